"""Broyden with ten pairs on hard linear problems: how many of 200 does it not solve?

    python -m benchmarks.limited_memory

z = W z + b, W non-symmetric Gaussian of spectral radius 0.95, D = 64, float64, relative residual 1e-6 within 200 steps.
One batch holds all seeds, as a sample's solve does not depend on its mates.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import deqcore


def problems(seeds: int, size: int, rho: float) -> tuple[Any, Any]:
    """Return matrices `(seeds, size, size)` of spectral radius `rho`, and right-hand sides `(seeds, size)`."""
    rng = [np.random.default_rng(seed) for seed in range(seeds)]
    w = np.stack([r.standard_normal((size, size)) for r in rng])
    radius = np.abs(np.linalg.eigvals(w)).max(axis=1)
    return w * (rho / radius)[:, None, None], np.stack([r.standard_normal(size) for r in rng])


def main() -> None:
    """Count the failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--memory", type=int, default=10)
    given = parser.parse_args()
    w, b = problems(given.seeds, 64, 0.95)
    sol = deqcore.fixed_point(
        lambda z: np.einsum("bij,bj->bi", w, z) + b,
        0 * b,
        forward__solver="broyden",
        forward__options={"memory": given.memory},
        forward__rtol=1e-6,
        forward__max_steps=200,
        forward__on_failure="ignore",
    )
    steps = sol.steps[sol.converged]
    print(
        f"{(~sol.converged).sum()} of {given.seeds} not solved; median {np.median(steps):.0f} steps, most {steps.max()}"
    )


if __name__ == "__main__":
    main()
