"""Plugins of a notebook, a script or a deqfile, registered while the program runs."""

from __future__ import annotations

import os
from types import ModuleType

from deqcore.errors import PluginError
from deqcore.plugins import lookup, owners, specs
from deqcore.plugins.lookup import lock, manager


def register(plugin: object) -> None:
    """Register a plugin from a notebook or a script.

    Registering another plugin under the same name replaces the first, so that a notebook cell may run again.

    Args:
        plugin: a module or an object with functions marked `hookimpl`, or a record.

    Raises:
        PluginError: it is not a plugin, one of its hooks fails, or a name that it offers is built in.

    Example:
        >>> import deqcore.plugins as plugins
        >>> plugins.register(plugins.SolverSpec("mine", "my_notebook:Mine"))
        >>> plugins.solvers()["mine"].target
        'my_notebook:Mine'
    """
    with lock:
        if isinstance(plugin, specs.Spec):
            manager().offer(plugin, f"{plugin.kind} {plugin.name}", "registered")
        else:
            name = plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__qualname__
            status = manager().register(plugin, name, "registered")
            if status.status == "broken":
                manager().unregister(name)
                raise PluginError(f"The plugin {name!r} cannot be registered: {status.reason}")
    forget()


def load_deqfile(path: str | os.PathLike[str]) -> None:
    """Execute a `deqfile.py` and register its hooks. Only for a config with `plugins.deqfile = true`.

    The file becomes a module: a record in it may have the target `f"{__name__}:MySolver"`. Its folder is appended to
    `sys.path`, so that a record may also name modules beside it. An unchanged file is not run twice.

    Raises:
        PluginError: the file is missing or wrong; the message names file and line.
    """
    from pathlib import Path

    from deqcore.plugins import deqfile

    path = Path(path).resolve()
    with lock:
        if not deqfile.changed(path):
            return
        name = str(path)
        try:
            status = manager().register(deqfile.execute(path), name, "deqfile")
        except BaseException:
            deqfile.forget(path)
            raise
        if status.status == "broken":
            deqfile.forget(path)
            manager().unregister(name)
            raise PluginError(f"{name} cannot be used: {status.reason}")
    forget()


def forget() -> None:
    """Empty the caches: the meaning of a name may have changed."""
    lookup.forget()
    owners.forget()


def reset() -> None:
    """Forget every plugin; the next lookup discovers them again (tests, changed environments)."""
    from deqcore.plugins import deqfile

    manager.cache_clear()
    deqfile.forget()
    forget()
