"""Passive records that the parts of a solve exchange. This module imports nothing from above.

Arrays are those of the backend's framework. `(batch,)` and `(batch, n)` are shapes; a record that is a NamedTuple may
stand inside compiled, traced code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

Array: TypeAlias = Any
"""An array of the backend's framework. Frameworks share no base class, so the type checker sees Any."""


Tree: TypeAlias = Any
"""Nested tuples, lists and dicts (and whatever else the framework registers) with arrays at the leaves."""


Map: TypeAlias = Callable[[Array], Array]
"""A function from `(batch, n)` to `(batch, n)`."""


LoopVars = TypeVar("LoopVars")


@dataclass(frozen=True)
class BoundMap:
    """The map z ↦ f(z, *args), which still shows its arguments.

    Attributes:
        f: `f(z, *args)` on `(batch, n)`.
        args: any trees.
    """

    f: Callable[..., Array]
    args: tuple[Any, ...]

    def __call__(self, z: Array) -> Array:
        """Evaluate f at z `(batch, n)`."""
        return self.f(z, *self.args)


class StepResult(NamedTuple):
    """The result of a step.

    Attributes:
        z: the iterate `(batch, n)`.
        fz: f(z).
        state: the solver's state.
        size: ‖f(z)‖ `(batch,)`, or None if it has not been measured.
        frozen: z and state of the samples that are not active are already unchanged.
    """

    z: Array
    fz: Array
    state: Any
    size: Array | None = None
    frozen: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do. Tests and the core ask for capabilities, never for a backend's name.

    Attributes:
        autodiff: it differentiates f itself (otherwise by a dense Jacobian of finite differences).
        jvp: it has forward-mode products J v.
        jit: fixed_point works inside compiled, traced code.
        vmap: fixed_point can be vectorised over a further axis.
        float64: double-precision states are exact without a global switch.
        bfloat16: a state or a history can be bfloat16.
        complex: a state can be complex.
        accelerator: arrays can live on another device than the host.
        second_derivatives: gradients of gradients of exact-ift are right.
        compaction: a solve may continue with fewer rows than it began with (shapes are known step by step).
        eager: every call of fixed_point runs its Python code, never code compiled in an earlier call.

    Example:
        >>> import deqcore
        >>> deqcore.get_backend(backend="numpy").capabilities.compaction
        True
    """

    autodiff: bool = True
    jvp: bool = False
    jit: bool = False
    vmap: bool = False
    float64: bool = True
    bfloat16: bool = False
    complex: bool = False
    accelerator: bool = False
    second_derivatives: bool = False
    compaction: bool = False
    eager: bool = True


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


class Status(IntEnum):
    """How a sample's solve ended. An int32 in traced code; `sentence` gives cause and remedy.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(np.cos, np.ones((1, 1)), forward__max_steps=2, forward__on_failure="ignore")
        >>> Status(int(sol.status[0])).name, Status.MAX_STEPS.sentence[:25]
        ('MAX_STEPS', 'The step budget was spent')
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    STALLED = 3
    DIVERGED = 4
    NONFINITE = 5
    FIXED_STEPS = 6

    @property
    def sentence(self) -> str:
        """Cause and remedy in one sentence."""
        return _SENTENCES[self].format(others=_listed(SEARCHING), damp="damp the step")

    def advice(self, solver: str = "") -> str:
        """Return the sentence without a recommendation of `solver`, the one in use (its name or its repr)."""
        used, _, options = solver.partition("(")
        others = [name for name in SEARCHING if name.replace("-", "") != used.replace("-", "").lower()]
        damp = "damp the step"
        if "max_residual_growth=None" in options:
            damp += " (forward.options.max_residual_growth = 2)"
        return _SENTENCES[self].format(others=_listed(others), damp=damp)


SEARCHING: Final = ("broyden", "anderson", "newton-krylov")  # solvers that work where plain iteration does not


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


_SENTENCES = {
    Status.RUNNING: "The solve has not ended.",
    Status.CONVERGED: "The residual met the tolerance.",
    Status.MAX_STEPS: (
        "The step budget was spent before the residual met the tolerance: raise forward.max_steps, loosen "
        "forward.rtol, or choose a solver that may need fewer steps ({others})."
    ),
    Status.STALLED: (
        "The residual stopped falling above the tolerance: it may be below what the dtype can reach (loosen "
        "forward.rtol or use a wider dtype), or the method is stuck (start elsewhere, or try another solver: {others})."
    ),
    Status.DIVERGED: (
        "The residual grew far above the scale of the start, or the iterate grew while its residual did not fall: f is "
        "not a contraction near here, or has no fixed point. Use {others}, {damp}, start closer, or regularise the "
        "Jacobian of f in training."
    ),
    Status.NONFINITE: (
        "f returned NaN or inf at the start, or wherever a step led, shorter steps included: the best finite iterate "
        "is returned. Start where f is finite, and look for overflow, a division by zero or a narrow dtype in f, or "
        "for NaN in its inputs and parameters."
    ),
    Status.FIXED_STEPS: (
        "The strategy takes a fixed number of steps, after which the residual was above the tolerance or was not "
        "measured (NaN): raise its own step count in backward.options, or choose a strategy that solves."
    ),
}


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


Pull: TypeAlias = Callable[[Array], tuple[Array, ...]]
"""`u ↦ (∂f/∂θ)ᵀu`: the gradients of the arrays θ that f depends on and that are differentiated."""


class PassInputs(NamedTuple):
    """What a strategy with state gets in addition to the adjoint equation.

    Attributes:
        values: the state `(m,)` of float32, as the last pass left it.
        converged: samples whose forward solve converged, `(batch,)` of bool.
        residual: ‖f(z) − z‖ of the forward solve, `(batch,)`.
        pull: products with ∂f/∂θ, or None where nothing but z is differentiated. Each call costs one product with the
            parameters, and no vjp.

    Example:
        >>> import numpy as np
        >>> PassInputs(np.zeros(2, np.float32), np.array([True]), np.array([1e-6]), lambda u: (u.sum(axis=0),)).pull(
        ...     np.ones((1, 2)))[0].tolist()
        [1.0, 1.0]
    """

    values: Array
    converged: Array
    residual: Array
    pull: Pull | None


class Figures(Protocol):
    """A few numbers about a batch, a NamedTuple of arrays, that may leave traced code. See `CallGuards.watch`.

    Example:
        >>> import numpy as np
        >>> from deqcore.solution import Tally
        >>> found: Figures = Tally.of(np, np.array([1, 2]), np.array([3, 9]), np.array([1e-6, 0.5]))
        >>> bool(found.notable())
        True
    """

    def notable(self) -> Any:
        """Return whether the host must see them: one bool."""

    def merged(self, xp: Any) -> Any:
        """Return one record of the same kind from a stack of them along the first axis of each array."""


class Reached(NamedTuple):
    """Where a fixed number of recorded steps led.

    Attributes:
        z: the iterate, with its derivative `(batch, n)`.
        fz: f(z) `(batch, n)`, or None if it was not evaluated.
        evaluations: evaluations of f `(batch,)` int32.
        scale: scale of the start, max(‖z0‖, ‖f(z0)‖), `(batch,)`.
        residual: ‖f(z0) − z0‖ at the start `(batch,)`.
        unsettled: samples whose derivative is known not to be at its limit `(batch,)` of bool, or None.
        steps: steps taken `(batch,)` int32; None: the `steps` of the strategy.

    Example:
        >>> import numpy as np
        >>> one = np.ones(1)
        >>> Reached(np.ones((1, 2)), np.ones((1, 2)), np.ones(1, np.int32), scale=one, residual=one).z.tolist()
        [[1.0, 1.0]]
    """

    z: Array
    fz: Array
    evaluations: Array
    scale: Array
    residual: Array
    unsettled: Array | None = None
    steps: Array | None = None


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


class StoppingCriteria(NamedTuple):
    """When to stop. Numbers may be scalars of the framework: changing them then recompiles nothing.

    Attributes:
        rtol: a sample has converged when ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖, unless only because ‖f(z)‖ has grown.
        atol: see rtol.
        max_steps: step budget; 0 evaluates f once and reports.
        check_every: steps between host checks, or "auto".
        patience: steps without progress after which a sample counts as stalled.
        units: consecutive rows that f may couple: the units of one sample.
    """

    rtol: float | Array
    atol: float | Array = 0.0
    max_steps: int | Array = 40
    check_every: int | str = "auto"
    patience: int = 50
    units: int = 1


FINE: Final = 1e-5  # a dtype with an ε below it resolves residuals far below what growth explains


class Limits(NamedTuple):
    """The numbers that decide the status of samples. `rtol` and `atol` may be arrays; `atol` may be `(batch,)`.

    Attributes:
        rtol: relative tolerance.
        atol: absolute tolerance.
        patience: steps without progress after which a sample has stalled.
        slack: growth of the iterate, relative to the fall of the residual, up to which the tolerance is met.
        lost: unit roundoff of the state: a residual below this part of ‖f(z)‖ is rounding.
        hidden: the same, but 0 in dtypes that are too coarse to count it as residual.
        tiny: ‖f(z)‖ counts for at least this part of the start's scale.
    """

    rtol: Any
    atol: Any
    patience: int
    slack: Any
    lost: float
    hidden: float
    tiny: float

    @classmethod
    def of(cls, xp: Any, eps: float, rtol: Any, atol: Any, patience: int) -> Limits:
        """Return the limits for a state whose dtype has the machine epsilon `eps`."""
        least = min(1.0, max(0.1, 5.0 * eps**0.25))
        if isinstance(rtol, float):
            slack: Any = min(1.0, max(least, 8.0 * rtol**0.5))
        else:
            slack = xp.clip(8.0 * xp.sqrt(rtol), min=least, max=1.0)
        return cls(rtol, atol, patience, slack, 0.5 * eps, 0.5 * eps if eps < FINE else 0.0, eps**4)

    @property
    def relative(self) -> bool:
        """Whether the criterion needs ‖f(z)‖ at all."""
        return not (isinstance(self.rtol, float) and self.rtol == 0.0)


class Path(NamedTuple):
    """What is known of a sample's way so far, `(batch,)` each.

    Attributes:
        reference: scale of the start, max(‖z0‖, ‖f(z0)‖).
        peak: largest residual so far.
        best: least residual so far.
        mark: residual at the last progress.
        since: steps since then, or REFUSED or PENDING.
    """

    reference: Any
    peak: Any
    best: Any
    mark: Any
    since: Any


class LoopState(NamedTuple):
    """The state of the loop. All arrays have the batch as their first axis."""

    z: Array
    fz: Array
    state: Any
    status: Array
    steps: Array
    best_z: Array
    best_fz: Array
    best_residual: Array
    reference: Array  # scale of the start, max(‖z0‖, ‖f(z0)‖)
    peak: Array  # largest residual so far
    mark: Array  # residual at the last progress
    since: Array  # steps since then; REFUSED: f was not finite where the last step led; PENDING: not evaluated yet
    length: Array  # part of the residual that is tried after a refused step
    tried: Array  # least residual at the last refused step
    extra: Array  # evaluations of f beyond those that the solver counts: one for each time that the solve continued
    stale: Array = None  # coupled units: f(z) is from a point at which another unit of the sample was elsewhere

    @property
    def path(self) -> Path:
        """The part that the verdict reads."""
        return Path(self.reference, self.peak, self.best_residual, self.mark, self.since)


class SolveResult(NamedTuple):
    """The result of a solve, raveled: `z` and `fz` are `(batch, n)`, the rest `(batch,)`.

    A strategy that takes a fixed number of steps leaves no `carry`, and `fz` only if it evaluated f there.
    """

    z: Array
    fz: Any
    residual: Array
    status: Array
    steps: Array
    evaluations: Array
    carry: Any
