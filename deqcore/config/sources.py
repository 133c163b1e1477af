"""The sources of settings: mappings, overrides, files. `environment` reads the variables.

Every source becomes a `Layer`: values by key, each with its origin as text. `merge` puts layers on top of each other,
and `validate` checks the result; an error names the file or variable to change.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from deqcore.config.sections import (
    CHOICES,
    KEYS,
    SECTIONS,
    Backward,
    Forward,
    Key,
    Plugins,
    Section,
    Settings,
    names_of,
)
from deqcore.errors import ConfigError
from deqcore.options import Options, check, freeze

if TYPE_CHECKING:
    from pathlib import Path


class Layer:
    """The values that one level sets, by key, and the origin of each. Hashed by identity; never changes."""

    def __init__(self, values: Mapping[Key, object], origins: Mapping[Key, str]) -> None:
        self.values = values
        self.origins = origins


def layer(values: Iterable[tuple[Key, object]], origin: str) -> Layer:
    """Return a layer of values with one origin; tables of options are split into their options."""
    flat: dict[Key, object] = {}
    for key, value in values:
        if key in CHOICES.values() and isinstance(value, Mapping):
            owner = f"{'.'.join(key)} (set by {origin})"
            flat |= {(*key, str(name)): freeze(owner, str(name), scalar(item)) for name, item in value.items()}
        else:
            flat[key] = scalar(value)
    return Layer(flat, dict.fromkeys(flat, origin))


def flatten(table: Mapping[str, object]) -> Iterable[tuple[Key, object]]:
    """Key and value of each setting in a mapping of sections, such as a parsed file."""
    for name, value in table.items():
        items = value
        if isinstance(value, Section):
            items = {field: getattr(value, field) for field in names_of(type(value))}
        if name in SECTIONS and isinstance(items, Mapping):
            yield from (((name, str(field)), item) for field, item in items.items())
        else:
            yield (str(name),), value


def merge(*layers: Layer) -> Layer:
    """Put layers on top of each other, the lowest first."""
    values: dict[Key, object] = {}
    origins: dict[Key, str] = {}
    for upper in layers:
        dropped = [options for choice, options in CHOICES.items() if choice in upper.values]
        values = {key: value for key, value in values.items() if key[:2] not in dropped} | dict(upper.values)
        origins |= upper.origins
    return Layer(values, {key: origins[key] for key in values})


def validate(given: Layer, *, strict: bool = True) -> Settings:
    """Check a layer and fill in the defaults.

    Args:
        given: the layer.
        strict: refuse "3" for 3; only text from the environment is converted.

    Raises:
        ConfigError: a setting is wrong; the message names it, the fault and where it was set.
    """
    tables: dict[str, dict[str, Any]] = {name: {} for name in ("", *SECTIONS)}
    options: dict[str, dict[str, object]] = {}
    for key, value in given.values.items():
        if len(key) > 2:
            options.setdefault(key[0], {})[key[2]] = value
            continue
        table, name = key if len(key) == 2 else ("", key[0])
        cls: type = SECTIONS[table] if table else Settings
        owner = f"[{table}]" if table else "The config"
        owner = f"{owner} (set by {given.origins[key]})"
        if name not in names_of(cls):
            raise unknown(owner, name, names_of(cls), ".")
        tables[table][name] = check(owner, cls, name, value, strict=strict)
    for table, values in options.items():
        tables[table]["options"] = Options(values)
    return Settings(
        **tables[""],
        forward=Forward(**tables["forward"]),
        backward=Backward(**tables["backward"]),
        plugins=Plugins(**tables["plugins"]),
    )


def unknown(owner: str, given: str, known: Iterable[str], separator: str) -> ConfigError:
    """Return the error for a setting that does not exist; it suggests the full name if only the section is missing."""
    known = list(known)
    full = [separator.join(key) for key in KEYS if key[-1] == given and len(key) > 1]
    if not full or given in known:
        return ConfigError.unknown_option(owner, given, known)
    return ConfigError(f"{owner} has no option {given!r}. Did you mean {' or '.join(map(repr, full))}?")


def overrides_layer(overrides: Iterable[tuple[str, object]], origin: str) -> Layer:
    """Return the layer of overrides such as `forward__rtol=1e-6`."""
    pairs = [(tuple(name.split("__", 2)), value) for name, value in overrides]
    for key, _ in pairs:
        if key not in KEYS and not (len(key) == 3 and key[:2] in CHOICES.values()):
            raise unknown(origin[:1].upper() + origin[1:], "__".join(key), map("__".join, KEYS), "__")
    return layer(pairs, origin)


def read_file(path: Path) -> dict[str, object]:
    """Return the settings of a TOML file: its top level, or `[tool.deqcore]` of a pyproject.toml.

    Raises:
        ConfigError: the file is missing, is a directory, is not valid TOML (with the line), or has no such table.
    """
    import tomllib

    try:
        table: object = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte-order mark
    except FileNotFoundError:
        raise ConfigError(
            f"The config file {str(path)!r} does not exist in {os.getcwd()}. Name an existing TOML file."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} must be a TOML file (got a directory). Name a file in it.") from None
    except OSError as error:
        raise ConfigError(f"The config file {str(path)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config file {str(path)!r} must be UTF-8 text: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The config file {str(path)!r} is not valid TOML: {error}.") from None
    except (ValueError, RecursionError) as error:  # an impossible path; tables nested too deeply
        raise ConfigError(f"The config file {str(path)!r} cannot be read: {error}.") from None
    if path.name == "pyproject.toml":
        for name in ("tool", "deqcore"):
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise ConfigError(f"{str(path)!r} has no table [tool.deqcore]. Add one, or name a deq.toml.")
    return dict(table) if isinstance(table, dict) else {}


def scalar(value: object) -> object:
    """Return the Python number in a NumPy scalar or zero-dimensional array, and anything else unchanged."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)) and value.ndim == 0:
        return value.item()
    return value
