"""The parts of the measurement, each in its own process: `python -m benchmarks.certificates.sections NAME OUT`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.certificates import trained
from benchmarks.certificates.measure import Outcome, Result, measure
from benchmarks.certificates.problems import (
    Case,
    dense_slow_modes,
    hidden_modes,
    linear_problems,
    random_cells,
    small_tanh_cells,
)
from benchmarks.certificates.trained import Training

RANDOM: Final = ("linear", "random-cells")
MORE: Final = {"tanh-cells": small_tanh_cells, "slow-modes": dense_slow_modes, "hidden-modes": hidden_modes}
LEARNT: Final = ("digits-conv", "digits-attention", "digits-dense")
OUTCOMES: Final = ("outcomes", "alone", "preconditioned")
IMAGES: Final = "images-conv"


def names(quick: bool, images: bool) -> list[str]:
    """Return the sections, the longest first."""
    if quick:
        return [*RANDOM, *MORE]
    return [*([IMAGES] if images else []), *LEARNT[:1], *RANDOM, *LEARNT[1:], *MORE]


def cases(name: str, samples: int, images: Path | None) -> Iterator[tuple[Case, Training | None]]:
    """Yield the problems of a section."""
    if name == "linear":
        yield from ((case, None) for case in linear_problems(samples))
    elif name == "random-cells":
        yield from ((case, None) for case in random_cells(samples))
    elif name in MORE:
        yield from ((case, None) for case in MORE[name](samples))
    elif name == IMAGES:
        if images is None:
            raise ValueError(f"section {name!r} needs --images")
        yield trained.conv_on_images(samples, images)
    else:
        yield {
            "digits-dense": trained.dense_on_digits,
            "digits-conv": trained.conv_on_digits,
            "digits-attention": trained.attention_on_digits,
        }[name](samples)


def pack(results: list[Result], trainings: list[Training], seconds: float) -> dict[str, Any]:
    """Convert results and trainings to JSON types."""
    packed = [vars(r) | {name: [_outcome(o) for o in getattr(r, name)] for name in OUTCOMES} for r in results]
    return {"seconds": round(seconds, 1), "results": packed, "trainings": [vars(t) for t in trainings]}


def unpack(section: dict[str, Any]) -> tuple[list[Result], list[Training]]:
    """Undo `pack`, after a way through JSON, where keys are text."""
    results = []
    for result in section["results"]:
        outcomes = {name: [_unpacked(o) for o in result[name]] for name in OUTCOMES}
        curve = {float(level): (int(own), int(theirs)) for level, (own, theirs) in result["curve"].items()}
        results.append(Result(**result | outcomes | {"curve": curve}))
    return results, [Training(**t) for t in section["trainings"]]


def _unpacked(o: dict[str, Any]) -> Outcome:
    return Outcome(**{name: np.array(value) if isinstance(value, list) else value for name, value in o.items()})


def _outcome(o: Outcome) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(o).items()}


def main() -> int:
    """Measure one section and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    results: list[Result] = []
    trainings: list[Training] = []
    for case, training in cases(options.name, options.samples, options.images):
        results.append(measure(case))
        trainings += [] if training is None else [training]
        print(f"{time.perf_counter() - start:6.1f} s  {case.name}", file=sys.stderr, flush=True)
        packed = pack(results, trainings, time.perf_counter() - start)
        options.out.write_text(json.dumps(packed, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main())
