"""The folder that results go to."""

from __future__ import annotations

import os
from pathlib import Path

from deqcore.errors import ConfigError


def result_folder(path: Path) -> Path:
    """Make the folder, before anything is measured.

    Raises:
        ConfigError: it is a file, or nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out must be a folder ({str(path)!r} is a file). Name another path.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(path)!r}: the folder cannot be made ({error.strerror}).") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--out {str(path)!r}: this folder is not writable. Name another one.")
    return path
