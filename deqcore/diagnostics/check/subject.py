"""A layer under test, bound to its arrays: runs of the layer and of its cell, as matrices `(batch, n)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.config import Config
from deqcore.diagnostics.check import naming
from deqcore.diagnostics.check.effects import EffectWatch
from deqcore.diagnostics.check.record import LayerUnderTest
from deqcore.diagnostics.linearization import host
from deqcore.errors import DeqcoreError, InitialIterateError, ProblemError, described
from deqcore.solve.dispatch import pick_backend
from deqcore.solve.flatten import RavelSpec
from deqcore.types import Array, Tree

RTOL: Final = 1e-3


@dataclass(frozen=True)
class Subject:
    """A layer with everything that a check needs.

    Attributes:
        record: what the user said.
        backend: of the arrays.
        layer: the module or function.
        cell: `f(layer, z, *inputs)`.
        inputs: of the layer.
        keywords: further arguments of the layer.
        space: how the state becomes a matrix; one row in all if `record.batch` is False.
        z: the state that the layer returned, `(batch, n)`.
        tree: the same as the layer returned it.
        watch: keeps global state.
    """

    record: LayerUnderTest
    backend: Backend
    layer: Any
    cell: Callable[..., Any]
    inputs: tuple[Tree, ...]
    keywords: Mapping[str, Any]
    space: RavelSpec
    z: Array
    tree: Tree = field(repr=False)
    watch: EffectWatch = field(repr=False)

    def run(self, layer: Any = None, inputs: tuple[Tree, ...] | None = None, start: Tree = None) -> Array:
        """Return the state of a run of the layer, `(batch, n)`."""
        given = self.inputs if inputs is None else inputs
        keywords = dict(self.keywords) if start is None else dict(self.keywords) | {self.record.start: start}
        output = call(self.layer if layer is None else layer, given, keywords, self.watch)
        return self.space.ravel_like("state of the layer", naming.state_of(self.record.state)(output))

    def f(self, z: Array, *, layer: Any = None, inputs: tuple[Tree, ...] | None = None) -> Array:
        """Return the cell at `z` `(batch, n)`."""
        given = self.inputs if inputs is None else inputs
        owner = self.layer if layer is None else layer
        return self.space.call(lambda tree, *args: self.cell(owner, tree, *args), z, given)

    def residual(self, z: Array, **changed: Any) -> Any:
        """‖f(z) − z‖ per row, on the host `(batch,)`."""
        fz = self.backend.detach(self.f(self.backend.detach(z), **changed))
        return host(self.backend, self.backend.norm(fz - z))

    @property
    def rtol(self) -> float:
        """The relative residual that the layer promises."""
        eps = self.backend.eps(self.z)
        default = RTOL if eps < 1e-4 else 2 * float(np.sqrt(eps))
        return default if self.record.claims.rtol is None else self.record.claims.rtol

    def whole(self) -> Subject:
        """Return the same with the whole state as one row, for a cell that couples the samples."""
        space = RavelSpec.of(self.backend, self.tree, batch=False)
        return replace(self, space=space, z=self.backend.xp.reshape(self.z, (1, -1)) if self.z.shape[0] else self.z)


def bind(
    record: LayerUnderTest,
    layer: Any,
    inputs: tuple[Tree, ...],
    keywords: Mapping[str, Any],
    cell: Callable[..., Any],
    watch: EffectWatch,
) -> Subject:
    """Run the layer once and bind it to the state that it returns.

    Raises:
        ConfigError: the name of the state does not exist.
        ProblemError: the layer or the cell raises, or the cell does not return a tree like the state.
        InitialIterateError: the state is not a tree of floating-point arrays, or it is empty.
    """
    tree = naming.state_of(record.state)(call(layer, inputs, keywords, watch))
    try:
        backend = pick_backend(Config(), tree, inputs)
        space = RavelSpec.of(backend, tree, record.batch)
    except InitialIterateError as error:
        raise InitialIterateError(
            f"The state must be a tree of floating-point arrays with the batch as first axis (the layer returned "
            f"{described(tree)}). {error} Name the state with `state`, or set batch=False."
        ) from error
    z = backend.detach(space.ravel(tree))
    if 0 in z.shape:
        raise InitialIterateError(
            f"The state must have at least one sample with one number (the layer returned {described(tree)}). Give "
            f"inputs that are not empty."
        )
    tree = mapped(backend, tree, backend.detach)
    subject = Subject(record, backend, layer, cell, inputs, keywords, space, z, tree, watch)
    _check_cell(subject)
    return subject


def _check_cell(subject: Subject) -> None:
    """Raise a ProblemError unless the cell takes the state and returns one like it."""
    try:
        subject.f(subject.z)
    except DeqcoreError as error:
        raise ProblemError(
            f"The cell must return a tree like the state. {error} Name another cell or state, or give a function "
            f"f(layer, z, *inputs)."
        ) from error
    except Exception as error:
        whole = subject.record.state is None and not subject.backend.is_array(subject.tree)
        part = " Name the state in it with `state`, if it is a part of that." if whole else ""
        raise ProblemError(
            f"The cell raised {first_line(error)}. It is called as f(z, *inputs) with the state that the layer "
            f"returned ({described(subject.tree)}) and the layer's inputs.{part} Give a function f(layer, z, *inputs) "
            f"if it takes others."
        ) from error


def call(layer: Any, inputs: tuple[Tree, ...], keywords: Mapping[str, Any], watch: EffectWatch) -> Any:
    """Call the layer.

    Raises:
        ProblemError: it raises.
    """
    try:
        with watch():
            return layer(*inputs, **keywords)
    except Exception as error:
        raise ProblemError(f"The layer raised {type(error).__name__}: {error}") from error


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:160].rstrip('.')}" if lines else type(error).__name__


def mapped(backend: Backend, tree: Tree, change: Callable[[Array], Array]) -> Tree:
    """Return a tree with `change` applied to its arrays."""
    leaves, structure = backend.flatten(tree)
    return backend.unflatten(structure, [change(leaf) if backend.is_array(leaf) else leaf for leaf in leaves])
