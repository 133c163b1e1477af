"""Draw the pictures of docs/concepts.md from computations on the NumPy backend, with fixed seeds, and README.md's.

    python docs/tools/pictures.py          # all of them, about a minute
    python docs/tools/pictures.py times    # the README's bars alone, from docs/benchmarks/results.json

The figures that docs/concepts.md quotes are written to docs/pictures/figures.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np

import deqcore
from deqcore.diagnostics import gradient_audit, residual_curve

mpl.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
N, BATCH = 120, 16
SLOW = (0, 1, 2, 5, 10, 20)
COLORS = {"plain": "#d95f02", "jacobian-free": "#7570b3", "certified": "#1b9e77"}
PLAIN = {"certify": False, "max_relative_error": "none", "fallback": "none"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"backward__strategy": "broyden-reuse", "backward__options": PLAIN},
    "jacobian-free": {"backward__strategy": "jacobian-free"},
    "certified": {"backward__strategy": "broyden-reuse", "backward__options": {"max_relative_error": 0.1}},
}
NAMES = {"plain": "plain reuse", "jacobian-free": "jacobian-free", "certified": "certified reuse, target 0.1"}


def slow_modes(count: int, seed: int) -> np.ndarray:
    """Make a symmetric matrix with `count` eigenvalues from 0.9 to 0.99 and the others within ±0.3."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
    values = rng.uniform(-0.3, 0.3, N)
    values[:count] = np.linspace(0.9, 0.99, count) if count > 1 else 0.95
    return np.asarray(basis * values @ basis.T)


def layer(weight: np.ndarray) -> Callable[[Any, Any], Any]:
    """Make a nearly linear layer: tanh makes it nonlinear, and a small input keeps its slope near the matrix."""
    return lambda z, x: np.tanh(z @ weight + x)


def inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw random inputs and cotangents of a batch."""
    rng = np.random.default_rng(1000 + seed)
    return 0.01 * rng.standard_normal((BATCH, N)), rng.standard_normal((BATCH, N))


def audit(weight: np.ndarray, seed: int, settings: dict[str, Any]) -> Any:
    """Compare a strategy's gradient of one batch with the exact one."""
    x, g = inputs(seed)
    forward = {"forward__solver": "broyden", "forward__rtol": 1e-4, "forward__max_steps": 100}
    options = {"forward__options": {"history_size": 100}, "backend": "numpy"}
    return gradient_audit(layer(weight), np.zeros((BATCH, N)), x, cotangent=g, **forward, **options, **settings)


def draw_iteration(axes: Any) -> None:
    """Draw the staircase of plain iteration on one number, and Broyden's (here: secant) steps."""
    f = lambda z: 0.2 + 0.9 * np.sin(1.6 * z)  # noqa: E731
    grid = np.linspace(0, 1.3, 300)
    axes.plot(grid, f(grid), color="#333", label="f(z)")
    axes.plot(grid, grid, color="#999", lw=1, label="z")
    z, path = 0.05, [(0.05, 0.05)]
    for _ in range(12):
        path += [(z, f(z)), (f(z), f(z))]
        z = float(f(z))
    axes.plot(*np.transpose(path), color="#d95f02", lw=1.2, label="plain iteration")
    star = float(deqcore.fixed_point(f, np.full((1, 1), 0.8), forward__rtol=1e-10).value[0, 0])
    axes.plot([star], [star], "o", color="#1b9e77", label=f"z* = {star:.3f}")
    axes.set(xlabel="z", title="The equilibrium is where f(z) meets z")
    axes.legend(frameon=False, fontsize=8)


def draw_residuals(axes: Any, figures: dict[str, Any]) -> None:
    """Draw residuals of the four solvers on one layer with slow modes."""
    weight, (x, _) = slow_modes(5, 0), inputs(0)
    for solver in ("picard", "anderson", "broyden", "newton-krylov"):
        curve = residual_curve(layer(weight), np.zeros((BATCH, N)), x, steps=60, forward__solver=solver,
                               forward__rtol=1e-8, backend="numpy")  # fmt: skip
        worst = curve.residual.max(axis=1)
        axes.semilogy(np.maximum(worst, 1e-12), label=solver)
        figures[f"steps to 1e-4, {solver}"] = int(curve.steps_to(1e-4).max())
    axes.axhline(1e-4, color="#999", lw=1, ls=":")
    axes.set(xlabel="steps", ylabel="‖f(z) − z‖ / ‖f(z)‖", title="Five slow modes: worst of 16 samples")
    axes.legend(frameon=False, fontsize=8)


def draw_reuse(axes: Any, figures: dict[str, Any]) -> None:
    """Draw the worst cosine with the exact gradient against the number of slow modes."""
    for name, settings in STRATEGIES.items():
        found = [audit(slow_modes(count, 1), 1, settings) for count in SLOW]
        worst = [float(np.min(each.cosine)) for each in found]
        axes.plot(range(len(SLOW)), worst, "o-", color=COLORS[name], label=NAMES[name])
        figures[f"worst cosine, {NAMES[name]}"] = dict(zip(map(str, SLOW), np.round(worst, 4).tolist(), strict=True))
        ratio = [float(np.max(each.norm_ratio)) for each in found]
        figures[f"largest norm ratio, {NAMES[name]}"] = dict(
            zip(map(str, SLOW), np.round(ratio, 2).tolist(), strict=True)
        )
        if name == "certified":
            vjps = [float(np.mean(each.vjps)) for each in found]
            figures["mean vjps, certified"] = dict(zip(map(str, SLOW), np.round(vjps, 1).tolist(), strict=True))
    axes.axhline(0, color="#999", lw=1)
    axes.set_xticks(range(len(SLOW)), map(str, SLOW))
    axes.set(xlabel="slow modes of J (eigenvalues 0.9 to 0.99)", ylabel="worst cosine with the exact gradient",
             title="Plain reuse loses the direction")  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))


def draw_certificate(axes: Any, figures: dict[str, Any]) -> None:
    """Draw the error that the certificate estimates against the true one, per sample."""
    true, stated = [], []
    for count in SLOW:
        for seed in (2, 3):
            for target in (0.1, 0.01):
                options = {"max_relative_error": target, "fallback": "none"}
                settings = {"backward__strategy": "broyden-reuse", "backward__options": options}
                found = audit(slow_modes(count, seed), seed, settings)
                true.append(found.error)
                stated.append(found.reported)
    real, said = np.concatenate(true), np.concatenate(stated)
    ratio = said / real
    figures["certificate: samples"] = len(ratio)
    figures["certificate: share at least half the error"] = round(float(np.mean(ratio >= 0.5)), 4)
    figures["certificate: share at most three times the error"] = round(float(np.mean(ratio <= 3)), 4)
    figures["certificate: share of targets kept"] = round(float(np.mean(real <= np.repeat([0.1, 0.01] * 12, BATCH))), 4)
    axes.loglog(real, said, ".", color="#1b9e77", alpha=0.6, ms=4)
    ends = np.array([min(real.min(), said.min()), max(real.max(), said.max())])
    axes.plot(ends, ends, color="#333", lw=1)
    axes.fill_between(ends, ends / 2, ends * 3, color="#1b9e77", alpha=0.12)
    for target in (0.1, 0.01):
        axes.axhline(target, color="#999", lw=1, ls=":")
    axes.set(
        xlabel="true relative error of u", ylabel="error that the certificate states", title="Stated against true error"
    )


def figure(name: str, *draw: Callable[[Any], None], width: float = 4.6) -> None:
    """Write one picture of one panel or two."""
    fig, axes = plt.subplots(
        1, len(draw), figsize=(width * len(draw), 3.6), dpi=120, layout="constrained", squeeze=False
    )
    for each, panel in zip(draw, axes[0], strict=True):
        each(panel)
        panel.spines[["top", "right"]].set_visible(False)
    fig.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
    plt.close(fig)


TIMES = {  # contenders of the convolution, by the method that they share
    "plain iteration": {"deqcore": "deqcore picard", "torchdeq": "torchdeq fixed_point_iter"},
    "Anderson": {
        "deqcore": "deqcore anderson",
        "torchdeq": "torchdeq anderson",
        "xitorch": "xitorch anderson_acc",
    },
    "Broyden": {"deqcore": "deqcore broyden", "torchdeq": "torchdeq broyden"},
}
LIBRARIES = {"deqcore": "#3949ab", "torchdeq": "#b0b7c6", "xitorch": "#d5d9e2"}


def draw_times(axes: Any) -> None:
    """Time of one solve of the convolution to one residual: the medians of docs/benchmarks/results.json."""
    path = FOLDER.parent / "benchmarks" / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["sections"]["cases-torch"]["rows"]
    seconds = {row["contender"]: median(row["seconds"]) for row in rows if row["case"] == "conv" and row["reached"]}
    place, ticks = 0.0, []
    for method, contenders in TIMES.items():
        for library, contender in contenders.items():
            value = 1e3 * seconds[contender]
            axes.barh(place, value, 0.8, color=LIBRARIES[library])
            axes.text(value + 5, place, f"{library}  {value:.0f} ms", va="center", fontsize=10)
            place += 1
        ticks.append((place - (len(contenders) + 1) / 2, method))
        place += 0.6
    axes.set_yticks([at for at, _ in ticks], [method for _, method in ticks], fontsize=11)
    axes.invert_yaxis()
    longest = max(seconds[contender] for contenders in TIMES.values() for contender in contenders.values())
    axes.set(xlim=(0, 1.2e3 * longest), xlabel="milliseconds, lower is better")
    axes.set_title("Convolutional layer, PyTorch: time to the same residual", loc="left", fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def main() -> None:
    """Draw everything."""
    figure("times", draw_times, width=6.8)
    if sys.argv[1:] == ["times"]:
        return
    warnings.simplefilter("ignore", deqcore.errors.ConvergenceWarning)
    figures: dict[str, Any] = {}
    figure("forward", draw_iteration, lambda axes: draw_residuals(axes, figures))
    figure("reuse", lambda axes: draw_reuse(axes, figures), lambda axes: draw_certificate(axes, figures))
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
