"""Settings from environment variables such as `DEQCORE_FORWARD__RTOL=1e-6`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

from deqcore.config.sections import CHOICES, KEYS, SECTIONS, TABLES, Key, Settings
from deqcore.config.sources import Layer, flatten, layer, validate
from deqcore.errors import ConfigError, did_you_mean, listing
from deqcore.options import Options, freeze

PREFIX: Final = "DEQCORE_"
OTHER_VARIABLES: Final = frozenset({"DEQCORE_DISABLE_PLUGINS", "DEQCORE_NATIVE", "DEQCORE_PLUGIN_AUTOLOAD"})
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
    import difflib

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
    import json

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
