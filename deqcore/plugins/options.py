"""Options of a solver or strategy: a hashable mapping, and the checks that turn it into an instance.

The options of a solver are the fields of its dataclass. Nothing swallows an unknown one, and a value that does
not fit the field's annotation is refused, not converted (an int for a float is the exception).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, final, get_type_hints

from deqcore.errors import ConfigError, PluginError, listing

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


@final
class Options(Mapping[str, object]):
    """A frozen, hashable mapping; lists inside become tuples, tables become `Options`.

    Two of them are equal if keys, values and the values' types are: 1, 1.0 and True are different settings.

    Example:
        >>> Options({"memory": 20})
        Options(memory=20)
        >>> Options({"memory": 20})["memory"], Options({"memory": 20}) == {"memory": 20}
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

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
        """Let pydantic models have fields of this type."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(_validate)


def freeze(owner: str, name: str, value: object) -> object:
    """Return a hashable equivalent of one option's value.

    Raises:
        ConfigError: the value is neither hashable nor a list or table of such.
    """
    if isinstance(value, Options):
        return value
    if isinstance(value, Mapping):
        return Options(value, f"{owner}.{name}")
    if isinstance(value, (list, tuple)):
        return tuple(freeze(owner, name, item) for item in value)
    try:
        hash(value)
    except TypeError:
        expected = "a number, a string, a boolean, or a list or table of them"
        raise ConfigError.bad_value(owner, name, value, expected) from None
    return value


def plain(value: object) -> object:
    """The inverse of `freeze` for printing and for JSON: dicts instead of Options."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


def as_options(owner: str, values: Mapping[str, object] | None) -> Options:
    """Freeze a mapping of options; a frozen one is returned as it is."""
    return values if isinstance(values, Options) else Options(values, owner)


def _validate(value: object) -> Options:
    if isinstance(value, Mapping):
        return as_options("options", value)
    raise ValueError("a table of options is expected")


def instantiate(owner: str, cls: type[T], options: Mapping[str, object]) -> T:
    """Make an instance of the dataclass `cls` from options.

    Args:
        owner: whose options they are, for messages, such as "solver 'anderson'".
        cls: a dataclass.
        options: its fields.

    Raises:
        ConfigError: an option is unknown, missing, of another type, or refused by the class.
        PluginError: `cls` is not a dataclass.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"The {owner} is {cls!r}, but a dataclass of its options is expected.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in options:
        if name not in fields:
            raise ConfigError.unknown_option(f"The {owner}", name, fields)
    missing = [name for name, field in fields.items() if name not in options and _is_required(field)]
    if missing:
        raise ConfigError(f"The {owner} needs the option {listing(missing)}, which has no default.")
    checked = {name: _check(owner, cls, name, value) for name, value in options.items()}
    try:
        return cls(**checked)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"The {owner} refuses its options: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check(owner: str, cls: type, name: str, value: object) -> object:
    """Check one value against its field's annotation; ints become floats where floats are expected."""
    adapter = _adapter(cls, name)
    if adapter is None:
        return value
    from pydantic import ValidationError
    from pydantic_core import to_json

    # Frozen options hold tuples and Options where a TOML file has lists and tables.
    given = plain(value)
    try:
        checked: object = adapter.validate_python(given, strict=True)
    except ValidationError:
        # JSON's strict rules: a list fits a tuple and a string an Enum, but "3" is no number.
        try:
            checked = adapter.validate_json(to_json(given, inf_nan_mode="constants"), strict=True)
        except ValueError:
            raise ConfigError.bad_value(f"The {owner}", name, value, _expected(cls, name)) from None
    return value if isinstance(value, Options) else checked


@lru_cache(maxsize=256)
def _adapter(cls: type, name: str) -> TypeAdapter[Any] | None:
    """What checks the field, or None if its annotation cannot be evaluated or checked."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

    try:
        return TypeAdapter(get_type_hints(cls, include_extras=True)[name])
    except (NameError, PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        # A type imported under TYPE_CHECKING only, or the plugin's own: the class itself must check it.
        return None


def _expected(cls: type, name: str) -> str:
    """The annotation as the author wrote it."""
    annotation = {field.name: field.type for field in dataclasses.fields(cls)}[name]
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
