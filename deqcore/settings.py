"""The settings themselves, and where values are read: mappings, overrides, files, environment variables.

Every source becomes a `Layer`: values by key, each with the words that say where it came from. `merge` puts
layers on top of each other and `validate` checks the result: an error names the file or variable to change.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deqcore.errors import ConfigError, did_you_mean, listing
from deqcore.plugins.options import Options, freeze

Key: TypeAlias = tuple[str, ...]
Tolerance: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name: TypeAlias = Annotated[str, Field(min_length=1)]

PREFIX: Final = "DEQCORE_"
OTHER_VARIABLES: Final = frozenset({"DEQCORE_DISABLE_PLUGINS", "DEQCORE_PLUGIN_AUTOLOAD"})


class _Section(BaseModel):
    """A description is what an error message expects."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Forward(_Section):
    """How the fixed point is solved for."""

    solver: Name = Field(default="broyden", description="the name of a registered solver")
    rtol: Literal["auto"] | Tolerance = Field(default="auto", description="'auto' or a finite number >= 0")
    atol: Tolerance = Field(default=0.0, description="a finite number >= 0")
    max_steps: int = Field(default=40, ge=0, description="an integer >= 0")
    check_every: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="'auto' or an integer >= 1"
    )
    batch: bool = Field(default=True, description="true or false")
    on_failure: Literal["raise", "warn", "ignore"] = Field(
        default="warn", description="'raise', 'warn' or 'ignore'"
    )
    compact: bool = Field(default=False, description="true or false")
    options: Options = Field(default=Options(), description="a table of the solver's options")


class Backward(_Section):
    """How the gradient is found."""

    strategy: Name = Field(default="exact-ift", description="the name of a registered strategy")
    options: Options = Field(default=Options(), description="a table of the strategy's options")


class Plugins(_Section):
    """What code a config file may bring along."""

    deqfile: bool = Field(default=False, description="true or false")


class Settings(_Section):
    """All settings, with their defaults."""

    backend: Name = Field(default="auto", description="'auto' or the name of a registered backend")
    forward: Forward = Field(default=Forward(), description="a table of settings")
    backward: Backward = Field(default=Backward(), description="a table of settings")
    plugins: Plugins = Field(default=Plugins(), description="a table of settings")


SECTIONS: Final[dict[str, type[_Section]]] = {"forward": Forward, "backward": Backward, "plugins": Plugins}
KEYS: Final[tuple[Key, ...]] = (
    ("backend",),
    *((section, field) for section, model in SECTIONS.items() for field in model.model_fields),
)
# A level that sets the first of a pair discards what lower levels say of the second.
CHOICES: Final[dict[Key, Key]] = {
    ("forward", "solver"): ("forward", "options"),
    ("backward", "strategy"): ("backward", "options"),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """The values that one level sets, by key, and where each came from. Hashed by identity; never changes."""

    values: Mapping[Key, object]
    origins: Mapping[Key, str]


def layer(values: Iterable[tuple[Key, object]], origin: str) -> Layer:
    """A layer of values that all came from one place; tables of options are spread, option by option."""
    flat: dict[Key, object] = {}
    for key, value in values:
        if key in CHOICES.values() and isinstance(value, Mapping):
            owner = f"{'.'.join(key)} (set by {origin})"
            flat |= {
                (*key, str(name)): freeze(owner, str(name), scalar(item)) for name, item in value.items()
            }
        else:
            flat[key] = scalar(value)
    return Layer(flat, dict.fromkeys(flat, origin))


def flatten(table: Mapping[str, object]) -> Iterable[tuple[Key, object]]:
    """Key and value of each setting in a mapping of sections, such as a parsed file."""
    for name, value in table.items():
        if isinstance(value, _Section):
            fields: object = {field: getattr(value, field) for field in value.model_fields_set}
        else:
            fields = value
        if name in SECTIONS and isinstance(fields, Mapping):
            yield from (((name, str(field)), item) for field, item in fields.items())
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
        ConfigError: naming the setting, what is wrong with it, and where it was set.
    """
    nested: dict[str, Any] = {}
    for (*tables, name), value in given.values.items():
        table = nested
        for each in tables:
            table = table.setdefault(each, {})
        table[name] = value
    try:
        return Settings.model_validate(nested, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        raise _readable(given, tuple(str(part) for part in first["loc"]), first["type"]) from None


def _readable(given: Layer, location: Key, problem: str) -> ConfigError:
    key = next(key for size in (2, 1) if (key := location[:size]) in given.values or size == 1)
    where = given.origins.get(key) or next(o for k, o in given.origins.items() if k[: len(key)] == key)
    owner = f"[{key[0]}] (set by {where})" if len(key) > 1 else f"The config (set by {where})"
    fields = SECTIONS[key[0]].model_fields if len(key) > 1 else Settings.model_fields
    if problem == "extra_forbidden":
        return unknown(owner, key[-1], fields, ".")
    return ConfigError.bad_value(
        owner, key[-1], given.values[key], fields[key[-1]].description or "another type"
    )


def unknown(owner: str, given: str, known: Iterable[str], separator: str) -> ConfigError:
    """The error for a setting that does not exist; one that only lacks its section is told in full."""
    known = list(known)
    full = [separator.join(key) for key in KEYS if key[-1] == given and len(key) > 1]
    if not full or given in known:
        return ConfigError.unknown_option(owner, given, known)
    return ConfigError(f"{owner} has no option {given!r}. Did you mean {' or '.join(map(repr, full))}?")


def overrides_layer(overrides: Iterable[tuple[str, object]], origin: str) -> Layer:
    """The layer of `forward__rtol=1e-6` and the like."""
    pairs = [(tuple(name.split("__", 2)), value) for name, value in overrides]
    for key, _ in pairs:
        if key not in KEYS and not (len(key) == 3 and key[:2] in CHOICES.values()):
            raise unknown(origin[:1].upper() + origin[1:], "__".join(key), map("__".join, KEYS), "__")
    return layer(pairs, origin)


def read_file(path: Path) -> dict[str, object]:
    """The settings of a TOML file: its top level, or `[tool.deqcore]` of a pyproject.toml.

    Raises:
        ConfigError: it is missing, no file, no TOML (with the line), or without that table.
    """
    try:
        table: object = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {str(path)!r}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a directory, but a TOML file is expected.") from None
    except OSError as error:
        raise ConfigError(f"The config file {str(path)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config file {str(path)!r} is no UTF-8 text: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The config file {str(path)!r} is not valid TOML: {error}.") from None
    if path.name == "pyproject.toml":
        for name in ("tool", "deqcore"):
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise ConfigError(f"{str(path)!r} has no table [tool.deqcore].")
    return dict(table) if isinstance(table, dict) else {}


_seen: tuple[object, tuple[tuple[str, str], ...]] = (None, ())


def variables() -> tuple[tuple[str, str], ...]:
    """The environment variables that may hold settings; half a microsecond while none changes."""
    global _seen  # noqa: PLW0603 - a cache of one entry
    # os.environ decodes each name when it is iterated; comparing what it wraps is 20 times cheaper.
    raw = vars(os.environ).get("_data")
    if raw is None or raw != _seen[0]:
        found = {
            name: value for name, value in os.environ.items() if name.startswith(PREFIX) and value.strip()
        }
        _seen = (raw and dict(raw), tuple(sorted(found.items() - dict.fromkeys(OTHER_VARIABLES).items())))
    return _seen[1]


@lru_cache(maxsize=64)
def environment(given: tuple[tuple[str, str], ...]) -> Layer:
    """The layer of `DEQCORE_FORWARD__RTOL=1e-6` and the like.

    Args:
        given: as `variables()` found them.

    Raises:
        ConfigError: a variable nearly names a setting, or its value does not fit; the variable is named.
    """
    mine = {name: value for name, value in given if _is_setting(name)}
    if not mine:
        return Layer({}, {})
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
    from pydantic_settings.exceptions import SettingsError

    class Environment(BaseSettings, Settings):
        model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__")

    source = EnvSettingsSource(Environment)
    source.env_vars = {name.lower(): value for name, value in mine.items()}
    try:
        found = source()
    except SettingsError as error:
        raise ConfigError(
            f"One of {listing(mine)} is not valid JSON, where a table is expected: {error}."
        ) from None
    raw = layer(flatten(found), "the environment")
    texts = {key: _parse(value) if len(key) > 2 else value for key, value in raw.values.items()}
    named = Layer(texts, {key: f"environment variable {_variable(key, mine)}" for key in texts})
    checked = validate(named, strict=False)
    values = {key: value if len(key) > 2 else _get(checked, key) for key, value in texts.items()}
    return Layer(values, named.origins)


def _is_setting(name: str) -> bool:
    """Whether a DEQCORE_ variable is one of ours; a misspelt one is an error, a stranger's is not."""
    head = name.removeprefix(PREFIX).lower().split("__")[0]
    if head == "backend" or head in SECTIONS:
        return True
    known = [PREFIX + "__".join(key).upper() for key in KEYS]
    if head.split("_")[0] in SECTIONS or difflib.get_close_matches(name, known, n=1, cutoff=0.85):
        raise ConfigError(f"The environment variable {name} names no setting.{did_you_mean(name, known)}")
    return False


def _variable(key: Key, names: Iterable[str]) -> str:
    """The variable that a value came from: its own, or one that holds a whole table as JSON."""
    candidates = [PREFIX + "__".join(key[:size]).upper() for size in range(len(key), 0, -1)]
    return next((name for name in candidates if name in names), candidates[0])


def _parse(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _get(settings: Settings, key: Key) -> object:
    value: object = settings
    for name in key:
        value = getattr(value, name)
    return value


def scalar(value: object) -> object:
    """A NumPy scalar, or array of no dimension, as the Python number it holds; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)) and value.ndim == 0:
        return value.item()
    return value
