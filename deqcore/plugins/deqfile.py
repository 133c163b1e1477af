"""`deqfile.py` beside a config file: a plugin without a package. It is code, so the config must enable it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

from deqcore.errors import PluginError

_loaded: Final[dict[Path, bytes]] = {}


def changed(path: Path) -> bool:
    """Return whether the file is new or has changed since it was last executed.

    Raises:
        PluginError: the file cannot be read.
    """
    return _loaded.get(path) != _digest(_read(path))


def execute(path: Path) -> ModuleType:
    """Execute the file as a module named after its path and return the module.

    Raises:
        PluginError: the file cannot be read or raises; the message names the line in it.
    """
    source = _read(path)
    module = ModuleType("deqfile_" + hashlib.sha256(str(path).encode()).hexdigest()[:12])
    module.__file__ = str(path)
    folder = str(path.parent)
    # Last, so that a file beside a config cannot shadow an installed package.
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # what plugins.deqfile = true asks for
    except BaseException as error:
        del sys.modules[module.__name__]
        if not isinstance(error, (Exception, SystemExit)):  # an interrupt: the next load executes it again
            raise
        raise PluginError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    _loaded[path] = _digest(source)
    return module


def forget(path: Path | None = None) -> None:
    """Allow the file, or all files, to be executed again."""
    if path is None:
        _loaded.clear()
    else:
        _loaded.pop(path, None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PluginError(
            f"plugins.deqfile = true, but {path} cannot be read ({error.strerror}). Put a deqfile.py beside "
            f"the config file, or remove the setting."
        ) from error


def _digest(source: bytes) -> bytes:
    return hashlib.sha256(source).digest()


def _place(path: Path, error: BaseException) -> str:
    """Return file and line of the innermost frame in the file itself."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{path}, line {line}" if line else str(path)
