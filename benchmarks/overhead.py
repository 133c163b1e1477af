"""What two ways to the same result differ by, and the command line that the benchmarks of such overheads share."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deqcore.bench.machine import describe
from deqcore.bench.timing import Clock, Spread

Row = dict[str, Any]


def compared(seconds: Mapping[str, Sequence[float]], off: str, on: str) -> tuple[list[float], Row]:
    """Seconds without (the mean of `off` and `off again`, per round), and by how much more is needed with.

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
) -> None:
    """Measure and print.

    Args:
        description: of the command.
        cases: arguments of `measure`, which takes rounds, seconds and a clock besides.
        measure: makes a row; `inside_us`, `inside`, `target_met` and what `compared` gives are printed.
        head: begins a row's line.
        target: for "inside".
        budget: seconds per case, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=budget, help=f"seconds per case, of {len(cases)}")
    parser.add_argument("--busy", action="store_true", help="count processor time: for a machine that never is quiet")
    parser.add_argument("--json", action="store_true")
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
    if asked.json:
        print(json.dumps({"machine": describe(["torch"]), "rows": rows}, indent=2))
