"""What the monitor costs a training step: `python -m benchmarks.monitor` (torch; `--json` for numbers).

Two figures. "inside": thread time spent in calls of the monitor over thread time of the step, which a busy machine
hardly disturbs. "overhead": steps without and with the monitor take turns in every round and the ratio is taken within
a round; "off" is measured twice, and how far off/off is from 1 is what this machine can resolve.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import deqcore
from benchmarks.cells import EVERY
from benchmarks.overhead import Row, compared, main
from deqcore.abc.backend import Backend
from deqcore.bench.harness import Harness
from deqcore.bench.timing import Clock, Spread, interleave
from deqcore.config import Config
from deqcore.monitor import Monitor, Trigger
from deqcore.solve.observer import Observer, Solve, observing
from deqcore.types import BackwardRecord

TARGET = 0.02  # of a training step

Step = Callable[[], object]


def step_of(cell: str, batch: int, size: int) -> Step:
    """Return a whole training step: forward, backward, SGD update."""
    ready = Harness.of(deqcore.get_backend(backend="torch"), "torch").ready(EVERY[cell](batch=batch, size=size))
    parameters = [parameter.requires_grad_() for parameter in ready.params.values()]
    optimizer = torch.optim.SGD(parameters, lr=1e-6)
    config = deqcore.Config(forward={"on_failure": "ignore"}, backward={"strategy": "broyden-reuse"})

    def step() -> None:
        sol = deqcore.fixed_point(ready.f, ready.z0, ready.params, ready.inputs, config=config)
        optimizer.zero_grad()
        sol.value.square().mean().backward()
        optimizer.step()

    return step


class Clocked(Observer):
    """A monitor, and the thread time that its calls take."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.seconds = 0.0

    def adjust(self, config: Config, backend: Backend) -> Config:
        start = time.thread_time()
        result = self.monitor.adjust(config, backend)
        self.seconds += time.thread_time() - start
        return result

    def solved(self, solve: Solve) -> None:
        start = time.thread_time()
        self.monitor.solved(solve)
        self.seconds += time.thread_time() - start
        record = solve.solution.record
        heard = record.listener if record is not None else None
        if record is not None and heard is not None:
            record.listener = lambda record: self._heard(heard, record)

    def _heard(self, heard: Callable[[BackwardRecord], None], record: BackwardRecord) -> None:
        start = time.thread_time()
        heard(record)
        self.seconds += time.thread_time() - start


def inside(step: Step, monitor: Monitor, steps: int) -> tuple[float, float]:
    """Return the seconds in the monitor per step, and their part of the step's thread time."""
    clocked = Clocked(monitor)
    start = time.thread_time()
    with observing(clocked):
        for _ in range(steps):
            step()
            began = time.thread_time()
            monitor.advance()
            clocked.seconds += time.thread_time() - began
    whole = time.thread_time() - start
    return clocked.seconds / steps, clocked.seconds / (whole - clocked.seconds)


def watched(step: Step, monitor: Monitor) -> Step:
    """Run the same step, observed."""

    def observed() -> None:
        with observing(monitor):
            step()
        monitor.advance()

    return observed


def measure(cell: str, batch: int, size: int, rounds: int, budget: float, clock: Clock) -> Row:
    """Return the overhead of the monitor with its default sink and three triggers, in parts of a step."""
    step = step_of(cell, batch, size)
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(
            sinks=[{"sink": "jsonl", "path": str(Path(folder) / "log.jsonl")}],
            triggers=[
                Trigger("deq_unconverged_fraction", "> 1"),
                Trigger("deq_backward_error", "> 1e9", window=50),
                Trigger("deq_forward_steps", "> 1e9", statistic="median"),
            ],
        )
        # As many steps in one task as there are between two flushes: each task pays for one flush.
        tasks = {
            "off": _times(step, monitor.every),
            "on": _times(watched(step, monitor), monitor.every),
            "off again": _times(step, monitor.every),
        }
        for task in tasks.values():
            task()
        seconds, share = inside(step, monitor, 10 * monitor.every)
        result = interleave(tasks, rounds=rounds, budget=budget, clock=clock)
        monitor.close()
    base, difference = compared(result.seconds, "off", "on")
    return {
        "cell": f"{cell}, batch {batch}, size {size}",
        "step_ms": 1e3 * Spread.of(base).median / monitor.every,
        "inside_us": 1e6 * seconds,
        "inside": share,
        **difference,
        "rounds": len(base),
        "disturbance": Spread.of(result.disturbance).median,
        "target_met": share <= TARGET,
    }


def _times(task: Step, count: int) -> Step:
    def run() -> None:
        for _ in range(count):
            task()

    return run


CASES = (("conv", 16, 32), ("attention", 8, 64), ("dense", 128, 256))


if __name__ == "__main__":
    main(
        __doc__,
        CASES,
        measure,
        lambda row: f"{row['cell']:30} step {row['step_ms']:7.2f}",
        target=TARGET,
        budget=40.0,
        name="monitor",
    )
