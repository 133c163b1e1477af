"""`DEQ`: a cell and its equilibrium as a `flax.nnx.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from flax import nnx
from flax.errors import TraceContextError

import deqcore
from deqcore.errors import ProblemError
from deqcore.layer import LayerSettings, batch_norm_text, check_cell
from deqcore.types import Tree
from deqcore_jax.layer import ImplicitLayer


class DEQ(ImplicitLayer, nnx.Module):
    """The equilibrium z* = cell(z*, *inputs) as a layer.

    Every leaf of z has the batch as its first axis (see `forward.batch` for others), and the cell returns a tree like
    it. To start warm, pass `z0=` the previous equilibrium, or see `deqcore_jax.equilibrium_cache`.

    Args:
        cell: module or function `cell(z, *inputs)`. Its optional method `initial_state(*inputs)` gives z0; without
            one z0 is zeros like the first input.
        config: complete settings; default: environment and `deqcore.using` at each call.
        evaluation: overrides that apply when `deterministic` is true, such as `{"forward__max_steps": 100}`.
        deterministic: whether the layer is in use, not in training; `model.eval()` and `model.train()` set it.
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
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from deqcore_jax.nnx import DEQ
        >>> class Cell(nnx.Module):
        ...     def __init__(self, width, rngs):
        ...         self.linear = nnx.Linear(width, width, kernel_init=nnx.initializers.normal(0.1), rngs=rngs)
        ...     def __call__(self, z, x):
        ...         return jnp.tanh(self.linear(z) + x)
        >>> layer = DEQ(Cell(3, nnx.Rngs(0)), forward__rtol=1e-5)
        >>> layer(jnp.ones((4, 3))).shape
        (4, 3)
    """

    def __init__(
        self,
        cell: Callable[..., Tree],
        config: deqcore.Config | None = None,
        *,
        evaluation: Mapping[str, object] | None = None,
        deterministic: bool = False,
        **overrides: object,
    ) -> None:
        check_cell(cell)
        self.cell = cell
        self.settings = LayerSettings.of(config, overrides, evaluation)
        self.deterministic = deterministic

    def _training(self) -> bool:
        return not self.deterministic

    @contextmanager
    def _check_cell(self) -> Iterator[None]:
        try:
            yield
        except TraceContextError as error:
            raise ProblemError(_changes_itself(self.cell, error)) from error


def _changes_itself(cell: Callable[..., Tree], error: Exception) -> str:
    """Return why a cell that writes to itself has no fixed point, and how to fix it."""
    parts = [(".".join(map(str, path)) or "the cell", part) for path, part in nnx.iter_modules(cell)]
    norms = [name for name, part in parts if isinstance(part, nnx.BatchNorm) and not part.use_running_average]
    if norms:
        return f"{batch_norm_text(norms)}evaluation mode: layer.eval()."
    drops = [name for name, part in parts if isinstance(part, nnx.Dropout) and not part.deterministic]
    if drops:
        return (
            f"The cell draws random numbers while the solver evaluates it (dropout: {', '.join(drops)}), so it is "
            f"another function at each step. Draw one mask before the solve by deqcore_jax.cells.dropout_mask, and "
            f"pass it as an input."
        )
    return (
        f"The cell changes its own state while the solver evaluates it ({str(error).partition(' (')[0]}), so it is "
        f"another function at each step and has no fixed point. Compute the values that change before the solve, and "
        f"pass them as an input."
    )
