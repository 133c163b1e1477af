"""A cell that goes stiff during training, with the adaptive strategy: `python -m benchmarks.stiff` (torch on the CPU).

The cell z = tanh(W z + x) learns the equilibria of a teacher of the same form. The largest eigenvalue of the teacher's
matrix is .3 at first, .95 in the middle third of the steps, and .3 again. Each step measures the spectral radius of J
at the equilibria, and compares the gradient that training used with that of a dense solve in float64. Figures and
picture are written to docs/benchmarks/adaptive-stiff.json and adaptive-stiff.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import deqcore
from deqcore.backward.adaptive import Adaptive

PLACE: Final = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "adaptive-stiff.json"
WIDTH, BATCH, THIRD = 24, 32, 120
RADII: Final = (0.3, 0.95, 0.3)
RATE: Final = 5e-3
STRATEGY: Final = Adaptive(max_relative_error=0.3, audit_every=25)
SETTINGS: Final[dict[str, Any]] = {
    "forward__rtol": 1e-6, "forward__max_steps": 300, "forward__on_failure": "ignore",
    "backward__strategy": "adaptive",
    "backward__options": {"max_relative_error": STRATEGY.max_relative_error, "audit_every": STRATEGY.audit_every},
}  # fmt: skip


def cell(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """Return f(z)."""
    return torch.tanh(z @ w + x)


def dense(w: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, float]:
    """Return the exact gradient of W for cotangents `g` `(batch, n)`, and the largest spectral radius of J."""
    w, z, g = w.detach().double(), z.detach().double(), g.double()
    slope = 1 - z**2
    jacobian = slope[:, None, :] * w[None]
    u = torch.linalg.solve(torch.eye(len(w), dtype=w.dtype) - jacobian, g) * slope
    return z.T @ u, float(torch.linalg.eigvals(jacobian).abs().max())


def train(steps: int) -> list[dict[str, float]]:
    """Train for three times `steps` steps; return what each did."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    spread = torch.linspace(-0.3, 0.3, WIDTH)
    w = (0.1 * torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    adam, state, rules = torch.optim.Adam([w], lr=RATE), deqcore.StrategyState(), STRATEGY
    rows = []
    for step in range(3 * steps):
        values = spread.clone()
        values[-3:] = RADII[step // steps]
        teacher = basis * values @ basis.T
        x = 0.1 * torch.randn(BATCH, WIDTH, generator=generator)
        with torch.no_grad():
            wanted = x
            for _ in range(400):
                wanted = cell(wanted, teacher, x)
        sol = deqcore.fixed_point(cell, torch.zeros_like(x), w, x, strategy_state=state, **SETTINGS)
        difference = sol.value - wanted
        adam.zero_grad()
        (0.5 * difference.square().sum()).backward()
        assert sol.backward is not None
        exact, radius = dense(w, sol.value, difference.detach())
        after = rules.learned(state.values)
        rows.append(
            {
                "radius": radius, "chosen": int(after.chosen), "vjps": int(sol.backward.vjps.max()),
                "audit": int(after.since == 0), "error": float((w.grad.double() - exact).norm() / exact.norm()),
            }
        )  # fmt: skip
        adam.step()
    return rows


def draw(rows: list[dict[str, float]], place: Path) -> None:
    """Draw spectral radius, vjps and error over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, middle, low) = plt.subplots(3, 1, figsize=(8, 6.6), sharex=True, layout="constrained")
    steps = range(len(rows))
    between = [step for step in steps if not rows[step]["audit"]]
    audits = [step for step in steps if rows[step]["audit"]]
    top.plot(steps, [row["radius"] for row in rows], color="#7570b3")
    top.set_ylabel("spectral radius of J")
    exact = STRATEGY.controller.candidates
    chosen = [row["chosen"] for row in rows]
    middle.step(steps, chosen, where="post", color="#1b9e77")
    middle.set_yticks(range(0, exact + 1, 3), [*map(str, range(0, exact, 3)), "exact"])
    middle.set_ylabel("vjps in force")
    low.semilogy(between, [rows[step]["error"] for step in between], ".", color="#1b9e77", label="between audits")
    low.semilogy(audits, [rows[step]["error"] for step in audits], "|", color="#666666", label="audits")
    low.axhline(STRATEGY.max_relative_error, color="#d95f02", linestyle="--", label="asked: at most 0.3")
    low.set_ylabel("error of the gradient")
    low.set_xlabel("training step")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(place, dpi=110)


def main() -> None:
    """Train, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=THIRD, help="of each third of the training")
    parser.add_argument("--json", type=Path, default=PLACE, help="the picture is beside it")
    parser.add_argument("--draw", action="store_true", help="draw from the figures that are there, and train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.draw:
        options.json.write_text(json.dumps(train(options.steps)) + "\n")
    rows = json.loads(options.json.read_text())
    draw(rows, options.json.with_suffix(".png"))
    for third in range(3):
        part = rows[len(rows) // 3 * third : len(rows) // 3 * (third + 1)]
        judged = [row["error"] for row in part if not row["audit"]]
        over = sum(error > STRATEGY.max_relative_error for error in judged)
        taken = sum(row["vjps"] for row in part) / len(part)
        print(
            f"third {third + 1} ends at radius {part[-1]['radius']:.2f}, {part[-1]['chosen']} vjps in force; "
            f"{taken:.1f} vjps a step; {over} of {len(judged)} steps between audits beyond the target"
        )


if __name__ == "__main__":
    main()
