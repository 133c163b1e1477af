"""Arguments whose arrays are inside opaque leaves: dataclasses and modules that are not registered as trees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any, Final

from deqcore.abc.backend import Backend
from deqcore.errors import ProblemError
from deqcore.types import Array, Tree

PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), type, FunctionType, ModuleType)
Build = Callable[[Any], Any]


def arrays_in(backend: Backend, tree: Tree) -> Iterator[Array]:
    """Yield all arrays of a tree, including those in the attributes of its leaves."""
    yield from _arrays(backend, tree, {})


def _arrays(backend: Backend, tree: Tree, visited: dict[int, Any]) -> Iterator[Array]:
    for leaf in backend.flatten(tree)[0]:
        if backend.is_array(leaf):
            yield leaf
        elif not isinstance(leaf, PLAIN) and id(leaf) not in visited:
            visited[id(leaf)] = leaf  # kept alive, so that ids stay unique
            for value in _attributes(leaf).values():
                yield from _arrays(backend, value, visited)


def _attributes(leaf: Any) -> Mapping[str, Any]:
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name)}
    attributes: Mapping[str, Any] = getattr(leaf, "__dict__", {})
    return dict(attributes)


def opened(backend: Backend, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Callable[[tuple[Any, ...]], Any]]:
    """Return the arguments with dataclasses turned into trees, and the function that undoes it.

    A dataclass that is not a tree of the backend becomes the dict of its fields. Undoing it makes a copy of the
    dataclass with new fields, also for gradients.

    Raises:
        ProblemError: a leaf that is neither an array nor a dataclass holds floating-point arrays, which would get no
            gradient.
    """
    pairs = [_open(backend, arg, f"argument {i}") for i, arg in enumerate(args)]
    return tuple(tree for tree, _ in pairs), lambda trees: tuple(
        build(tree) for (_, build), tree in zip(pairs, trees, strict=True)
    )


def _open(backend: Backend, tree: Tree, name: str) -> tuple[Tree, Build]:
    leaves, structure = backend.flatten(tree)
    pairs = [_open_leaf(backend, leaf, name) for leaf in leaves]
    if all(build is _same for _, build in pairs):
        return tree, _same

    def build(values: list[Any]) -> Any:
        made = [make(value) for (_, make), value in zip(pairs, values, strict=True)]
        return backend.unflatten(structure, made)

    return [value for value, _ in pairs], build


def _open_leaf(backend: Backend, leaf: Any, name: str) -> tuple[Any, Build]:
    if backend.is_array(leaf) or isinstance(leaf, PLAIN) or not _holds(backend, leaf):
        return leaf, _same
    if not is_dataclass(leaf):
        raise ProblemError(
            f"deqcore.vjp: {name} has a {type(leaf).__name__} with arrays, which is not a tree of {backend.name}, so "
            f"they would get no gradient. Pass the arrays as a tree (a dict of a module's parameters by name, "
            f"which torch.func.functional_call takes), or register the class as a pytree."
        )
    pairs = {key: _open(backend, value, name) for key, value in _attributes(leaf).items()}

    def build(values: dict[str, Any]) -> Any:
        made = copy.copy(leaf)
        for key, (_, make) in pairs.items():
            object.__setattr__(made, key, make(values[key]))
        return made

    return {key: value for key, (value, _) in pairs.items()}, build


def _holds(backend: Backend, leaf: Any) -> bool:
    return any("float" in backend.dtype_name(array) for array in arrays_in(backend, leaf))


def _same(value: Any) -> Any:
    return value
