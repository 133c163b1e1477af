"""Options of a solver or strategy: a hashable mapping, and the checks that turn it into an instance.

The options of a solver are the fields of its dataclass. An unknown option is an error. A value that does not fit its
annotation is refused, not converted, except that an int passes for a float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, Union, final, get_args, get_origin, get_type_hints

from deqcore.errors import ConfigError, PluginError, listing

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

PLAIN: Final = (str, bool, int, float, type(None))


@final
class Options(Mapping[str, object]):
    """A frozen, hashable mapping. Lists inside become tuples, tables become `Options`.

    Two are equal if their keys, values and the types of the values are equal: 1, 1.0 and True are different settings.

    Example:
        >>> Options({"history_size": 20})
        Options(history_size=20)
        >>> Options({"history_size": 20})["history_size"], Options({"history_size": 20}) == {"history_size": 20}
        (20, True)
    """

    __slots__ = ("_hash", "_items", "_key")

    def __init__(self, values: Mapping[str, object] | None = None, owner: str = "options") -> None:
        items = {name: freeze(owner, name, value) for name, value in (values or {}).items()}
        self._items = items
        self._key = frozenset((name, type(value), value) for name, value in items.items())
        self._hash = hash(self._key)

    def __getitem__(self, name: str) -> object:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Options):
            return self._key == other._key
        return self._items == other

    def __repr__(self) -> str:
        return f"Options({', '.join(f'{name}={value!r}' for name, value in self._items.items())})"

    def __reduce__(self) -> tuple[type[Options], tuple[dict[str, object]]]:
        # The hash of a string differs between processes, so it must not travel.
        return Options, (self._items,)


def freeze(owner: str, name: str, value: object) -> object:
    """Return a hashable equivalent of one option's value.

    Raises:
        ConfigError: the value is neither hashable nor a list or table of hashable values.
    """
    if isinstance(value, Options) or type(value) in PLAIN:
        return value
    if isinstance(value, Mapping):
        return Options(value, f"{owner}, {name}")
    if isinstance(value, (list, tuple)):
        return tuple(freeze(owner, name, item) for item in value)
    try:
        hash(value)
    except TypeError:
        expected = "a number, a string, a boolean, or a list or table of them"
        raise ConfigError.bad_value(owner, name, value, expected) from None
    return value


def plain(value: object) -> object:
    """Undo `freeze` for printing and for JSON: return dicts instead of Options."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


def as_options(owner: str, values: Mapping[str, object] | None) -> Options:
    """Freeze a mapping of options; a frozen one is returned as it is."""
    return values if isinstance(values, Options) else Options(values, owner)


def instantiate(owner: str, cls: type[T], options: Mapping[str, object]) -> T:
    """Make an instance of the dataclass `cls` from options.

    Args:
        owner: the owner of the options, for messages, such as "solver 'anderson'".
        cls: a dataclass.
        options: its fields.

    Raises:
        ConfigError: an option is unknown, missing, of another type, or refused by the class.
        PluginError: `cls` is not a dataclass.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"The {owner} must be a dataclass of its options (got {cls!r}). Mark it with @dataclass.")
    fields = options_of(cls)
    for name in options:
        if name not in fields:
            raise ConfigError.unknown_option(f"The {owner}", name, fields)
    missing = [name for name, field in fields.items() if name not in options and is_required(field)]
    if missing:
        raise ConfigError(f"The {owner} needs the option {listing(missing)}, which has no default. Set it.")
    checked = {name: check(f"The {owner}", cls, name, value) for name, value in options.items()}
    try:
        return cls(**checked)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"The {owner} refuses its options: {str(error).removesuffix('.')}.") from error


def options_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the options among a dataclass's fields: those that `__init__` takes, unless marked `internal`."""
    fields = dataclasses.fields(cls)
    return {field.name: field for field in fields if field.init and not field.metadata.get("internal")}


def option_values(owner: object) -> dict[str, object]:
    """Return the options of an instance by name; none if it is not a dataclass."""
    if isinstance(owner, type) or not dataclasses.is_dataclass(owner):
        return {}
    return {name: getattr(owner, name) for name in options_of(type(owner))}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check(owner: str, cls: type, name: str, value: object, *, strict: bool = True) -> object:
    """Check one value against the annotation of a dataclass's field; an int becomes a float where a float is declared.

    The metadata of a field may contain more: `least`, the smallest number allowed (which must then be finite), `most`,
    the largest one, and `expected`, a noun phrase that continues "must be" in the message.

    Args:
        owner: the owner of the option, for the message.
        cls: the dataclass.
        name: name of the field.
        value: the value given.
        strict: refuse "3" for 3; only text from the environment is converted.

    Raises:
        ConfigError: the value does not fit.
    """
    metadata, hint = _field(cls, name)
    fits, checked = (True, value) if _fits_plainly(hint, value) else _fits(cls, name, value, strict)
    least, most = metadata.get("least"), metadata.get("most")
    if fits and most is not None and isinstance(checked, int) and checked > most:
        raise ConfigError.bad_value(owner, name, value, f"a number of at most {most}")
    if fits and least is not None and isinstance(checked, (int, float)):
        fits = least <= checked < float("inf")
    if not fits:
        raise ConfigError.bad_value(owner, name, value, metadata.get("expected") or f"of type {_readable(hint)}")
    return checked


@lru_cache(maxsize=512)
def _field(cls: type, name: str) -> tuple[Mapping[str, Any], Any]:
    """Return the metadata of a field and its annotation, evaluated if possible."""
    field = {field.name: field for field in dataclasses.fields(cls)}[name]
    try:
        return field.metadata, get_type_hints(cls, include_extras=True)[name]
    except NameError:
        # The author imported the type under TYPE_CHECKING only, so the class itself must check the value.
        return field.metadata, Any


def _fits_plainly(hint: Any, value: object) -> bool:
    """Return whether the value is exactly of the declared type; saves the 0.1 s that importing pydantic takes."""
    if get_origin(hint) is Literal:
        return any(type(choice) is type(value) and choice == value for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits_plainly(member, value) for member in get_args(hint))
    return hint is Any or type(value) is hint


def _fits(cls: type, name: str, value: object, strict: bool) -> tuple[bool, object]:
    """Return whether pydantic accepts the value, and the value that it returns."""
    from pydantic_core import to_json

    adapter = _adapter(cls, name)
    if adapter is None:
        hint = _field(cls, name)[1]
        return not isinstance(hint, type) or isinstance(value, hint), value
    given = plain(value)
    try:
        checked: object = adapter.validate_python(given, strict=strict)
    except ValueError:
        # The strict rules of JSON: a list fits a tuple and a string an Enum, but "3" does not fit a number.
        try:
            checked = adapter.validate_json(to_json(given, inf_nan_mode="constants"), strict=True)
        except ValueError:
            return False, value
    return True, value if isinstance(value, Options) else checked


@lru_cache(maxsize=512)
def _adapter(cls: type, name: str) -> TypeAdapter[Any] | None:
    """Return the adapter that checks the field, or None if pydantic does not know its type."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError

    try:
        return TypeAdapter(_field(cls, name)[1])
    except PydanticSchemaGenerationError:
        return None


def _readable(hint: Any) -> str:
    """Return an annotation as its author would write it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
