"""Arguments that hold arrays where the backend's trees end: dataclasses, modules, functions and sets."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, Final

from deqcore.abc.arrays import is_inexact
from deqcore.abc.backend import Backend
from deqcore.errors import ProblemError
from deqcore.types import Array, Tree

PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), type, ModuleType)
Build = Callable[[Any], Any]
_EMPTY: Final = CellType()


def arrays_in(backend: Backend, tree: Tree) -> Iterator[Array]:
    """Yield all arrays of a tree, including those in the attributes of its leaves."""
    yield from _arrays(backend, tree, {})


def _arrays(backend: Backend, tree: Tree, visited: dict[int, Any]) -> Iterator[Array]:
    for leaf in backend.flatten(tree)[0]:
        if backend.is_array(leaf) and not _is_compound(leaf):
            yield leaf
        elif not isinstance(leaf, PLAIN) and id(leaf) not in visited:
            visited[id(leaf)] = leaf  # kept alive, so that ids stay unique
            for value in _contents(leaf):
                yield from _arrays(backend, value, visited)


def _contents(leaf: Any) -> Iterator[Any]:
    """Yield all that an object, a function or a set refers to."""
    yield from _attributes(leaf).values()
    if isinstance(leaf, FunctionType):
        yield from (leaf.__defaults__ or (), leaf.__kwdefaults__ or {})
        yield from (cell.cell_contents for cell in leaf.__closure__ or () if cell != _EMPTY)
        named = (leaf.__globals__.get(name) for name in leaf.__code__.co_names)
        yield from (value for value in named if not isinstance(value, FunctionType))
    elif isinstance(leaf, MethodType):
        yield from (leaf.__self__, leaf.__func__)
    elif isinstance(leaf, functools.partial):
        yield from (leaf.func, leaf.args, leaf.keywords)
    elif isinstance(leaf, AbstractSet | ValuesView):
        yield from leaf
    elif isinstance(leaf, MappingProxyType):
        yield from leaf.values()
    elif _is_compound(leaf):
        yield from (leaf[name] for name in leaf.dtype.names) if leaf.dtype.names else leaf.ravel().tolist()


def _is_compound(leaf: Any) -> bool:
    """Return whether this is an array of objects or of records."""
    dtype = getattr(leaf, "dtype", None)
    return getattr(dtype, "names", None) is not None or getattr(dtype, "hasobject", False) is True


def _attributes(leaf: Any) -> Mapping[str, Any]:
    """Return the attributes that an object itself has, in its `__dict__` or its slots."""
    attributes = dict(getattr(leaf, "__dict__", {}))
    for cls in type(leaf).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            mangled = (
                f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            )
            if mangled not in ("__dict__", "__weakref__") and hasattr(leaf, mangled):
                attributes[mangled] = getattr(leaf, mangled)
    return attributes


def opened(backend: Backend, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Callable[[tuple[Any, ...]], Any]]:
    """Return the arguments with dataclasses turned into trees, and the function that undoes it.

    A dataclass that is not a tree of the backend becomes the dict of its fields. Undoing it makes a copy of the
    dataclass with new fields, also for gradients.

    Raises:
        ProblemError: a leaf that is neither an array nor a dataclass holds floating-point arrays, for which there would
            be no gradient; or a dataclass derives such arrays from its fields, which a copy would not do again.
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
    if (backend.is_array(leaf) and not _is_compound(leaf)) or isinstance(leaf, PLAIN) or not _holds(backend, leaf):
        return leaf, _same
    if not is_dataclass(leaf):
        raise ProblemError(
            f"deqcore.vjp: {name} has a {type(leaf).__name__} that holds arrays, but is not a tree of {backend.name}, "
            f"so they would get no gradient. Pass the arrays themselves as a tree (a dict of a module's parameters "
            f"by name, which torch.func.functional_call takes), or register the class as a pytree."
        )
    held = _fields(backend, leaf, name)
    pairs = {key: _open(backend, value, name) for key, value in held.items()}

    def build(values: dict[str, Any]) -> Any:
        made = copy.copy(leaf)
        for key, (_, make) in pairs.items():
            object.__setattr__(made, key, make(values[key]))
        return made

    return {key: value for key, (value, _) in pairs.items()}, build


def _fields(backend: Backend, leaf: Any, name: str) -> dict[str, Any]:
    """Return the fields of a dataclass, unless it has arrays that it computes from them.

    Raises:
        ProblemError: it has.
    """
    attributes = _attributes(leaf)
    given = {field.name for field in fields(leaf) if field.init or not hasattr(leaf, "__post_init__")}
    for key, value in attributes.items():
        if key not in given and _holds(backend, value):
            raise ProblemError(
                f"deqcore.vjp: {name} has a {type(leaf).__name__} whose attribute {key!r} holds arrays, but is "
                f"not a field that its constructor takes: a copy with other fields would keep the old {key!r}, and "
                f"gradients would miss it. Compute it inside f, or pass the arrays themselves as a tree "
                f"(a dict or a tuple)."
            )
    return {field.name: attributes[field.name] for field in fields(leaf) if field.name in attributes}


def _holds(backend: Backend, leaf: Any) -> bool:
    return any(is_inexact(backend.dtype_name(array)) for array in arrays_in(backend, leaf))


def _same(value: Any) -> Any:
    return value
