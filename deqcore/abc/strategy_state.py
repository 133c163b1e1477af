"""Where the state of a strategy stays between the backward passes of a layer or function."""

from __future__ import annotations

from deqcore.types import Array


class StrategyState:
    """Holds the state of a strategy between backward passes; eager frameworks only.

    A layer of PyTorch has one of its own. Pass one to `fixed_point` or `vjp` to keep the state of a function. In JAX
    the state is a value that goes in and out, see `deqcore_jax.strategy_state`.

    Attributes:
        values: the state, one vector `(m,)` of float32 in the backend's arrays; None before the first pass.

    Example:
        >>> import numpy as np, deqcore
        >>> state = deqcore.StrategyState()
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 2)), np.ones((1, 2)),
        ...                        cotangent=np.ones((1, 2)), backward__strategy="adaptive", strategy_state=state)
        >>> dx.round(4).tolist(), state.values is not None
        ([[2.0, 2.0]], True)
    """

    def __init__(self, values: Array | None = None) -> None:
        self.values: Array | None = values
