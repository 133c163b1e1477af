"""Solve one equilibrium on the backend named on the command line: `python run.py torch`.

The problem is written with the array namespace, so that the same lines run on NumPy, PyTorch and JAX.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import deqcore
from deqcore import Config

BATCH, SIZE = 4, 32


def problem(backend: deqcore.Backend) -> tuple[Any, Any, tuple[Any, Any]]:
    """f, z0 and its arguments: a symmetric tanh layer with one slow mode."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((SIZE, SIZE))
    direction = np.ones((SIZE, 1)) / SIZE**0.5
    weight = 0.3 * (noise + noise.T) / (8 * SIZE) ** 0.5 + 0.9 * direction @ direction.T
    x = 0.1 * rng.standard_normal((BATCH, SIZE))

    def f(z: Any, w: Any, x: Any) -> Any:
        return backend.xp.tanh(z @ w + x)

    arrays = [backend.asarray(a, dtype="float32") for a in (np.zeros((BATCH, SIZE)), weight, x)]
    return f, arrays[0], (arrays[1], arrays[2])


def main(name: str) -> dict[str, Any]:
    """Solve with the configured solver and with Picard; return what was found."""
    config = Config.load(Path(__file__).with_name("deq.toml"))
    backend = deqcore.get_backend(config, backend=name)
    f, z0, args = problem(backend)
    found: dict[str, Any] = {}
    for solver in (config.forward.solver, "picard"):
        changed: dict[str, Any] = {} if solver == config.forward.solver else {"forward__solver": solver}
        sol = deqcore.fixed_point(f, z0, *args, config=config, backend=name, **changed)
        found[solver] = {
            "z": backend.to_numpy(backend.detach(sol.value)),
            "steps": backend.to_numpy(sol.steps).tolist(),
            "converged": bool(backend.to_numpy(sol.converged).all()),
        }
    return found


if __name__ == "__main__":
    for solver, result in main(sys.argv[1] if len(sys.argv) > 1 else "numpy").items():
        print(f"{solver:8s} converged: {result['converged']}, steps per sample: {result['steps']}")
