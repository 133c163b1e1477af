"""Deblurring with a learned denoiser: an inverse problem solved by its own fixed point.

y = A x + noise, with A a Gaussian blur. The image is the equilibrium of

    z = (AᵀA + λ)⁻¹ (Aᵀ y + λ D(z))                    data on the left, learned denoiser D on the right

so that D is trained, by exact implicit gradients, for the blur it will meet, at the cost in memory of one application.
Source: Gilton, Ongie & Willett (2021), "Deep equilibrium architectures for inverse problems in imaging" (half-quadratic
splitting instead of their proximal step).

    python examples/models/deblurring.py --out pictures            # PyTorch
    python examples/models/deblurring.py --backend jax
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np

SIZE, SIGMA, NOISE, CHANNELS = 8, 1.0, 0.02, 32
SETTINGS = {
    "forward__solver": "anderson",
    "forward__rtol": 1e-3,
    "forward__max_steps": 60,
    "forward__on_failure": "ignore",
    "backward__strategy": "exact-ift",
    "backward__options": {"rtol": 1e-2, "max_steps": 20},
}


def modes() -> tuple[Any, Any]:
    """Return Q and k of the blur K = Q diag(k) Qᵀ of one axis; the blur of an image X is K X K."""
    at = np.arange(SIZE)
    kernel = np.exp(-(((at[:, None] - np.arange(-SIZE, 2 * SIZE)) / SIGMA) ** 2) / 2)
    mirrored = kernel[:, SIZE : 2 * SIZE] + kernel[:, :SIZE][:, ::-1] + kernel[:, 2 * SIZE :][:, ::-1]
    blur = mirrored / kernel.sum(1, keepdims=True)  # images are mirrored beyond their border
    values, vectors = np.linalg.eigh((blur + blur.T) / 2)
    return vectors.astype(np.float32), values.astype(np.float32)


def data(rng: np.random.Generator) -> dict[str, Any]:
    """Load scikit-learn's handwritten digits `(n, 1, 8, 8)` between 0 and 1: 1400 to train, 397 to test."""
    from sklearn.datasets import load_digits

    vectors, values = modes()
    blur = vectors * values @ vectors.T
    sharp = (load_digits().images[:, None] / 16).astype(np.float32)
    blurred = (blur @ sharp @ blur + NOISE * rng.standard_normal(sharp.shape)).astype(np.float32)
    return {
        "train": sharp[:1400],
        "train_blurred": blurred[:1400],
        "test": sharp[1400:],
        "test_blurred": blurred[1400:],
    }


def weights(rng: np.random.Generator) -> common.Weights:
    """Draw log λ and a denoiser of three convolutions, small enough at the start that the map contracts."""
    return {
        "deq.cell.log_weight": np.float32(np.log(2e-2)).reshape(1),
        "deq.cell.first.weight": common.matrix(rng, CHANNELS, 1, 3, 3),
        "deq.cell.first.bias": np.zeros(CHANNELS, np.float32),
        "deq.cell.second.weight": common.matrix(rng, CHANNELS, CHANNELS, 3, 3),
        "deq.cell.second.bias": np.zeros(CHANNELS, np.float32),
        "deq.cell.third.weight": common.matrix(rng, 1, CHANNELS, 3, 3, gain=0.1),
    }


def decibels(found: Any, sharp: Any) -> float:
    """Peak signal-to-noise ratio, of all images together."""
    return float(-10 * np.log10(np.mean((found - sharp) ** 2)))


def tikhonov(blurred: Any, weight: float) -> Any:
    """Solve the same equation without a denoiser, as a baseline of linear regularisation."""
    vectors, values = modes()
    gains = np.outer(values, values)
    return vectors @ (gains / (gains**2 + weight) * (vectors.T @ blurred @ vectors)) @ vectors.T


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train, and compare with the input and with the best linear regularisation."""
    options = common.arguments(__doc__ or "", 500, given)
    rng = np.random.default_rng(options.seed)
    patches, begin = data(rng), common.start(options, weights(rng))
    model = common.side(options.backend, "deblurring", begin, SETTINGS, options.device)
    model.fit(common.batches(rng, 16, patches["train_blurred"], patches["train"]), options.steps, 3e-3, decay=0.02)

    sharp, blurred = patches["test"], patches["test_blurred"]
    found, steps, converged = model.predict(blurred)
    linear = {
        w: decibels(tikhonov(patches["train_blurred"], w), patches["train"]) for w in 10.0 ** -np.arange(1, 4, 0.25)
    }
    best = tikhonov(blurred, max(linear, key=lambda w: linear[w]))
    result = {"input": decibels(blurred, sharp), "linear": decibels(best, sharp), "learned": decibels(found, sharp)}
    print("  ".join(f"{name} {value:.2f} dB" for name, value in result.items()), end="")
    print(f"  gain {result['learned'] - result['input']:.2f} dB")
    print(f"{100 * np.mean(converged):.1f} % of the solves converge, in {np.mean(steps):.1f} steps")
    common.finish(options, "deblurring", model.weights())

    def draw(figure: Any) -> None:
        axes = figure.subplots(4, 6)
        for row, (title, images) in enumerate(
            {"sharp": sharp, "input": blurred, "linear": best, "learned": found}.items()
        ):
            axes[row, 0].set_ylabel(title)
            for axis, image in zip(axes[row], images[:6], strict=True):
                axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])

    common.figure(options, "deblurring", draw, (7, 5))
    return result


if __name__ == "__main__":
    main()
