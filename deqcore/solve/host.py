"""The loop where reading a sample's figures costs no wait: its decisions in plain NumPy, on `(batch,)` arrays.

An operation of a framework on a few numbers costs several times one of NumPy, and most of a solve of a small f is such
operations. So the figures (residuals, statuses, counters) stay NumPy arrays from the first step to the last. The
decisions are those of `deqcore.solve.termination`, and so are the results.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.linear.norms import residual_norms
from deqcore.solve.step import freeze, masked, shortened, take_step
from deqcore.solve.termination import IDLE, PROGRESS, REFUSED, judged, spent, verdict
from deqcore.types import Array, Limits, LoopState, Map, Status, StepResult

FIGURES: Final = ("status", "steps", "best_residual", "reference", "peak", "mark", "since", "length", "tried", "extra")
DOUBT: Final = 1.0 + 2.0**-10  # covers the rounding of a quick test: what is closer to the tolerance gets a verdict


def read(backend: Backend, carry: LoopState) -> LoopState | None:
    """Return the loop state with its figures as NumPy arrays, or None if that would cost a wait or a copy."""
    if is_read(backend, carry.status):
        return carry
    views = {}
    for name in FIGURES:
        views[name] = backend.host.numpy_view(getattr(carry, name))
        if views[name] is None:
            return None
    return carry._replace(**views)


def written(backend: Backend, carry: LoopState) -> LoopState:
    """Undo `read`; return a loop state whose figures are arrays of the backend as it is."""
    if not is_read(backend, carry.status):
        return carry
    return carry._replace(**{name: backend.host.from_numpy_view(getattr(carry, name)) for name in FIGURES})


def is_read(backend: Backend, figure: Any) -> bool:
    """Return whether a figure is a NumPy array that is not an array of the backend."""
    return isinstance(figure, np.ndarray) and not backend.is_array(figure)


class HostLoop:
    """The loop where reading a number costs no wait. See `DeviceLoop`, whose results are the same.

    Args:
        backend: the backend of the iterates.
        solver: the method.
        f: the map on `(batch, n)`.
        limits: of the verdict.
        spare: the loop ends once at most this many samples run.
    """

    def __init__(self, backend: Backend, solver: Solver, f: Map, limits: Limits, spare: int = 0) -> None:
        self.backend, self.solver, self.f, self.spare = backend, solver, f, spare
        self.asked, self.limits = limits, on_host(backend, limits)
        self.factor = DOUBT * self.limits.rtol
        self.least: Any = 0.0  # of `_all_progress`: what `goal` adds to rtol‖f(z)‖, at most
        self.known: Any = None  # the array of statuses that the next four are known for
        self.going = False
        self.mask: Any = None  # which samples run, None: all
        self.active: Array | None = None  # `mask` as an array of the backend
        self.stopped: Any = None  # the other samples, None: none
        self.norms: tuple[Any, Any] | None = None  # residual and ‖f(z)‖ of the latest step
        self.last: tuple[Any, Any] = (None, None)  # the result of `run`, and the same with NumPy arrays

    def run(self, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after at most `steps` steps, with figures that are arrays of the backend."""
        host = read(self.backend, carry)
        assert host is not None
        last = self.advance(host, steps, check_every)
        end = written(self.backend, last)
        self.last = end, last
        return end

    def advance(self, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after at most `steps` steps; its figures are NumPy arrays before and after them."""
        with np.errstate(all="ignore"):
            floor = self.limits.rtol * (self.limits.tiny * carry.reference)
            self.least = DOUBT * (floor + self.limits.atol)
        end: LoopState = self.backend.loop(self.running, self.step, carry, steps, check_every)
        return end

    def running(self, carry: LoopState) -> bool:
        """Return whether enough samples still run."""
        if carry.status is not self.known:
            stopped = int(np.count_nonzero(carry.status))  # RUNNING is 0
            self.known, self.going = carry.status, len(carry.status) - stopped > self.spare
            self.mask = carry.status == int(Status.RUNNING) if stopped else None
            self.active = self.backend.host.from_numpy_view(self.mask) if stopped else None
            self.stopped = ~self.mask if stopped else None
        return self.going

    def step(self, carry: LoopState) -> LoopState:
        """Take one step, and shorten it where f is not finite at its end."""
        backend = self.backend
        self.running(carry)
        running, active = self.mask, self.active
        start = carry.z, carry.fz, masked(carry.state, active)
        result, residual, size = take_step(backend, self.solver, self.f, start, self.asked)
        if active is not None and not result.frozen:
            result = result._replace(state=freeze(backend, active, result.state, carry.state))
        now = backend.host.numpy_view(residual)
        length = None if size is None else backend.host.numpy_view(size)
        self.norms = now, length
        z, fz = (result.z, result.fz) if active is None else self._moved(active, result, (carry.z, carry.fz))
        met = self._all_progress(carry, now, length)
        if met is None:
            return self._judged(carry, result, (z, fz), now, length)
        best = (z, fz) if active is None else self._best(carry, result, (z, fz), active)
        steps, status, since, mark = carry.steps + 1, carry.status, carry.status, now  # RUNNING is 0, as `since` is
        if running is not None:
            steps, since = carry.steps + running, carry.since * self.stopped
            mark = now = np.where(running, now, carry.best_residual)
            if carry.mark is not carry.best_residual:
                mark = np.where(running, now, carry.mark)
        elif met is not False:
            since = np.zeros_like(status)
        if met is not False:
            status = status + met * np.int32(int(Status.CONVERGED))
        return LoopState(
            z, fz, result.state, status, steps, *best, now, carry.reference, carry.peak, mark, since, carry.length,
            carry.tried, carry.extra,
        )  # fmt: skip

    def _moved(self, rows: Array, result: StepResult, old: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return iterate and value of the step in `rows`, `old` elsewhere."""
        return self.backend.select(rows, result.z, old[0]), self.backend.select(rows, result.fz, old[1])

    def _best(self, carry: LoopState, result: StepResult, now: tuple[Array, Array], rows: Array) -> tuple[Array, Array]:
        """Return the best iterate and its value if those of the step are better in `rows`, where samples run."""
        if carry.best_z is carry.z and carry.best_fz is carry.fz and rows is self.active:
            return now
        return self._moved(rows, result, (carry.best_z, carry.best_fz))

    def _all_progress(self, carry: LoopState, now: Any, length: Any) -> Any:
        """Return None unless all running samples surely progress or converge, as in most steps of most solves.

        Then no verdict and no selection is needed: the best residual is at most the mark and the peak. Return False if
        none converges, otherwise which ones do `(batch,)`.
        """
        with np.errstate(all="ignore"):  # rtol‖f(z)‖ may leave the range
            bar = self.least if length is None else self.factor * length + self.least
            progress = now < PROGRESS * carry.best_residual
            far = now > bar
            if self.mask is not None:
                progress |= self.stopped
                far |= self.stopped
            if not _all(progress):
                return None
            if _all(far):
                return False
            if length is None:
                return None
            met, escaped = judged(np, self.limits, now, length, carry.reference, carry.peak, carry.mark)
            if self.mask is not None:
                met, escaped = met & self.mask, escaped & self.mask
        return None if np.count_nonzero(escaped) else met

    def _judged(
        self, carry: LoopState, result: StepResult, moved: tuple[Array, Array], now: Any, length: Any
    ) -> LoopState:
        """Return the loop state after a step to `moved` on which each sample gets a verdict."""
        backend, running = self.backend, self.mask
        if length is None:
            length = backend.host.numpy_view(backend.norm(result.fz))
            self.norms = now, length
        with np.errstate(all="ignore"):  # a residual may be NaN or inf
            better, status, since, mark, peak = verdict(np, self.limits, now, length, carry.path)
        taken: Any = 1
        if running is not None:
            status, taken = np.where(running, status, carry.status), running
            since, mark = np.where(running, since, carry.since), np.where(running, mark, carry.mark)
            peak = np.where(running, peak, carry.peak)
            better &= running
        best = *moved, now
        if not _all(better):
            moved_is_best = running is not None and _all(better == running)
            rows = self.active if moved_is_best else backend.host.from_numpy_view(better)
            best = *self._best(carry, result, moved, rows), np.where(better, now, carry.best_residual)
        after = LoopState(
            *moved, result.state, status, carry.steps + taken, *best, carry.reference, peak, mark, since, carry.length,
            carry.tried, carry.extra,
        )  # fmt: skip
        if not np.count_nonzero(since == REFUSED):
            return after
        again = read(backend, shortened(backend, self.solver, written(backend, after)))
        assert again is not None
        return again

    def ended(self, start: LoopState, end: LoopState) -> LoopState:
        """Return the loop state with the statuses of samples that have spent their budget."""
        backend = self.backend
        last = self.last[1] if end is self.last[0] else read(backend, end)
        first = read(backend, start)
        assert last is not None
        assert first is not None
        left = last.status == int(Status.RUNNING)
        if not np.count_nonzero(left):
            return end
        # Below the bound of `spent` a sample is neither idle nor, without refused steps, anything but MAX_STEPS.
        if _all((last.since >= 0) & (last.since < IDLE)):
            status = np.where(left, np.int32(int(Status.MAX_STEPS)), last.status)
            return end._replace(status=backend.host.from_numpy_view(status))
        residual, size = self.norms or map(backend.host.numpy_view, residual_norms(backend, end.z, end.fz))
        size = backend.host.numpy_view(backend.norm(end.fz)) if size is None else size
        with np.errstate(all="ignore"):
            status = spent(np, residual, size, last.path, last.steps - first.steps)
        return end._replace(status=backend.host.from_numpy_view(np.where(left, status, last.status)))


def on_host(backend: Backend, limits: Limits) -> Limits:
    """Return the limits with NumPy views of their arrays."""
    names = ("rtol", "atol", "slack")
    views: dict[str, Array] = {
        name: backend.host.numpy_view(limit) for name in names if not isinstance(limit := getattr(limits, name), float)
    }
    return limits._replace(**views) if views else limits


def _all(mask: Any) -> bool:
    """Return whether all of `mask` `(batch,)` holds; the method of an array takes four times as long."""
    return int(np.count_nonzero(mask)) == len(mask)
