"""Compaction: a solve that continues with the samples that still run, and evaluates f only for them.

Opt-in (`forward.compact`), because only the caller knows which arguments carry the batch axis. Each time that half of
the current rows have stopped, the others move to smaller arrays, so that all moves together copy a state and its
histories at most once. At the end iterates, statuses and histories return to their places, so that estimates and a
continued solve are not affected. Samples are independent in a solve, so the results are the same as without
compaction; they are equal bit by bit if f also computes each row from that row alone, in the same way for any batch.
"""

from __future__ import annotations

from typing import Any, Protocol

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.solver import map_state, map_states
from deqcore.errors import ProblemError
from deqcore.types import Array, LoopState, Map, Status


class RestrictRows(Protocol):
    """A function that restricts f to some samples."""

    def __call__(self, rows: Array) -> Map:
        """Return the map on `(k, n)` for the samples with the indices `rows` `(k,)`."""


class Advance(Protocol):
    """A function that steps with f while more than `spare` samples run, at most `steps` times."""

    def __call__(self, f: Map, carry: LoopState, steps: int, spare: int) -> LoopState:
        """Return the loop state after these steps."""


def solve_compacted(
    backend: Backend,
    advance: Advance,
    f: Map,
    narrow: RestrictRows,
    carry: LoopState,
    steps: int,
    rows: Array | None = None,
) -> LoopState:
    """Advance `carry` until all its samples have stopped, with fewer and fewer rows.

    Args:
        backend: the backend of these arrays.
        advance: the loop.
        f: the map for the rows in `carry`.
        narrow: see `RestrictRows`; its indices refer to the whole batch.
        carry: the current loop state.
        steps: step budget.
        rows: indices of the samples in `carry`, None for all.

    Raises:
        ProblemError: f returns other values for some samples than for the whole batch.
    """
    end = advance(f, carry, steps, carry.status.shape[0] // 2)
    going = backend.rows(end.status == int(Status.RUNNING))
    left = steps - _spent(backend, carry, end)
    if going.shape[0] == 0 or left <= 0:
        return end
    chosen = going if rows is None else backend.take(rows, going)
    part = take_rows(backend, end, going)
    fewer = narrow(chosen)
    if rows is None:
        _check(backend, fewer, part)
    done: LoopState = _put(backend, end, going, solve_compacted(backend, advance, fewer, narrow, part, left, chosen))
    return done


def _spent(backend: Backend, start: LoopState, end: LoopState) -> int:
    """Return the number of steps between two loop states: that of a sample that ran all the time."""
    taken = end.steps - start.steps
    return int(backend.xp.max(taken)) if taken.shape[0] else 0


def _check(backend: Backend, fewer: Map, part: LoopState) -> None:
    """Compare one evaluation of f on the first subset of samples with the values from the whole batch.

    With an undeclared argument, a batch statistic or a random number in f, the solve would silently converge to wrong
    results.
    """
    xp = backend.xp
    try:
        difference = backend.norm(fewer(part.z) - part.fz)
    except Exception as error:
        error.add_note(
            f"f raised this when it was evaluated on {part.z.shape[0]} samples without the others "
            f"(forward.compact = true). {_REMEDY}"
        )
        raise
    slack = 0.05 if backend.guards.autocasting(part.z) else backend.eps(part.z) ** 0.5
    if bool(xp.any(difference > slack * (backend.norm(part.fz) + backend.norm(part.z)))):
        raise ProblemError(
            f"forward.compact = true, but f returns other values for {part.z.shape[0]} samples alone than for the "
            f"same samples in the whole batch. {_REMEDY}"
        )


_REMEDY = (
    "Every argument that carries the batch axis must be passed in args and named in batched_args, not closed over, "
    "and f must neither couple samples (batch statistics) nor draw random numbers. Otherwise set "
    "forward.compact = false."
)


def take_rows(backend: Backend, carry: Any, rows: Array) -> Any:
    """Return a loop state of the samples `rows` `(k,)` only; leaves without a batch axis stay."""

    def taken(leaf: Any) -> Any:
        if isinstance(leaf, History):
            return leaf.take(rows)
        return backend.take(leaf, rows) if leaf.ndim else leaf

    return map_state(carry, taken)


def _put(backend: Backend, carry: Any, rows: Array, part: Any) -> Any:
    """Return `carry` with its samples `rows` taken from `part`; leaves without a batch axis are those of `part`."""

    def leaf(whole: Any, part: Any) -> Any:
        if isinstance(whole, History):
            return whole.put(rows, part)
        return part if whole is None or not whole.ndim else backend.put(whole, rows, part)

    return map_states(leaf, carry, part)
