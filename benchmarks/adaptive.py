"""The adaptive strategy in training: `python -m benchmarks.adaptive` (torch on the CPU, one thread).

Trains the cells of the study on digits, with the same weights and order of samples for every strategy. On random steps,
drawn independently of the strategy's audits, it compares the parameter gradient that the strategy would use there
without an audit with the exact one of the same batch, and finds the fewest vjps that would have been enough with the
coefficients in force. Costs are counted: evaluations of f, vjps, products with the parameters. Times are those of the
thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from deqcore_torch.study import TorchOps
from torch import Tensor

import deqcore
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import Controller, nested
from deqcore.bench.report import markdown
from deqcore.study.data.base import Dataset
from deqcore.study.data.digits import load
from deqcore.study.models import find
from deqcore.study.models.base import Model

FORWARD: Final[Mapping[str, Any]] = {
    "forward__solver": "broyden", "forward__rtol": 1e-3, "forward__max_steps": 60, "forward__on_failure": "ignore",
    "backward__on_failure": "ignore", "backward__verify_every": 0,
}  # fmt: skip
TARGETS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.65, 0.8)
JUDGED: Final = 0.05
"""Share of the steps that are judged."""


@dataclass
class Run:
    """One training.

    Attributes:
        name: of the strategy.
        seed: of weights and order.
        accuracy: on the test part, in per cent.
        loss: of the last epoch, mean.
        steps: training steps.
        evaluations: of f in forward solves, mean of the slowest samples.
        vjps: per step, of the slowest sample, audits included.
        products: with the parameters, per step, beyond the one that every gradient takes.
        seconds: of the thread, all training steps.
        errors: true relative errors on judged steps.
        taken: vjps in force there.
        enough: fewest vjps that would have been enough there, known only afterwards.
        each: true errors there with 0, 1, … vjps.
        chosen: vjps in force at each step.
        audits: audits that counted.
        excluded: audits that did not.
        over: audits that found more than the target.
    """

    name: str
    seed: int
    accuracy: float = 0.0
    loss: float = 0.0
    steps: int = 0
    evaluations: float = 0.0
    vjps: float = 0.0
    products: float = 0.0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    enough: list[int] = field(default_factory=list)
    each: list[list[float]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    audits: int = 0
    excluded: int = 0
    over: int = 0

    @property
    def cost(self) -> float:
        """Evaluations, vjps and products per step, with the recorded evaluation and the product of every gradient."""
        return self.evaluations + 2 + self.vjps + self.products


class Trained:
    """A model in training with one strategy."""

    def __init__(self, data: Dataset, model: str, width: int, seed: int, strategy: str, options: Mapping[str, object]):
        self.model: Model = find(model)(data.shape, width)
        weights = self.model.initial(np.random.default_rng([seed, 0]))
        self.weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in weights.items()}
        self.ops, self.strategy, self.options = TorchOps(), strategy, dict(options)
        self.state = deqcore.StrategyState()
        self.adam = torch.optim.Adam(self.weights.values(), lr=0.0)

    def loss(self, x: Tensor, y: Tensor, state: deqcore.StrategyState | None, strategy: str) -> tuple[Tensor, Any]:
        """Return the loss with its gradient attached, and the solution."""
        injected = self.model.inject(self.ops, self.weights, x)
        options = self.options if strategy == self.strategy else {}
        sol = deqcore.fixed_point(
            lambda z: self.model.cell(self.ops, self.weights, z, injected),
            self.model.start(self.ops, self.weights, injected),
            strategy_state=state, backward__strategy=strategy, backward__options=options, **FORWARD,
        )  # fmt: skip
        return F.cross_entropy(self.model.read(self.ops, self.weights, sol.value), y), sol

    def gradient(self, x: Tensor, y: Tensor, state: deqcore.StrategyState | None, strategy: str) -> Tensor:
        """Return the gradient of the parameters that the cell sees, as one vector."""
        loss, _ = self.loss(x, y, state, strategy)
        inner = [value for name, value in self.weights.items() if name not in ("R", "c")]
        found = torch.autograd.grad(loss, inner, allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None]).double()


def batches(size: int, batch: int, epochs: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield the epoch and the rows of each step."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, 1, epoch]).permutation(size)
        for i in range(size // batch):
            yield epoch, order[i * batch : (i + 1) * batch]


def judge(trained: Trained, rules: Controller, x: Tensor, y: Tensor, run: Run) -> None:
    """Compare the gradient in force with the exact one; the state of the training does not change."""
    values = trained.state.values
    if values is None:
        return
    s = rules.unpack(np, values.numpy().copy())
    exact = trained.gradient(x, y, None, "exact-ift")
    target = rules.target

    def error(k: int, coefficients: Any) -> float:
        forced = s._replace(since=np.float32(1), interval=np.float32(1e6), jumped=np.float32(0), chosen=np.float32(k))
        forced = forced._replace(coefficients=coefficients, begun=np.float32(1))
        held = deqcore.StrategyState(torch.from_numpy(rules.pack(np, forced).astype(np.float32)))
        found = trained.gradient(x, y, held, "adaptive")
        return float((found - exact).norm() / exact.norm())

    chosen, m = int(s.chosen), rules.candidates
    run.errors.append(error(chosen, s.coefficients))
    run.taken.append(chosen)
    fits = nested(np, s.gram, s.right, np.eye(m, dtype=np.float32))
    run.each.append([error(k, fits[k]) for k in range(m)])
    run.enough.append(next((k for k in range(m) if run.each[-1][k] <= target), m))


def train(
    data: Dataset, model: str, width: int, seed: int, strategy: str, options: Mapping[str, object], *,
    epochs: int = 30, batch: int = 128, rate: float = 3e-3, judged: float = JUDGED, name: str = "",
) -> Run:  # fmt: skip
    """Train once."""
    trained, run = Trained(data, model, width, seed, strategy, options), Run(name or strategy, seed)
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    rules = Adaptive(**options).controller if strategy == "adaptive" else None  # type: ignore[arg-type]
    rng, total, last = np.random.default_rng([seed, 9]), epochs * (len(x) // batch), []
    for epoch, rows in batches(len(x), batch, epochs, seed):
        xs, ys = x[rows], y[rows]
        if rules is not None and rng.random() < judged:
            judge(trained, rules, xs, ys, run)
        began = time.thread_time()
        loss, sol = trained.loss(xs, ys, trained.state, strategy)
        trained.adam.zero_grad()
        loss.backward()
        trained.adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * run.steps / total))
        trained.adam.step()
        run.seconds += time.thread_time() - began
        run.steps += 1
        run.evaluations += float(sol.evaluations.max())
        run.vjps += float(sol.backward.vjps.max())
        run.products += float(sol.backward.gradient_products.max())
        if rules is not None and trained.state.values is not None:
            run.chosen.append(int(rules.unpack(np, trained.state.values.numpy()).chosen))
        if epoch == epochs - 1:
            last.append(loss.item())
    for count in ("evaluations", "vjps", "products"):
        setattr(run, count, getattr(run, count) / run.steps)
    if rules is not None and trained.state.values is not None:
        s = rules.unpack(np, trained.state.values.numpy())
        run.audits, run.excluded, run.over = int(s.audits), int(s.excluded), int(s.over)
    with torch.no_grad():
        injected = trained.model.inject(trained.ops, trained.weights, torch.from_numpy(data.test.x))
        z = deqcore.fixed_point(
            lambda z: trained.model.cell(trained.ops, trained.weights, z, injected),
            trained.model.start(trained.ops, trained.weights, injected), **FORWARD,
        ).value  # fmt: skip
        right = trained.model.read(trained.ops, trained.weights, z).argmax(1).numpy() == data.test.y
    run.accuracy, run.loss = 100 * float(np.mean(right)), float(np.mean(last))
    return run


def contenders(targets: list[float]) -> dict[str, tuple[str, dict[str, object]]]:
    """Return the strategies by the name that the table gives them."""
    found: dict[str, tuple[str, dict[str, object]]] = {"exact-ift": ("exact-ift", {})}
    found["jacobian-free"] = ("jacobian-free", {})
    return found | {f"adaptive, {t:g}": ("adaptive", {"max_relative_error": t}) for t in targets}


def summary(runs: list[Run]) -> list[dict[str, str]]:
    """Return a row for each strategy; differences of accuracy and costs are paired over seeds."""
    by = {(run.name, run.seed): run for run in runs}
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        gaps = [run.accuracy - by["exact-ift", run.seed].accuracy for run in mine]
        half = 2.78 * float(np.std(gaps, ddof=1)) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        free = [by["jacobian-free", run.seed] for run in mine]
        errors, target = [e for run in mine for e in run.errors], float(name.partition(", ")[2] or "nan")
        taken = [k for run in mine for k in run.taken]
        enough = [k for run in mine for k in run.enough]
        rows.append(
            {
                "strategy": name,
                "accuracy": f"{np.mean([run.accuracy for run in mine]):.2f}",
                "minus exact (95 %)": f"{np.mean(gaps):+.2f} ± {half:.2f}",
                "vjps a step": f"{np.mean([run.vjps for run in mine]):.2f}",
                "products a step": f"{np.mean([run.products for run in mine]):.2f}",
                "cost over jacobian-free": f"{np.mean([r.cost / f.cost for r, f in zip(mine, free, strict=True)]):.2f}",
                "time over it": f"{np.mean([r.seconds / f.seconds for r, f in zip(mine, free, strict=True)]):.2f}",
                "judged": str(len(errors)) if errors else "",
                "error: median, 95 %": f"{np.median(errors):.2f}, {np.quantile(errors, 0.95):.2f}" if errors else "",
                "beyond target": f"{100 * np.mean(np.array(errors) > target):.1f} %" if errors else "",
                "vjps in force": f"{np.mean(taken):.2f}" if errors else "",
                "fewest fixed": str(fixed(mine, target)) if errors else "",
                "fewest a step": f"{np.mean(enough):.2f}" if errors else "",
            }
        )
    return rows


def fixed(runs: list[Run], target: float) -> int:
    """Return the least fixed number of vjps that keeps 95 % of the judged steps within the target."""
    each = np.array([errors for run in runs for errors in run.each])
    enough = np.flatnonzero(np.mean(each > target, axis=0) <= 0.05)
    return int(enough[0]) if len(enough) else each.shape[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs")
    parser.add_argument("--model", default="dense", help="dense, slow or conv")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--target", type=float, action="append", help="all of the sweep by default")
    parser.add_argument("--only", action="append", help="strategies by their names in the table; default: all")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--read", type=Path, nargs="+", help="print the table of such files, and measure nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.read:
        runs = [Run(**each) for path in options.read for each in json.loads(path.read_text())]
        rows = summary(runs)
        print(markdown(rows, tuple(rows[0])))
        return
    data, runs = load(), []
    seeds, epochs = (1, 2) if options.quick else (options.seeds, options.epochs)
    for name, (strategy, given) in contenders(options.target or list(TARGETS)).items():
        if options.only and name not in options.only:
            continue
        for seed in range(options.first, options.first + seeds):
            runs.append(train(data, options.model, options.width, seed, strategy, given, epochs=epochs, name=name))
    if options.json:
        options.json.write_text(json.dumps([vars(run) for run in runs], indent=1) + "\n")
    if not options.only:
        rows = summary(runs)
        print(f"{options.model}, width {options.width}, digits, {epochs} epochs, {seeds} seeds")
        print(markdown(rows, tuple(rows[0])))


if __name__ == "__main__":
    main()
