"""The settings themselves, and their sources: mappings, overrides, files, environment variables.

Every source becomes a `Layer`: values by key, each with its origin as text. `merge` puts layers on top of each other,
and `validate` checks the result; an error names the file or variable to change.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar

from deqcore.errors import ConfigError, did_you_mean, listing
from deqcore.options import Options, check, freeze

Key: TypeAlias = tuple[str, ...]
T = TypeVar("T")

TABLE: Final = {"expected": "a table of settings"}

PREFIX: Final = "DEQCORE_"
OTHER_VARIABLES: Final = frozenset({"DEQCORE_DISABLE_PLUGINS", "DEQCORE_NATIVE", "DEQCORE_PLUGIN_AUTOLOAD"})


LARGEST: Final = 2**31 - 1  # steps are counted in int32, on every backend


def setting(default: T, expected: str, least: float | None = None, most: int | None = None) -> T:
    """Return a field of a section.

    Args:
        default: the default.
        expected: a noun phrase that continues "must be" in an error.
        least: the smallest number allowed.
        most: the largest number allowed.
    """
    made: T = field(default=default, metadata={"expected": expected, "least": least, "most": most})
    return made


@dataclass(frozen=True)
class Forward:
    """The settings of the solve.

    Attributes:
        solver: name of a registered solver (`deqcore solvers`).
        rtol: a sample has converged when ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖, 2-norm over its own state; "auto": what
            the dtype can reach, at most 1e-4. Growth of the iterate alone does not meet the tolerance.
        atol: see rtol; in units of the state.
        max_steps: solver steps at most. The first evaluation of f comes on top.
        check_every: steps between checks whether all samples have stopped; "auto": 1 where a check costs no wait.
        batch: the first axis of every leaf is the batch; false: the whole state is one system; 2: the first two axes
            are units, such as the tokens of each sequence, each with its own convergence.
        coupled: whether f may couple the units of a sample, as attention does; only `batch = 2` reads it. False: units
            are as independent as samples, and the backward pass solves for each alone.
        patience: steps without progress of the residual after which a sample ends as STALLED.
        on_failure: what happens if a sample does not converge. Code compiled by JAX raises with "raise", and warns
            only if "warn" is set explicitly: the default compiles no callback in.
        compact: evaluate f only for the samples that still run (eager backends; needs `batched_args`).
        options: fields of the solver's own dataclass.

    Raises:
        ConfigError: (when a Config is made) a setting is unknown or out of range.

    Example:
        >>> from deqcore import Config
        >>> forward = Config(forward={"solver": "anderson", "max_steps": 60}).forward
        >>> forward.solver, forward.max_steps, forward.rtol
        ('anderson', 60, 'auto')
    """

    solver: str = setting("auto", "the name of a registered solver")
    rtol: float | Literal["auto"] = setting("auto", "'auto' or a finite number >= 0", least=0)
    atol: float = setting(0.0, "a finite number >= 0", least=0)
    max_steps: int = setting(40, "an integer >= 0", least=0, most=LARGEST)
    check_every: int | Literal["auto"] = setting("auto", "'auto' or an integer >= 1", 1, LARGEST)
    batch: bool | Literal[2] = setting(True, "true, false or 2")
    coupled: bool = setting(True, "true or false")
    patience: int = setting(50, "an integer >= 1", least=1, most=LARGEST)
    on_failure: Literal["raise", "warn", "ignore"] = setting("warn", "'raise', 'warn' or 'ignore'")
    compact: bool = setting(False, "true or false")
    options: Options = field(default=Options(), metadata=TABLE)


@dataclass(frozen=True)
class Backward:
    """The settings of the gradient.

    Attributes:
        strategy: name of a registered strategy (`deqcore strategies`).
        on_failure: what happens if the adjoint solve of a sample does not converge: a warning, an error, nothing, or
            zero or NaN instead of its adjoint solution.
        verify_every: measure the true adjoint residual and look for coupled samples in the first backward pass of a
            layer or function and in every n-th after it; 0: never. Code compiled by JAX measures only if this was
            set, in one pass of n on average.
        step: the training step, from which strategies that draw random numbers (`looped`) draw with their seed. In JAX
            an array of int32, so that another step compiles nothing.
        options: fields of the strategy's own dataclass.

    Raises:
        ConfigError: (when a Config is made) a setting is unknown.

    Example:
        >>> from deqcore import Config
        >>> backward = Config(backward={"strategy": "broyden-reuse", "options": {"max_relative_error": 0.1}}).backward
        >>> backward.strategy, backward.options["max_relative_error"]
        ('broyden-reuse', 0.1)
    """

    strategy: str = setting("exact-ift", "the name of a registered strategy")
    on_failure: Literal["warn", "raise", "ignore", "zero", "nan"] = setting(
        "warn", "'warn', 'raise', 'ignore', 'zero' or 'nan'"
    )
    verify_every: int = setting(100, "an integer >= 0", least=0, most=LARGEST)
    step: int = setting(0, "an integer >= 0", least=0, most=LARGEST)
    options: Options = field(default=Options(), metadata=TABLE)


@dataclass(frozen=True)
class Plugins:
    """Whether a config file may bring code along.

    Attributes:
        deqfile: execute the `deqfile.py` beside the config file, which registers solvers and other plugins.

    Raises:
        ConfigError: (when a Config is made) a setting is unknown, or is not true or false.

    Example:
        >>> from deqcore import Config
        >>> Config().plugins.deqfile  # a config file executes nothing by default
        False
    """

    deqfile: bool = setting(False, "true or false")


@dataclass(frozen=True)
class Settings:
    """All settings, with their defaults."""

    backend: str = setting("auto", "'auto' or the name of a registered backend")
    forward: Forward = field(default=Forward(), metadata=TABLE)
    backward: Backward = field(default=Backward(), metadata=TABLE)
    plugins: Plugins = field(default=Plugins(), metadata=TABLE)


Section: TypeAlias = Forward | Backward | Plugins


def names_of(cls: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields."""
    return tuple(field.name for field in fields(cls))


SECTIONS: Final[dict[str, type[Section]]] = {"forward": Forward, "backward": Backward, "plugins": Plugins}
KEYS: Final[tuple[Key, ...]] = (
    ("backend",),
    *((section, field) for section, cls in SECTIONS.items() for field in names_of(cls)),
)
TABLES: Final[tuple[Key, ...]] = tuple((section,) for section in SECTIONS)
# A level that sets the first of a pair discards the second of lower levels.
CHOICES: Final[dict[Key, Key]] = {
    ("forward", "solver"): ("forward", "options"),
    ("backward", "strategy"): ("backward", "options"),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """The values that one level sets, by key, and the origin of each. Hashed by identity; never changes."""

    values: Mapping[Key, object]
    origins: Mapping[Key, str]


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
            f"The config file {str(path)!r} does not exist in {Path.cwd()}. Name an existing TOML file."
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


_latest: tuple[object, tuple[tuple[str, str], ...]] = (None, ())  # the environment, and the settings found in it


def variables() -> tuple[tuple[str, str], ...]:
    """Return the environment variables that may hold settings, in upper or lower case.

    A call takes half a microsecond while no variable changes.
    """
    global _latest  # noqa: PLW0603 - a cache of one entry
    # os.environ decodes each name when it is iterated; comparing the dict that it wraps is 20 times cheaper.
    raw = vars(os.environ).get("_data")
    if raw is None or raw != _latest[0]:
        ours = [(name, value) for name, value in os.environ.items() if _is_ours(name) and value.strip()]
        settings = sorted(pair for pair in ours if pair[0] not in OTHER_VARIABLES)
        _latest = (raw and dict(raw), tuple(settings))
    return _latest[1]


@lru_cache(maxsize=64)
def environment(given: tuple[tuple[str, str], ...]) -> Layer:
    """Return the layer of variables such as `DEQCORE_FORWARD__RTOL=1e-6`; the case of a name does not matter.

    Args:
        given: the result of `variables()`.

    Raises:
        ConfigError: a variable nearly names a setting, two differ in case only, or a value does not fit; the variable
            is named.
    """
    texts = {name: value for name, value in given if _is_setting(name)}
    _refuse_twins(texts)
    if not texts:
        return Layer({}, {})
    from pydantic import BaseModel
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
    from pydantic_settings.exceptions import SettingsError

    class Table(BaseModel):
        options: dict[str, Any]

    class Environment(BaseSettings):
        model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__")
        backend: str
        forward: Table
        backward: Table
        plugins: Table

    source = EnvSettingsSource(Environment)
    source.env_vars = {name.lower(): value for name, value in texts.items()}
    try:
        tables = source()
    except (SettingsError, RecursionError) as error:
        names = [name for name in texts if _key(name) in (*TABLES, *CHOICES.values())]
        raise ConfigError(
            f"The environment variable {listing(names)} holds a whole table, so it must be valid JSON, such as "
            f"'{{\"history_size\": 20}}'."
        ) from error
    raw = layer(flatten(tables), "the environment")
    parsed = {key: _read(key, value) for key, value in raw.values.items()}
    named = Layer(parsed, {key: f"environment variable {_variable(key, texts)}" for key in parsed})
    checked = validate(named, strict=False)
    values = {key: value if len(key) > 2 else _get(checked, key) for key, value in parsed.items()}
    return Layer(values, named.origins)


def _key(name: str) -> Key:
    return tuple(name[len(PREFIX) :].lower().split("__", 2))


def _is_ours(name: str) -> bool:
    return name[: len(PREFIX)].upper() == PREFIX


def _refuse_twins(names: Iterable[str]) -> None:
    """Refuse two names that differ in case only: Windows ignores case, elsewhere they could contradict each other."""
    first: dict[str, str] = {}
    for name in names:
        twin = first.setdefault(name.upper(), name)
        if twin != name:
            raise ConfigError(
                f"The environment variables {twin} and {name} are one setting, because case does not matter in their "
                f"names. Unset one of them."
            )


def _is_setting(name: str) -> bool:
    """Return whether a DEQCORE_ variable holds a setting; a misspelt name is an error, an unrelated one is not."""
    if name.upper() in OTHER_VARIABLES:  # these are not settings, and they are read under one name only
        raise ConfigError(f"The environment variable {name} must be written {name.upper()}. Rename it.")
    head = _key(name)[0]
    if head == "backend" or head in SECTIONS:
        return True
    known = [PREFIX + "__".join(key).upper() for key in KEYS]
    if head.split("_")[0] in SECTIONS or difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85):
        hint = did_you_mean(name.upper(), known)
        raise ConfigError(f"The environment variable {name} does not name a setting.{hint} Rename it or unset it.")
    return False


def _variable(key: Key, names: Iterable[str]) -> str:
    """Return the variable that contains a value: its own, or one that holds a whole table as JSON."""
    candidates = [PREFIX + "__".join(key[:size]).upper() for size in range(len(key), 0, -1)]
    written = {name.upper(): name for name in names}
    return next((written[name] for name in candidates if name in written), candidates[0])


def _read(key: Key, value: object) -> object:
    """Return the value in the text of a variable, where its type is not that of the setting."""
    if key == ("forward", "batch") and str(value).strip() == "2":
        return 2
    return _parse(value) if len(key) > 2 else value


def _parse(value: object) -> object:
    """Return an option's value as JSON reads it; text that is not valid JSON stays text."""
    if isinstance(value, Mapping):
        return Options({name: _parse(item) for name, item in value.items()})
    try:
        return freeze("options", "", json.loads(value)) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _get(settings: Settings, key: Key) -> object:
    value: object = settings
    for name in key:
        value = getattr(value, name)
    return value


def scalar(value: object) -> object:
    """Return the Python number in a NumPy scalar or zero-dimensional array, and anything else unchanged."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)) and value.ndim == 0:
        return value.item()
    return value
