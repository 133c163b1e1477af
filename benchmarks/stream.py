"""Throughput of `solve_stream` on a heavy-tailed mix: how near is a batch with refilled slots to the mean depth?

    OMP_NUM_THREADS=1 python -m benchmarks.stream                 # torch, and --backend numpy or jax
    OMP_NUM_THREADS=1 python -m benchmarks.stream --json docs/benchmarks/stream.json
    OMP_NUM_THREADS=1 python -m benchmarks.stream --counts --size 64 --items 512

f(z) = rate · z M + x with one symmetric M of eigenvalues in [0, 1] for all items, float32. The depth that plain
iteration needs is drawn from a Pareto distribution. For each solver:

- *occupied*: evaluations that items needed, divided by slots × evaluations of the batch;
- *throughput*: seconds of an ideal batch, divided by those of the stream. An ideal batch spends the mean depth: the
  evaluations that items needed, divided by the slots, times the seconds of one step of `fixed_point` on a full batch;
- *gain*: seconds of `fixed_point` on one batch after the other, each of which costs its largest depth, divided by
  those of the stream.

Seconds are processor time, which other work on the machine changes little: the least of two runs, after one that
compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import deqcore

SOLVERS = ("picard", "auto")


def problem(matrix: Any, solver: str, rtol: float) -> tuple[Callable[..., Any], list[int], dict[str, Any]]:
    """Return f, a list whose one number grows by one with each call of f, and the settings of its solves."""
    calls = [0]

    def f(z: Any, rate: Any, x: Any) -> Any:
        calls[0] += 1
        return rate * (z @ matrix) + x

    settings = {
        "forward__solver": solver,
        "forward__rtol": rtol,
        "forward__max_steps": 1000,
        "forward__on_failure": "ignore",
    }
    return f, calls, settings


def counts(solver: str, slots: int, count: int, size: int) -> dict[str, float]:
    """Return the figures that are counts of evaluations, the same on any machine, by NumPy."""
    backend, rtol = deqcore.get_backend(backend="numpy"), 1e-4
    matrix, stream = items(backend, count, size, rtol)
    f, calls, given = problem(matrix, solver, rtol)
    results = list(deqcore.solve_stream(f, stream, slots=slots, **given))
    needed, streamed = sum(result.evaluations for result in results), calls[0]
    deepest = [max(r.evaluations for r in results[start : start + slots]) for start in range(0, count, slots)]
    return {
        "mean depth": needed / count,
        "largest depth": float(max(deepest)),
        "occupied": needed / (slots * streamed),
        "evaluations, batch by batch / stream": sum(deepest) / streamed,
    }


def items(backend: Any, count: int, size: int, rtol: float) -> tuple[Any, list[tuple[Any, ...]]]:
    """Return M `(size, size)`, and items (z0, rate, x) whose depth has a heavy tail: 8 to 300 steps, mean about 22."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    matrix = (basis * np.linspace(0.0, 1.0, size)) @ basis.T
    depth = np.minimum(8.0 * (1.0 - rng.random(count)) ** (-1 / 1.5), 300.0)
    rates = np.exp(np.log(rtol) / depth)
    made = [(np.zeros(size), np.full(1, rate), rng.standard_normal(size)) for rate in rates]
    return backend.asarray(matrix, dtype="float32"), [
        tuple(backend.asarray(part, dtype="float32") for part in item) for item in made
    ]


def seconds(run: Callable[[], Any], runs: int = 2) -> tuple[float, Any]:
    """Return the seconds of the fastest run, and its result."""
    run()
    taken = []
    for _ in range(runs):
        start = time.process_time()
        result = run()
        taken.append(time.process_time() - start)
    return min(taken), result


def measure(name: str, solver: str, slots: int, count: int, size: int) -> dict[str, float]:
    """Return the figures of one backend and solver."""
    backend, rtol = deqcore.get_backend(backend=name), 1e-4
    matrix, stream = items(backend, count, size, rtol)
    f, calls, given = problem(matrix, solver, rtol)
    xp = backend.xp
    taken, results = seconds(lambda: list(deqcore.solve_stream(f, stream, slots=slots, **given)))
    needed = sum(result.evaluations for result in results)
    calls[0] = 0
    if backend.capabilities.eager:
        list(deqcore.solve_stream(f, stream, slots=slots, **given))
    eager_calls = calls[0]

    def batches() -> list[Any]:
        values = []
        for start in range(0, count, slots):
            parts = [xp.stack(part) for part in zip(*stream[start : start + slots], strict=True)]
            values.append(backend.to_numpy(deqcore.fixed_point(f, *parts, **given).z))
        return values

    one_by_one, _ = seconds(batches, 1)
    full = [xp.stack(part) for part in zip(*stream[:slots], strict=True)]
    full[1] = 0 * full[1] + 0.999
    fixed = given | {"forward__rtol": 0.0, "forward__max_steps": 100}

    def stepped() -> Any:
        return backend.to_numpy(deqcore.fixed_point(f, *full, **fixed).z)

    step = seconds(stepped)[0] / 101
    return {
        "mean depth": needed / count,
        "largest depth": float(max(result.evaluations for result in results)),
        "occupied": needed / (slots * eager_calls) if eager_calls else float("nan"),
        "throughput": needed / slots * step / taken,
        "gain": one_by_one / taken,
        "items/s": count / taken,
    }


def main() -> None:
    """Measure, print a table, and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("torch", "numpy", "jax"), default="torch")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--counts", action="store_true", help="count evaluations only, which load does not change")
    parser.add_argument("--json", type=Path, help="file to which the figures of this backend are added")
    given = parser.parse_args()
    if given.counts:
        for solver in SOLVERS:
            figures = counts(solver, given.slots, given.items, given.size)
            print(f"{solver}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()), flush=True)
        return
    rows = {s: measure(given.backend, s, given.slots, given.items, given.size) for s in SOLVERS}
    load = os.getloadavg()[0]
    for solver, figures in rows.items():
        print(f"{given.backend} {solver}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    print(f"load after {load:.2f}")
    if given.json is not None:
        known = json.loads(given.json.read_text()) if given.json.exists() else {}
        known[given.backend] = {"slots": given.slots, "items": given.items, "size": given.size, "load": load} | rows
        given.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
