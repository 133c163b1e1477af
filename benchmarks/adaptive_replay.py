"""Rules of the adaptive strategy on recorded trainings: `python -m benchmarks.adaptive_replay --task digits`.

Trains once with an audit of all powers in every step and keeps the inner products of its gradients. Then the controller
runs over these steps without a training: each pass that is not exact is judged, not one in twenty. Two trainings differ
by chance more than two rules do; here the steps are the same for all. The figures are means over starts and intervals.
"""

from __future__ import annotations

import argparse
import math
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import numpy as np
import torch

import deqcore
from benchmarks.adaptive import TASKS, Task, Trained, batches
from deqcore.backward import adaptive
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import Controller, Signals
from deqcore.bench.report import markdown

RECORDED: Final[dict[str, object]] = {"max_relative_error": 0.5, "audit_every": 1, "audit_rtol": 1e-3}
STARTS: Final = (0, 2, 5)
INTERVALS: Final = (40, 50)


class Step(NamedTuple):
    """One step of a training.

    Attributes:
        gram: inner products of the gradients of u, g, Jᵀg, … `(m + 1, m + 1)`.
        growth: ‖(Jᵀ)^j g‖ / ‖g‖ for each j, mean over samples `(m,)`.
        now: the free signals.
        vjps: of the solve, to the residual of `RECORDED`.
    """

    gram: Any
    growth: Any
    now: Signals
    vjps: int


@dataclass
class Counts:
    """What the controller did. Attributes are counts of passes, but `vjps` and `products`."""

    steps: int = 0
    over: int = 0
    audits: int = 0
    exact: int = 0
    vjps: float = 0.0
    products: int = 0

    def add(self, other: Counts) -> None:
        """Add those of another replay."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def record(task: Task, seed: int) -> Iterator[Step]:
    """Train with exact gradients, and yield each step."""
    strategy, last = Adaptive(**RECORDED), {}  # type: ignore[arg-type]
    rules, form = strategy.controller, adaptive.powers_gram
    trained = Trained(task, seed, ("adaptive", RECORDED))
    x, y = torch.from_numpy(task.data.train.x), torch.from_numpy(task.data.train.y)
    new = rules.unpack(np, np.array(rules.initial(), np.float32))
    forced = rules.pack(np, new._replace(begun=np.float32(1), chosen=np.float32(rules.candidates)))
    forced = np.asarray(forced, np.float32)

    def kept(backend: Any, k: Any, first: Any, u: Any, sound: Any, count: int, *rest: Any, **options: Any) -> Any:
        gram, products = form(backend, k, first, u, sound, count, *rest, **options)
        columns, slots = k.columns.masked(None).vectors(), first.shape[1]
        c, growth = first + 0.0, []
        for _ in range(count):
            growth.append(float(torch.linalg.vector_norm(c, dim=1).mean()))
            weights = (columns[:, :, slots:] @ c[:, :, None])[:, None, :, 0]
            c = c - (weights @ columns[:, :, :slots])[:, 0]
        last.update(gram=gram.numpy().copy(), growth=np.array(growth))
        return gram, products

    total = task.epochs * (len(x) // task.batch)
    with mock.patch.object(adaptive, "powers_gram", kept):
        for number, (_, rows) in enumerate(batches(len(x), task.batch, task.epochs, seed)):
            trained.state = deqcore.StrategyState(torch.from_numpy(forced.copy()))
            loss, sol = trained.loss(x[rows], y[rows], trained.state, trained.backward)
            trained.adam.zero_grad()
            loss.backward()
            trained.adam.param_groups[0]["lr"] = task.rate * 0.5 * (1 + math.cos(math.pi * number / total))
            trained.adam.step()
            s = rules.unpack(np, np.asarray(trained.state.values))
            yield Step(last["gram"], last["growth"], Signals(s.forward, s.unconverged), int(sol.backward.vjps.max()))


def replay(rules: Controller, steps: list[Step]) -> Counts:
    """Run the controller over the steps of one training. Errors count in all passes; exact ones have none."""
    counts, m = Counts(), rules.candidates
    s, eye = rules.unpack(np, np.array(rules.initial())), np.eye(m)
    for step in steps:
        sound = np.isfinite(step.gram).all() and step.gram[0, 0] > 0
        unit = step.gram / step.gram[0, 0] if sound else np.zeros_like(step.gram)
        gram, right, k = unit[1:, 1:], unit[0, 1:], int(s.chosen)
        counts.steps += 1
        if sound and s.begun and k < m:
            c = s.coefficients
            counts.over += bool(1 - 2 * c @ right + c @ gram @ c > rules.target**2)
        if rules.due(np, s):
            formed = int(rules.powers(np, s))
            there = np.arange(m) < formed
            counts.audits += 1
            counts.products += formed + 2
            counts.vjps += max(step.vjps, formed - 1)
            learned = rules.learn(np, s, gram * np.outer(there, there), right * there, eye, step.now)
            s = learned if sound else rules.exclude(np, s)
        elif k >= m:
            counts.exact += 1
            counts.vjps += step.vjps
            s = s._replace(since=s.since + 1)
        else:
            spent = int(rules.steps(np, s))
            counts.vjps += spent
            s = rules.grown(np, s, step.growth[min(spent, m - 1)], step.now)
    return counts


def main() -> None:
    """Record, or read what was recorded, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits", choices=TASKS, help="a study of docs/evidence")
    parser.add_argument("--data", type=Path, help="folder with the archive of images and the texts")
    parser.add_argument("--work", type=Path, default=Path("study-evidence/data"), help="where images are unpacked")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--steps", type=int, help="at most, of each training")
    parser.add_argument("--file", type=Path, help="keep the steps here, and read them if the file exists")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.file and options.file.exists():
        trainings = pickle.loads(options.file.read_bytes())
    else:
        task = Task.of(options.task, options.data, options.work.resolve())
        trainings = [[*record(task, seed)] for seed in range(options.seeds)]
        if options.file:
            options.file.write_bytes(pickle.dumps(trainings))
    counts = Counts()
    for start in STARTS:
        for interval in INTERVALS:
            rules = Adaptive(max_relative_error=options.target, audit_every=interval).controller
            for steps in trainings:
                counts.add(replay(rules, steps[start : options.steps]))
    shares = {
        "beyond target": f"{100 * counts.over / counts.steps:.1f} %",
        "audits": f"{100 * counts.audits / counts.steps:.1f} %",
        "exact passes": f"{100 * counts.exact / counts.steps:.1f} %",
        "vjps a step": f"{counts.vjps / counts.steps:.2f}",
        "products a step": f"{counts.products / counts.steps:.2f}",
    }
    print(markdown([shares], tuple(shares)))


if __name__ == "__main__":
    main()
