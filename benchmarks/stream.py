"""Throughput of `solve_stream` on a heavy-tailed mix: how near is a batch with refilled slots to the mean depth?

    OMP_NUM_THREADS=1 python -m benchmarks.stream                 # torch, and --backend numpy or jax
    OMP_NUM_THREADS=1 python -m benchmarks.stream --maps "matrix 512" cell --json stream.json
    OMP_NUM_THREADS=1 python -m benchmarks.stream --counts --items 512
    OMP_NUM_THREADS=1 python -m benchmarks.stream --maps cell --solvers picard --compact   # forward.compact = true

Maps, float32, each the same for all items, with an item's own rate and x:

- *matrix n*: f(z) = rate · z M + x with M symmetric, eigenvalues in [0, 1], `(n, n)`;
- *cell*: f(z) = rate · z + (1 − rate) · block(z, x), where block is one layer of attention and a perceptron on 32
  tokens of width 128. Not with NumPy.

The depth that plain iteration needs is drawn from a Pareto distribution. For each map and solver:

- *occupied*: evaluations that items needed, divided by the rows that f has evaluated;
- *throughput*: seconds of an ideal batch, divided by those of the stream. An ideal batch spends the mean depth: the
  evaluations that items needed, divided by the slots, times the seconds of an evaluation in `fixed_point` (its step
  included) on full batches of equal depth. Those are the items in the order of their depth, and the seconds of a call
  (`max_steps = 0`) are taken off;
- *gain*: seconds of `fixed_point` on one batch after the other, each of which costs its largest depth, divided by
  those of the stream;
- *f, ms*: an evaluation of f alone.

Seconds are processor time. Stream, batches and ideal take turns; figures are medians, throughput with quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import deqcore

SOLVERS = ("picard", "auto")
MAPS = ("matrix 16", "matrix 256", "matrix 512", "matrix 1024", "cell")
RTOL = 1e-4
TOKENS, WIDTH, HIDDEN, HEADS = 32, 128, 256, 4
Item = tuple[Any, ...]


class Problem:
    """A map and its items.

    Attributes:
        backend: of the arrays.
        items: `(z0, rate, x)` of each item.
        settings: of all solves.
        calls: how often f has been called.
        rows: rows in all calls of f.
    """

    def __init__(self, backend: Any, name: str, solver: str, count: int, compact: bool = False) -> None:
        self.backend, self.compact, self.calls, self.rows = backend, compact, 0, 0
        self.settings = {
            "forward__solver": solver,
            "forward__rtol": RTOL,
            "forward__max_steps": 1000,
            "forward__on_failure": "ignore",
        }
        rng = np.random.default_rng(0)
        size = int(name.split()[1]) if name.startswith("matrix") else 0
        shape = (size,) if size else (TOKENS, WIDTH)
        self._weights = [self._array(w) for w in ([symmetric(rng, size)] if size else block_weights(rng))]
        self.items = [
            (self._array(np.zeros(shape)), self._array(np.full((1,) * len(shape), rate)),
             self._array(rng.standard_normal(shape)))
            for rate in rates(rng, count)
        ]  # fmt: skip
        self._map = self._linear if size else self._block

    def f(self, z: Any, rate: Any, x: Any) -> Any:
        """Return f(z) on a batch."""
        self.calls += 1
        self.rows += z.shape[0]
        return self._map(z, rate, x)

    def stream(self, slots: int) -> list[deqcore.StreamResult]:
        """Solve the items in slots."""
        settings = {**self.settings, "forward__compact": self.compact}
        return list(deqcore.solve_stream(self.f, self.items, slots=slots, **settings))

    def batches(self, items: Sequence[Item], slots: int, **settings: Any) -> list[int]:
        """Solve one batch after the other; return the evaluations of each batch, those of its deepest item."""
        xp, taken = self.backend.xp, []
        for begin in range(0, len(items), slots):
            parts = [xp.stack(part) for part in zip(*items[begin : begin + slots], strict=True)]
            sol = deqcore.fixed_point(self.f, *parts, **(self.settings | settings))
            self.backend.to_numpy(sol.z)
            taken.append(int(self.backend.to_numpy(sol.evaluations).max()))
        return taken

    def _array(self, values: Any) -> Any:
        return self.backend.asarray(values, dtype="float32")

    def _linear(self, z: Any, rate: Any, x: Any) -> Any:
        return rate * (z @ self._weights[0]) + x

    def _block(self, z: Any, rate: Any, x: Any) -> Any:
        xp, (query, key, value, out, first, second) = self.backend.xp, self._weights

        def heads(part: Any) -> Any:
            return xp.permute_dims(xp.reshape(part, (*part.shape[:2], HEADS, -1)), (0, 2, 1, 3))

        h = z + x
        q, k, v = (heads(h @ weight) for weight in (query, key, value))
        weights = xp.exp(q @ xp.permute_dims(k, (0, 1, 3, 2)))
        mixed = xp.permute_dims((weights / xp.sum(weights, axis=-1, keepdims=True)) @ v, (0, 2, 1, 3))
        h = x + xp.reshape(mixed, z.shape) @ out
        return rate * z + (1.0 - rate) * (h + xp.tanh(h @ first) @ second)


def symmetric(rng: np.random.Generator, size: int) -> Any:
    """Return a symmetric matrix `(size, size)` whose eigenvalues are spread evenly over [0, 1]."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return (basis * np.linspace(0.0, 1.0, size)) @ basis.T


def block_weights(rng: np.random.Generator) -> list[Any]:
    """Return weights with which a step of the block contracts."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    return [0.4 * rng.standard_normal(shape) / np.sqrt(shape[0]) for shape in shapes]


def rates(rng: np.random.Generator, count: int) -> Any:
    """Return rates `(count,)` of contraction whose depth has a heavy tail: 8 to 300 steps, mean about 22."""
    depth = np.minimum(8.0 * (1.0 - rng.random(count)) ** (-1 / 1.5), 300.0)
    return np.exp(np.log(RTOL) / depth)


def seconds(run: Callable[[], Any]) -> float:
    """Return the processor time of `run()`."""
    start = time.process_time()
    run()
    return time.process_time() - start


def counts(name: str, solver: str, slots: int, count: int, compact: bool) -> dict[str, float]:
    """Return the figures that are counts of evaluations, the same on any machine, by NumPy."""
    problem = Problem(deqcore.get_backend(backend="numpy"), name, solver, count, compact)
    needed = [result.evaluations for result in problem.stream(slots)]
    streamed, rows = problem.calls, problem.rows
    return {
        "mean depth": sum(needed) / count,
        "largest depth": float(max(needed)),
        "occupied": sum(needed) / rows,
        "evaluations, batch by batch / stream": sum(problem.batches(problem.items, slots)) / streamed,
    }


def measure(backend: str, name: str, solver: str, slots: int, count: int, rounds: int, compact: bool) -> dict[str, Any]:
    """Return the figures of one backend, map and solver."""
    problem = Problem(deqcore.get_backend(backend=backend), name, solver, count, compact)
    needed = np.array([result.evaluations for result in problem.stream(slots)])
    rows = problem.rows
    equal = [problem.items[k] for k in np.argsort(needed, kind="stable")]
    evaluations = sum(problem.batches(equal, slots)) - len(range(0, count, slots))  # the first one is in the call
    full = [problem.backend.xp.stack(part) for part in zip(*equal[:slots], strict=True)]
    compiled = problem.backend.autodiff.staged(problem.f, full[0], tuple(full[1:]), _apply)
    runs: dict[str, Callable[[], Any]] = {
        "stream": lambda: problem.stream(slots),
        "equal": lambda: problem.batches(equal, slots),
        "calls": lambda: problem.batches(equal, slots, forward__max_steps=0),
        "batches": lambda: problem.batches(problem.items, slots),
        "f": lambda: [problem.backend.to_numpy(compiled(full[0], full[1:])[0, :1]) for _ in range(20)],
    }
    for run in runs.values():
        run()
    taken = {key: np.zeros(rounds) for key in runs}
    for turn in range(rounds):
        for key, run in runs.items():
            taken[key][turn] = seconds(run)
    step = (taken["equal"] - taken["calls"]) / evaluations
    throughput = needed.sum() / slots * step / taken["stream"]
    eager = problem.backend.capabilities.eager
    return {
        "mean depth": needed.mean(),
        "largest depth": float(needed.max()),
        "f, ms": 1e3 * np.median(taken["f"]) / 20,
        "step, ms": 1e3 * np.median(step),
        "occupied": needed.sum() / rows if eager else None,
        "throughput": np.median(throughput),
        "quartiles": np.quantile(throughput, [0.25, 0.75]).tolist(),
        "gain": np.median(taken["batches"] / taken["stream"]),
        "items/s": count / np.median(taken["stream"]),
    }


def _apply(bind: Any, z: Any, args: Any) -> Any:
    return bind(tuple(args))(z)


def main() -> None:
    """Measure, print a line for each map and solver, and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("torch", "numpy", "jax"), default="torch")
    parser.add_argument("--maps", nargs="+", choices=MAPS, help="default: all; with --counts matrix 16")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", action="store_true", help="count evaluations only, which load does not change")
    parser.add_argument("--compact", action="store_true", help="forward.compact = true (torch and numpy)")
    parser.add_argument("--json", type=Path, help="file to which the figures of this backend are added")
    given = parser.parse_args()
    known: dict[str, Any] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    for name in given.maps or (MAPS[:1] if given.counts else MAPS):
        if name == "cell" and (given.counts or given.backend == "numpy"):
            continue  # attention by NumPy is not a case of anyone
        for solver in given.solvers:
            label = f"{name}, {solver}" + ", compact" * given.compact
            if given.counts:
                figures: dict[str, Any] = counts(name, solver, given.slots, given.items, given.compact)
            else:
                figures = measure(given.backend, name, solver, given.slots, given.items, given.rounds, given.compact)
                figures |= {"slots": given.slots, "items": given.items, "load": os.getloadavg()[0]}
                known.setdefault(given.backend, {})[label] = figures
            shown = {key: np.round(value, 3).tolist() for key, value in figures.items() if value is not None}
            print(f"{label}: {shown}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
