"""A block that refines a transformer's output: its equilibrium, reached from that output.

Two explicit layers read a text and propose a state h. A refining block starts at z = h and iterates z ← block(z, h)
until nothing changes. As the state after 0, 1, 2, … steps is read by the same weights, refinement can stop at any time.
The gradient takes one product with the Jacobian, u = g + Jᵀg, at the equilibrium. A second training takes a random
number of steps and differentiates through the last two. Text and windows are those of `text.py`.
Source: "Attractor models" (2026), arXiv:2605.12466.

    python examples/models/attractor.py                   # PyTorch
    python examples/models/attractor.py --backend jax
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import common
import numpy as np
import text

WIDTH, HIDDEN, LAYERS, BATCH = 64, 128, 2, 16
STEPS, RTOL, RATE = 8, 1e-2, 4e-3
DEPTHS = (1, 2, 4, 8, 16, 32)
SETTINGS = {
    "forward__solver": "picard",
    "forward__rtol": RTOL,
    "forward__max_steps": STEPS,
    "forward__on_failure": "ignore",
    "backward__strategy": "neumann",
    "backward__options": {"terms": 1},
}
LOOPED = {
    "backward__strategy": "looped",
    "backward__options": {"depth": 4, "recorded": 2, "distribution": "log-normal-poisson", "seed": 0},
}
TRAININGS = {"to rest": ("attractor", SETTINGS), "random depth": ("attractor_looped", LOOPED)}
"""The file of the weights, and the settings."""


def weights(rng: np.random.Generator, width: int = WIDTH, hidden: int = HIDDEN) -> common.Weights:
    """Draw the weights of the explicit layers and of the refining block."""
    made = text.weights(rng, width, hidden, LAYERS)
    block = text.weights(rng, width, hidden, 0)
    return made | {name: value for name, value in block.items() if name.startswith("deq.cell.")}


def batches(rng: np.random.Generator, coded: Any) -> Iterable[tuple[Any, ...]]:
    """Yield random windows `(batch, length + 1)` and the training step without end."""
    for step, (windows,) in enumerate(text.batches(rng, coded, BATCH)):
        yield windows, np.int32(step)


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train in both ways, and print the perplexity of the test text after several steps of refinement."""
    options = common.arguments(__doc__ or "", 400, given)
    _, coded = text.data()
    found: dict[str, float] = {}
    trainings = TRAININGS if options.steps else {"given weights": ("attractor", SETTINGS)}
    for name, (file, settings) in trainings.items():
        rng = np.random.default_rng(options.seed)
        side = common.side(options.backend, "attractor", common.start(options, weights(rng)), settings, options.device)
        side.fit(batches(rng, coded["train"]), options.steps, RATE, decay=0.1, memory=0.95)
        common.finish(options, file, side.weights())
        for depth in DEPTHS:
            stopping = SETTINGS | {"forward__rtol": 0.0, "forward__max_steps": depth}
            model = common.side(options.backend, "attractor", side.weights(), stopping, options.device)
            found[f"{name}, {depth} steps"] = text.perplexity(model, coded["test"])
            print(f"{name}, {depth:3d} steps: test perplexity {found[f'{name}, {depth} steps']:.3f}", flush=True)
    line = STEPS, "most steps of the training to rest"
    common.figure(
        options, "attractor", lambda figure: text.draw_depths(figure, found, DEPTHS, *line, "steps of refinement")
    )
    return found


if __name__ == "__main__":
    main()
