"""Layers, modules and functions with their data, as the functions of parameters that the diagnostics look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.config import Config
from deqcore.diagnostics.audit import Audit, gradient_audit
from deqcore.errors import ConfigError, described
from deqcore.layer import LayerSettings, initial_state
from deqcore.solve.dispatch import pick_backend
from deqcore.types import Array, Tree


@runtime_checkable
class Layer(Protocol):
    """A layer `DEQ` of a framework: a cell and the settings of its solve."""

    cell: Any
    settings: LayerSettings


@dataclass(frozen=True)
class BoundLayer:
    """A cell with its data: z* = f(z*, params, *inputs).

    Attributes:
        name: of the cell's class or function.
        backend: of the data.
        f: `f(z, params, *inputs)`.
        params: the arrays of a module's parameters; empty for a function.
        inputs: what the cell takes after z.
        z0: the initial iterate.
        config: complete settings of a layer, or None.
        settings: single settings of a layer.
    """

    name: str
    backend: Backend
    f: Callable[..., Tree]
    params: Tree
    inputs: tuple[Tree, ...]
    z0: Tree
    config: Config | None
    settings: dict[str, object]

    @classmethod
    def of(cls, layer: Any, inputs: tuple[Tree, ...], z0: Tree = None) -> BoundLayer:
        """Bind a layer, a module or a function `cell(z, *inputs)`.

        Raises:
            ConfigError: it cannot be called, or nothing gives the shape of the state.
            InitialIterateError: neither the inputs nor z0 hold arrays.
        """
        cell, config = layer, None
        own: dict[str, object] = {}
        if isinstance(layer, Layer):
            cell = layer.cell
            config, own = layer.settings.call(training=True)
        if not callable(cell):
            raise ConfigError.bad_value("The diagnostics", "layer", described(layer), "a layer, a module or a function")
        backend = pick_backend(Config(), (inputs, z0), ())
        params, bind = backend.harness.parameters(cell)
        start = initial_state(cell, inputs, backend_zeros(backend)) if z0 is None else z0
        name = getattr(cell, "__name__", type(cell).__name__)
        return cls(name, backend, lambda z, p, *x: bind(p)(z, *x), params, inputs, start, config, own)

    def direction(self) -> Tree:
        """Return a cotangent of standard normal numbers, the same in each run."""
        rng = np.random.default_rng(20)
        return _mapped(
            self.backend, self.z0, lambda leaf: self.backend.asarray(rng.standard_normal(tuple(leaf.shape)), like=leaf)
        )


def layer_audit(
    layer: Any,
    *inputs: Tree,
    z0: Tree = None,
    cotangent: Tree = None,
    samples: int | None = None,
    turn: int = 0,
    max_vjps: int = 100,
    **overrides: object,
) -> Audit:
    """Compare the gradient of a layer's strategy with the exact one, for its parameters and inputs.

    It is `gradient_audit` for a layer `DEQ` with its own settings, for a module (of torch, flax or equinox), or for a
    function `cell(z, *inputs)`.

    Args:
        layer: the layer, module or function.
        *inputs: what it takes after z, arrays with the batch as first axis.
        z0: initial iterate; default: as the layer makes it, zeros like the first input if it has no
            `initial_state`.
        cotangent: dL/dz*, a tree like z0; default: standard normal numbers from a fixed seed.
        samples: how many samples, spread evenly over the batch; default: all.
        turn: which samples these are: each turn takes the next ones.
        max_vjps: of the reference.
        **overrides: settings of this call, as in `backward__strategy="jacobian-free"`.

    Returns:
        Figures per audited sample, see `Audit`.

    Raises:
        ConfigError: the layer cannot be called, or as `gradient_audit`.

    Example:
        >>> import numpy as np
        >>> from deqcore.diagnostics import layer_audit
        >>> found = layer_audit(lambda z, x: 0.5 * z + x, np.ones((2, 3)), backward__strategy="jacobian-free")
        >>> found.norm_ratio.round(3).tolist()  # u = g, but 2 g is exact
        [0.5, 0.5]
    """
    bound = BoundLayer.of(layer, inputs, z0)
    return gradient_audit(
        bound.f,
        bound.z0,
        bound.params,
        *inputs,
        cotangent=bound.direction() if cotangent is None else cotangent,
        samples=samples,
        turn=turn,
        batched_args=range(1, 1 + len(inputs)),
        max_vjps=max_vjps,
        config=bound.config,
        **(bound.settings | overrides),
    )


def backend_zeros(backend: Backend) -> Callable[[Tree], Tree]:
    """Return a function from a tree of arrays to zeros like it."""
    return lambda tree: _mapped(backend, tree, backend.xp.zeros_like)


def _mapped(backend: Backend, tree: Tree, change: Callable[[Array], Array]) -> Tree:
    leaves, structure = backend.flatten(tree)
    return backend.unflatten(structure, [change(leaf) for leaf in leaves])
