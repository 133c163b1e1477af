"""Train one cell: the same order of samples, rates, audits and clock for every backend and strategy.

The clock runs in training steps only. Compiling and warming up come before it, and it stands still while the model
is evaluated, audited or saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.config import Config
from deqcore.study import store
from deqcore.study.data.base import Dataset, Split
from deqcore.study.data.drift import drifted
from deqcore.study.grid import Cell
from deqcore.study.models import find
from deqcore.study.train.memory import PeakMemory
from deqcore.study.train.trainer import Figures, Step, Trainer

OnProgress: TypeAlias = Callable[[Mapping[str, object]], None]

WEIGHTS, ORDER, AUDIT = range(3)  # streams of random numbers that one seed gives
PARTS: Final = ("forward", "backward", "update")
AUDIT_RTOL: Final = 1e-5
AUDIT_STEPS: Final = 100
AUDIT_PRODUCTS: Final = 40
AUDIT_SAMPLES: Final = 16  # whose spectral radius is estimated
EVALUATION_BATCH: Final = 256


class CellFailure(Exception):
    """A training that failed, with a readable reason.

    Attributes:
        reason: one or two words.
    """

    def __init__(self, detail: str, reason: str = "diverged") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class AuditPoint:
    """An audit of the gradient during training, on a batch of the training data.

    Attributes:
        epoch: epochs done before it.
        cosine: of the strategy's gradient with the exact one.
        ratio: of their norms.
        error: ‖g − g*‖ / ‖g*‖ of the gradient g of all weights; g* is the exact one.
        radius: estimate of the Jacobian's spectral radius, median over samples. `radius_most`: the largest.
    """

    epoch: int
    cosine: float
    ratio: float
    error: float
    radius: float | None
    radius_most: float | None


def initial_weights(cell: Cell, data: Dataset) -> tuple[Any, dict[str, Any]]:
    """Return the model and where it starts: the same numbers on every backend, for every strategy."""
    model = find(cell.model.name, cell.own.model)(data.shape, cell.model.width)
    return model, model.initial(np.random.default_rng([cell.seed, WEIGHTS]))


def batches(cell: Cell, size: int, epoch: int) -> NDArray[np.int64]:
    """Return the rows of the training data, `(steps, batch)`: a function of seed and epoch only."""
    batch = min(cell.training.batch, size)
    order = np.random.default_rng([cell.seed, ORDER, epoch]).permutation(size)
    steps = size // batch
    return order[: steps * batch].reshape(steps, batch)


def rate(cell: Cell, step: int, steps: int) -> float:
    """Return the learning rate of a step: in each round from the full rate to zero along a cosine."""
    round_steps = steps // cell.drift.rounds
    return cell.training.rate * 0.5 * (1 + math.cos(math.pi * (step % round_steps) / round_steps))


def audited(cell: Cell, epoch: int) -> bool:
    """Return whether to audit the gradient before this epoch: `audits` times a round, evenly, first at its start."""
    epochs = cell.training.epochs
    audits = min(cell.training.audits, epochs)
    return audits > 0 and epoch % epochs in {round(i * epochs / audits) for i in range(audits)}


def exact(cell: Cell) -> Config:
    """Return the settings of the reference gradient: implicit, and solved far below the study's tolerance."""
    return Config(
        backend=cell.backend,
        forward={"solver": "broyden", "rtol": AUDIT_RTOL, "max_steps": AUDIT_STEPS, "on_failure": "ignore"},
        backward={
            "strategy": "exact-ift",
            "options": {"rtol": AUDIT_RTOL, "max_steps": AUDIT_STEPS},
            "on_failure": "ignore",
        },
    )


class CellTraining:
    """One cell in training.

    Args:
        cell: what is trained.
        data: on what.
        trainer: the class for its backend.
        folder: where progress is saved.
        tell: takes progress as plain values.
    """

    def __init__(
        self, cell: Cell, data: Dataset, trainer: Callable[..., Trainer], folder: Path, tell: OnProgress
    ) -> None:
        self.cell, self.data, self.folder, self.tell = cell, data, folder, tell
        self.start = data  # before any drift
        model, weights = initial_weights(cell, data)
        if data.kind not in model.accepts:
            raise CellFailure(
                f"the model {cell.model.name!r} takes {' or '.join(model.accepts)}, not {data.kind}", "unfit"
            )
        self.before = PeakMemory.now()
        self.parameters = sum(value.size for value in weights.values())
        self.trainer = trainer(model, weights, cell.config(), cell.device)
        self.best: dict[str, Any] = self._weights()
        self.history: dict[str, Any] = {
            "epochs": 0,
            "steps": [],
            "epoch": [],
            "audits": [],
            "best": None,
            "best_epoch": 0,
            "peak": 0,
            "rounds": [],
        }

    def run(self) -> dict[str, Any]:
        """Train, or continue where a killed process stopped, and look at the test data once.

        Raises:
            CellFailure: the loss is no longer a number.
        """
        self._resume()
        self._warm_up()
        for epoch in range(self.history["epochs"], self.cell.epochs):
            self._begin(epoch)
            self._audit(epoch)
            self._epoch(epoch)
            self._validate(epoch)
            self.history["epochs"] = epoch + 1
            if (epoch + 1) % self.cell.training.epochs == 0:
                self._end_round()
            tensors = {**self.trainer.save(), **{f"best.{name}": value for name, value in self.best.items()}}
            store.write_progress(self.folder, tensors, self.history)
        return self._result()

    def _begin(self, epoch: int) -> None:
        """Take the data of this epoch's round; at the start of a round, forget which epoch was the best."""
        number, inside = divmod(epoch, self.cell.training.epochs)
        self.data = drifted(self.start, number * self.cell.drift.amount)
        if inside == 0:
            self.history["best"] = None

    def _end_round(self) -> None:
        """Go back to the round's best epoch, and look at the test data once."""
        self.trainer.restore(self.trainer.save() | self.best)
        loss, accuracy = self._evaluate(self.data.test)
        self.history["rounds"].append({"test_loss": _number(loss), "test_accuracy": accuracy})

    def measure(self, steps: int) -> dict[str, Any]:
        """Time steps with nothing else running, at the weights of the start and at the latest ones; changes nothing.

        Returns:
            `warm_up` and `times` as in a result; the whole training is extrapolated from them.
        """
        self._warm_up()
        rows = batches(self.cell, len(self.data.train), 0)
        taken: list[Step] = []
        for _ in range(2 if store.read_progress(self.folder) else 1):
            for i in range(steps):
                chosen = rows[i % len(rows)]
                taken.append(self.trainer.step(self.data.train.x[chosen], self.data.train.y[chosen], 0.0))
            self._resume()
        columns = {part: [getattr(step, part) for step in taken] for part in PARTS}
        result = times(columns)
        result["training"] *= len(rows) * self.cell.epochs / len(taken)
        return {"warm_up": self.warm_up, "times": result}

    def _resume(self) -> None:
        result = store.read_progress(self.folder)
        if result is None:
            return
        tensors, history = result
        self.history |= history
        self.trainer.restore({name: value for name, value in tensors.items() if not name.startswith("best.")})
        self.best = {name.removeprefix("best."): v for name, v in tensors.items() if name.startswith("best.")}

    def _weights(self) -> dict[str, Any]:
        return {name: value for name, value in self.trainer.save().items() if name.startswith("weight.")}

    def _warm_up(self) -> None:
        start = time.perf_counter()
        rows = batches(self.cell, len(self.data.train), 0)[0]
        self.trainer.warm_up(self.data.train.x[rows], self.data.train.y[rows], EVALUATION_BATCH)
        self.warm_up = time.perf_counter() - start

    def _epoch(self, epoch: int) -> None:
        rows = batches(self.cell, len(self.data.train), epoch)
        steps = len(rows) * self.cell.epochs
        memory = PeakMemory()
        self.trainer.reset_peak()
        for i, chosen in enumerate(rows):
            number = epoch * len(rows) + i
            step = self.trainer.step(
                self.data.train.x[chosen], self.data.train.y[chosen], rate(self.cell, number, steps)
            )
            if not math.isfinite(step.loss):
                raise CellFailure(f"the loss became {step.loss} at step {number + 1} of {steps} (epoch {epoch + 1})")
            self.history["steps"].append(_row(step))
            self._progress(step, number, steps, epoch)
        memory.stop()
        self.history["peak"] = max(self.history["peak"], self.trainer.peak() or memory.most)

    def _progress(self, step: Step, number: int, steps: int, epoch: int) -> None:
        figures = step.figures
        self.tell(
            {
                "step": number + 1,
                "steps": steps,
                "epoch": epoch + 1,
                "loss": step.loss,
                "residual": figures.residual,
                "evaluations": figures.evaluations_most,
                "vjps": figures.vjps_most,
            }
        )

    def _audit(self, epoch: int) -> None:
        if not audited(self.cell, epoch) or self.cell.explicit:
            return
        rng = np.random.default_rng([self.cell.seed, AUDIT, epoch])
        train = self.data.train
        rows = rng.choice(len(train), min(self.cell.training.batch, len(train)), replace=False)
        x, y, truth = train.x[rows], train.y[rows], exact(self.cell)
        _, result = self.trainer.gradient(x, y, self.cell.config())
        _, wanted = self.trainer.gradient(x, y, truth)
        radius = self.trainer.radius(x[:AUDIT_SAMPLES], truth, AUDIT_PRODUCTS)
        own, size = float(np.linalg.norm(result)), max(float(np.linalg.norm(wanted)), 1e-30)
        audit = AuditPoint(
            epoch=epoch,
            cosine=float(result @ wanted) / (own * size) if own > 0 else 0.0,
            ratio=own / size,
            error=float(np.linalg.norm(result - wanted)) / size,
            radius=_number(np.median(radius)),
            radius_most=_number(radius.max()),
        )
        if not (math.isfinite(audit.cosine) and math.isfinite(audit.ratio)):
            raise CellFailure(f"the gradient is not finite at the audit before epoch {epoch + 1}")
        self.history["audits"].append(asdict(audit))

    def _validate(self, epoch: int) -> None:
        loss, accuracy = self._evaluate(self.data.validation)
        self.history["epoch"].append({"validation_loss": _number(loss), "validation_accuracy": accuracy})
        # By loss: with a few hundred samples many epochs have one accuracy, and the first of them is rarely the best.
        if self.history["best"] is None or loss < self.history["best"]:
            self.history["best"], self.history["best_epoch"] = _number(loss), epoch + 1
            self.best = self._weights()

    def _evaluate(self, split: Split) -> tuple[float, float]:
        """Mean cross-entropy and accuracy. Batches have one size, the last one is filled up: nothing is recompiled."""
        logits = []
        for start in range(0, len(split), EVALUATION_BATCH):
            rows = np.arange(start, start + EVALUATION_BATCH)
            result = self.trainer.predict(split.x[np.minimum(rows, len(split) - 1)])
            logits.append(result[: len(split) - start])
        scores = np.concatenate(logits).astype(np.float64)
        scores = scores - scores.max(-1, keepdims=True)
        scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        right = np.take_along_axis(scores, split.y[..., None], axis=-1)
        return float(-right.mean()), float((scores.argmax(-1) == split.y).mean())

    def _step_memory(self) -> int | None:
        """Measure a step's memory on the first batch, after the training: the step's state is not used any more."""
        rows = batches(self.cell, len(self.data.train), 0)[0]
        return self.trainer.step_memory(self.data.train.x[rows], self.data.train.y[rows])

    def _result(self) -> dict[str, Any]:
        history, last = self.history, self.history["rounds"][-1]
        columns = {name: [row[name] for row in history["steps"]] for name in history["steps"][0]}
        return {
            "status": "ok",
            "cell": self.cell.as_dict(),
            **last,
            "rounds": history["rounds"],
            "best_epoch": history["best_epoch"],
            "parameters": self.parameters,
            "device": self.trainer.device(),
            "test_samples": int(self.data.test.y.size),
            "warm_up": self.warm_up,
            "times": times(columns),
            "peak_memory": history["peak"],
            "training_memory": history["peak"] - (0 if self.trainer.peak() is not None else self.before),
            "step_memory": self._step_memory(),
            "figures": {name: _average(columns[name]) for name in Figures._fields},
            "cosine": _average([audit["cosine"] for audit in history["audits"]]),
            "history": {"steps": columns, "epochs": history["epoch"], "audits": history["audits"]},
        }


def times(columns: Mapping[str, Any]) -> dict[str, float]:
    """Return the median seconds of each part of a step, and of the whole training (the sum of its steps)."""
    parts = {name: float(median(columns[name])) for name in PARTS}
    whole = [sum(item) for item in zip(*(columns[name] for name in PARTS), strict=True)]
    return parts | {"step": float(median(whole)), "training": float(sum(whole))}


def _row(step: Step) -> dict[str, Any]:
    parts = {"loss": step.loss, "forward": step.forward, "backward": step.backward, "update": step.update}
    return parts | step.figures._asdict()


def _average(values: list[Any]) -> float | None:
    available = [value for value in values if value is not None]
    return sum(available) / len(available) if available else None


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
