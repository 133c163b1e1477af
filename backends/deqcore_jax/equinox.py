"""`DEQ`: a cell and its equilibrium as an `equinox.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import FrozenInstanceError

import equinox as eqx
import jax

import deqcore
from deqcore.errors import LayerWarning, ProblemError
from deqcore.layer import LayerSettings, batch_norm_text, check_cell
from deqcore.solve.user_line import warn
from deqcore.types import Tree
from deqcore_jax.layer import ImplicitLayer


class DEQ(ImplicitLayer, eqx.Module):
    """The equilibrium z* = cell(z*, *inputs) as a layer.

    Every leaf of z has the batch as its first axis (see `forward.batch` for others), and the cell returns a tree like
    it; a cell for one sample goes in as `jax.vmap(cell)`. To start warm, pass `z0=` the previous equilibrium, or see
    `deqcore_jax.equilibrium_cache`.

    Args:
        cell: module or function `cell(z, *inputs)`. Its optional method `initial_state(*inputs)` gives z0; without
            one z0 is zeros like the first input.
        config: complete settings; default: environment and `deqcore.using` at each call.
        evaluation: overrides that apply when `inference` is true, such as `{"forward__max_steps": 100}`.
        inference: whether the layer is in use, not in training; `equinox.nn.inference_mode` sets it.
        **overrides: single settings, such as `forward__rtol=1e-5`.

    Attributes:
        cell: the cell.

    Raises:
        ConfigError: a setting is unknown or out of range.
        UnknownNameError: a solver or a strategy is not registered.
        ProblemError: (when called) the cell returned something that is not like z, takes other arguments, or changed
            its own state.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from deqcore_jax.equinox import DEQ
        >>> layer = DEQ(lambda z, x: 0.5 * jnp.tanh(z) + x, forward__rtol=1e-5)
        >>> layer(jnp.ones((4, 3))).shape
        (4, 3)
    """

    cell: Callable[..., Tree]
    settings: LayerSettings = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        cell: Callable[..., Tree],
        config: deqcore.Config | None = None,
        *,
        evaluation: Mapping[str, object] | None = None,
        inference: bool = False,
        **overrides: object,
    ) -> None:
        check_cell(cell)
        self.cell = cell
        self.settings = LayerSettings.of(config, overrides, evaluation)
        self.inference = inference

    def _training(self) -> bool:
        return not self.inference

    @contextmanager
    def _check_cell(self) -> Iterator[None]:
        norms = _training_norms(self.cell)
        if norms and not self.inference:
            warn(f"{batch_norm_text(norms)}equinox.nn.inference_mode.", LayerWarning)
        try:
            yield
        except FrozenInstanceError as error:
            raise ProblemError(
                f"The cell changes its own state while the solver evaluates it ({error}), but equinox modules are "
                f"immutable, and a fixed point needs one function. Compute the values that change before the solve, "
                f"and pass them as an input."
            ) from error


def _training_norms(cell: Callable[..., Tree]) -> list[str]:
    """Return the paths in a cell of batch normalisation in training mode."""
    parts = jax.tree_util.tree_leaves_with_path(cell, is_leaf=lambda part: isinstance(part, eqx.nn.BatchNorm))
    return [
        jax.tree_util.keystr(path).lstrip(".") or "the cell"
        for path, part in parts
        if isinstance(part, eqx.nn.BatchNorm) and not part.inference
    ]
