"""The settings of a study: the table `[study]` of a config file, checked strictly.

Every list is an axis of the grid. An entry is a name, or a table with the name and its options:

    [study]
    name = "pilot"
    models = ["dense", { name = "conv", width = 16 }]
    strategies = ["exact-ift", { name = "broyden-reuse", label = "plain", options = { max_relative_error = "none" } }]
    seeds = [0, 1, 2]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deqcore.errors import ConfigError
from deqcore.study.translations import LANGUAGES

Option: TypeAlias = bool | int | float | str


class SettingsTable(BaseModel):
    """A table of settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _named(given: object) -> object:
    return {"name": given} if isinstance(given, str) else given


def _listed(given: object) -> object:
    return tuple(given) if isinstance(given, list) else given


class ModelChoice(SettingsTable):
    """A model and its width."""

    name: str
    width: int = Field(default=128, ge=4)


class SolverChoice(SettingsTable):
    """A registered solver and its options."""

    name: str
    options: dict[str, Option] = {}


class StrategyChoice(SettingsTable):
    """A registered strategy, its options, and what tables call it."""

    name: str
    label: str = ""
    options: dict[str, Option | None] = {}

    @model_validator(mode="before")
    @classmethod
    def _label(cls, given: Any) -> Any:
        return {**given, "label": given.get("label") or given.get("name", "")} if isinstance(given, Mapping) else given


class DataChoice(SettingsTable):
    """A data set.

    Attributes:
        name: "digits", "images", "arrays", "text", or "own" (named on the command line).
        path: of the folder or file.
        label: what tables call it.
        size: images are resized to size × size; 0 keeps them.
        per_class: images of each class at most; 0 takes all.
        level: of a text: "char" or "word".
        length: of a text's windows.
        words: the most frequent words (or characters) kept.
        samples: windows of a text at most; 0 takes all.
    """

    name: str
    path: str = ""
    label: str = ""
    size: int = Field(default=0, ge=0)
    per_class: int = Field(default=0, ge=0)
    level: Literal["char", "word"] = "char"
    length: int = Field(default=32, ge=2)
    words: int = Field(default=1000, ge=2)
    samples: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _label(cls, given: Any) -> Any:
        return {**given, "label": given.get("label") or given.get("name", "")} if isinstance(given, Mapping) else given


class TrainingSettings(SettingsTable):
    """The budget that every cell gets.

    Attributes:
        epochs: passes over the training data.
        batch: samples per step; an incomplete last batch is left out (the order changes each epoch).
        rate: Adam's learning rate; falls to zero along a cosine.
        audits: how often in a training the gradient is compared with the exact one.
        threads: of each process; 1 is the fastest for small models and leaves no rounding to chance.
    """

    epochs: int = Field(default=20, ge=1)
    batch: int = Field(default=64, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    audits: int = Field(default=8, ge=0)
    threads: int = Field(default=1, ge=1)


class DriftSettings(SettingsTable):
    """Retraining: the weights are kept, and trained again on data that has drifted a little further.

    Attributes:
        rounds: trainings in a row, each of `training.epochs`; 1 is a single training, without drift.
        amount: of drift from one round to the next, see `deqcore.study.data.drift`.
    """

    rounds: int = Field(default=1, ge=1)
    amount: float = Field(default=0.1, ge=0, le=10)


class CostSettings(SettingsTable):
    """The price of the machine.

    Attributes:
        price_per_hour: of one machine. Without it the report counts no money.
        currency: of the price, such as "USD" or "JPY"; a price needs it.
        trainings_per_month: the retraining schedule.
        scale: a real training in units of the one that was measured (more data, more epochs).
        switch_cost: of changing the strategy, once.
        devices: devices that a training with exact gradients needs for its memory; 1: the report omits devices.
    """

    price_per_hour: float | None = Field(default=None, ge=0)
    currency: str = ""
    trainings_per_month: float = Field(default=30.0, ge=0)
    scale: float = Field(default=1.0, gt=0)
    switch_cost: float = Field(default=0.0, ge=0)
    devices: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _priced(self) -> CostSettings:
        if self.price_per_hour is not None and not self.currency:
            raise ValueError('price_per_hour needs a currency, such as currency = "USD"')
        return self


class Gate(SettingsTable):
    """A criterion that a stage must meet.

    Attributes:
        stage: "pilot", "shadow", "rollout" or another name; stages are passed in the order of the file.
        strategy: label of the strategy on trial.
        metric: see `deqcore.study.report.gates.METRICS`.
        at_least: the lowest value that passes.
        at_most: the highest value that passes.
    """

    stage: str
    strategy: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs at_least or at_most")
        return self


Models: TypeAlias = tuple[Annotated[ModelChoice, BeforeValidator(_named)], ...]
Solvers: TypeAlias = tuple[Annotated[SolverChoice, BeforeValidator(_named)], ...]
Strategies: TypeAlias = tuple[Annotated[StrategyChoice, BeforeValidator(_named)], ...]
Data: TypeAlias = tuple[Annotated[DataChoice, BeforeValidator(_named)], ...]


class Study(SettingsTable):
    """The whole of `[study]`.

    Attributes:
        device: where the models live: "cpu", "cuda", "cuda:1", or whatever the backend calls it; "auto" is its GPU if
            it has one. The attributes that are not listed are named like their key.
    """

    name: str = "digits"
    backends: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("auto",)
    data: Annotated[Data, BeforeValidator(_listed), Field(min_length=1)] = (DataChoice(name="digits"),)
    models: Annotated[Models, BeforeValidator(_listed), Field(min_length=1)] = (ModelChoice(name="dense"),)
    solvers: Annotated[Solvers, BeforeValidator(_listed), Field(min_length=1)] = (SolverChoice(name="broyden"),)
    strategies: Annotated[Strategies, BeforeValidator(_listed), Field(min_length=1)] = (
        StrategyChoice(name="exact-ift"),
        StrategyChoice(name="exact-ift", label="exact-ift 0.01", options={"rtol": 0.01}),
        StrategyChoice(name="exact-ift", label="exact-ift 0.1", options={"rtol": 0.1}),
        StrategyChoice(name="broyden-reuse"),
        StrategyChoice(name="jacobian-free"),
    )
    rtol: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(_listed), Field(min_length=1)] = (
        1e-4,
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_listed), Field(min_length=1)] = (0,)
    max_steps: int = Field(default=40, ge=1)
    device: str = Field(default="auto", pattern=r"^(auto|[a-z]+(:\d+)?)$")
    language: Literal["en", "ja"] = "en"
    training: TrainingSettings = TrainingSettings()
    drift: DriftSettings = DriftSettings()
    cost: CostSettings = CostSettings()
    gates: Annotated[tuple[Gate, ...], BeforeValidator(_listed)] = ()


assert set(LANGUAGES) == {"en", "ja"}


def read(table: Mapping[str, object], origin: str) -> Study:
    """Check the table `[study]`.

    Args:
        table: as it was written.
        origin: where, for the error.

    Raises:
        ConfigError: a key is unknown (with a suggestion) or a value does not fit.
    """
    try:
        return Study.model_validate(dict(table))
    except ValidationError as error:
        raise _as_config_error(error, origin) from None


def _as_config_error(error: ValidationError, origin: str) -> ConfigError:
    """Convert the first mistake to a ConfigError."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if not (isinstance(part, str) and part.endswith("]"))]
    owner = f"[study{''.join(f'.{part}' for part in path[:-1])}] (set by {origin})"
    name = str(path[-1]) if path else "study"
    if first["type"] == "extra_forbidden":
        return ConfigError.unknown_option(owner, name, _keys_at(path[:-1]))
    expected = first["msg"].removeprefix("Value error, ")
    if path and isinstance(path[-1], int):
        owner, name = f"[study] (set by {origin})", f"{path[-2]}[{path[-1]}]"
    return ConfigError(f"{owner}: {name} = {first.get('input')!r} does not fit: {expected[:1].lower()}{expected[1:]}.")


def _keys_at(path: list[int | str]) -> list[str]:
    """Return the keys of the table at a path."""
    tables: dict[str, type[SettingsTable]] = {
        "models": ModelChoice,
        "solvers": SolverChoice,
        "strategies": StrategyChoice,
        "data": DataChoice,
        "training": TrainingSettings,
        "drift": DriftSettings,
        "cost": CostSettings,
        "gates": Gate,
    }
    result = tables[str(path[0])] if path else Study
    return list(result.model_fields)
