"""An implicit graph network: node states are the equilibrium of messages over the whole graph.

Z = relu(Â Z Wᵀ + Â X Uᵀ + b), with W held inside a ball in which there is exactly one solution. All nodes are one
system, so `batch = false`. Compared with a graph convolutional network of three layers that has the same matrices, W
applied once; both are tuned over the same grid of rates and decays on validation nodes.

The graphs are generated: a stochastic block model of four groups with noisy features, three graphs, few labels.
Source: Gu, Chang, Zhu, Sojoudi & El Ghaoui (2020), "Implicit graph neural networks"; Kipf & Welling (2017).

    python examples/models/graph.py                   # PyTorch
    python examples/models/graph.py --backend jax
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import common
import numpy as np

NODES, GROUPS, FEATURES, WIDTH = 400, 4, 16, 16
INSIDE, OUTSIDE, SIGNAL = 0.04, 0.012, 0.35  # probabilities of edges; how far apart the features' means are
RADIUS = 0.95
SETTINGS = {
    "forward__batch": False,
    "forward__solver": "anderson",
    "forward__rtol": 1e-4,
    "forward__max_steps": 50,
    "backward__strategy": "exact-ift",
    "backward__options": {"rtol": 1e-3, "max_steps": 40},
}
RATES, DECAYS, GRAPHS = (3e-3, 1e-2, 3e-2), (0.0, 0.3), 3


def data(seed: int) -> dict[str, Any]:
    """Normalised adjacency `(n, n)`, features `(n, 16)`, groups `(n,)`, and which nodes train, tune and test."""
    rng = np.random.default_rng(1000 + seed)
    groups = rng.integers(0, GROUPS, NODES)
    likely = np.where(groups[:, None] == groups, INSIDE, OUTSIDE)
    edges = np.triu(rng.random((NODES, NODES)) < likely, 1)
    adjacency = edges + edges.T + np.eye(NODES)
    root = adjacency.sum(1) ** -0.5
    means = SIGNAL * rng.standard_normal((GROUPS, FEATURES))
    order = rng.permutation(NODES)
    return {
        "adjacency": (root[:, None] * adjacency * root).astype(np.float32),
        "features": (means[groups] + rng.standard_normal((NODES, FEATURES))).astype(np.float32),
        "groups": groups,
        "train": order[:40],
        "tune": order[40:120],
        "test": order[120:],
    }


def weights(rng: np.random.Generator) -> common.Weights:
    """U, b, W and the readout."""
    return {
        "inject.weight": common.matrix(rng, WIDTH, FEATURES),
        "inject.bias": np.zeros(WIDTH, np.float32),
        "deq.cell.weight": common.matrix(rng, WIDTH, WIDTH, gain=0.5),
        "read.weight": common.matrix(rng, GROUPS, WIDTH),
        "read.bias": np.zeros(GROUPS, np.float32),
    }


def tuned(options: Any, explicit: bool) -> tuple[float, Any]:
    """Mean test accuracy over the graphs with the setting that is best on their validation nodes, and one model."""

    def run(rate: float, decay: float, seed: int) -> tuple[float, float, Any]:
        graph = data(seed)
        begin = common.start(options, weights(np.random.default_rng(options.seed + seed)))
        side = common.side(options.backend, "graph", begin, SETTINGS, options.device, explicit=explicit)
        batch = tuple(graph[name] for name in ("adjacency", "features", "groups", "train"))
        side.fit(repeat(batch), options.steps, rate, decay, quiet=True)
        right = side.predict(graph["adjacency"], graph["features"]).argmax(-1) == graph["groups"]
        return right[graph["tune"]].mean(), right[graph["test"]].mean(), side

    tune, test, side, setting = common.tune(run, RATES, DECAYS, GRAPHS)
    name = "explicit" if explicit else "implicit"
    print(f"{name}: test accuracy {100 * test:.1f} % (validation {100 * tune:.1f} %; {setting})", flush=True)
    return test, side


def main(given: list[str] | None = None) -> dict[str, float]:
    """Tune both networks over the same grid, compare them on test nodes."""
    options = common.arguments(__doc__ or "", 100, given)
    explicit, _ = tuned(options, explicit=True)
    implicit, side = tuned(options, explicit=False)
    print(
        f"difference {100 * (implicit - explicit):+.1f} points, {sum(v.size for v in side.weights().values())} weights"
    )
    common.finish(options, "graph", side.weights())
    return {"implicit": implicit, "explicit": explicit}


if __name__ == "__main__":
    main()
