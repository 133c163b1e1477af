"""Steps of a small attention cell with units of tokens and with samples, by the strength of each part.

python benchmarks/units.py            # causal attention
python benchmarks/units.py --both     # attention in both directions
"""

from __future__ import annotations

import sys

import torch

import deqcore

CAUSAL = (8, 32, 16, ((0.8, 0.1), (0.8, 0.5), (0.2, 0.8), (0.5, 1.0), (1.2, 0.4), (1.5, 1.0)))
BOTH = (4, 16, 8, ((0.2, 0.6), (0.0, 0.9), (-0.3, 0.9), (0.0, 1.2)))
SETTINGS = {"forward__rtol": 1e-5, "forward__max_steps": 150, "forward__on_failure": "ignore"}


def measure(causal: bool) -> None:
    """Print mean and largest steps, and the share that converged, for each solver and kind of unit."""
    batch, tokens, width, cells = CAUSAL if causal else BOTH
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    query, key, value, own = (torch.randn(width, width, **draw) / width**0.5 for _ in range(4))
    x = torch.randn(batch, tokens, width, **draw)
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    seen = torch.tril(seen) if causal else seen

    for a, b in cells:

        def f(z: torch.Tensor, x: torch.Tensor, a: float = a, b: float = b) -> torch.Tensor:
            scores = (z @ query) @ (z @ key).transpose(1, 2) / width**0.5
            weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
            return torch.tanh(a * z @ own + b * (weights @ (z @ value)) + x)

        for solver in ("picard", "anderson", "broyden", "auto"):
            for units in (2, True):
                chosen = {"forward__solver": solver, "forward__batch": units, **SETTINGS}
                sol = deqcore.fixed_point(f, torch.zeros_like(x), x, **chosen)
                steps, share = sol.steps.double(), sol.converged.double().mean()
                print(f"a={a} b={b} {solver} batch={units}: {steps.mean():.0f}, {steps.max():.0f} ({share:.2f})")


if __name__ == "__main__":
    measure("--both" not in sys.argv)
