"""A small multiscale equilibrium model (MDEQ) that classifies images.

Two states, at full and at half resolution, exchange features until neither changes: z* = f(z*, image), a tree of two
arrays. Compared with an explicit network of as many weights, in which the same cell, narrower, is stacked twice with
separate weights each time; both are tuned over the same grid on validation images.

The images are scikit-learn's 1797 handwritten digits.
Source: Bai, Koltun & Kolter (2020), "Multiscale deep equilibrium models", reduced to two scales.

    python examples/models/images.py                   # PyTorch
    python examples/models/images.py --backend jax
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np

WIDTH, NARROW, BLOCKS, NORM_GROUPS = 12, 9, 2, 3
TEST = 360  # images to tune with, and as many to test with
SETTINGS = {
    "forward__solver": "anderson",
    "forward__rtol": 1e-3,
    "forward__max_steps": 20,
    "forward__on_failure": "ignore",
    "backward__strategy": "exact-ift",
    "backward__options": {"rtol": 3e-2, "max_steps": 12},
}
RATES, DECAYS, SEEDS = (3e-3, 1e-2, 3e-2), (0.02,), 2


def data() -> dict[str, tuple[Any, Any]]:
    """Load images `(n, 1, 8, 8)` and digits, in parts to train, tune and test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    parts = {"test": order[:TEST], "tune": order[TEST : 2 * TEST], "train": order[2 * TEST :]}
    x, y = (found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64)
    return {name: (x[rows], y[rows]) for name, rows in parts.items()}


def weights(rng: np.random.Generator, width: int = WIDTH, blocks: int = 0) -> common.Weights:
    """Draw the weights of the equilibrium model (no blocks) or the explicit network; the kernels start small."""

    def conv(name: str, out: int, into: int, gain: float) -> common.Weights:
        return {f"{name}.weight": common.matrix(rng, out, into, 3, 3, gain=gain)}

    made = conv("low", width, 1, 1.5) | conv("high", 2 * width, width, 1.5)
    for cell in [f"cells.{k}" for k in range(blocks)] or ["deq.cell"]:
        made |= conv(f"{cell}.low_low", width, width, 0.7) | conv(f"{cell}.high_high", 2 * width, 2 * width, 0.7)
        made |= conv(f"{cell}.low_high", 2 * width, width, 0.7) | conv(f"{cell}.high_low", width, 2 * width, 0.7)
    made["read.weight"] = common.matrix(rng, 10, 12 * width)
    made["read.bias"] = np.zeros(10, np.float32)
    return made


def tuned(options: Any, width: int, blocks: int) -> tuple[float, Any]:
    """Mean test accuracy of the setting that is best on the validation images, and one model."""
    parts = data()

    def run(rate: float, decay: float, seed: int) -> tuple[float, float, Any]:
        rng = np.random.default_rng(options.seed + seed)
        begin = weights(rng, width, blocks)
        begin = begin if blocks else common.start(options, begin)
        side = common.side(options.backend, "images", begin, SETTINGS, options.device, width=width, blocks=blocks)
        side.fit(common.batches(rng, 32, *parts["train"]), options.steps, rate, decay, quiet=blocks > 0)
        scores = [(side.predict(x)[0].argmax(-1) == y).mean() for x, y in (parts["tune"], parts["test"])]
        return scores[0], scores[1], side

    tune, test, side, setting = common.tune(run, RATES, DECAYS, SEEDS)
    size = sum(value.size for value in side.weights().values())
    name = "explicit" if blocks else "equilibrium"
    print(f"{name}: test accuracy {100 * test:.1f} % (validation {100 * tune:.1f} %; {setting}; {size} weights)")
    return test, side


def main(given: list[str] | None = None) -> dict[str, float]:
    """Tune both networks over the same grid, compare them on test images."""
    options = common.arguments(__doc__ or "", 300, given)
    explicit, _ = tuned(options, NARROW, BLOCKS)
    implicit, side = tuned(options, WIDTH, 0)
    images, digits = data()["test"]
    logits, steps, converged = side.predict(images)
    print(f"difference {100 * (implicit - explicit):+.1f} points")
    print(f"{100 * np.mean(converged):.1f} % of the solves converge, in {np.mean(steps):.1f} steps")
    common.finish(options, "images", side.weights())
    wrong = np.flatnonzero(logits.argmax(-1) != digits)[:10]

    def draw(figure: Any) -> None:
        for axis, k in zip(figure.subplots(1, max(2, len(wrong))), wrong, strict=False):
            axis.imshow(images[k, 0], cmap="gray_r")
            axis.set(xticks=[], yticks=[], title=f"{digits[k]}: {logits[k].argmax()}")

    common.figure(options, "images", draw, (7, 1.4))
    return {"implicit": implicit, "explicit": explicit}


if __name__ == "__main__":
    main()
