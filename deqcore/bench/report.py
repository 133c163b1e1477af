"""Tables of measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from deqcore.bench.rows import BenchRow
from deqcore.bench.timing import SHARE, Spread

COLUMNS: Final = (
    "problem",
    "solver",
    "evaluations",
    "residual (max / median)",
    "ms (quartiles)",
    "ms per f",
    "overhead (quartiles)",
    "memory",
    "first call s",
)
SMALL: Final = 2**17  # bytes of a state below which the growth of the process is not informative


def cells(row: BenchRow) -> dict[str, str]:
    """Return the cells of a table, by column."""
    if row.error:
        return dict.fromkeys(COLUMNS, "") | {
            "problem": row.case,
            "solver": row.contender,
            "ms (quartiles)": f"raised {row.error.partition(':')[0]}",
        }
    result = {
        "problem": row.case,
        "solver": row.contender,
        "evaluations": str(row.evaluations),
        "residual (max / median)": f"{row.residual_max:.1e} / {row.residual_median:.1e}",
        "memory": "" if row.memory is None or row.state < SMALL else f"{row.memory / row.state:.1f} states",
        "first call s": f"{row.first_seconds:.2f}",
    }
    if not row.seconds:
        why = "not timed" if row.reached else "residual not reached"
        return result | {"ms (quartiles)": why, "ms per f": "", "overhead (quartiles)": ""}
    ms = Spread.of([1e3 * second for second in row.seconds])
    return result | {
        "ms (quartiles)": spread(ms),
        "ms per f": f"{1e3 * Spread.of(row.reference).median:.3g}",
        "overhead (quartiles)": spread(row.overhead),
    }


def spread(value: Spread) -> str:
    """Return the median and quartiles."""
    return f"{value.median:.3g} ({value.low:.3g}–{value.high:.3g})"


def markdown(rows: Iterable[Mapping[str, str]], columns: Sequence[str] = COLUMNS) -> str:
    """Return a Markdown table, one line per row, in their order."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[column].replace("|", "\\|") for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return what `machine.describe` found, in one paragraph."""
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']} GiB"
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['system']}, Python {machine['python']}; "
        f"{packages}; {machine['date']}."
    )


def disturbed(rows: Iterable[BenchRow]) -> int:
    """Return how many kept rounds were disturbed by others, over the comparisons of these rows."""
    rounds = {(row.framework, row.case): row.disturbance for row in rows if row.seconds}
    return sum(item > SHARE for kept in rounds.values() for item in kept)
