"""What a study means: its cells, each one training with everything that decides its numbers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Final

from deqcore import plugins
from deqcore.abc.backward import Strategy
from deqcore.config import Config
from deqcore.errors import ConfigError, StrategyError, UnknownNameError
from deqcore.study.models import find
from deqcore.study.settings import (
    DataChoice,
    DriftSettings,
    ModelChoice,
    SettingsTable,
    SolverChoice,
    StrategyChoice,
    Study,
    TrainingSettings,
)

FORMAT: Final = 1  # of a cell's files; raised when old results cannot be read, or would come out differently
EXPLICIT: Final = "explicit"


@dataclass(frozen=True)
class UserCode:
    """Import strings of the user's own code, from the command line."""

    data: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Cell:
    """One training. Equal cells give equal numbers."""

    data: DataChoice
    backend: str
    model: ModelChoice
    solver: SolverChoice
    strategy: StrategyChoice
    rtol: float
    seed: int
    max_steps: int
    training: TrainingSettings
    own: UserCode = field(default=UserCode())
    device: str = "auto"
    drift: DriftSettings = field(default=DriftSettings())

    @property
    def explicit(self) -> bool:
        """Whether the model has no equilibrium, so that no solver and no strategy is used."""
        return self.strategy.name == EXPLICIT

    @property
    def epochs(self) -> int:
        """Of all rounds together."""
        return self.training.epochs * self.drift.rounds

    @property
    def key(self) -> str:
        """Name of the cell's folder: readable, and different for cells that differ in anything."""
        content = json.dumps([FORMAT, self.as_dict()], sort_keys=True).encode()
        parts = (self.data.label, self.backend, self.model.name, self.solver.name, self.strategy.label, f"s{self.seed}")
        slug = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-").lower()[:80]
        return f"{slug}-{hashlib.sha256(content).hexdigest()[:8]}"

    @property
    def label(self) -> str:
        """For progress bars and error messages."""
        parts = [self.data.label, self.backend, self.model.name]
        parts += [] if self.explicit else [self.solver.name, self.strategy.label, f"{self.rtol:g}"]
        return " ".join((*parts, f"seed {self.seed}"))

    def config(self) -> Config:
        """Return the settings of its solves. What does not converge is counted, so nothing warns."""
        return Config(
            backend=self.backend,
            forward={
                "solver": self.solver.name,
                "options": dict(self.solver.options),
                "rtol": self.rtol,
                "max_steps": self.max_steps,
                "on_failure": "ignore",
            },
            backward={
                "strategy": self.strategy.name,
                "options": _options(self.strategy),
                "on_failure": "ignore",
            },
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        tables = ("data", "model", "solver", "strategy", "training")
        plain: dict[str, Any] = {name: getattr(self, name).model_dump() for name in tables}
        numbers = {name: getattr(self, name) for name in ("backend", "rtol", "seed", "max_steps")}
        plain |= numbers | {"own": asdict(self.own)}
        plain |= {} if self.device == "auto" else {"device": self.device}
        return plain | {"drift": self.drift.model_dump()} if self.drift.rounds > 1 else plain

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Cell:
        """Undo `as_dict`."""
        tables: dict[str, type[SettingsTable]] = {
            "data": DataChoice,
            "model": ModelChoice,
            "solver": SolverChoice,
            "strategy": StrategyChoice,
            "training": TrainingSettings,
        }
        read: dict[str, Any] = {name: table.model_validate(plain[name]) for name, table in tables.items()}
        numbers = {name: plain[name] for name in ("backend", "rtol", "seed", "max_steps")}
        drift = DriftSettings.model_validate(plain.get("drift", {}))
        return cls(**read, **numbers, own=UserCode(**plain["own"]), device=plain.get("device", "auto"), drift=drift)


def cells(study: Study, own: UserCode, backends: tuple[str, ...]) -> list[Cell]:
    """Return the grid, seeds outermost, so that a study that is stopped early has compared everything on some seeds.

    Args:
        study: what was asked for.
        own: the user's code.
        backends: the names that `study.backends` stand for.

    Raises:
        UnknownNameError: a name is not registered.
        ConfigError: an option does not exist or does not fit; two entries of an axis are equal.
        StrategyError: a strategy needs an estimate that a solver does not keep.
    """
    _check(study, own, backends)
    result = [cell for seed in study.seeds for cell in _of_seed(study, own, backends, seed)]
    keys = [cell.key for cell in result]
    if len(set(keys)) < len(keys):
        raise ConfigError("The study asks for the same cell twice: remove the repeated entry of an axis.")
    return result


def _of_seed(study: Study, own: UserCode, backends: tuple[str, ...], seed: int) -> Iterator[Cell]:
    for data, backend, model in product(study.data, backends, study.models):
        if not _fits(data, model, own):
            continue
        shared: dict[str, Any] = {
            "data": data,
            "backend": backend,
            "model": model,
            "seed": seed,
            "max_steps": study.max_steps,
            "training": study.training,
            "own": own,
            "device": study.device,
            "drift": study.drift,
        }
        if not find(model.name, own.model).equilibrium:
            explicit = StrategyChoice(name=EXPLICIT)
            yield Cell(solver=SolverChoice(name="none"), strategy=explicit, rtol=0.0, **shared)
            continue
        for rtol, solver, strategy in product(study.rtol, study.solvers, study.strategies):
            yield Cell(solver=solver, strategy=strategy, rtol=rtol, **shared)


def _fits(data: DataChoice, model: ModelChoice, own: UserCode) -> bool:
    """Return whether a model takes the data, as far as that is known before the data is read."""
    given = _gives(data, own)
    return given is None or given in find(model.name, own.model).accepts


def _gives(data: DataChoice, own: UserCode) -> str | None:
    """Return the kind of its inputs, if that is known before it is read."""
    if data.name == "own" and own.data is not None:
        return None
    spec = plugins.spec("data", data.name)
    return spec.gives if isinstance(spec, plugins.DataSpec) else None


def _check_pairs(study: Study, own: UserCode) -> None:
    for model in study.models:
        if not any(_fits(data, model, own) for data in study.data):
            takes = " or ".join(find(model.name, own.model).accepts)
            raise ConfigError(f"[study]: the model {model.name!r} takes {takes}. Add an entry to data that gives it.")
    for data in study.data:
        if not any(_fits(data, model, own) for model in study.models):
            raise ConfigError(
                f"[study]: the data {data.label!r} is {_gives(data, own)}. Add an entry to models that takes it."
            )


def _check_own(study: Study, own: UserCode) -> None:
    """Check that the file names the user's own code ("own"); otherwise the study would silently leave it out."""
    for option, given, axis, choices in (
        ("--data", own.data, "data", study.data),
        ("--model", own.model, "models", study.models),
    ):
        if given is not None and "own" not in [choice.name for choice in choices]:
            raise ConfigError(
                f'{option} {given!r} is named, but [study] {axis} has no entry "own", which stands for it: write '
                f'{axis} = ["own"], or leave {axis} out.'
            )


def _check(study: Study, own: UserCode, backends: tuple[str, ...]) -> None:
    """Find every mistake in the names and options before the first training."""
    _check_own(study, own)
    axes = {"strategies": [item.label for item in study.strategies], "data": [item.label for item in study.data]}
    for axis, labels in axes.items():
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"[study]: two entries of {axis} have the label {label!r}. Give one of them another label."
                )
    trained = {spec.backend for spec in plugins.trainers().values()}
    for backend in backends:
        plugins.spec("backend", backend)
        if backend not in trained:
            raise UnknownNameError.of("trainer", backend, trained, " A study trains, so its backend needs a trainer.")
    for model in study.models:
        find(model.name, own.model)
    _check_pairs(study, own)
    for solver, strategy in product(study.solvers, study.strategies):
        made = plugins.make_solver(solver.name, solver.options)
        backward = plugins.make_strategy(strategy.name, _options(strategy))
        if isinstance(backward, Strategy) and backward.wants_estimate() and not made.has_estimate:
            raise StrategyError.needs_estimate(strategy.label, solver.name, ("broyden",))


def _options(strategy: StrategyChoice) -> dict[str, object]:
    """TOML has no null: the text "none" stands for it in an option `max_relative_error`."""
    return {
        name: None if name == "max_relative_error" and value == "none" else value
        for name, value in strategy.options.items()
    }
