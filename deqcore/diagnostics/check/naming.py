"""Find the parts of a layer by the names that a user gives, and by identity."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

from deqcore.errors import ConfigError, ProblemError, described, did_you_mean, listing

DEPTH: Final = 4  # levels of attributes in which a part is looked for
UNKNOWN: Final = "LayerUnderTest"


def follow(owner: Any, path: str, what: str) -> Any:
    """Return the part of `owner` at a dotted path of attributes, keys and positions.

    Raises:
        ConfigError: a part does not exist.
    """
    part = owner
    for name in path.split(".") if path else ():
        try:
            part = _step(part, name)
        except (AttributeError, LookupError, TypeError) as error:
            names = sorted({label for label, _ in parts(part)} | set(_methods(part)))
            deeper = [
                f"{label}.{name}" for label, inner in _walk(part) if label and callable(getattr(inner, name, None))
            ]
            raise ConfigError(
                f"{UNKNOWN}: {what} = {path!r}, but {described(part)} has no part {name!r}."
                f"{did_you_mean(deeper[0], deeper) if deeper else did_you_mean(name, names)} "
                f"Its parts: {listing(names[:20])}."
            ) from error
    return part


def _step(part: Any, name: str) -> Any:
    if name.lstrip("-").isdigit():
        return part[int(name)]
    if isinstance(part, dict) and name in part:
        return part[name]
    return getattr(part, name)


def parts(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a module: its attributes, and the modules that torch keeps apart; or those of a container."""
    if isinstance(owner, dict):
        yield from ((str(key), item) for key, item in owner.items())
    if isinstance(owner, list | tuple):
        yield from ((str(i), item) for i, item in enumerate(owner))
    for name, part in getattr(owner, "__dict__", {}).items():
        if name == "_modules":  # of torch
            yield from part.items()
        elif not name.startswith("_"):
            yield name, part


def _methods(owner: Any) -> list[str]:
    if isinstance(owner, dict | list | tuple):
        return []
    kind = type(owner)
    package = kind.__module__.partition(".")[0]  # those of the framework's own classes would hide the user's
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == package]
    own = [name for base in bases for name, item in vars(base).items() if inspect.isfunction(item)]
    return [name for name in own if not name.startswith("_")]


def locate(owner: Any, part: Any) -> str | None:
    """Return the dotted path from `owner` to `part`, by identity; None if it is not there."""
    if inspect.ismethod(part) or hasattr(part, "__self__"):
        at = locate(owner, part.__self__)
        return None if at is None else f"{at}.{part.__name__}".lstrip(".")
    return next((path for path, item in _walk(owner) if item is part), None)


def _walk(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the owner and all parts below it with their dotted paths, the nearest first."""
    level = [("", owner)]
    for _ in range(DEPTH + 1):
        yield from level
        level = [(f"{path}.{name}".lstrip("."), inner) for path, item in level for name, inner in parts(item)]


def cell_of(layer: Any, cell: Any) -> Callable[..., Any]:
    """Return the cell as a function `f(layer, z, *inputs)`, so that the layer may be replaced by a converted one.

    Raises:
        ConfigError: the cell is not found.
    """
    if not callable(layer):
        raise ConfigError.bad_value(UNKNOWN, "layer", described(layer), "a module or a function")
    if isinstance(cell, str):
        if not callable(follow(layer, cell, "cell")):
            raise ConfigError.bad_value(UNKNOWN, "cell", cell, "the name of a module or of a function cell(z, *inputs)")
        return lambda owner, z, *inputs: follow(owner, cell, "cell")(z, *inputs)
    if not callable(cell):
        raise ConfigError.bad_value(UNKNOWN, "cell", described(cell), "a name below the layer, or a function")
    path = locate(layer, cell)
    if path:
        return cell_of(layer, path)
    if is_function(layer):
        return lambda _, *arguments: cell(*arguments)
    if is_function(cell):
        function: Callable[..., Any] = cell
        return function
    raise ConfigError(
        f"{UNKNOWN}: cell must be a part of the layer, since its parameters are the layer's (got {described(cell)}, "
        f"which is not below {described(layer)}). Give its name, such as cell='deq.f', or a function "
        f"f(layer, z, *inputs)."
    )


def is_function(thing: Any) -> bool:
    """Return whether this is a plain function, with no parts to name; also if it is compiled."""
    return inspect.isroutine(thing) or isinstance(thing, functools.partial) or hasattr(thing, "__wrapped__")


def state_of(state: Any) -> Callable[[Any], Any]:
    """Return the function from what the layer returns to the state.

    Raises:
        ConfigError: `state` is of another kind than a position, a name or a function.
    """
    if state is None:
        return lambda output: output
    if callable(state):
        chosen: Callable[[Any], Any] = state
        return chosen
    if isinstance(state, int | str) and not isinstance(state, bool):
        return lambda output: follow(output, str(state), "state")
    raise ConfigError.bad_value(UNKNOWN, "state", state, "None, a position, a name such as '0.z', or a function")


def check_start(layer: Any, start: str) -> None:
    """Raise a ConfigError unless the layer has an argument of this name."""
    try:
        parameters = inspect.signature(getattr(layer, "forward", layer)).parameters
    except (TypeError, ValueError):  # a callable without a signature: the call will show it
        return
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    if start not in names and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise ConfigError(
            f"{UNKNOWN}: start = {start!r}, but {described(layer)} has no argument {start!r}."
            f"{did_you_mean(start, names)} Its arguments: {listing(names)}."
        )


def record_call(model: Any, inner: str, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call a model once and record what it passes to one of its parts.

    Returns:
        The part, and its positional and keyword arguments.

    Raises:
        ConfigError: the part does not exist or cannot be called.
        ProblemError: the model does not call it, or fails.
    """
    part = follow(model, inner, "inner")
    kind: Any = type(part)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if not callable(part) or is_function(part):
        raise ConfigError.bad_value(UNKNOWN, "inner", inner, "the name of a module")

    original = kind.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is part:
            calls.append((args, kwargs))
        return original(self, *args, **kwargs)

    own = vars(kind).get("__call__")
    kind.__call__ = watched  # the call of an instance looks at its class
    try:
        model(*inputs)
    except Exception as error:
        raise ProblemError(f"The model raised {type(error).__name__}: {error}") from error
    finally:
        if own is None:
            del kind.__call__
        else:
            kind.__call__ = own
    if not calls:
        raise ProblemError(
            f"The model must call its part {inner!r} (it did not, or it calls a copy, as compiled code does). Pass the "
            f"part as `layer`, with its own inputs."
        )
    return part, *calls[0]
