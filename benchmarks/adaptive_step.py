"""Whole training steps with `adaptive`, audits included, beside those of torchdeq's default.

`python -m benchmarks.adaptive_step`. Each step has new inputs and a new linear loss. Both layers solve to the same
relative tolerance. The error is that of the batch's gradient of all parameters in steps without an audit, against
exact-ift to an adjoint residual of 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import deqcore
from benchmarks.cells import case
from benchmarks.harnesses import torch_harness
from benchmarks.training import RTOL, STEPS, TorchDEQ
from deqcore.bench.harness import Ready
from deqcore.bench.timing import Clock

AUDIT = 2  # an audit takes more than this many times the median number of vjps


class Compared(NamedTuple):
    """Seconds of each step, ours and torchdeq's, vjps of each, and errors of the steps that were judged."""

    ours: list[float]
    theirs: list[float]
    vjps: list[int]
    errors: list[float]


def compare(ready: Ready, target: float, steps: int, clock: Clock) -> Compared:
    """Take training steps with both; every fourth is judged."""
    parameters = [parameter.requires_grad_() for parameter in ready.params.values()]
    forward = {"rtol": RTOL, "max_steps": STEPS, "on_failure": "ignore"}
    adaptive = deqcore.Config(
        backend="torch",
        forward=forward,
        backward={"strategy": "adaptive", "options": {"max_relative_error": target}},
    )
    exact = deqcore.Config(
        backend="torch", forward={**forward, "rtol": 0.1 * RTOL}, backward={"options": {"rtol": 1e-4}}
    )
    state, peer = deqcore.StrategyState(), TorchDEQ(RTOL)
    generator = torch.Generator().manual_seed(0)
    found = Compared([], [], [], [])
    for step in range(steps):
        inputs = ready.inputs.std() * torch.randn(ready.inputs.shape, generator=generator)
        weights = torch.randn(ready.z0.shape, generator=generator)

        def solved(config: deqcore.Config, memory: Any = None, inputs: Tensor = inputs) -> deqcore.Solution:
            return deqcore.fixed_point(ready.f, ready.z0, ready.params, inputs, config=config, strategy_state=memory)

        def gradient(value: Tensor, weights: Tensor = weights) -> Tensor:
            parts = torch.autograd.grad((value * weights).sum(), parameters)
            return torch.cat([part.flatten() for part in parts])

        seconds, (solution, own) = _timed(clock, lambda: _with_gradient(solved(adaptive, state), gradient))
        found.ours.append(seconds)
        found.vjps.append(int(solution.backward.vjps.max()))
        of_batch = Ready(ready.case, ready.f, ready.z0, ready.params, inputs)
        found.theirs.append(_timed(clock, lambda ready=of_batch: gradient(peer(ready).value))[0])
        if step % 4 == 0 and step > 0 and found.vjps[-1] <= AUDIT * statistics.median(found.vjps):
            truth = gradient(solved(exact).value)
            found.errors.append(float((own - truth).norm() / truth.norm()))
    return found


def _with_gradient(solution: deqcore.Solution, gradient: Callable[[Tensor], Tensor]) -> tuple[deqcore.Solution, Tensor]:
    return solution, gradient(solution.value)


def _timed(clock: Clock, task: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    result = task()
    return clock() - start, result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each cell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive_step", description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--target", type=float, default=0.1, help="largest relative error of the batch's gradient")
    parser.add_argument("--cell", action="append", choices=("conv", "dense"), help="default: both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--busy", action="store_true", help="count processor time: for a machine that never is quiet")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    clock: Clock = time.process_time if given.busy else time.perf_counter
    for name in given.cell or ("conv", "dense"):
        found = compare(torch_harness().ready(case(name, quick=False)), given.target, given.steps, clock)
        later = slice(given.steps // 2, None)  # the first audits follow each other
        ours, theirs = (statistics.fmean(times[later]) for times in (found.ours, found.theirs))
        print(
            f"{name}: {1e3 * ours:.1f} ms a step, torchdeq {1e3 * theirs:.1f}: {ours / theirs:.2f} "
            f"(all steps {sum(found.ours) / sum(found.theirs):.2f}); vjps median {statistics.median(found.vjps):.0f}, "
            f"mean {statistics.fmean(found.vjps):.1f}; error median {np.median(found.errors):.3f}, "
            f"largest {max(found.errors):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
