"""Measured rows for people."""

from __future__ import annotations

from collections.abc import Sequence

from deqcore.bench.compare import Row

COLUMNS = ("problem", "solver", "evaluations", "residual", "ms", "ms per f", "overhead", "memory", "first call s")
SMALL = 2**17  # bytes of a state below which the process's growth says nothing about it


def cells(row: Row) -> dict[str, str]:
    """The cells of a table, by column."""
    found = {
        "problem": row.case,
        "solver": row.contender,
        "evaluations": str(row.evaluations),
        "residual": f"{row.residual_max:.1e} / {row.residual_median:.1e}",
        "memory": "" if row.memory is None or row.state < SMALL else f"{row.memory / row.state:.1f} states",
        "first call s": f"{row.first_seconds:.2f}",
    }
    if not row.seconds:
        return found | {"ms": "" if row.reached else "residual not reached", "ms per f": "", "overhead": ""}
    ms = sorted(1e3 * each for each in row.seconds)
    overhead = row.overhead
    return found | {
        "ms": f"{ms[len(ms) // 2]:.2f} ({ms[0]:.2f}–{ms[-1]:.2f})",
        "ms per f": f"{1e3 * sorted(row.reference)[len(row.reference) // 2]:.3f}",
        "overhead": f"{overhead.median:.2f} ({overhead.low:.2f}–{overhead.high:.2f})",
    }


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one line per row, grouped as they come."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)[column] for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)
