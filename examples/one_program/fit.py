"""Fit a small equilibrium layer on whatever framework the config names: `python fit.py jax.toml`.

The program is written on `deqcore.get_backend` and `deqcore.vjp` only, so that changing one line of its config (or
setting DEQCORE_BACKEND) runs it on NumPy, PyTorch or JAX, with the same numbers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import deqcore
from deqcore import Config

os.environ.setdefault("JAX_ENABLE_X64", "1")  # JAX hides double precision behind a switch
BATCH, SIZE, STEPS, RATE = 4, 6, 8, 0.5


def data() -> dict[str, Any]:
    """Draw weights to start from, inputs, and targets."""
    rng = np.random.default_rng(0)
    drawn = {"w": 0.4 * rng.standard_normal((SIZE, SIZE)) / SIZE**0.5, "x": rng.standard_normal((BATCH, SIZE))}
    return drawn | {"target": np.tanh(rng.standard_normal((BATCH, SIZE)))}


def fit(config: Config) -> list[float]:
    """Minimise ‖z* − target‖² / 2 by gradient descent, and return the loss before each step."""
    backend = deqcore.get_backend(config)
    xp = backend.xp
    w, x, target = (backend.asarray(value) for value in data().values())

    def f(z: Any, w: Any, x: Any) -> Any:
        return xp.tanh(xp.matmul(z, w) + x)

    losses, z = [], xp.zeros_like(target)
    for _ in range(STEPS):
        z = deqcore.fixed_point(f, z, w, x, config=config).value
        error = z - target
        losses.append(float(backend.to_numpy(xp.sum(error * error))) / 2)
        z, (dw, _) = deqcore.vjp(f, z, w, x, cotangent=error, config=config)
        w = w - RATE * dw / BATCH
    return losses


def main(path: str) -> list[float]:
    """Fit with the config file at `path`, and say how it went."""
    config = Config.load(path)
    losses = fit(config)
    print(f"{config.backend}: loss {losses[0]:.10f} → {losses[-1]:.10f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("numpy.toml")))
