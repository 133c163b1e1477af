"""The common part of the layers for flax and equinox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp

import deqcore  # its names are imported when they are used: what solves, in the first solve of a program
from deqcore import layer
from deqcore.types import Tree


class ImplicitLayer:
    """The methods of a layer; a module of flax or equinox adds how it stores `cell` and `settings`.

    Attributes:
        cell: the cell, `cell(z, *inputs)`.
        settings: the settings of the layer.
    """

    cell: Callable[..., Tree]
    settings: layer.LayerSettings

    def __call__(
        self, *inputs: Tree, z0: Tree = None, until: deqcore.halting.Rule | None = None, mask: jax.Array | None = None
    ) -> Tree:
        """Return the equilibrium z*, a tree like the state.

        Args:
            *inputs: what the cell takes in addition to z.
            z0: initial iterate; default: see the class.
            until: when a sample halts before it has converged, such as `deqcore.halting.Settled(read)`.
            mask: samples or units that take part, see `deqcore.fixed_point`.
        """
        return self.solve(*inputs, z0=z0, until=until, mask=mask).value

    def solve(
        self,
        *inputs: Tree,
        z0: Tree = None,
        until: deqcore.halting.Rule | None = None,
        mask: jax.Array | None = None,
        **overrides: object,
    ) -> deqcore.Solution:
        """Return the solution: the equilibrium and the report of its solve.

        Args:
            *inputs: what the cell takes in addition to z.
            z0: initial iterate; default: see the class.
            until: when a sample halts before it has converged.
            mask: samples or units that take part.
            **overrides: settings of this call.

        Raises:
            ProblemError: the cell returned something that is not like z, or changed its own state.
        """
        with self._check_cell():
            return self._solve(inputs, z0, [overrides], until, mask)[0]

    def trajectory(self, *inputs: Tree, steps: Sequence[int], z0: Tree = None) -> list[Tree]:
        """Return states on the way, for losses that correct the path (fixed-point correction).

        Each is the best iterate so far and carries its own implicit gradient. The last one is the solution with the
        step budget of the layer.

        Args:
            *inputs: what the cell takes in addition to z.
            steps: step counts, increasing and positive, after which a state is wanted.
            z0: initial iterate; default: see the class.

        Raises:
            ConfigError: the step counts do not increase.
            ProblemError: the cell returned something that is not like z, or changed its own state.

        Source: Bai, Geng, Savani & Kolter (2022), "Deep equilibrium optical flow estimation", eq. (6).
        """
        stages = layer.stages(steps)
        with self._check_cell():
            return [solution.value for solution in self._solve(inputs, z0, stages)]

    def check_settings(self, saved: Mapping[str, object]) -> None:
        """Warn if the settings stored with a checkpoint differ from the layer's own, which stay unchanged.

        Args:
            saved: `layer.settings.as_dict()` of the layer that was saved, as JSON gives it back; orbax stores it
                beside the weights by `JsonSave`.

        Warns:
            LayerWarning: they differ, with each difference.
        """
        layer.compare_settings(saved, self.settings.as_dict())

    def initial_state(self, *inputs: Tree) -> Tree:
        """Return the initial iterate of a solve without z0."""
        return layer.initial_state(self.cell, inputs, lambda tree: jax.tree.map(jnp.zeros_like, tree))

    def _solve(
        self,
        inputs: tuple[Tree, ...],
        z0: Tree,
        stages: Sequence[Mapping[str, object]],
        rule: deqcore.halting.Rule | None = None,
        mask: jax.Array | None = None,
    ) -> list[deqcore.Solution]:
        """Return the solutions of consecutive solves, each continued from the one before under further settings."""
        config, own = self.settings.call(self._training())
        start = self.initial_state(*inputs) if z0 is None else z0
        f = self.cell
        if rule is not None:
            from deqcore.halting import until

            f = until(f, rule)
        solutions: list[deqcore.Solution] = []
        for stage in stages:
            state = solutions[-1].state if solutions else None
            with layer.explain_arguments(self.cell, inputs, type(self.cell).__name__):
                solutions.append(
                    deqcore.fixed_point(f, start, *inputs, config=config, state=state, mask=mask, **(own | dict(stage)))
                )
        return solutions

    def _training(self) -> bool:
        """Return whether the layer is in training mode."""
        raise NotImplementedError

    @contextmanager
    def _check_cell(self) -> Iterator[None]:
        """Translate the module system's error about a cell that changes itself inside the block."""
        raise NotImplementedError
        yield
