"""Whether a study's device is there, asked in separate processes: a framework keeps what it takes of a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import Final

from deqcore.errors import ConfigError, DeqcoreError

ANYWHERE: Final = frozenset({"auto", "cpu"})  # every backend has it


def check(device: str, backends: Iterable[str]) -> None:
    """Put a number on the device with each backend.

    Args:
        device: as the study names it.
        backends: the names of those that will train.

    Raises:
        ConfigError: a backend cannot use it.
    """
    if device in ANYWHERE:
        return
    for backend in backends:
        words = [sys.executable, "-m", "deqcore.study.executors.device", backend, device]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(
                f"[study]: device = {device!r}, but {backend} has none of that name here: {last} Set 'auto' or 'cpu'."
            )


def main(backend: str, device: str) -> None:
    """Use the device.

    Raises:
        BackendError: that cannot be done.
    """
    import deqcore
    from deqcore.config.project import load_plugins

    load_plugins(lambda error: print(f"Error: {error}", file=sys.stderr))
    made = deqcore.get_backend(backend=backend)
    made.to_numpy(made.to_device(made.asarray([0.0]), device))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DeqcoreError as error:
        sys.exit(" ".join(str(error).splitlines()))
