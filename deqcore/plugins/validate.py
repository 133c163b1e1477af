"""Whether a class keeps the contract that it was registered for, told before it is used and not from inside a solve."""

from __future__ import annotations

import inspect

from deqcore.errors import PluginError, listing


def fulfils(owner: str, cls: object, *bases: type) -> type:
    """Return `cls` if it is a whole subclass of one of `bases` whose methods take what the contract gives them.

    Args:
        owner: what it was registered as, for messages, such as "solver 'mine'".
        cls: what the registered target is.
        bases: abstract classes of deqcore.

    Raises:
        PluginError: it is no such class, a method is missing, or one takes other arguments.
    """
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        wanted = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)
        raise PluginError(f"The {owner} is {cls!r}, but a subclass of {wanted} is expected.")
    missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    if missing:
        base = next(base for base in bases if issubclass(cls, base))
        raise PluginError(
            f"The {owner} is {cls.__qualname__}, which lacks {listing(missing)}: see {base.__module__}.{base.__name__}."
        )
    for base in bases:
        if issubclass(cls, base):
            for method in sorted(getattr(base, "__abstractmethods__", ())):
                _takes(owner, cls, base, method)
    return cls


def _takes(owner: str, cls: type, base: type, method: str) -> None:
    """Fail unless the method can be called as the contract declares it."""
    declared, own = (inspect.signature(getattr(each, method)) for each in (base, cls))
    kinds = inspect.Parameter
    positional = [name for name, each in declared.parameters.items() if each.kind is not kinds.KEYWORD_ONLY]
    named = {name: None for name, each in declared.parameters.items() if each.kind is kinds.KEYWORD_ONLY}
    try:
        own.bind(*positional, **named)
    except TypeError as error:
        raise PluginError(
            f"The {owner} has {method}{_bare(own)}, but it is called as {method}{_bare(declared)}: {error}."
        ) from error


def _bare(signature: inspect.Signature) -> str:
    """Return a signature without annotations."""
    empty = inspect.Signature.empty
    bare = [each.replace(annotation=empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=empty))
