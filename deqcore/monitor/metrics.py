"""Standard names, units and meanings: the one table that the monitor, its sinks, triggers, views and dashboard use.

Names follow the practice of Prometheus: one prefix, and base units. Every value of a row is a float; what was not
measured is absent, never zero and never NaN.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from deqcore.errors import ConfigError, did_you_mean, listing

NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
PREFIX: Final = "deq_"  # of the standard names; a config that uses another name with it is wrong


@dataclass(frozen=True)
class Metric:
    """The name, unit and meaning of a number.

    Attributes:
        name: letters, digits and underscores, as Prometheus wants it.
        unit: "1" for ratios, else "steps", "seconds", "samples", "norm" (of the state's unit).
        help: one sentence.

    Example:
        >>> Metric("my_loss", "nats", "Training loss.").unit
        'nats'
    """

    name: str
    unit: str
    help: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            expected = "letters, digits and underscores, such as 'my_loss'"
            raise ConfigError.bad_value("Metric", "name", self.name, expected)


STANDARD: Final[tuple[Metric, ...]] = (
    Metric("deq_forward_steps", "steps", "Solver steps, mean over the batch."),
    Metric("deq_forward_steps_max", "steps", "Solver steps of the slowest sample."),
    Metric("deq_forward_evaluations", "evaluations", "Evaluations of f in the forward solve, mean over the batch."),
    Metric("deq_forward_residual", "norm", "‖f(z) − z‖ of the returned iterate, median over the batch."),
    Metric("deq_forward_residual_max", "norm", "‖f(z) − z‖ of the worst sample (inf where it is not finite)."),
    Metric("deq_forward_seconds", "seconds", "Host time of the forward solve."),
    Metric("deq_unconverged_fraction", "1", "Samples whose solve did not meet the forward tolerance."),
    Metric("deq_nonfinite_fraction", "1", "Samples where f returned NaN or inf, or whose solve diverged."),
    Metric("deq_backward_steps", "steps", "Vector–Jacobian products of the backward pass, mean over the batch."),
    Metric("deq_backward_steps_max", "steps", "Vector–Jacobian products of the costliest sample."),
    Metric("deq_backward_residual", "1", "Relative adjoint residual ‖g + Jᵀu − u‖ / ‖g‖, median over the batch."),
    Metric("deq_backward_residual_max", "1", "Relative adjoint residual of the worst sample."),
    Metric(
        "deq_backward_error", "1", "Estimate of the gradient's relative error, worst sample (an estimate, no bound)."
    ),
    Metric(
        "deq_coupling",
        "1",
        "How much of a vector–Jacobian product lands in rows where its cotangent is zero: above 0, f couples the rows.",
    ),
    Metric("deq_backward_seconds", "seconds", "Host time of the adjoint solve."),
    Metric("deq_uncertified_fraction", "1", "Samples whose backward pass missed the target of its strategy."),
    Metric("deq_refined_fraction", "1", "Samples whose reused gradient needed more than the certificate's product."),
    Metric("deq_fallback_fraction", "1", "Samples whose backward pass used its fallback."),
    Metric("deq_gradient_cosine", "1", "Gradient audit: cosine between the gradient used and the exact one."),
    Metric("deq_gradient_error", "1", "Gradient audit: relative error of the gradient used, 2-norm."),
    Metric("deq_gradient_products", "products", "Products with the parameters that an audit of a strategy took."),
    Metric("deq_spectral_radius", "1", "Estimated spectral radius of the Jacobian of f at the fixed point."),
    Metric("deq_residual_psi", "1", "Drift of the residuals from the reference: population stability index."),
    Metric("deq_residual_ks", "1", "Drift of the residuals from the reference: Kolmogorov–Smirnov distance."),
    Metric("deq_residual_ks_pvalue", "1", "Probability of such a distance without drift."),
    Metric("deq_steps_psi", "1", "Drift of the steps from the reference: population stability index."),
    Metric("deq_steps_ks", "1", "Drift of the steps from the reference: Kolmogorov–Smirnov distance."),
    Metric("deq_steps_ks_pvalue", "1", "Probability of such a distance without drift."),
    Metric("deq_retrain", "1", "1 once a trigger has marked the model for retraining."),
)

# Counters that Prometheus needs in addition to the values, each with its label.
COUNTERS: Final[tuple[tuple[Metric, str], ...]] = (
    (Metric("deq_solves_total", "1", "Solves observed."), "layer"),
    (Metric("deq_events_total", "1", "Events: triggers fired and cleared, retrain marks, failing sinks."), "kind"),
)

SHARE: Final = "_fraction"  # ends the names of shares, which people read as percentages


def mean(values: list[float]) -> float:
    """Return the mean of some numbers, also where their sum is beyond the largest float; inf or NaN if one of them is.

    Example:
        >>> mean([1e308, 1e308]), mean([1.0, float("inf")])
        (1e+308, inf)
    """
    try:
        return statistics.fmean(values)
    except OverflowError:
        largest = max(map(abs, values))
        return largest * statistics.fmean(value / largest for value in values)
    except ValueError:  # inf − inf
        return sum(values) / len(values)


def is_share(name: str) -> bool:
    """Return whether a metric is a share of samples, between 0 and 1.

    Example:
        >>> is_share("deq_unconverged_fraction"), is_share("deq_backward_error")
        (True, False)
    """
    return name.endswith(SHARE)


def readable(name: str, value: float, digits: int = 4) -> str:
    """Return a value as people read it: a share as a percentage.

    Args:
        name: of its metric.
        value: as a row has it.
        digits: how many significant ones.

    Example:
        >>> readable("deq_unconverged_fraction", 0.0625), readable("deq_forward_steps", 12.0)
        ('6.25 %', '12')
    """
    return f"{100 * value:.{digits}g} %" if is_share(name) else f"{value:.{digits}g}"


class Metrics(Mapping[str, Metric]):
    """The standard metrics, and those that a monitor's user adds.

    Args:
        more: further metrics.

    Raises:
        ConfigError: two have the same name.

    Example:
        >>> metrics = Metrics([Metric("my_loss", "1", "Training loss.")])
        >>> metrics["my_loss"].unit, metrics["deq_forward_steps"].unit
        ('1', 'steps')
    """

    def __init__(self, more: Iterable[Metric] = ()) -> None:
        self._known = {metric.name: metric for metric in STANDARD}
        for metric in more:
            if metric.name in self._known:
                raise ConfigError(f"The metric {metric.name!r} exists already. Choose another name.")
            self._known[metric.name] = metric

    def __getitem__(self, name: str) -> Metric:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def check(self, owner: str, name: str) -> Metric:
        """Return the metric of this name.

        Raises:
            ConfigError: the metric does not exist; `owner` is named in the message.
        """
        if name not in self._known:
            raise ConfigError(
                f"{owner}: unknown metric {name!r}.{did_you_mean(name, self._known)} Available: "
                f"{listing(self._known)}. Declare your own with Monitor(metrics=[Metric(...)])."
            )
        return self._known[name]
