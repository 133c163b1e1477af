"""`DEQ`: a cell and its equilibrium as a `flax.nnx.Module`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from flax.errors import TraceContextError

from deqcore.config import Config
from deqcore.errors import ProblemError
from deqcore.halting import Rule
from deqcore.layer import LayerSettings, batch_norm_text, compare_settings
from deqcore.solution import Solution
from deqcore_jax.layer import check_cell, initial_state, solve, trajectory


class DEQ(nnx.Module):
    """The equilibrium z* = cell(z*, *inputs) as a layer.

    Every leaf of z has the batch as its first axis (unless `forward.batch = false`), and the cell returns a tree like
    it. To start warm, pass `z0=` the previous equilibrium.

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
        cell: Any,
        config: Config | None = None,
        *,
        evaluation: Mapping[str, object] | None = None,
        deterministic: bool = False,
        **overrides: object,
    ) -> None:
        self.cell = check_cell(cell)
        self.settings = LayerSettings.of(config, overrides, evaluation)
        self.deterministic = deterministic

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
        try:
            return solve(self.cell, self.settings, not self.deterministic, z0, inputs, overrides, until)
        except TraceContextError as error:
            raise ProblemError(_changes_itself(self.cell, error)) from error

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
        return trajectory(self.cell, self.settings, not self.deterministic, z0, inputs, steps)

    def check_settings(self, saved: Mapping[str, Any]) -> None:
        """Warn if the settings stored with a checkpoint differ from the layer's own, which stay unchanged.

        Args:
            saved: `layer.settings.as_dict()` of the layer that was saved, as JSON gives it back; orbax stores it
                beside the weights by `JsonSave`.

        Warns:
            LayerWarning: they differ, with each difference.
        """
        compare_settings(saved, self.settings.as_dict())

    def initial_state(self, *inputs: Any) -> Any:
        """Return the initial iterate of a solve without z0."""
        return initial_state(self.cell, inputs)


def _changes_itself(cell: Any, error: Exception) -> str:
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
