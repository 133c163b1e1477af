"""A block that refines a transformer's output: its equilibrium, reached from that output.

Two explicit layers read a text and propose a state h. A refining block starts at z = h and iterates z ← block(z, h)
until nothing changes. As the state after 0, 1, 2, … steps is read by the same weights, refinement can stop at any time.
The gradient takes one product with the Jacobian, u = g + Jᵀg, at the equilibrium. Text and windows are those of
`text.py`.
Source: "Attractor models" (2026), arXiv:2605.12466.

    python examples/models/attractor.py                   # PyTorch
    python examples/models/attractor.py --backend jax
"""

from __future__ import annotations

import common
import numpy as np
import text

WIDTH, HIDDEN, LAYERS, BATCH = 64, 128, 2, 16
STEPS, RTOL = 8, 1e-2
DEPTHS = (1, 2, 4, 8, 16, 32)
SETTINGS = {
    "forward__solver": "picard",
    "forward__rtol": RTOL,
    "forward__max_steps": STEPS,
    "forward__on_failure": "ignore",
    "backward__strategy": "neumann",
    "backward__options": {"terms": 1},
}


def weights(rng: np.random.Generator, width: int = WIDTH, hidden: int = HIDDEN) -> common.Weights:
    """Draw the weights of the explicit layers and of the refining block."""
    made = text.weights(rng, width, hidden, LAYERS)
    block = text.weights(rng, width, hidden, 0)
    return made | {name: value for name, value in block.items() if name.startswith("deq.cell.")}


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train, and print the perplexity of the test text after several steps of refinement."""
    options = common.arguments(__doc__ or "", 400, given)
    rng = np.random.default_rng(options.seed)
    _, coded = text.data()
    side = common.side(options.backend, "attractor", common.start(options, weights(rng)), SETTINGS, options.device)
    side.fit(text.batches(rng, coded["train"], BATCH), options.steps, 8e-3, decay=0.1, memory=0.95)
    found = {}
    for depth in DEPTHS:
        settings = SETTINGS | {"forward__rtol": 1e-4, "forward__max_steps": depth}
        model = common.side(options.backend, "attractor", side.weights(), settings, options.device)
        found[f"steps {depth}"] = text.perplexity(model, coded["test"])
        print(f"{depth:3d} steps: test perplexity {found[f'steps {depth}']:.3f}", flush=True)
    common.finish(options, "attractor", side.weights())
    return found


if __name__ == "__main__":
    main()
