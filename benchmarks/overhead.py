"""What two ways to the same result differ by, and the command line that the benchmarks of such overheads share."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deqcore.bench.machine import describe
from deqcore.bench.report import machine_text, markdown
from deqcore.bench.timing import Clock, Spread

Row = dict[str, Any]


def compared(seconds: Mapping[str, Sequence[float]], off: str, on: str) -> tuple[list[float], Row]:
    """Return the seconds without (the mean of `off` and `off again`, per round), and by how much more is needed with.

    Args:
        seconds: of the tasks `off`, `on` and `off again` in each round.
        off: without.
        on: with.
    """
    again = seconds[f"{off} again"]
    base = [(a + b) / 2 for a, b in zip(seconds[off], again, strict=True)]
    overhead = Spread.of([one / other - 1 for one, other in zip(seconds[on], base, strict=True)])
    noise = Spread.of([b / a - 1 for a, b in zip(seconds[off], again, strict=True)])
    return base, {
        "overhead": overhead.median,
        "quartiles": [overhead.low, overhead.high],
        "noise": [noise.low, noise.high],
    }


def main(
    description: str | None,
    cases: Sequence[tuple[Any, ...]],
    measure: Callable[..., Row],
    head: Callable[[Row], str],
    *,
    target: float,
    budget: float,
    name: str,
) -> None:
    """Measure and print; with `--out`, leave a page as well.

    Args:
        description: of the command.
        cases: arguments of `measure`, which takes rounds, seconds and a clock besides.
        measure: makes a row; `inside_us`, `inside`, `target_met` and what `compared` gives are printed.
        head: begins a row's line.
        target: for "inside".
        budget: seconds per case, by default.
        name: of the module, and of the page.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=budget, help=f"seconds per case, of {len(cases)}")
    parser.add_argument("--busy", action="store_true", help="count processor time: for a machine that never is quiet")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help=f"folder for {name}.md and {name}.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    clock: Clock = time.process_time if asked.busy else time.perf_counter
    rows = []
    for case in cases:
        row = measure(*case, asked.rounds, asked.budget, clock)
        rows.append(row)
        if asked.json:
            continue
        (low, high), (least, most) = row["quartiles"], row["noise"]
        print(
            f"{head(row)} ms  inside {row['inside_us']:4.0f} us = {row['inside']:.2%}  "
            f"overhead {row['overhead']:+.1%} ({low:+.1%} to {high:+.1%}; noise {least:+.1%} to {most:+.1%})  "
            f"inside <= {target:.0%}: {'met' if row['target_met'] else 'MISSED'}",
            flush=True,
        )
    result = {"machine": describe(["torch"]), "clock": clock.__name__, "rows": rows}
    if asked.json:
        print(json.dumps(result, indent=2))
    if asked.out is not None:
        (asked.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (asked.out / f"{name}.md").write_text(page(name, description or "", result, head, target))


def page(name: str, description: str, found: Row, head: Callable[[Row], str], target: float) -> str:
    """Return what was measured, how, and on which machine."""
    title, _, rest = description.partition("\n\n")
    shown = [
        {
            "case, ms": " ".join(head(row).split()),
            "inside": f"{row['inside_us']:.0f} µs = {row['inside']:.2%}",
            "overhead (quartiles)": "{:+.1%} ({:+.1%} to {:+.1%})".format(row["overhead"], *row["quartiles"]),
            "off against off": "{:+.1%} to {:+.1%}".format(*row["noise"]),
            f"inside ≤ {target:.0%}": "met" if row["target_met"] else "missed",
        }
        for row in found["rows"]
    ]
    clock = "processor time" if found["clock"] == "process_time" else "wall-clock time"
    return (
        f"# {title.partition(':')[0]}\n\nBy `python -m benchmarks.{name} --out docs/benchmarks`; {clock}.\n\n"
        f"{rest.strip()}\n\n{markdown(shown, tuple(shown[0]))}\n\n{machine_text(found['machine'])}\n"
    )
