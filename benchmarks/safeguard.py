"""Broyden with and without its safeguard on maps that grow faster than linearly: how many of 100 are solved?

    python -m benchmarks.safeguard

Three maps with Gaussian W of spectral radius about 1, D = 20, float64, from z = 0, relative residual 1e-8 within 150
steps. One batch holds all seeds, as a sample's solve does not depend on its mates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

import deqcore
from deqcore.types import Map


def problems(seeds: int, size: int) -> Iterator[tuple[str, Map, Any]]:
    """Yield the name, map and initial iterate `(seeds, size)`."""
    rng = [np.random.default_rng(seed) for seed in range(seeds)]
    w = np.stack([r.standard_normal((size, size)) for r in rng]) / np.sqrt(size)
    x = np.stack([r.standard_normal(size) for r in rng])

    def mix(z: Any) -> Any:
        return np.einsum("bij,bj->bi", w, z)

    yield "x - 4 z^3 - W z / 2", lambda z: x - 4.0 * z**3 - 0.5 * mix(z), 0 * x
    yield "x + 4 sin(W z)", lambda z: x + 4.0 * np.sin(mix(z)), 0 * x
    yield "tanh(3 W z + x)", lambda z: np.tanh(3.0 * mix(z) + x), 0 * x


def main() -> None:
    """Solved seeds and median evaluations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    given = parser.parse_args()
    for name, f, z0 in problems(given.seeds, 20):
        for max_residual_growth in (None, 10.0, 2.0, 1.0):
            sol = deqcore.fixed_point(
                f,
                z0,
                forward__solver="broyden",
                forward__options={"max_residual_growth": max_residual_growth},
                forward__rtol=1e-8,
                forward__max_steps=150,
                forward__on_failure="ignore",
            )
            spent = sol.evaluations[sol.converged]
            median = f"{np.median(spent):.0f}" if len(spent) else "-"
            print(
                f"{name:22} growth {max_residual_growth!s:5} solved {len(spent):3} of {given.seeds}, "
                f"median evaluations {median}"
            )


if __name__ == "__main__":
    main()
