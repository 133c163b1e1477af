"""`solve_stream`: solve many samples of unequal depth in a batch of fixed size, whose slots are refilled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from deqcore import config as settings
from deqcore.abc.backend import Backend
from deqcore.config import Config
from deqcore.errors import BackendError, ConfigError, ConvergenceError, ConvergenceWarning
from deqcore.solve.dispatch import pick_backend, plan_call
from deqcore.solve.flatten import RavelSpec
from deqcore.solve.host import is_read
from deqcore.solve.plan import Plan
from deqcore.solve.refill import Arrivals, Budget, Opening, Round, Slots
from deqcore.solve.sample import Layout, Sample, Unravel
from deqcore.solve.source import Source
from deqcore.solve.user_line import due, warn
from deqcore.types import Array, LoopState, Status, Tree

EVERY_ON_DEVICE: Final = 4  # steps between two looks at the statuses where a look waits for the device
LONGEST: Final = 16  # steps of a round that ends when enough samples have stopped
SHARE: Final = 8  # one free slot of so many is enough


@dataclass(frozen=True)
class StreamResult:
    """The result of one item of a stream. It carries no gradient.

    Attributes:
        index: the number of the item in the stream, from 0.
        value: the iterate, a tree like the item's z0.
        residual: ‖f(z) − z‖ at `value`.
        status: how the solve of this item ended.
        steps: solver steps that it took.
        evaluations: evaluations of f (and products) that it took.

    Example:
        >>> import numpy as np, deqcore
        >>> items = [(np.ones(1), np.array([a])) for a in (0.5, 0.9)]
        >>> [r.status.name for r in deqcore.solve_stream(lambda z, a: a * np.cos(z), items, slots=2)]
        ['CONVERGED', 'CONVERGED']
    """

    index: int
    value: Tree
    residual: float
    status: Status
    steps: int
    evaluations: int

    @property
    def converged(self) -> bool:
        """Whether the item met its tolerance."""
        return self.status is Status.CONVERGED


def solve_stream(
    f: Callable[..., Tree],
    inputs: Iterable[Any],
    *,
    slots: int = 16,
    ordered: bool = True,
    start: Callable[..., Tree] | None = None,
    config: Config | None = None,
    **overrides: object,
) -> Iterator[StreamResult]:
    """Solve z* = f(z*, *args) for a stream of samples, in a batch whose slots are refilled (continuous batching).

    A sample that has stopped leaves the batch, and the next item takes its slot, so the batch costs the mean depth of
    its samples and not the largest. f always sees the same shapes: its program is compiled once, also under
    `torch.compile(f)`, and in JAX the whole round is one compiled program. Slots without an item, at the end of the
    stream, are frozen; with `forward.compact = true` (eager backends) they are given up each time that half of them
    are free, so that f sees fewer rows.

    Each item is solved as if alone, with its own budget of `forward.max_steps`; its neighbours do not change it. The
    result is that of `fixed_point` bit for bit where f computes each row in the same way for any batch and the solver
    keeps no history (picard, and auto until it accelerates). A history is summed in another order, so that
    other results differ by rounding.

    This is inference: no gradient is recorded. Differentiate at the result with `fixed_point(f, result.value, …)`.

    Args:
        f: `f(z, *args)` on batches, as in `fixed_point`: the first axis of every array counts `slots` samples, and
            each is computed from its own row alone. What is common to all items is closed over.
        inputs: items, each a tuple `(z0, *args)` of one sample, without a batch axis; with `start` a tuple `args`.
            Arrays have the same shapes and dtypes in all items. `None` means that no item is there at present: the
            others continue. Items are taken when slots are refilled, and not before.
        slots: the size of the batch, at least 1.
        ordered: yield results in the order of the items; finished ones wait for those before them. False: yield each
            one when it is finished.
        start: `start(*args)` returns z0 of an item.
        config: as in `fixed_point`. `forward.check_every` is the number of steps between two refills. "auto" refills
            once an eighth of the slots (at least one) is free, and after 16 steps at the latest; in eager mode on
            other devices than a CPU every 4 steps. The settings of the backward pass do not matter.
        **overrides: as in `fixed_point`, such as `forward__rtol=1e-6`.

    Yields:
        The results. `forward.on_failure` applies to each; an item that did not converge is a result like the others
        unless it is "raise".

    Raises:
        ConfigError: `slots` is less than 1, or `forward.batch = false`, or `forward.compact = true` on a backend
            that traces its loops.
        ProblemError: an item is not a tuple, or its arrays differ from those of the first item. The error names the
            item. It comes, as does any error of `inputs`, after the results of all items before it.
        ConvergenceError: `on_failure = "raise"` and an item did not converge.
        BackendError: inside `jax.jit`, `jax.grad` and the like, where no status can be read.

    Source: continuous (in-flight) batching: Yu et al. (2022), "Orca: A Distributed Serving System for
    Transformer-Based Generative Models".

    Example:
        >>> import numpy as np, deqcore
        >>> items = ((np.zeros(2), np.full(2, rate)) for rate in (0.1, 0.9, 0.2, 0.3))
        >>> f = lambda z, rate: rate * z + 1.0
        >>> results = deqcore.solve_stream(f, items, slots=2, ordered=False, forward__solver="picard",
        ...                                forward__rtol=1e-3, forward__max_steps=100)
        >>> [(r.index, r.steps) for r in results]
        [(0, 3), (2, 5), (3, 6), (1, 44)]
    """
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ConfigError.bad_value("solve_stream", "slots", slots, "an integer >= 1")
    resolved, _ = settings.resolve(config, overrides)
    if resolved.forward.batch is not True:
        raise ConfigError(
            f"solve_stream: forward.batch must be true, because each slot holds one sample (got "
            f"{str(resolved.forward.batch).lower()}). Use fixed_point to solve one system at a time."
        )
    source = Source(inputs, start)
    results = _solved(f, source, slots, resolved, config, overrides)
    return _reported(_in_order(results) if ordered else results, source, resolved)


def _in_order(results: Iterator[StreamResult]) -> Iterator[StreamResult]:
    """Yield results by index."""
    waiting: dict[int, StreamResult] = {}
    following = 0
    for result in results:
        waiting[result.index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _reported(results: Iterator[StreamResult], source: Source, resolved: Config) -> Iterator[StreamResult]:
    """Yield the results, report failures as `forward.on_failure` says, and raise what ended the stream."""
    action, solver, failed = resolved.forward.on_failure, resolved.forward.solver, 0
    for result in results:
        if not result.converged and action != "ignore":
            text = (
                f"Item {result.index} of the stream ended as {result.status.name} after {result.steps} steps, residual "
                f"‖f(z) − z‖ {result.residual:.3g}. {result.status.advice(solver)} (solver {solver!r}; "
                f"forward.on_failure = {action!r} decides what happens now)"
            )
            if action == "raise":
                raise ConvergenceError(text)
            failed += 1
            if due(failed - 1):
                warn(text + (f" This is item {failed} of this stream that failed." if failed > 1 else ""),
                     ConvergenceWarning)  # fmt: skip
        yield result
    if source.error is not None:
        raise source.error


def _solved(
    f: Callable[..., Tree],
    source: Source,
    size: int,
    resolved: Config,
    config: Config | None,
    overrides: dict[str, object],
) -> Iterator[StreamResult]:
    """Yield results as they are finished."""
    layout: Layout | None = None

    def accept(z0: Tree, args: tuple[Any, ...], index: int) -> Sample:
        nonlocal layout
        if layout is None:
            layout = Layout.of(pick_backend(resolved, z0, args), z0, args)
        return layout.sample(z0, args, index)

    first = None
    while first is None and not source.ended:
        first = source.next(accept)
    if first is None or layout is None:
        return
    if layout.backend.is_traced(*first.z0, *first.args):
        raise BackendError(
            "solve_stream reads the status of each sample after each round, so it cannot run inside jax.jit, jax.grad "
            "or jax.vmap (got traced arrays). Call it outside, where it compiles its own step, or use fixed_point."
        )
    solve = _Stream(f, layout, first, size, plan_call(config, overrides, *layout.batch(first, size)))
    while solve.seat(source, accept):
        yield from solve.round()


class _Stream:
    """The state of a stream: which sample is in which slot, and the loop state of all slots."""

    def __init__(self, f: Callable[..., Tree], layout: Layout, first: Sample, size: int, plan: Plan) -> None:
        backend, control = plan.backend, plan.control
        self.plan, self.layout, self.size = plan, layout, size
        self.owner: list[Sample | None] = [None] * size
        self.waiting: Sample | None = first
        self.fresh: set[int] = set()
        self.steps = np.zeros(size, np.int64)  # of each slot at the last look
        z0, args = layout.batch(first, size)
        space, self.f = plan.space, f
        self.compacts = plan.compacts()
        self.checks = control.check_every == "auto" and not _waits(backend, z0)
        self.every = _steps_in_round(control.check_every, self.checks)
        self.max_steps = int(control.max_steps)
        self.run = self._staged(space, space.ravel(z0), layout.leaves(args))
        apart = partial(backend.autodiff.staged, lambda z, *leaves: z, space.ravel(z0), layout.leaves(args))
        self.slots: Slots = apart(Opening(backend, plan.solver, size))(first.z0, first.args)
        self.unravel = apart(Unravel(backend, layout.z_kinds))
        self.last = first

    def seat(self, source: Source, accept: Callable[[Tree, tuple[Any, ...], int], Sample]) -> bool:
        """Give items to free slots; return whether there is anything to do, now or later."""
        for slot, owner in enumerate(self.owner):
            if owner is None:
                sample, self.waiting = self.waiting or source.next(accept), None
                if sample is None:
                    break
                self.owner[slot] = self.last = sample
                self.fresh.add(slot)
        taken = self._taken()
        if self.compacts and source.ended and not self.fresh and 0 < 2 * len(taken) <= len(self.owner):
            self._compact(taken)
        return bool(taken) or not source.ended

    def _taken(self) -> list[int]:
        return [slot for slot, owner in enumerate(self.owner) if owner is not None]

    def _staged(self, space: RavelSpec, z: Array, leaves: tuple[Array, ...]) -> Callable[..., Any]:
        """Return a round of the slots of `space`."""
        plan, flat, arguments = self.plan, space.wrap(self.f), self.layout.arguments
        body = Round(plan.backend, plan.solver, plan.control.patience, single=self.every == 1, checks=self.checks)
        return plan.backend.autodiff.staged(lambda z, *leaves: flat(z, *arguments(leaves)), z, leaves, body)

    def _compact(self, taken: list[int]) -> None:
        """Give up the slots without an item."""
        backend = self.plan.backend
        self.owner, self.steps = [self.owner[slot] for slot in taken], self.steps[taken]
        self.slots = self.slots.take(backend, backend.asarray(np.array(taken), dtype="int64", like=self.slots.carry.z))
        self.run = self._staged(self.plan.space.of_rows(len(taken)), self.slots.carry.z, self.slots.args)

    def round(self) -> list[StreamResult]:
        """Run one round; return the results of the samples that it has finished."""
        backend, control = self.plan.backend, self.plan.control
        taken = self._taken()
        if not taken:
            return []
        # The first step of a new sample evaluates f at z0.
        left = min(self.max_steps + 1 if slot in self.fresh else self.max_steps - self.steps[slot] for slot in taken)
        spare = len(taken) - max(1, len(self.owner) // SHARE) if self.checks else 0
        budget = Budget(control.rtol, control.atol, control.max_steps, int(min(self.every, left)), max(0, spare))
        try:
            self.slots, evaluations = self.run(self.slots, self._arrivals(), budget)
        except Exception as error:
            if len(self.owner) < self.size:
                error.add_note(
                    f"f raised this when it was evaluated on {len(self.owner)} of {self.size} slots, because "
                    f"forward.compact = true gives up slots that are free. Set forward.compact = false if f needs them."
                )
            raise
        self.fresh.clear()
        carry = self.slots.carry
        status, self.steps = _numpy(backend, carry.status), _numpy(backend, carry.steps)
        done = [slot for slot in taken if status[slot] != int(Status.RUNNING)]
        return self._results(done, carry, evaluations) if done else []

    def _arrivals(self) -> Arrivals:
        """Return the new samples, each by its slot if the backend can write rows, else with fillers in all slots."""
        backend, owners = self.plan.backend, self.owner
        traced = not backend.capabilities.eager
        if not self.fresh and not traced:
            return Arrivals(None, None, (), ())
        rows = np.array([slot in self.fresh for slot in range(len(owners))])
        if not traced:  # a compiled round takes NumPy arrays, at a tenth of the time
            rows = backend.asarray(rows, dtype="bool", like=self.slots.carry.z)
        if traced or not backend.capabilities.compaction:
            places, samples = None, [owner if slot in self.fresh and owner else self.last
                                     for slot, owner in enumerate(owners)]  # fmt: skip
        else:
            places = np.array(sorted(self.fresh))
            samples = [owner for owner in map(owners.__getitem__, places) if owner is not None]
        return Arrivals(rows, places, tuple(sample.z0 for sample in samples), tuple(sample.args for sample in samples))

    def _results(self, done: list[int], carry: LoopState, evaluations: Array) -> list[StreamResult]:
        backend = self.plan.backend
        residual, counts = _numpy(backend, carry.best_residual), backend.to_numpy(evaluations)
        status, results = _numpy(backend, carry.status), []
        if backend.capabilities.eager:
            index = backend.asarray(np.array(done, np.int32), dtype="int32", like=carry.z)
            leaves = dict(zip(done, self.unravel(backend.take(carry.best_z, index)), strict=True))
        else:  # one program, whichever slots they are
            leaves = dict(enumerate(self.unravel(carry.best_z)))
        for slot in done:
            sample, self.owner[slot] = self.owner[slot], None
            assert sample is not None
            ended = Status(int(status[slot]))
            results.append(
                StreamResult(
                    sample.index,
                    self.layout.iterate(leaves[slot]),
                    float(residual[slot]),
                    ended,
                    int(self.steps[slot]),
                    int(counts[slot]),
                )
            )
        return results


def _numpy(backend: Backend, figure: Any) -> Any:
    """Return a figure, which may be on the host already, as a NumPy array."""
    return figure if is_read(backend, figure) else backend.to_numpy(figure)


def _waits(backend: Backend, z0: Tree) -> bool:
    """Return whether a look at the statuses within a round waits for a device. Compiled rounds look there."""
    return backend.capabilities.eager and "cpu" not in str(backend.device_of(backend.flatten(z0)[0][0])).lower()


def _steps_in_round(check_every: int | str, checks: bool) -> int:
    """Return the steps of a round, at most."""
    if isinstance(check_every, int):
        return check_every
    return LONGEST if checks else EVERY_ON_DEVICE
