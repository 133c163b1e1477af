"""Products J v in PyTorch, by forward mode and by the recorded vjp: `python -m benchmarks.products --threads 2`.

Times of `newton-krylov` on the compared cells, in turn, the best of `--rounds`, and of single products on small cells.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from deqcore_torch import jvp
from torch import Tensor

import deqcore
from benchmarks.cells import EVERY, case
from deqcore.testing.suite.fixtures import Kit
from deqcore.types import Map


def forward_mode(f: Map, z: Tensor, fused: bool = True) -> Map:
    """Return v ↦ J v by forward mode."""
    return jvp._Products(f, z, fused, sought=True)


def best(task: Callable[[], Any], rounds: int) -> float:
    """Return the least seconds of a call."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        task()
        times.append(time.perf_counter() - began)
    return min(times)


def solves(name: str, rounds: int) -> str:
    """Return a row: milliseconds of a solve with products of both kinds, and its steps."""
    made, kit = case(name, False, False), Kit(deqcore.get_backend(backend="torch"))
    f, problem = made.problem.bound(kit.backend), made.problem
    z0, *args = (kit.tree(tree, "float32") for tree in (problem.z0, problem.params, problem.inputs))
    settings = {"rtol": made.rtol, "max_steps": made.max_steps, "solver": "newton-krylov", "on_failure": "ignore"}

    def solve() -> Any:
        return deqcore.fixed_point(f, z0, *args, **{f"forward__{key}": value for key, value in settings.items()})

    def before() -> Any:
        with mock.patch.object(jvp, "jvp", forward_mode):
            return solve()

    solve(), before()
    pairs = [(best(before, 1), best(solve, 1)) for _ in range(rounds)]
    first, second = (1e3 * min(column) for column in zip(*pairs, strict=True))
    steps = [int(sol.steps.max()) for sol in (before(), solve())]
    return f"| {name} | {first:.1f} | {second:.1f} | {second / first:.2f} | {steps[0]}, {steps[1]} |"


def products(batch: int, n: int, rounds: int) -> str:
    """Return a row: microseconds of f and of a product of a dense cell."""
    weights, x, z, v = torch.randn(n, n) / (2 * n**0.5), *torch.randn(3, batch, n)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weights + x)

    recorded = jvp.jvp(f, z)
    tasks = (lambda: f(z), lambda: forward_mode(f, z)(v), lambda: jvp.jvp(f, z)(v), lambda: recorded(v))
    times = [1e6 * best(task, 10 * rounds) for task in tasks]
    return f"| {batch}×{n} | " + " | ".join(f"{each:.0f}" for each in times) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad():
        print("| dense cell | f, µs | product in forward mode | first product of the recorded vjp | each further one |")
        print("|---|---|---|---|---|")
        for batch, n in ((8, 16), (32, 64), (256, 512)):
            print(products(batch, n, given.rounds))
        print("\n| newton-krylov | forward mode, ms | recorded vjp, ms | ratio | steps |\n|---|---|---|---|---|")
        for name in EVERY:
            print(solves(name, given.rounds), flush=True)


if __name__ == "__main__":
    main()
