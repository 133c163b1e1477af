"""The state of a strategy such as `adaptive` in JAX: a value that goes into a step and comes out of it.

A vector–Jacobian product returns only its gradients, so the new state comes back as one of them: inside
`carrying(state)` a solve takes the state along, and the gradient with respect to it *is* the state for the next step.
It passes `jit`, `scan` and layers. Nothing is compiled again when the strategy takes another number of products.

Rules: one state serves one solve; differentiate with respect to it inside the same `jit`; under `vmap` each lane brings
its own. A step that averages gradients over devices averages the state as well, so that all of them agree. `adaptive`
takes a sum of states (of a state that `scan` or `vmap` shares) as their mean, and makes an exact pass where they differ
in the number of products. A solve with a state has reverse mode of first order only.

Example:
    >>> import jax, jax.numpy as jnp, deqcore, deqcore_jax.strategy_state as strategy_state
    >>> def loss(a, state):
    ...     with strategy_state.carrying(state):
    ...         z = deqcore.fixed_point(lambda z: a * z + 1.0, jnp.zeros((2, 1)), backward__strategy="adaptive").value
    ...     return jnp.sum(z)
    >>> step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    >>> state = strategy_state.new("adaptive")
    >>> for _ in range(3):
    ...     gradient, state = step(0.5, state)
    >>> print(gradient.round(2))
    8.0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import jax
import jax.numpy as jnp

from deqcore import plugins
from deqcore.abc.stateful import StatefulStrategy
from deqcore.errors import StrategyError
from deqcore_jax.solve_block import SolveBlock

_states: Final = SolveBlock[jax.Array](
    "deqcore_jax.strategy_state",
    "A second solve runs inside one `carrying` block. Give each solve a state of its own.",
)


def new(strategy: str, options: Mapping[str, object] | None = None) -> jax.Array:
    """Return the state before the first step.

    Args:
        strategy: its name.
        options: those of `backward.options`.

    Returns:
        The state `(m,)` of float32.

    Raises:
        StrategyError: the strategy has no state.
        UnknownNameError: it is not registered.

    Example:
        >>> new("adaptive", {"max_vjps": 0}).ndim
        1
    """
    made = plugins.make_strategy(strategy, dict(options or {}))
    if not isinstance(made, StatefulStrategy):
        raise StrategyError(f"{strategy!r} must be a strategy with state (got {type(made).__name__}). Use 'adaptive'.")
    return jnp.asarray(made.init_state(), jnp.float32)


@contextmanager
def carrying(state: jax.Array | None) -> Iterator[None]:
    """Let the one solve inside the block use `state`, and return the next one as its gradient.

    Args:
        state: the argument to differentiate with respect to `(m,)`, as in the example of this module; None: the
            strategy is called as one without state.

    Raises:
        StrategyError: a second solve runs inside the block, or the state is that of other options.

    Example:
        >>> import deqcore
        >>> def loss(state, x):
        ...     with carrying(state), deqcore.using(backward__strategy="adaptive"):
        ...         return deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x).value.sum()
        >>> state = new("adaptive")
        >>> bool((jax.grad(loss)(state, jnp.ones((2, 3))) != state).any())
        True
    """
    with _states.holding(state):
        yield


def take(strategy: object) -> jax.Array | None:
    """Return the state of the block for the solve that starts now. Only `deqcore_jax.autodiff` calls it."""
    if not isinstance(strategy, StatefulStrategy):
        return None
    values, shape = _states.take(), (len(strategy.init_state()),)
    if values is not None and values.shape != shape:
        raise StrategyError(
            f"The state must have the shape {shape} of the strategy's options (got {values.shape}). Make it with "
            f"deqcore_jax.strategy_state.new and the options of the solve."
        )
    return values
