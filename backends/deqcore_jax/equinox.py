"""`DEQ`: a cell and its equilibrium as an `equinox.Module`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import equinox as eqx
import jax

from deqcore.config import Config
from deqcore.errors import LayerWarning, ProblemError
from deqcore.halting import Rule
from deqcore.layer import LayerSettings, batch_norm_text, compare_settings
from deqcore.solution import Solution
from deqcore_jax.layer import check_cell, initial_state, solve, trajectory


class DEQ(eqx.Module):
    """The equilibrium z* = cell(z*, *inputs) as a layer.

    Every leaf of z has the batch as its first axis (unless `forward.batch = false`), and the cell returns a tree like
    it; a cell for one sample goes in as `jax.vmap(cell)`. To start warm, pass `z0=` the previous equilibrium.

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

    cell: Any
    settings: LayerSettings = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        cell: Any,
        config: Config | None = None,
        *,
        evaluation: Mapping[str, object] | None = None,
        inference: bool = False,
        **overrides: object,
    ) -> None:
        self.cell = check_cell(cell)
        self.settings = LayerSettings.of(config, overrides, evaluation)
        self.inference = inference

    def __call__(self, *inputs: Any, z0: Any = None, until: Rule | None = None) -> Any:
        """Return the equilibrium z*, a tree like the state.

        Args:
            *inputs: what the cell takes in addition to z.
            z0: initial state; default: see the class.
            until: when a sample halts before it has converged, such as `deqcore.halting.Settled(read)`.
        """
        return self.solve(*inputs, z0=z0, until=until).value

    def solve(self, *inputs: Any, z0: Any = None, until: Rule | None = None, **overrides: object) -> Solution:
        """Return the solution: the equilibrium and the report of its solve.

        Args:
            *inputs: what the cell takes in addition to z.
            z0: initial state; default: see the class.
            until: when a sample halts before it has converged.
            **overrides: settings of this call.

        Raises:
            ProblemError: the cell returned something that is not like z, or changed its own state.
        """
        norms = _training_norms(self.cell)
        if norms and not self.inference:
            warnings.warn(f"{batch_norm_text(norms)}equinox.nn.inference_mode.", LayerWarning, stacklevel=3)
        try:
            return solve(self.cell, self.settings, not self.inference, z0, inputs, overrides, until)
        except FrozenInstanceError as error:
            raise ProblemError(
                f"The cell changes its own state while the solver evaluates it ({error}), but equinox modules are "
                f"immutable, and a fixed point needs one function. Compute the values that change before the solve, "
                f"and pass them as an input."
            ) from error

    def trajectory(self, *inputs: Any, steps: Sequence[int], z0: Any = None) -> list[Any]:
        """Return states on the way, for losses that correct the path (fixed-point correction).

        Each is the best iterate so far and carries its own implicit gradient. The last one is the solution with the
        step budget of the layer.

        Args:
            *inputs: what the cell takes in addition to z.
            steps: step counts, increasing and positive, after which a state is wanted.
            z0: initial state; default: see the class.

        Raises:
            ConfigError: the step counts do not increase.

        Source: Bai, Geng, Savani & Kolter (2022), "Deep equilibrium optical flow estimation", eq. (6).
        """
        return trajectory(self.cell, self.settings, not self.inference, z0, inputs, steps)

    def check_settings(self, saved: Mapping[str, Any]) -> None:
        """Warn if the settings stored with a checkpoint differ from the layer's own, which stay unchanged.

        Args:
            saved: `layer.settings.as_dict()` of the layer that was saved, as JSON gives it back.

        Warns:
            LayerWarning: they differ, with each difference.
        """
        compare_settings(saved, self.settings.as_dict())

    def initial_state(self, *inputs: Any) -> Any:
        """Return the initial iterate of a solve without z0."""
        return initial_state(self.cell, inputs)


def _training_norms(cell: Any) -> list[str]:
    """Return the paths in a cell of batch normalisation in training mode."""
    parts = jax.tree_util.tree_leaves_with_path(cell, is_leaf=lambda part: isinstance(part, eqx.nn.BatchNorm))
    return [
        jax.tree_util.keystr(path).lstrip(".") or "the cell"
        for path, part in parts
        if isinstance(part, eqx.nn.BatchNorm) and not part.inference
    ]
