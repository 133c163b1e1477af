"""The adaptive strategy in training: `python -m benchmarks.adaptive --task digits` (torch on the CPU, one thread).

Trains a task of docs/evidence (digits, slow, images, text), with the same weights and order of samples for every
strategy. `images` and `text` need `--data FOLDER`, as in `python -m benchmarks.evidence`. On random steps,
drawn independently of the strategy's audits, it compares the parameter gradient that the strategy would use there
without an audit with the exact one of the same batch, and finds the fewest vjps that would have been enough with the
coefficients in force. Costs are counted: evaluations of f, vjps, products with the parameters. Times are those of the
thread. On other random steps it times one vjp and one product with the parameters, outside of the training's time, so
that the time beyond jacobian-free can be compared with that of the vjps which the strategy reports.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from deqcore_torch.study import TorchOps
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import deqcore
from benchmarks import evidence
from benchmarks.adaptive_table import Run, summary
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import Controller, nested
from deqcore.bench.report import markdown
from deqcore.study.data import Dataset, load
from deqcore.study.models import find
from deqcore.study.models.base import Model
from deqcore.study.settings import DataChoice

QUIET: Final[Mapping[str, Any]] = {
    "forward__on_failure": "ignore", "backward__on_failure": "ignore", "backward__verify_every": 0,
}  # fmt: skip
TASKS: Final = ("digits", "slow", "images", "text")
EVALUATION_BATCH: Final = 256
MAX_STEPS: Final = 60
"""Of the forward solve, where the study of the task names none."""
Backward = tuple[str, dict[str, object]]
"""A strategy's name and its options."""
REFERENCE: Final[Backward] = ("exact-ift", {})
LOOSER: Final = (0.1, 0.5)
"""Residuals of the adjoint equation with which `exact-ift` runs beside `adaptive`."""
TARGETS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.65, 0.8)
JUDGED: Final = 0.05
"""Share of the steps that are judged."""
TIMED: Final = 0.05
"""Share of the steps at which one vjp and one product are timed."""
REPEATS: Final = 5
"""Of each such time."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: of the study in docs/evidence.
        data: its data.
        model: name of its model, of size `width`.
        forward: settings of its forward solves.
        epochs: of a training. `batch`: samples of a step. `rate`: the first learning rate, of Adam.
    """

    name: str
    data: Dataset
    model: str
    width: int
    forward: Mapping[str, Any]
    epochs: int
    batch: int
    rate: float

    @classmethod
    def of(cls, name: str, source: Path | None, work: Path) -> Task:
        """Read the settings and the data of a study of docs/evidence.

        Raises:
            DeqcoreError: the study needs data that `source` does not have.
        """
        asked = evidence.settings(f"{name}-torch")
        chosen = dict(asked.get("data", [{"name": "digits"}])[0])
        if name in evidence.NEEDS:
            evidence.prepare([f"{name}-torch"], source, work)
            chosen["path"] = str(work / chosen["path"])
        model, training = asked["models"][0], asked["training"]
        forward = {
            "forward__solver": "broyden", "forward__rtol": asked["rtol"][0],
            "forward__max_steps": asked.get("max_steps", MAX_STEPS),
        }  # fmt: skip
        sizes = (training["epochs"], training["batch"], training["rate"])
        return cls(name, load(DataChoice(**chosen)), model["name"], model["width"], forward | QUIET, *sizes)


class Trained:
    """A model in training with one strategy."""

    def __init__(self, task: Task, seed: int, backward: Backward):
        self.model: Model = find(task.model)(task.data.shape, task.width)
        self.forward = task.forward
        weights = self.model.initial(np.random.default_rng([seed, 0]))
        self.weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in weights.items()}
        self.ops, self.backward = TorchOps(), backward
        self.state = deqcore.StrategyState()
        self.adam = torch.optim.Adam(self.weights.values(), lr=0.0)

    def logits(self, x: Tensor, state: deqcore.StrategyState | None, backward: Backward) -> tuple[Tensor, Any]:
        """Return the logits, shape `(batch, classes)` or `(batch, tokens, classes)`, and the solution."""
        strategy, options = backward
        injected = self.model.inject(self.ops, self.weights, x)
        sol = deqcore.fixed_point(
            lambda z: self.model.cell(self.ops, self.weights, z, injected),
            self.model.start(self.ops, self.weights, injected),
            strategy_state=state, backward__strategy=strategy, backward__options=options, **self.forward,
        )  # fmt: skip
        return self.model.read(self.ops, self.weights, sol.value), sol

    def loss(self, x: Tensor, y: Tensor, state: deqcore.StrategyState | None, backward: Backward) -> tuple[Tensor, Any]:
        """Return the loss with its gradient attached, and the solution."""
        logits, sol = self.logits(x, state, backward)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten()), sol

    def inner(self, z: Any) -> list[Tensor]:
        """Return the weights that the readout of `z` does not use: those of the cell and of what it is given."""
        weights = list(self.weights.values())
        used = torch.autograd.grad(self.model.read(self.ops, self.weights, z).sum(), weights, allow_unused=True)
        return [weight for weight, found in zip(weights, used, strict=True) if found is None]

    def gradient(self, x: Tensor, y: Tensor, state: deqcore.StrategyState | None, backward: Backward) -> Tensor:
        """Return the gradient of the parameters that the cell sees, as one vector."""
        loss, sol = self.loss(x, y, state, backward)
        found = torch.autograd.grad(loss, self.inner(sol.z), allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None]).double()

    def times(self, x: Tensor) -> tuple[float, float]:
        """Return the seconds of the thread of one vjp and of one product with the parameters, at the equilibria."""
        with torch.no_grad():
            _, sol = self.logits(x, None, ("jacobian-free", {}))
            given = self.model.inject(self.ops, self.weights, x)
        leaves, spec = tree_flatten(given)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        states, shape = tree_flatten(sol.z)
        states = [state.detach().requires_grad_() for state in states]
        z, injected = tree_unflatten(states, shape), tree_unflatten(leaves, spec)
        out = tree_flatten(self.model.cell(self.ops, self.weights, z, injected))[0]
        cotangents = [torch.randn_like(part) for part in out]

        def timed(wanted: list[Tensor]) -> float:
            seconds = []
            for _ in range(REPEATS):
                began = time.thread_time()
                torch.autograd.grad(out, wanted, cotangents, retain_graph=True, allow_unused=True)
                seconds.append(time.thread_time() - began)
            return float(np.median(seconds))

        return timed(states), timed([*self.weights.values(), *leaves])


def batches(size: int, batch: int, epochs: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield the epoch and the rows of each step."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, 1, epoch]).permutation(size)
        for i in range(size // batch):
            yield epoch, order[i * batch : (i + 1) * batch]


def judge(trained: Trained, rules: Controller | None, x: Tensor, y: Tensor, run: Run) -> None:
    """Compare the gradient in force with the exact one; the state of the training does not change."""
    values = trained.state.values
    if rules is not None and values is None:
        return
    exact = trained.gradient(x, y, None, REFERENCE)
    if rules is None:
        run.errors.append(float((trained.gradient(x, y, None, trained.backward) - exact).norm() / exact.norm()))
        return
    s, target = rules.unpack(np, values.numpy().copy()), rules.target

    def error(k: int, coefficients: Any) -> float:
        forced = s._replace(since=np.float32(1), interval=np.float32(1e6), jumped=np.float32(0), chosen=np.float32(k))
        forced = forced._replace(coefficients=coefficients, begun=np.float32(1), square=np.float32(k * k))
        held = deqcore.StrategyState(torch.from_numpy(rules.pack(np, forced).astype(np.float32)))
        found = trained.gradient(x, y, held, trained.backward)
        return float((found - exact).norm() / exact.norm())

    chosen, m = int(s.chosen), rules.candidates
    run.errors.append(error(chosen, s.coefficients))
    run.taken.append(chosen)
    fits = nested(np, s.gram, s.right, np.eye(m, dtype=np.float32))
    run.each.append([error(k, fits[k]) for k in range(m)])
    run.enough.append(next((k for k in range(m) if run.each[-1][k] <= target), m))


def train(task: Task, seed: int, backward: Backward, *, judged: float = JUDGED, name: str = "") -> Run:
    """Train once."""
    (strategy, options), run = backward, Run(name or backward[0], seed)
    trained = Trained(task, seed, backward)
    x, y = torch.from_numpy(task.data.train.x), torch.from_numpy(task.data.train.y)
    rules = Adaptive(**options).controller if strategy == "adaptive" else None  # type: ignore[arg-type]
    timer, units = np.random.default_rng([seed, 10]), []
    rng, total, last = np.random.default_rng([seed, 9]), task.epochs * (len(x) // task.batch), []
    for epoch, rows in batches(len(x), task.batch, task.epochs, seed):
        xs, ys = x[rows], y[rows]
        if name != "exact-ift" and rng.random() < judged:
            judge(trained, rules, xs, ys, run)
        if timer.random() < TIMED:
            units.append(trained.times(xs))
        began = time.thread_time()
        loss, sol = trained.loss(xs, ys, trained.state, backward)
        solved = time.thread_time()
        trained.adam.zero_grad()
        loss.backward()
        trained.adam.param_groups[0]["lr"] = task.rate * 0.5 * (1 + math.cos(math.pi * run.steps / total))
        trained.adam.step()
        run.seconds += time.thread_time() - began
        run.backward += time.thread_time() - solved
        run.steps += 1
        run.evaluations += float(sol.evaluations.max())
        run.vjps += float(sol.backward.vjps.max())
        run.products += float(sol.backward.gradient_products.max())
        if rules is not None and trained.state.values is not None:
            run.chosen.append(int(rules.unpack(np, trained.state.values.numpy()).chosen))
        if epoch == task.epochs - 1:
            last.append(loss.item())
    for count in ("evaluations", "vjps", "products"):
        setattr(run, count, getattr(run, count) / run.steps)
    if rules is not None and trained.state.values is not None:
        s = rules.unpack(np, trained.state.values.numpy())
        run.audits, run.excluded, run.over = int(s.audits), int(s.excluded), int(s.over)
    run.vjp, run.product = map(float, np.mean(units, axis=0)) if units else (0.0, 0.0)
    run.loss = float(np.mean(last))
    run.accuracy, run.test_loss = evaluate(trained, task.data)
    return run


def evaluate(trained: Trained, data: Dataset) -> tuple[float, float]:
    """Return the accuracy in per cent and the mean cross-entropy on the test part."""
    right, losses = [], []
    for start in range(0, len(data.test), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        y = torch.from_numpy(data.test.y[rows])
        with torch.no_grad():
            logits, _ = trained.logits(torch.from_numpy(data.test.x[rows]), None, ("jacobian-free", {}))
            right.append((logits.argmax(-1) == y).flatten())
            losses.append(F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none"))
    return 100 * float(torch.cat(right).double().mean()), float(torch.cat(losses).double().mean())


def contenders(targets: list[float]) -> dict[str, Backward]:
    """Return the strategies by the name that the table gives them."""
    found: dict[str, Backward] = {"exact-ift": REFERENCE, "jacobian-free": ("jacobian-free", {})}
    found |= {f"exact-ift, residual {rtol:g}": ("exact-ift", {"rtol": rtol}) for rtol in LOOSER}
    return found | {f"adaptive, {t:g}": ("adaptive", {"max_relative_error": t}) for t in targets}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and two epochs")
    parser.add_argument("--task", default="digits", choices=TASKS, help="a study of docs/evidence")
    parser.add_argument("--data", type=Path, help="folder with the archive of images and the texts")
    parser.add_argument("--work", type=Path, default=Path("study-evidence/data"), help="where images are unpacked")
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
    task, runs = Task.of(options.task, options.data, options.work.resolve()), []
    seeds, task = (1, replace(task, epochs=2)) if options.quick else (options.seeds, task)
    strategies = contenders(options.target or list(TARGETS))
    if unknown := set(options.only or ()) - set(strategies):
        parser.error(f"--only: unknown {sorted(unknown)}; choose from {list(strategies)}")
    for name, backward in strategies.items():
        if options.only and name not in options.only:
            continue
        for seed in range(options.first, options.first + seeds):
            runs.append(train(task, seed, backward, name=name))
            if options.json:
                options.json.write_text(json.dumps([vars(run) for run in runs], indent=1) + "\n")
    if not options.only:
        rows = summary(runs)
        print(f"{task.name}: {task.model}, width {task.width}, {task.epochs} epochs, {seeds} seeds")
        print(markdown(rows, tuple(rows[0])))


if __name__ == "__main__":
    main()
