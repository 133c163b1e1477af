"""The user's own code, named on the command line as `module:attribute`, never in a config file."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from deqcore.errors import ConfigError, did_you_mean


def load_own(option: str, target: str, base: type) -> type:
    """Import a class.

    Args:
        option: of the command line, for the error.
        target: `module:Class`; the working directory is searched as well.
        base: the class that it must inherit from.

    Raises:
        ConfigError: it cannot be imported, or is not a subclass.
    """
    result = load_object(option, target)
    if not (isinstance(result, type) and issubclass(result, base)):
        raise ConfigError(
            f"{option} {target!r} must be a subclass of {base.__module__}.{base.__name__} (got {result!r})."
        )
    return result


def load_object(option: str, target: str) -> object:
    """Import `module:attribute`."""
    module, _, name = target.partition(":")
    if not (module and name):
        raise ConfigError.bad_value("The command line", option, target, "module:attribute, such as 'my_data:load'")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        result = import_module(module)
    except (Exception, SystemExit) as error:  # the module may raise anything on import
        raise ConfigError(f"{option} {target!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(result, name):
        raise ConfigError(f"{option}: the module {module!r} has no {name!r}.{did_you_mean(name, vars(result))}")
    value: object = getattr(result, name)
    return value
