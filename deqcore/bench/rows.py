"""One measured row: a contender on a case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from deqcore.bench.timing import Spread

FLOATS: Final = ("residual_max", "residual_median", "tolerance", "first_seconds")


@dataclass(frozen=True)
class BenchRow:
    """One contender on one case.

    Attributes:
        framework: the backend.
        case: the problem.
        contender: library and solver.
        evaluations: of f for the slowest sample, per solve; products J v count as one each.
        residual_max: over the batch, of the returned state, see `harness.residuals`.
        residual_median: the same, median.
        reached: whether every sample reached the residual that the case asks for.
        tolerance: what the contender was given in its own norm.
        first_seconds: the first call, compilation included.
        memory: bytes by which the process grew during a solve; None where unknown.
        state: bytes of one state.
        seconds: per kept round.
        reference: seconds per stand-alone evaluation of f beside it, per kept round.
        disturbance: share of the machine that other processes used, per kept round.
        dropped: rounds left out for disturbance.
        error: why it could not be measured, if it raised.
    """

    framework: str
    case: str
    contender: str
    evaluations: int
    residual_max: float
    residual_median: float
    reached: bool
    tolerance: float
    first_seconds: float
    memory: int | None
    state: int
    seconds: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    disturbance: list[float] = field(default_factory=list)
    dropped: int = 0
    error: str = ""

    @property
    def library(self) -> str:
        """The first word of the contender."""
        return self.contender.partition(" ")[0]

    @property
    def overhead(self) -> Spread:
        """Seconds / (evaluations × seconds per f), paired by round; 1.0 is the limit of eager code."""
        return Spread.of_ratios(self.seconds, [max(1, self.evaluations) * item for item in self.reference])

    def against(self, other: BenchRow) -> Spread:
        """Return the seconds of this over seconds of another row of the same comparison, paired by round."""
        return Spread.of_ratios(self.seconds, other.seconds)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON: None for NaN, which JSON does not have."""
        return {key: _known(value) for key, value in asdict(self).items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> BenchRow:
        """Undo `as_dict`."""
        result = {item.name: plain[item.name] for item in fields(cls)}
        blank = {key: math.nan for key in FLOATS if result[key] is None}
        shares = [math.nan if share is None else share for share in result["disturbance"]]
        return cls(**result | blank | {"disturbance": shares})


def _known(value: Any) -> Any:
    if isinstance(value, list):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
