"""Calls of f: what may be passed to it, and what is done with the arrays that it returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

from deqcore.abc.arrays import ArrayOps
from deqcore.types import Array, Figures

P = ParamSpec("P")
R = TypeVar("R")


class CallGuards:
    """Guards the calls of f. The defaults fit a framework whose arrays cannot be written to.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.guards.unfit(be.xp.ma.masked_array([1.0]))[:14]
        'a masked array'
    """

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

    def unfit(self, x: Array) -> str | None:
        """Say why an array of this framework (a subclass) cannot be a state, and what to pass; None if it can."""
        return None

    def autocasting(self, x: Array) -> bool:
        """Return whether f runs under automatic mixed precision, so that its output may be narrower than the state."""
        return False

    def output_eps(self, x: Array) -> float:
        """Return the machine epsilon of f's output for a state like `x`: coarser than `eps` under mixed precision."""
        return self.be.eps(x)

    def in_extended_precision(self) -> bool:
        """Return whether f is being evaluated in a wider dtype than the state's, to differentiate it by differences."""
        return False

    def holds(self, flag: Array) -> bool:
        """Return the value of a scalar of bool; inside a transformation that maps, whether it is true on each lane."""
        return bool(flag)

    def owned(self, leaves: list[Any]) -> list[Any]:
        """Copy each array in f's result that f or the user keeps: a reused buffer, an argument, z itself.

        Only a framework with writable arrays needs it. `leaves` and one container, or one name, may hold the arrays
        beside their owner.
        """
        return leaves

    def unshared(self, x: Array, other: Array) -> Array:
        """Return `x`, or a copy if it is writable and shares memory with `other`."""
        return x

    def guard_inplace(self, z: Array) -> AbstractContextManager[Array]:
        """Pass `z` to f so that a write to it is detected, without a pass over the array.

        `z` may be the user's own memory, in several threads at once, so the block changes no property of it.

        Returns:
            A context whose value is an array like `z`, on the same memory.

        Raises:
            ProblemError: (from the block) f wrote to that array.
        """
        return nullcontext(z)

    def keep_random_state(self, x: Array) -> AbstractContextManager[None]:
        """Restore the framework's global random state, on the host and the device of `x`, after the block.

        Evaluations of f that only check something run in it, so that they change no random number of the user's.
        """
        return nullcontext()

    def untraced(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Return `fn` run by Python even if a compiler of Python code (`torch.compile`) traces its caller."""
        return fn

    def watch(self, report: Callable[[Any], None], figures: Figures, *, compiled: bool) -> None:
        """Call `report` with what traced `figures` turn out to be, whenever they are notable.

        Only a tracing backend is asked to; an eager one has no traced arrays. It calls at once where values are known
        (eager transformations), and by a callback from compiled code only if `compiled`, since a callback has a price
        there. Under a vectorising transformation it calls once, with the figures of all lanes, see `Figures.merged`.
        """
