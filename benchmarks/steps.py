"""One measured training step of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from deqcore.bench.timing import Spread


@dataclass(frozen=True)
class Step:
    """A training step of one layer.

    Attributes:
        layer: its library, solver and strategy.
        case: the cell.
        forward_evaluations: of f until the value is there.
        backward_evaluations: of f in the backward pass.
        solver_evaluations: of f, as the solver counts them; None where it does not.
        residual: of the value, largest of the batch.
        cosine: of the batch's gradient of all parameters with the exact one.
        error: of that gradient, relative to the exact one's norm; None where it was not measured.
        forward: seconds per kept round. `backward`, `step`: the same for these.
        reference: seconds per evaluation of f without gradient, beside `step`.
        vjps: products of the backward pass, largest of the batch; None where the library does not say.
        floor: seconds that the step's evaluations, vjps and gradient of the parameters take alone, without a solver.
    """

    layer: str
    case: str
    forward_evaluations: int
    backward_evaluations: int
    solver_evaluations: int | None
    residual: float
    cosine: float
    error: float | None
    note: str = ""
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    disturbance: list[float] = field(default_factory=list)
    vjps: int | None = None
    floor: list[float] = field(default_factory=list)

    def against(self, other: Step, part: str = "step") -> Spread:
        """Return the seconds of a part over those of another layer, paired by round."""
        return Spread.of_ratios(getattr(self, part), getattr(other, part))

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Step:
        """Undo `as_dict`."""
        return cls(**{item.name: plain[item.name] for item in fields(cls) if item.name in plain})

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return asdict(self)
