"""Backward passes that fail: the sentence for people, the schedule of verification, and the warning or error.

`failure` and `coupling` make sentences from the NumPy values of a report; every backend uses them. `Watch` delivers in
eager backends, in whatever thread the framework differentiates in. Its `Ledger` counts the backward passes of one layer
or function, so that verification and warnings are rare however often `fixed_point` is called.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np

from deqcore.errors import ConvergenceError, ConvergenceWarning, CoupledRowsWarning
from deqcore.solve.verification import coupled_pair, failing, random_halves, verified
from deqcore.types import Status

if TYPE_CHECKING:
    from deqcore.abc.backend import Backend
    from deqcore.abc.backward import Strategy
    from deqcore.solve.adjoint import Adjoint
    from deqcore.types import AdjointReport, Array, Map

INSIDE: Final = frozenset(
    (
        *("deqcore", "deqcore_torch", "deqcore_jax", "deqcore_numpy"),
        *("torch", "jax", "flax", "equinox", "lightning", "functools", "contextlib"),
    )
)
MOST: Final = 256  # shapes of one function that are counted apart

ADVICE: Final = {
    Status.MAX_STEPS: "raise {budget}, loosen {tolerance}, or choose another backward.strategy",
    Status.STALLED: (
        "loosen {tolerance}, use a wider dtype, or regularize the Jacobian of f, since I − J is singular or nearly so "
        "at this solution"
    ),
    Status.DIVERGED: "use solver = 'gmres' in backward.options, which needs no contraction",
    Status.NONFINITE: "look for NaN or inf in f and in its derivative at the solution",
}


class Line(NamedTuple):
    """A line of the user's code, as `warnings.warn_explicit` wants it."""

    filename: str
    lineno: int
    module: str
    registry: dict[Any, Any]


def user_line() -> Line:
    """The innermost line outside of this package and of the frameworks that call it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame = frame.f_back
    found = frame.f_globals
    registry: dict[Any, Any] = found.setdefault("__warningregistry__", {})
    return Line(frame.f_code.co_filename, frame.f_lineno, found.get("__name__", "<unknown>"), registry)


def warn(text: str, category: type[Warning], line: Line) -> None:
    """Warn at a line of the user's, in whatever thread this is."""
    warnings.warn_explicit(text, category, line.filename, line.lineno, line.module, line.registry)


@dataclass
class Ledger:
    """What is known of one layer or function.

    Attributes:
        passes: backward passes that ran.
        failed: of these, passes whose failure was reported.
        coupled: of these, passes that were reported to couple rows.
        forward: solves that were reported to couple rows.
        suspect: whether the latest verification contradicted the strategy, so that the next pass is verified as well.
    """

    passes: int = 0
    failed: int = 0
    coupled: int = 0
    forward: int = 0
    suspect: bool = False


_ledgers: WeakKeyDictionary[Any, dict[Hashable, Ledger]] = WeakKeyDictionary()


def ledger(subject: Any, key: Hashable) -> Ledger:
    """The ledger of what `subject_of` returned.

    Args:
        subject: the code object of a function, or any other object, such as a layer's cell.
        key: what tells the problems of one subject apart.
    """
    try:
        mine = _ledgers.setdefault(subject, {})
    except TypeError:  # not hashable, or without weak references
        mine = _ledgers.setdefault(type(subject), {})
    if key not in mine and len(mine) >= MOST:
        mine.clear()
    return mine.setdefault(key, Ledger())


def forget() -> None:
    """Forget all counts: the next backward pass of each layer or function is its first again."""
    _ledgers.clear()


def subject_of(f: Any) -> Any:
    """What a map is made of: the code object of a function, or the object behind bound methods.

    What `functools.partial` or a `__wrapped__` attribute wraps counts as the map itself.
    """
    for _ in range(16):
        code = getattr(f, "__code__", None)
        if code is not None and not f.__dict__:
            return code
        if isinstance(f, functools.partial):
            f = f.func
        elif getattr(f, "__self__", None) is not None and hasattr(f, "__func__"):
            f = f.__self__
        elif "__wrapped__" in getattr(f, "__dict__", {}):
            f = f.__wrapped__
        else:
            return f if code is None else code
    return f


def promises(strategy: Strategy) -> bool:
    """Whether a strategy promises an accuracy, so that it can fail: it is exact, or it has an `rtol` or a `max_relative_error`."""
    return strategy.exact or any(getattr(strategy, name, None) is not None for name in ("rtol", "target"))


def failure(
    told: AdjointReport, rows: Any, strategy: Strategy, name: str, on_failure: str, wrong: int = 0
) -> str | None:
    """Describe the samples whose adjoint solve failed.

    Args:
        told: a report of NumPy arrays `(batch,)`.
        rows: the samples that failed, as `deqcore.solve.verification.failing` gives them, a NumPy array `(batch,)` of bool.
        strategy: that made it.
        name: under which the strategy is registered.
        on_failure: the setting.
        wrong: samples whose measured residual contradicts what the strategy reported.

    Returns:
        What failed, with numbers, and what helps; None if no sample failed.
    """
    if not rows.any():
        return None
    kinds = [kind for kind in Status if (told.status[rows] == int(kind)).any()]
    counts = ", ".join(f"{int((told.status[rows] == int(kind)).sum())} {kind.name}" for kind in kinds)
    left = told.residual[rows]
    known = left[~np.isnan(left)]
    residual = f", relative adjoint residual at most {float(known.max()):.2g}" if known.size else ""
    contradicted = (
        f" The strategy reported convergence for {wrong} of them, which the measured residual contradicts."
        if wrong
        else ""
    )
    advice = "; ".join(ADVICE[kind].format(**_options(strategy)) for kind in kinds if kind in ADVICE)
    return (
        f"The adjoint solve did not converge for {int(rows.sum())} of {rows.size} samples ({counts} after at most "
        f"{int(told.vjps[rows].max())} vector–Jacobian products{residual}): the gradient of these samples is "
        f"inaccurate.{contradicted} To fix it, {advice} (backward.strategy = {name!r}; "
        f"backward.on_failure = {on_failure!r} decides what happens now)."
    )


def _options(strategy: Strategy) -> dict[str, str]:
    """The names and values of the options that a failed solve may need."""

    def named(names: tuple[str, ...]) -> str:
        found = next((name for name in names if hasattr(strategy, name)), None)
        if found is None:
            return f"the {'budget' if 'max_steps' in names else 'tolerance'} of the strategy"
        return f"{found} = {getattr(strategy, found)!r} in backward.options"

    return {"budget": named(("max_steps", "max_refine_vjps", "terms", "steps")), "tolerance": named(("rtol", "target"))}


def coupling(pair: tuple[int, int] | None, wrong: int = 0, batch: int = 0, residual: float = float("nan")) -> str:
    """Say that f couples the rows of the state.

    Args:
        pair: (i, j) if it is known that row i of f(z) changes when row j of z does.
        wrong: samples whose adjoint residual contradicts what the strategy reported.
        batch: number of samples.
        residual: the largest of those residuals.
    """
    which = "another row" if pair is None else f"row {pair[1]}"
    mine = "a row" if pair is None else f"row {pair[0]}"
    measured = f" The true adjoint residual of {wrong} of {batch} samples is up to {residual:.2g}." if wrong else ""
    return (
        f"The rows of the state are coupled by f: {mine} of f(z) changes when {which} of z does.{measured} With "
        f"forward.batch = true each row counts as a sample of its own, so that residuals, statuses and gradients are "
        f"not those of the whole state. Set forward.batch = false to solve the whole state as one system. If the rows "
        f"are meant to be samples, look in f for batch normalization in training mode, attention or a mean over the "
        f"first axis."
    )


class Findings(NamedTuple):
    """What a verification found against a report.

    Attributes:
        coupled: whether f couples rows.
        pair: two such rows, if they were looked for.
        wrong: samples whose residual contradicts the report.
        residual: the largest of these residuals.
    """

    coupled: bool
    pair: tuple[int, int] | None
    wrong: int
    residual: float


class Watch:
    """Verifies the backward passes of one solve on schedule, and delivers what failed.

    It does not keep the map alive, and looks for its ledger when the first backward pass runs.

    Args:
        f: the map. A function has a ledger for its code object, strategy and `key`; any other object (a layer's cell)
            has one for each strategy.
        strategy: what finds the gradient.
        key: what tells the problems of one function apart: shapes and dtype.
        every: `backward.verify_every`.
        name: the strategy's registered name.
    """

    __slots__ = ("_key", "_ledger", "_subject", "every", "line", "name")

    def __init__(self, f: Callable[..., Any], strategy: Hashable, key: Hashable, every: int, name: str) -> None:
        subject = subject_of(f)
        self._key = (strategy, key) if isinstance(subject, CodeType) else strategy
        try:
            self._subject: Callable[[], Any] = ref(subject)
        except TypeError:  # without weak references
            self._subject = ref(type(subject))
        self._ledger: Ledger | None = None
        self.every = every
        self.name = name
        self.line = user_line()

    @property
    def ledger(self) -> Ledger:
        """Counts of the layer or function."""
        if self._ledger is None:
            subject = self._subject()
            self._ledger = Ledger() if subject is None else ledger(subject, self._key)
        return self._ledger

    def verify(
        self, adjoint: Adjoint, vjp: Map, g: Array, u: Array, told: AdjointReport
    ) -> tuple[AdjointReport, Findings | None]:
        """The report, measured if it is the turn of this pass, and what contradicts it."""
        count, self.ledger.passes = self.ledger.passes, self.ledger.passes + 1
        turn = self.every and (count % self.every == 0 or self.ledger.suspect)
        if not turn or not adjoint.uses_vjp:
            return told, None
        backend = adjoint.backend
        halves = random_halves(g.shape[0], g.shape[1], seed=count)
        with backend.errstate():
            true = verified(backend, adjoint.strategy, vjp, g, u, told, halves)
        found = self._findings(backend, told, true)
        self.ledger.suspect = found is not None
        if found is not None and found.coupled and adjoint.on_failure != "ignore" and _due(self.ledger.coupled):
            row = int(np.argmax(backend.to_numpy(true.coupling)))
            found = found._replace(pair=coupled_pair(backend, vjp, halves, g, row))
            spent = 2 + max(int(halves.rows.sum()) - 1, 0).bit_length()
            true = true._replace(verify_vjps=backend.xp.zeros_like(true.vjps) + spent)
        return true, found

    def _findings(self, backend: Backend, told: AdjointReport, true: AdjointReport) -> Findings | None:
        wrong = backend.to_numpy(true.status != told.status)
        coupled = bool((backend.to_numpy(true.coupling) > 0).any())
        if not coupled and not wrong.any():
            return None
        residual = backend.to_numpy(true.residual)
        return Findings(coupled, None, int(wrong.sum()), float(residual[wrong].max(initial=0.0)))

    def deliver(self, adjoint: Adjoint, told: AdjointReport, g: Array, found: Findings | None) -> None:
        """Warn or raise.

        Raises:
            ConvergenceError: `on_failure` is "raise" and a sample failed.
        """
        how, counts = adjoint.on_failure, self.ledger
        if how == "ignore":
            return
        coupled = found is not None and found.coupled
        failed = how in ("warn", "raise") and self._failed(adjoint, told, g)
        if how == "raise" and failed:
            raise ConvergenceError(self._text(adjoint, told, g, found))
        if coupled:
            if _due(counts.coupled):
                warn(self._text(adjoint, told, g, found), CoupledRowsWarning, self.line)
            counts.coupled += 1
        elif failed:
            if _due(counts.failed):
                warn(self._text(adjoint, told, g, found), ConvergenceWarning, self.line)
            counts.failed += 1

    def coupled_forward(self, find: Callable[[], tuple[int, int] | None]) -> bool:
        """Warn of a forward solve whose values differ because the rows of other samples moved.

        Args:
            find: looks for a pair of coupled rows; it is called as rarely as the warning is shown.

        Returns:
            Whether f couples rows.
        """
        counts = self.ledger
        if counts.suspect and not _due(counts.forward):
            counts.forward += 1
            return True
        pair = find()
        if pair is None:
            return False
        counts.suspect = True
        if _due(counts.forward):
            warn(coupling(pair), CoupledRowsWarning, self.line)
        counts.forward += 1
        return True

    def _failed(self, adjoint: Adjoint, told: AdjointReport, g: Array) -> bool:
        """Whether a sample failed. Waits for a device only where the strategy promises something."""
        backend = adjoint.backend
        status = backend.numpy_view(told.status)
        if status is not None and (status == int(Status.CONVERGED)).all():
            return False
        if status is None and not promises(adjoint.strategy):
            return False
        return bool(backend.to_numpy(failing(backend, told, g)).any())

    def _text(self, adjoint: Adjoint, told: AdjointReport, g: Array, found: Findings | None) -> str:
        if found is not None and found.coupled:
            return coupling(found.pair, found.wrong, told.status.shape[0], found.residual)
        backend = adjoint.backend
        host = told._replace(**{name: backend.to_numpy(getattr(told, name)) for name in told._fields[:5]})
        rows = backend.to_numpy(failing(backend, told, g))
        wrong = 0 if found is None else found.wrong
        return failure(host, rows, adjoint.strategy, self.name, adjoint.on_failure, wrong) or ""


def _due(count: int) -> bool:
    """Whether the next warning after `count` of them is shown: the 1st, 10th, 100th and so on."""
    return str(count + 1).strip("0") == "1"
