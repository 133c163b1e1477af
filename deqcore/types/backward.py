"""Records of a backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from deqcore.types.arrays import Array, ParameterVjp
from deqcore.types.status import Status


class BackwardRecord:
    """A record of the backward pass, filled in when it runs. Eager frameworks only.

    Attributes:
        report: the AdjointReport of the latest backward pass, or None before the first.
        seconds: host time of its adjoint solve, NaN if it was not measured; a device may still be at work.
        runs: how many backward passes have run.
        nondeterminism: ‖y − f(z*)‖ `(batch,)` between the evaluation that records the gradient and the solver's own at
            the same point, or None. More than rounding means that f is not deterministic.
        listener: called after each pass, in the thread in which the framework differentiates; it must not wait for a
            device.
    """

    __slots__ = ("listener", "nondeterminism", "report", "runs", "seconds")

    def __init__(self) -> None:
        self.report: AdjointReport | None = None
        self.seconds: float = float("nan")
        self.runs: int = 0
        self.nondeterminism: Array | None = None
        self.listener: Callable[[BackwardRecord], None] | None = None

    def add(self, report: AdjointReport, seconds: float = float("nan")) -> None:
        """Keep the report of a backward pass that has just run."""
        self.report = report
        self.seconds = seconds
        self.runs += 1
        if self.listener is not None:
            self.listener(self)


class AdjointReport(NamedTuple):
    """The report of the backward pass, per sample. All leaves have shape `(batch,)`.

    Attributes:
        status: `Status` as int32. A strategy that promises no accuracy reports CONVERGED.
        vjps: vector–Jacobian products spent, int32.
        residual: ‖g + Jᵀu − u‖ / ‖g‖, NaN where it was not measured.
        error: estimate of ‖u − u*‖ / ‖u*‖, NaN where there is none.
        fallback: True where the strategy gave up and used its fallback.
        coupling: how much of a vector–Jacobian product lands in this sample although its cotangent lies in others,
            relative to the largest sample; 0 if f does not couple the rows of the state. Above 0,
            ``forward.batch = false`` is needed. NaN or None where it was not measured.
        verify_vjps: vector–Jacobian products that `backward.verify_every` spent, int32; `vjps` does not count them.
        gradient_error: relative error of the batch's parameter gradient that an audit found for what was in force
            before it, the same for all samples; NaN in a pass without an audit. Strategies with state report it.
        gradient_cosine: the cosine to it.
        gradient_products: products with the parameters that the audit took, int32.
        per_sample: True where the adjoint equation was solved for all units of the sample together, with one set of
            coefficients, so that the figures are those of the sample; False where each row was solved alone.

    Example:
        >>> import numpy as np
        >>> unknown = np.full(2, np.nan)
        >>> AdjointReport(np.array([1, 2]), np.array([3, 9]), np.array([1e-6, 0.5]), unknown, np.array([False, True]))
        1 of 2 samples CONVERGED after at most 3 vjps, adjoint residual at most 1e-06.
        1 of 2 samples MAX_STEPS after at most 9 vjps, adjoint residual at most 0.5; 1 got the fallback.
    """

    status: Array
    vjps: Array
    residual: Array
    error: Array
    fallback: Array
    coupling: Array = None
    verify_vjps: Array = None
    gradient_error: Array = None
    gradient_cosine: Array = None
    gradient_products: Array = None
    per_sample: Array = None

    def __repr__(self) -> str:
        """Return a line per status that occurs; the fields themselves where they have no values (traced code)."""
        try:
            status, vjps, residual, error, fallback = (list(leaf.reshape(-1).tolist()) for leaf in self[:5])
            coupled = self.coupling is not None and any(share > 0 for share in self.coupling.reshape(-1).tolist())
            noun = "samples" if self.status.ndim == 1 else "units"
        except Exception:  # each framework raises another error for arrays without values
            return f"AdjointReport({', '.join(map('{}={!r}'.format, self._fields, self))})"
        shared = self.per_sample is not None and any(self.per_sample.reshape(-1).tolist())
        text = _as_text(status, vjps, residual, error, fallback, noun=noun)
        text += "\nThe units of a sample share one set of coefficients." if shared else ""
        return text + ("\nf couples the rows of the state: set forward.batch = false." if coupled else "")


class PassInputs(NamedTuple):
    """What a strategy with state gets in addition to the adjoint equation.

    Attributes:
        values: the state `(m,)` of float32, as the last pass left it.
        converged: samples whose forward solve converged, `(batch,)` of bool.
        residual: ‖f(z) − z‖ of the forward solve, `(batch,)`.
        parameter_vjp: u ↦ (∂f/∂θ)ᵀu for the parameters θ, or None where nothing but z is differentiated. A call costs
            one product with the parameters; `vjps` does not count it.
        has_vjp: whether `vjp` may be called; False only where `StatefulStrategy.next_uses_vjp` said, when f was
            recorded, that the pass would not call it.

    Example:
        >>> import numpy as np
        >>> values, converged, residual = np.zeros(2, np.float32), np.array([True]), np.array([1e-6])
        >>> inputs = PassInputs(values, converged, residual, lambda u: (u.sum(axis=0),))
        >>> inputs.parameter_vjp(np.ones((1, 2)))[0].tolist()
        [1.0, 1.0]
    """

    values: Array
    converged: Array
    residual: Array
    parameter_vjp: ParameterVjp | None
    has_vjp: bool = True


def _as_text(
    status: list[int], vjps: list[int], residual: list[float], error: list[float], fallback: list[bool], *, noun: str
) -> str:
    """Return one line per status that occurs in a report."""
    lines = []
    for kind in Status:
        rows = [row for row, code in enumerate(status) if code == kind]
        if not rows:
            continue
        text = f"{len(rows)} of {len(status)} {noun} {kind.name} after at most {max(vjps[row] for row in rows)} vjps"
        for name, values in (("adjoint residual", residual), ("estimated error", error)):
            if measured := [values[row] for row in rows if not math.isnan(values[row])]:
                text += f", {name} at most {max(measured):.3g}"
        if fallbacks := sum(bool(fallback[row]) for row in rows):
            text += f"; {fallbacks} got the fallback"
        lines.append(f"{text}.")
    return "\n".join(lines) or "The batch is empty."
