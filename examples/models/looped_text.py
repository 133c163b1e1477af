"""A recurrent-depth language model: a prelude, a core that is looped, and a coda, over the characters of a text.

The prelude encodes the text. The core updates a state that starts at zero, and reads the encoded text in each step
(input injection). The coda reads the last state. The number of steps is drawn for each training step from a log-normal
Poisson distribution, and the gradient runs through the last four; so the model works at many depths, and deeper than
its mean in training. A second training, always with the mean depth, shows what random depth is for. Text and windows
are those of `text.py`.
Source: Geiping et al. (2025), "Scaling up test-time compute with latent reasoning", arXiv:2502.05171.

    python examples/models/looped_text.py                   # PyTorch
    python examples/models/looped_text.py --backend jax
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import common
import numpy as np
import text

WIDTH, HIDDEN, BATCH = 64, 128, 16
DEPTH, RECORDED, SEED = 6, 4, 0
DEPTHS = (1, 2, 4, 6, 8, 16, 32, 64)
SETTINGS = {
    "backward__strategy": "looped",
    "backward__options": {"depth": DEPTH, "recorded": RECORDED, "distribution": "log-normal-poisson", "seed": SEED},
}
TRAININGS = {
    "random depth": ("looped_text", SETTINGS),
    "fixed depth": ("looped_text_fixed", {**SETTINGS, "backward__options": {"depth": DEPTH, "recorded": RECORDED}}),
}
"""The file of the weights, and the settings."""


def at_depth(steps: int) -> dict[str, Any]:
    """Return settings for a fixed number of steps."""
    return {"backward__strategy": "looped", "backward__options": {"depth": steps, "recorded": 1}}


def weights(rng: np.random.Generator, width: int = WIDTH, hidden: int = HIDDEN) -> common.Weights:
    """Draw the weights of prelude, core and coda, each one block of attention and a perceptron."""
    made = {
        "embed.weight": rng.standard_normal((text.WORDS, width)).astype(np.float32),
        "place": (0.5 * rng.standard_normal((text.LENGTH, width))).astype(np.float32),
        "deq.cell.adapter.weight": common.matrix(rng, width, 2 * width),
        "read.weight": common.matrix(rng, text.WORDS, width, gain=0.3),
        "read.bias": np.zeros(text.WORDS, np.float32),
    }
    for block in ("prelude", "deq.cell", "coda"):
        made[f"{block}.mix.weight"] = common.matrix(rng, 3 * width, width)
        made[f"{block}.out.weight"] = common.matrix(rng, width, width, gain=0.5)
        made[f"{block}.first.weight"] = common.matrix(rng, hidden, width)
        made[f"{block}.first.bias"] = np.zeros(hidden, np.float32)
        made[f"{block}.second.weight"] = common.matrix(rng, width, hidden, gain=0.5)
    return made


def batches(rng: np.random.Generator, coded: Any) -> Iterable[tuple[Any, ...]]:
    """Yield random windows `(batch, length + 1)` and the training step without end."""
    for step, (windows,) in enumerate(text.batches(rng, coded, BATCH)):
        yield windows, np.int32(step)


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train at random depth and at a fixed one, and print the perplexity of the test text at several depths."""
    options = common.arguments(__doc__ or "", 500, given)
    _, coded = text.data()
    found: dict[str, float] = {}
    trainings = TRAININGS if options.steps else {"given weights": ("looped_text", SETTINGS)}
    for name, (file, settings) in trainings.items():
        rng = np.random.default_rng(options.seed)
        begin = common.start(options, weights(rng))
        side = common.side(options.backend, "looped_text", begin, settings, options.device)
        side.fit(batches(rng, coded["train"]), options.steps, 8e-3, decay=0.1, memory=0.95)
        common.finish(options, file, side.weights())
        for depth in DEPTHS:
            model = common.side(options.backend, "looped_text", side.weights(), at_depth(depth), options.device)
            found[f"{name}, {depth} steps"] = text.perplexity(model, coded["test"])
            print(f"{name}, {depth:3d} steps: test perplexity {found[f'{name}, {depth} steps']:.3f}", flush=True)
    line = DEPTH, "mean depth of the training"
    common.figure(options, "looped-text", lambda figure: text.draw_depths(figure, found, DEPTHS, *line))
    return found


if __name__ == "__main__":
    main()
