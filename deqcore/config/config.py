"""The settings that apply: call > `using` > environment > file > defaults, key by key.

A level that names a solver or a strategy discards the `options` of lower levels, which belong to another one.
An explicit `config=` object is complete: only the overrides of the call itself go on top of it. A config contains
registered names, never an import path, and reading it executes nothing unless `plugins.deqfile = true`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Final, Never, TypeAlias, final

from deqcore.config.environment import environment, variables
from deqcore.config.sections import KEYS, Backward, Forward, Key, Plugins, Settings, names_of
from deqcore.config.sources import Layer, flatten, layer, merge, overrides_layer, read_file, scalar, validate
from deqcore.errors import ConfigError
from deqcore.options import freeze, plain
from deqcore.plugins.lookup import check_section, contexts
from deqcore.plugins.owners import backend_of
from deqcore.plugins.registration import load_deqfile

Table: TypeAlias = Mapping[str, object]

FILE: Final = "deq.toml"
RAW_SECTIONS: Final = ("study", "monitor")
# A traced program may pass these as scalars of the framework, so that changing them does not recompile.
SCALARS: Final = frozenset({"forward__rtol", "forward__atol", "forward__max_steps", "backward__step"})
NUMBERS: Final = (float, int, str, bool)


@final
class Config:
    """All settings of a solve: complete, frozen and hashable.

    Args:
        backend: "auto" or the name of a backend.
        forward: settings of the solve, see `deqcore.config.sections.Forward`.
        backward: settings of the gradient, see `deqcore.config.sections.Backward`.
        plugins: whether a config file may bring code along.
        study: settings that `deqcore study` reads; kept unchanged.
        monitor: settings that the monitor reads; checked here as far as possible without a monitor.

    Raises:
        ConfigError: a setting is unknown or its value does not fit.

    Example:
        >>> config = Config(backend="numpy", forward={"solver": "anderson", "options": {"history_size": 5}})
        >>> config.forward.solver, config.forward.options["history_size"], config.forward.max_steps
        ('anderson', 5, 40)
        >>> config.origin("forward.solver"), config.origin("forward.max_steps")
        ('Config(...)', 'default')
    """

    __slots__ = ("_hash", "_layer", "_sections", "_settings")

    _hash: int
    _layer: Layer
    _sections: dict[str, object]
    _settings: Settings

    def __init__(
        self,
        *,
        backend: str | None = None,
        forward: Table | Forward | None = None,
        backward: Table | Backward | None = None,
        plugins: Table | Plugins | None = None,
        study: Table | None = None,
        monitor: Table | None = None,
        **unknown: Never,
    ) -> None:
        for name in unknown:
            raise ConfigError.unknown_option("The config", name, (*names_of(Settings), *RAW_SECTIONS))
        given = {"backend": backend, "forward": forward, "backward": backward, "plugins": plugins}
        pairs = flatten({name: value for name, value in given.items() if value is not None})
        sections = {name: value for name, value in (("study", study), ("monitor", monitor)) if value is not None}
        self._fill(_without_file(layer(pairs, "Config(...)")), sections)
        self._check_sections()

    def _fill(self, merged: Layer, sections: Mapping[str, object]) -> None:
        self._layer = merged
        self._sections = copy.deepcopy(dict(sections))
        self._settings = validate(merged)
        self._hash = hash(self._settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """Read a TOML file, or `[tool.deqcore]` of a pyproject.toml; environment variables go on top.

        With `plugins.deqfile = true`, the `deqfile.py` beside the file is executed.

        Raises:
            ConfigError: the file cannot be read, is not TOML, or a setting in it does not fit.
            PluginError: its deqfile.py is missing or wrong.
        """
        from pathlib import Path

        path = Path(path)
        table = read_file(path)
        sections = {name: table[name] for name in table if name in RAW_SECTIONS}
        settings = {name: table[name] for name in table if name not in RAW_SECTIONS}
        lowest = layer(flatten(settings), f"file {path}")
        config = _assemble(merge(lowest, environment(variables())), sections)
        if config.plugins.deqfile:
            load_deqfile(path.parent / "deqfile.py")
        config._check_sections()
        return config

    def _check_sections(self) -> None:
        """Report mistakes in `[monitor]` where settings are read, not hours later where a monitor is made."""
        for name in self._sections:
            check_section(name, self.section(name))

    @classmethod
    def discover(cls, path: str | os.PathLike[str] | None = None) -> Config:
        """Return the config of a command line: the named file, else a `deq.toml` in the working directory."""
        if path is None and not os.path.exists(FILE):
            return current()
        return cls.load(FILE if path is None else path)

    @property
    def backend(self) -> str:
        """The name of a backend, or "auto"."""
        return self._settings.backend

    @property
    def forward(self) -> Forward:
        """The settings of the solve."""
        return self._settings.forward

    @property
    def backward(self) -> Backward:
        """The settings of the gradient."""
        return self._settings.backward

    @property
    def plugins(self) -> Plugins:
        """Whether a config file may bring code along."""
        return self._settings.plugins

    def section(self, name: str) -> dict[str, object]:
        """Return a section that the core does not read ("study", "monitor") as it was written, or an empty dict.

        Raises:
            ConfigError: the section does not exist.
        """
        if name not in RAW_SECTIONS:
            raise ConfigError.unknown_option("The config", name, RAW_SECTIONS)
        section = copy.deepcopy(self._sections.get(name, {}))
        if not isinstance(section, Mapping):
            raise ConfigError.bad_value("The config", name, section, "a table of settings")
        return dict(section)

    def origin(self, name: str) -> str:
        """Return the source of a value, such as "environment variable DEQCORE_FORWARD__RTOL".

        Args:
            name: dotted, such as "forward.rtol" or "forward.options.history_size".

        Raises:
            ConfigError: the setting does not exist.
        """
        key = tuple(name.split(".", 2))
        if key[:2] not in KEYS:
            raise ConfigError.unknown_option("The config", name, map(".".join, KEYS))
        origins = [origin for other, origin in self._layer.origins.items() if other[: len(key)] == key]
        return " and ".join(dict.fromkeys(origins)) or "default"

    def is_set(self, name: str) -> bool:
        """Return whether the setting `name`, dotted as in `origin`, was chosen, so that it is not the default."""
        return self.origin(name) != "default"

    def items(self) -> Iterator[tuple[str, object, str]]:
        """Yield every setting: its dotted name, its value and its source."""
        for key in KEYS:
            value: object = self._settings
            for part in key:
                value = getattr(value, part)
            options = value if isinstance(value, Mapping) and value else {"": value}
            for option, item in options.items():
                name = ".".join((*key, option) if option else key)
                yield name, plain(item), self.origin(name)

    def as_dict(self) -> dict[str, object]:
        """Return all settings as nested dictionaries of plain values, to print or to store."""
        nested: dict[str, object] = {"backend": self.backend}
        for name in ("forward", "backward", "plugins"):
            section = getattr(self, name)
            nested[name] = {field: plain(getattr(section, field)) for field in names_of(type(section))}
        return nested | copy.deepcopy(self._sections)

    def __eq__(self, other: object) -> bool:
        return self._settings == other._settings if isinstance(other, Config) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        shown = ", ".join(f"{'.'.join(key)}={value!r}" for key, value in self._layer.values.items())
        return f"<Config {shown}>" if shown else "<Config: defaults>"

    def __reduce__(self) -> tuple[object, ...]:
        # The hash of a string differs between processes, so it must not travel.
        return _assemble_from, (dict(self._layer.values), dict(self._layer.origins), self._sections)


def _assemble(merged: Layer, sections: Mapping[str, object]) -> Config:
    config = object.__new__(Config)
    config._fill(merged, sections)
    return config


def _assemble_from(values: dict[Key, object], origins: dict[Key, str], sections: dict[str, object]) -> Config:
    return _assemble(Layer(values, origins), sections)


_using: ContextVar[tuple[Layer, ...]] = ContextVar("deqcore.using", default=())


@contextmanager
def using(config: Config | None = None, **overrides: object) -> Iterator[Config]:
    """Apply settings to every solve inside a `with` block, in this thread or task only.

    Args:
        config: the settings that it sets explicitly apply; its defaults stay open to the environment.
        overrides: single settings on top of it, such as `forward__rtol=1e-6`.

    Yields:
        The settings that apply inside.

    Raises:
        ConfigError: a setting is unknown or its value does not fit.

    Example:
        >>> with using(forward__max_steps=7) as inside:
        ...     inside.forward.max_steps, current() == inside
        (7, True)
    """
    origin = "deqcore.using"
    upper = _without_file(overrides_layer(overrides.items(), origin))
    if config is not None:
        _must_be_config(config)
        lower = Layer(config._layer.values, {k: f"{origin}, {o}" for k, o in config._layer.origins.items()})
        upper = merge(lower, upper)
    validate(upper)
    token = _using.set((*_using.get(), upper))
    try:
        with ExitStack() as stack:
            config = current()
            for context in contexts():
                stack.enter_context(context(config))
            yield config
    finally:
        _using.reset(token)


def current() -> Config:
    """Return the settings that apply here: defaults, environment and `using`. No file is read."""
    return _resolved((), _using.get(), variables(), (), ())


def resolve(config: Config | None, overrides: Mapping[str, object]) -> tuple[Config, dict[str, object]]:
    """Return the settings of one call.

    Args:
        config: complete settings, or None for those that `current()` gives.
        overrides: single settings by name, such as `{"forward__rtol": 1e-6}`.

    Returns:
        The config, and the scalars of a framework given for `rtol`, `atol` or `max_steps`, by the override's name.
        The scalars may be traced, so they are neither checked nor part of the config.

    Raises:
        ConfigError: a setting is unknown or its value does not fit.
    """
    if config is not None:
        _must_be_config(config)
    if not overrides:
        return current() if config is None else config, {}
    scalars: dict[str, object] = {}
    names: list[tuple[str, object]] = []
    types: list[type] = []
    for name, value in overrides.items():
        plain_value = value if type(value) in NUMBERS else scalar(value)
        if name in SCALARS and backend_of(plain_value) not in (None, "numpy"):
            scalars[name] = value
            continue
        frozen = freeze("The call", name, plain_value)
        names.append((name, frozen))
        types.append(type(frozen))  # 1 == True, but these are different settings
    if config is None:
        return _resolved((), _using.get(), variables(), tuple(names), tuple(types)), scalars
    if not names:
        return config, scalars
    # Equal configs may have different origins; the layer distinguishes them here.
    return _resolved((config,), (config._layer,), (), tuple(names), tuple(types)), scalars


def _must_be_config(given: object) -> None:
    if not isinstance(given, Config):
        raise ConfigError(
            f"config must be a deqcore.Config (got {given!r}). Use deqcore.Config.load(path) to read a file, or "
            f"deqcore.Config(**settings) for a table."
        )


def override(config: Config, overrides: Mapping[str, object], origin: str) -> Config:
    """Return the config with settings on top of it, and with `origin` as their source.

    Args:
        config: complete settings.
        overrides: single settings by name, such as `{"forward__rtol": 1e-6}`.
        origin: their source, as `Config.origin` returns it.

    Raises:
        ConfigError: a setting is unknown or its value does not fit.
    """
    return _assemble(merge(config._layer, overrides_layer(overrides.items(), origin)), config._sections)


@lru_cache(maxsize=512)
def _resolved(
    base: tuple[Config, ...],
    levels: tuple[Layer, ...],
    variables: tuple[tuple[str, str], ...],
    overrides: tuple[tuple[str, object], ...],
    _types: tuple[type, ...],
) -> Config:
    call = _without_file(overrides_layer(overrides, "the call"))
    return _assemble(merge(environment(variables), *levels, call), base[0]._sections if base else {})


def _without_file(given: Layer) -> Layer:
    """Refuse `plugins.deqfile` in settings that do not come from a file."""
    if given.values.get(("plugins", "deqfile")) is True:
        raise ConfigError(
            "plugins.deqfile = true loads the deqfile.py beside a config file, so it must be set in a file. "
            "Write it into the file and use deqcore.Config.load, or call deqcore.plugins.register."
        )
    return given
