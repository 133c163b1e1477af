"""Overhead of a layer over a bare `fixed_point`: `python -m benchmarks.layer` (torch, one thread; `--json`).

Both run the same cell from the same z0 under the same complete config, forward and backward. They take turns in every
round and the ratio is taken within a round; "off" is measured twice, and how far off/off is from 1 is what this machine
can resolve. "inside" counts the layer's own calls alone, on the clock of the thread, which a busy machine hardly
disturbs: the bare call's time is taken out of the layer's by replacing `fixed_point` with one that stops the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from deqcore_torch import nn

import deqcore
from benchmarks.overhead import Row, compared, main
from deqcore.bench.timing import Clock, Spread, interleave

TARGET = 0.03  # of a bare call
SIZES = ((16, 32), (64, 128), (256, 512))

Step = Callable[[], object]


class Cell(torch.nn.Module):
    """tanh(W z + x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        torch.nn.init.normal_(self.linear.weight, std=0.5 / width**0.5)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(z) + x)


def pair(batch: int, width: int) -> tuple[nn.DEQ, torch.Tensor, Step, Step]:
    """Return a layer and its input, a step through it and one through `fixed_point`."""
    torch.manual_seed(0)
    config = deqcore.Config(forward={"rtol": 1e-4})
    layer = nn.DEQ(Cell(width), config)
    x = torch.randn(batch, width)

    def through() -> None:
        layer(x).sum().backward()

    def bare() -> None:
        deqcore.fixed_point(layer.cell, torch.zeros_like(x), x, config=config).value.sum().backward()

    return layer, x, through, bare


def inside(layer: nn.DEQ, x: torch.Tensor, calls: int) -> float:
    """Return the seconds per call in the layer and not in `fixed_point`, on the thread's clock."""
    spent, solve = 0.0, deqcore.fixed_point

    def timed(*args: object, **kwargs: object) -> object:
        nonlocal spent
        start = time.thread_time()
        try:
            return solve(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            spent += time.thread_time() - start

    with patch.object(deqcore, "fixed_point", timed):
        start = time.thread_time()
        for _ in range(calls):
            layer(x)
        whole = time.thread_time() - start
    return (whole - spent) / calls


def measure(batch: int, width: int, rounds: int, budget: float, clock: Clock) -> Row:
    """Return one row."""
    layer, x, through, bare = pair(batch, width)
    tasks = {"bare": bare, "layer": through, "bare again": bare}
    for task in tasks.values():
        task()
    own = inside(layer, x, 50)
    result = interleave(tasks, rounds=rounds, budget=budget, clock=clock).seconds
    base, difference = compared(result, "bare", "layer")
    seconds = Spread.of(base).median
    return {
        "case": f"batch {batch}, width {width}",
        "bare_ms": 1e3 * seconds,
        "inside_us": 1e6 * own,
        "inside": own / seconds,
        **difference,
        "target_met": own / seconds <= TARGET,
    }


if __name__ == "__main__":
    main(
        __doc__,
        SIZES,
        measure,
        lambda row: f"{row['case']:24} bare {row['bare_ms']:7.2f}",
        target=TARGET,
        budget=30.0,
        name="layer",
    )
