"""One `lax.while_loop` for every loop of the core; a scan of the whole budget where steps are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from deqcore.config.sections import LARGEST
from deqcore.types import LoopVars

# On an accelerator the host reads the predicate of a loop at each test.
EVERY: Final = {"cpu": 1}
EVERY_ELSEWHERE: Final = 4

_recorded: ContextVar[bool] = ContextVar("_recorded", default=False)


@contextmanager
def recorded() -> Iterator[None]:
    """Make loops inside the block differentiable in reverse mode, which `lax.while_loop` is not.

    They need a step budget that is a Python number. All of it is allocated; `lax.cond` skips a step that is not
    needed, together with its derivative.
    """
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def is_recorded() -> bool:
    """Return whether loops must be differentiable in reverse mode now."""
    return _recorded.get()


@custom_vmap
def anywhere(flag: jax.Array) -> jax.Array:
    """Return the flag; under vmap, whether it holds in any lane.

    With a predicate per lane, JAX would select between the old and the new carry in every step, including histories.
    The bodies of the core are harmless after the end, so that lanes may end together.
    """
    return flag


@anywhere.def_vmap
def _anywhere_batched(_axis_size: int, _in_batched: list[bool], flag: jax.Array) -> tuple[jax.Array, bool]:
    return jnp.any(flag), False


def loop(
    running: Callable[[LoopVars], jax.Array | bool],
    body: Callable[[LoopVars], LoopVars],
    carry: LoopVars,
    steps: ArrayLike,
    check_every: int | str = "auto",
) -> LoopVars:
    """Apply `body` while `running(carry)`, `steps` times at most; see `deqcore.abc.backend.Backend.loop`."""
    if is_recorded():
        return _scan(running, body, carry, int(steps))
    if isinstance(steps, int) and steps == 1:  # a condition: no loop, and no carry to copy
        once_at_most: LoopVars = lax.cond(anywhere(running(carry)), body, lambda same: same, carry)
        return once_at_most
    chosen = EVERY.get(jax.default_backend(), EVERY_ELSEWHERE) if check_every == "auto" else check_every
    every = int(chosen)
    budget = jnp.asarray(min(steps, LARGEST) if isinstance(steps, int) else steps).astype(jnp.int32)

    def goes_on(state: tuple[jax.Array, LoopVars]) -> jax.Array:
        done, inner = state
        return (done < budget) & anywhere(running(inner))

    def once(state: tuple[jax.Array, LoopVars]) -> tuple[jax.Array, LoopVars]:
        done, inner = state
        return done + 1, body(inner)

    def several(state: tuple[jax.Array, LoopVars]) -> tuple[jax.Array, LoopVars]:
        # A scan has a fixed length, so that no device is read for a predicate inside it.
        return lax.scan(lambda s, _: (once(s), None), state, length=every)[0]

    def chunk(state: tuple[jax.Array, LoopVars]) -> tuple[jax.Array, LoopVars]:
        # Single steps at the end of the budget: cheaper than masking each step of every chunk.
        return lax.cond(state[0] + every <= budget, several, once, state)

    start = jnp.int32(0), carry
    _, end = lax.while_loop(goes_on, once if every == 1 else chunk, start)
    return end


def _scan(
    running: Callable[[LoopVars], jax.Array], body: Callable[[LoopVars], LoopVars], carry: LoopVars, steps: int
) -> LoopVars:
    def step(inner: LoopVars, _: None) -> tuple[LoopVars, None]:
        return lax.cond(running(inner), body, lambda same: same, inner), None

    return lax.scan(step, carry, None, length=steps)[0]
