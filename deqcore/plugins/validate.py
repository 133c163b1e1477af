"""Check that a registered class keeps its contract, before it is used and not from inside a solve."""

from __future__ import annotations

import inspect
from typing import Final

from deqcore.abc.autodiff import Autodiff
from deqcore.abc.guards import CallGuards
from deqcore.abc.harness import Harness
from deqcore.abc.host import HostViews
from deqcore.abc.kernels import FusedKernels
from deqcore.abc.linalg import SmallLinalg
from deqcore.abc.numbers import NumberOps
from deqcore.errors import PluginError, listing

PARTS: Final[dict[str, type]] = {
    "linalg_class": SmallLinalg,
    "autodiff_class": Autodiff,
    "guards_class": CallGuards,
    "numbers_class": NumberOps,
    "host_class": HostViews,
    "kernels_class": FusedKernels,
    "harness_class": Harness,
}
"""The attributes by which a backend names the classes of its parts, and the contract of each part."""

REQUIRED: Final = ("linalg_class", "autodiff_class")


def fulfils(owner: str, cls: object, *bases: type) -> type:
    """Return `cls` if it is a complete subclass of one of `bases` whose methods take the arguments of the contract.

    Args:
        owner: kind and registered name, for messages, such as "solver 'mine'".
        cls: the registered target.
        bases: abstract classes of deqcore.

    Raises:
        PluginError: it is not such a class, a method is missing, or one takes other arguments.
    """
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        wanted = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)
        raise PluginError(f"The {owner} must be a subclass of {wanted} (got {cls!r}).")
    missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    if missing:
        base = next(base for base in bases if issubclass(cls, base))
        raise PluginError(
            f"The {owner} is {cls.__qualname__}, which must implement {listing(missing)}. See "
            f"{base.__module__}.{base.__name__}."
        )
    for base in bases:
        if issubclass(cls, base):
            for method in sorted(getattr(base, "__abstractmethods__", ())):
                _takes(owner, cls, base, method)
    return cls


def check_parts(owner: str, cls: type) -> None:
    """Check that the classes that a backend names for its parts keep their contracts.

    Args:
        owner: kind and registered name, for messages.
        cls: the class of the backend.

    Raises:
        PluginError: a part is missing, is not of its contract, or lacks a method.
    """
    for name, base in PARTS.items():
        part = getattr(cls, name, None)
        if part is not None or name in REQUIRED:
            fulfils(f"{name} of the {owner}", part, base)


def _takes(owner: str, cls: type, base: type, method: str) -> None:
    """Fail unless the method can be called as the contract declares it."""
    declared, own = (inspect.signature(getattr(owner_class, method)) for owner_class in (base, cls))
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    positional = [name for name, parameter in declared.parameters.items() if parameter.kind is not keyword_only]
    named = {name: None for name, parameter in declared.parameters.items() if parameter.kind is keyword_only}
    try:
        own.bind(*positional, **named)
    except TypeError as error:
        raise PluginError(
            f"The {owner} has {method}{_bare(own)}, but deqcore calls {method}{_bare(declared)}: {error}. Change the "
            f"arguments of {method}."
        ) from error


def _bare(signature: inspect.Signature) -> str:
    """Return a signature without annotations."""
    empty = inspect.Signature.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=empty))
