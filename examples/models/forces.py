"""A force field with an implicit energy: forces are its first derivatives, training needs its second.

Metal clusters of seven atoms under the Gupta potential, in which a bond weakens with the number of neighbours, so that
no sum over pairs describes it. The model starts from the best sum over pairs and adds an energy read from states of the
atoms at an equilibrium of messages, z* = f(z*, distances). The loss compares forces −dE/dx, and its gradient
differentiates through the fixed point twice.

Source: Gupta (1981), "Lattice relaxation at a metal surface"; constants near those of Cleri & Rosato (1993) for copper.

    python examples/models/forces.py                   # PyTorch
    python examples/models/forces.py --backend jax
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np

ATOMS, WIDTH, BASIS = 7, 16, 12
CENTRES, SPREAD = np.linspace(0.75, 2.6, BASIS).astype(np.float32), 0.17
SETTINGS = {
    "forward__solver": "anderson",
    "forward__rtol": 1e-4,
    "forward__max_steps": 30,
    "forward__on_failure": "ignore",
    "backward__strategy": "exact-ift",
    "backward__options": {"rtol": 1e-3, "max_steps": 20},
}
REPULSION, BOND, STEEP, RANGE = (
    0.09,
    1.22,
    10.9,
    2.3,
)  # A, ξ (electronvolt), p, q; lengths in nearest-neighbour distances


def vectors(x: Any) -> tuple[Any, Any]:
    """Return differences `(n, atoms, atoms, 3)` and distances, in which an atom is far from itself."""
    between = x[:, :, None] - x[:, None]
    return between, np.sqrt((between**2).sum(-1)) + 1e6 * np.eye(x.shape[1])


def energy(x: Any) -> Any:
    """Compute Gupta's energy of `(n, atoms, 3)`: Σᵢ (Σⱼ A exp(−p(r − 1)) − √(Σⱼ ξ² exp(−2q(r − 1))))."""
    _, r = vectors(x)
    density = (BOND**2 * np.exp(-2 * RANGE * (r - 1))).sum(-1)
    return (REPULSION * np.exp(-STEEP * (r - 1))).sum((1, 2)) - np.sqrt(density).sum(1)


def forces(x: Any) -> Any:
    """Compute the forces, the negative gradient of the energy, `(n, atoms, 3)`."""
    between, r = vectors(x)
    bond = BOND**2 * np.exp(-2 * RANGE * (r - 1))
    root = 1 / np.sqrt(bond.sum(-1))
    slope = RANGE * bond * (root[:, :, None] + root[:, None]) - 2 * STEEP * REPULSION * np.exp(-STEEP * (r - 1))
    return -((slope / r)[..., None] * between).sum(2)


def sample(rng: np.random.Generator, chains: int, snapshots: int, heat: float = 0.05) -> Any:
    """Draw positions `(chains · snapshots, atoms, 3)` of clusters by overdamped Langevin motion."""
    x = 0.9 * rng.standard_normal((chains, ATOMS, 3))
    found = []
    for step in range(400 + 40 * snapshots):
        force = forces(x)
        jvp = force / np.maximum(1, np.linalg.norm(force, axis=-1, keepdims=True) / 5)
        rate = 0.004
        x = x + rate * jvp + (2 * rate * heat) ** 0.5 * rng.standard_normal(x.shape)
        if step >= 400 and step % 40 == 0:
            found.append(x - x.mean(1, keepdims=True))
    return np.concatenate(found).astype(np.float32)


def pair_design(x: Any) -> Any:
    """Return the forces of each radial function, `(n · atoms · 3, basis)`, in which the baseline is linear."""
    between, r = vectors(x)
    gap = (r[..., None] - CENTRES) / SPREAD
    slope = -gap / SPREAD * np.exp(-(gap**2) / 2)
    return -2 * np.einsum("nijk,nijc->nick", slope / r[..., None], between).reshape(-1, BASIS)


def baseline(x: Any, target: Any) -> Any:
    """Fit the weights of a sum over pairs to the forces, by linear least squares."""
    return np.linalg.lstsq(pair_design(x), target.ravel(), rcond=1e-6)[0].astype(np.float32)


def weights(rng: np.random.Generator, pair: Any = None) -> common.Weights:
    """Draw messages that contract at the start, and an energy that starts at the sum over pairs."""
    return {
        "pair.weight": np.zeros((1, BASIS), np.float32) if pair is None else pair[None],
        "inject.weight": common.matrix(rng, WIDTH, BASIS, gain=0.5),
        "inject.bias": np.zeros(WIDTH, np.float32),
        "deq.cell.own.weight": common.matrix(rng, WIDTH, WIDTH, gain=0.3),
        "deq.cell.other.weight": common.matrix(rng, WIDTH, WIDTH, gain=0.3),
        "deq.cell.filter.weight": common.matrix(rng, WIDTH, BASIS, gain=0.5),
        "hidden.weight": common.matrix(rng, WIDTH, WIDTH),
        "hidden.bias": np.zeros(WIDTH, np.float32),
        "read.weight": common.matrix(rng, 1, WIDTH, gain=0.1),
    }


def error(found: Any, target: Any) -> float:
    """Root of the mean squared error of a force's component."""
    return float(np.sqrt(np.mean((found - target) ** 2)))


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train on forces, compare with the best sum over pairs on clusters from other chains."""
    options = common.arguments(__doc__ or "", 800, given)
    rng = np.random.default_rng(options.seed)
    x, x_test = sample(rng, 60, 10), sample(rng, 40, 5)
    target, target_test = (forces(part.astype(np.float64)).astype(np.float32) for part in (x, x_test))
    pair = baseline(x, target)
    linear = (pair_design(x_test) @ pair).reshape(target_test.shape)

    model = common.side(options.backend, "forces", common.start(options, weights(rng, pair)), SETTINGS, options.device)
    model.fit(common.batches(rng, 16, x, target), options.steps, 3e-3)
    found = model.predict(x_test)
    result = {
        "typical": error(0, target_test),
        "linear": error(linear, target_test),
        "model": error(found, target_test),
    }
    print(
        f"forces: typical {result['typical']:.3f}, error of pairs {result['linear']:.4f}, of the model "
        f"{result['model']:.4f} eV per nearest-neighbour distance: {result['model'] / result['linear']:.2f} of it"
    )
    common.finish(options, "forces", model.weights())

    def draw(figure: Any) -> None:
        for axis, (title, values) in zip(
            figure.subplots(1, 2, sharey=True), {"pairs": linear, "equilibrium": found}.items(), strict=True
        ):
            axis.plot(target_test.ravel(), (values - target_test).ravel(), ".", markersize=2)
            axis.set(title=title, xlabel="force", ylabel="error")

    common.figure(options, "forces", draw)
    return result


if __name__ == "__main__":
    main()
