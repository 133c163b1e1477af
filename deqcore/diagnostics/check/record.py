"""What a user says about a layer: where its cell and its state are, and what the layer claims."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from deqcore.errors import ConfigError
from deqcore.types import Tree

GRADIENTS: Final = ("exact", "approximate", "none")
DTYPES: Final = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Claims:
    """What a layer promises. A property that it does not promise is not held against it.

    Attributes:
        rtol: ‖f(z) − z‖ / ‖f(z)‖ of what it returns; None: 1e-3, in half precision 2·√eps.
        gradient: "exact" (the implicit one), "approximate" (a descent direction) or "none".
        gradient_rtol: relative error of an exact gradient.
        independent: each sample's state depends on its own inputs alone.
        unique: the state does not depend on the start.
        causal: the axis of positions, counted with the batch axis, if a position's state depends on it and earlier
            positions alone; None: the layer does not promise it.
        dtypes: further dtypes in which it works; None: the other one of float32 and float64, if it runs there.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from deqcore.diagnostics import Claims
        >>> Claims(gradient="approximate", causal=1).rtol is None
        True
    """

    rtol: float | None = None
    gradient: str = "exact"
    gradient_rtol: float = 0.01
    independent: bool = True
    unique: bool = True
    causal: int | None = None
    dtypes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.gradient not in GRADIENTS:
            raise ConfigError.no_entry("Claims", "gradient", str(self.gradient), GRADIENTS)
        for name, value in (("rtol", self.rtol), ("gradient_rtol", self.gradient_rtol)):
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError.bad_value("Claims", name, value, "a number above 0")
        for dtype in self.dtypes or ():
            if dtype not in DTYPES:
                raise ConfigError.no_entry("Claims", "dtype", str(dtype), DTYPES)
        if self.causal is not None and self.causal < 0:
            raise ConfigError.bad_value("Claims", "causal", self.causal, "an axis from 0 on, or None")


@dataclass(frozen=True)
class LayerUnderTest:
    """A layer with a fixed point inside, of any library, and where to find its parts.

    Attributes:
        layer: a module of torch, flax or equinox, or a function; `layer(*inputs)` returns the state, or something that
            holds it.
        cell: f of z = f(z, *inputs). A name below the layer, such as "cell" or "deq.f"; a part of the layer itself; or
            a function: `f(layer, z, *inputs)` for a module, `f(z, *inputs)` for a layer that is a function.
        inputs: what the layer is called with: trees of arrays.
        state: where the state is in what the layer returns: None (the whole), a position, a name such as "0.z", or a
            function of it.
        inner: name of the part that solves, if `layer` is a whole model. The model is called once with `inputs`, and
            the arguments of this part are recorded. All other names are then below this part.
        start: name of the layer's argument that takes an initial state; empty: it takes none.
        z0: a further initial state to start from.
        batch: whether the first axis of the state is the batch.
        claims: what the layer promises.

    Example:
        >>> import numpy as np
        >>> from deqcore.diagnostics import LayerUnderTest, check_layer
        >>> def cell(z, x):
        ...     return 0.5 * z + x
        >>> layer = LayerUnderTest(lambda x: 2.0 * x, cell, (np.ones((2, 3)),))
        >>> check_layer(layer).finding("equilibrium").status
        'ok'
    """

    layer: Any
    cell: Any
    inputs: tuple[Tree, ...] = ()
    state: Any = None
    inner: str = ""
    start: str = ""
    z0: Tree = None
    batch: bool = True
    claims: Claims = field(default_factory=Claims)
