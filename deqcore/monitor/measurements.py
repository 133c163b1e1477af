"""Costly measurements that a monitor takes on every n-th solve.

[monitor.measurements]
spectral_radius = 200       # solves between measurements
gradient_audit = 500
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from deqcore.errors import ConfigError
from deqcore.solve.observer import Solve
from deqcore.types import Array, Tree

Measured: TypeAlias = "float | Array | Sequence[float | Array]"


@dataclass(frozen=True)
class Measurement:
    """A measurement that the user defines.

    Attributes:
        metrics: what it measures: a metric's name, or several.
        measure: from a solve (with f, its arguments and the solution) to a number or a scalar of the framework; to as
            many of them as there are metrics, if these are several.
        every: solves between measurements.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore.monitor import Metric, Monitor
        >>> size = Measurement("my_size", lambda solve: float(np.abs(solve.solution.value).max()), every=1)
        >>> with Monitor(sinks=[], metrics=[Metric("my_size", "1", "Largest entry.")], measurements=[size]) as monitor:
        ...     _ = deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((4, 2)))
        >>> round(monitor.rows[-1].values["my_size"], 2)
        2.0
    """

    metrics: str | tuple[str, ...]
    measure: Callable[[Solve], Measured]
    every: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError.bad_value("Measurement", "every", self.every, "an integer >= 1")

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics as a tuple."""
        return (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)

    def take(self, solve: Solve) -> dict[str, float | Array]:
        """Measure; by metric."""
        result = self.measure(solve)
        values: Any = (result,) if isinstance(self.metrics, str) else result
        return dict(zip(self.names, values, strict=True))


def spectral_radius(every: int = 200, max_products: int = 20) -> Measurement:
    """Return the largest spectral radius of ∂f/∂z in the batch, at the solution.

    Cost: one evaluation of f and `max_products` vector–Jacobian products at most, each for the whole batch.
    """

    def measure(solve: Solve) -> float:
        from deqcore import diagnostics

        result = diagnostics.spectral_radius(
            solve.f, solve.solution.value, *solve.args, batch=solve.config.forward.batch, max_products=max_products
        )
        return float(np.max(result.radius))

    return Measurement("deq_spectral_radius", measure, every)


def gradient_audit(
    every: int = 500,
    cotangent: Callable[[Solve], Tree] | None = None,
    max_vjps: int = 100,
    samples: int | None = None,
    batched_args: Sequence[int] = (),
) -> Measurement:
    """Return the strategy's gradient against the exact one: cosine and relative error of u, means over the batch.

    Cost: one solve, the strategy's backward pass, and one GMRES solve to rounding, for `samples` samples.

    Args:
        every: solves between audits.
        cotangent: dL/dz* of a solve. Default: random numbers, since the loss is not known when the solve returns;
            an estimate that is made for the loss's own cotangents may look worse with them than it is.
        max_vjps: of the exact solve.
        samples: how many samples of the batch, other ones each time; default: all.
        batched_args: positions of the arguments of f that carry the batch, see `deqcore.diagnostics.gradient_audit`.
    """
    turns = itertools.count()

    def measure(solve: Solve) -> tuple[float, float]:
        from deqcore import diagnostics

        g = _random(solve) if cotangent is None else cotangent(solve)
        result = diagnostics.gradient_audit(
            solve.f, solve.z0, *solve.args, cotangent=g, max_vjps=max_vjps, config=solve.config, samples=samples,
            turn=next(turns), batched_args=batched_args,
        )  # fmt: skip
        return float(np.mean(result.cosine)), float(np.mean(result.error))

    return Measurement(("deq_gradient_cosine", "deq_gradient_error"), measure, every)


def _random(solve: Solve) -> Tree:
    """Return a cotangent like z0, always the same."""
    backend = solve.solution.backend
    leaves, structure = backend.flatten(solve.z0)
    rng = np.random.default_rng(0)
    made = [backend.cast(backend.asarray(rng.standard_normal(tuple(leaf.shape)), like=leaf), leaf) for leaf in leaves]
    return backend.unflatten(structure, made)


BUILT_IN: Final[Mapping[str, Callable[[int], Measurement]]] = {
    "spectral_radius": spectral_radius,
    "gradient_audit": gradient_audit,
}


def make_measurements(given: Mapping[str, object] | Iterable[Measurement]) -> tuple[Measurement, ...]:
    """Return the measurements of a table, as in `{"spectral_radius": 200}`, or of a sequence of them.

    Raises:
        ConfigError: a name is not a measurement, its number is out of range, or an item is not a `Measurement`.
    """
    if not isinstance(given, Mapping):
        made: list[Any] = list(given)
        for item in made:
            if not isinstance(item, Measurement):
                expected = 'Measurements, or a table such as {"spectral_radius": 200}'
                raise ConfigError.bad_value("Monitor", "measurements", item, expected)
        return tuple(made)
    for name, every in given.items():
        if name not in BUILT_IN:
            raise ConfigError.unknown_option("[monitor.measurements]", name, BUILT_IN)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError.bad_value("[monitor.measurements]", name, every, "a number of solves >= 1")
    return tuple(BUILT_IN[name](every) for name, every in given.items() if isinstance(every, int))
