"""Hugging Face transformers: a callback that runs a monitor through `Trainer.train`."""

from __future__ import annotations

import atexit
from functools import cache
from typing import Any

from deqcore.errors import MissingExtraError
from deqcore.monitor.monitor import Monitor
from deqcore.plugins.lookup import is_installed


def transformers_callback(monitor: Monitor) -> Any:
    """Return a `transformers.TrainerCallback` for `Trainer(callbacks=[...])`.

    The monitor is entered when training begins, counts the trainer's global steps, and is closed when training ends,
    in the process of world rank zero only. The trainer does not inform its callbacks of an exception: to have the log
    complete even then, put `with monitor:` around `trainer.train()`; the callback then only counts the steps.

    Args:
        monitor: a fresh monitor; it serves one `train`.

    Raises:
        MissingExtraError: transformers is not installed.

    Example:
        trainer = Trainer(model, args, callbacks=[transformers_callback(Monitor(config))])
    """
    return _class()(monitor)


@cache
def _class() -> Any:
    if not is_installed("transformers"):
        raise MissingExtraError.of("transformers_callback", "transformers", "transformers")
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):  # type: ignore[misc]
        """Runs a monitor through `train`."""

        def __init__(self, monitor: Monitor) -> None:
            self.monitor = monitor
            self._mine = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Enter, on rank zero, and count from where a restored trainer stands."""
            if state.is_world_process_zero and not self.monitor.entered:
                self.monitor.__enter__()
                self._mine = True
                atexit.register(self.monitor.close)  # the only thing left when the trainer fails
            if self.monitor.entered:
                self.monitor.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Count."""
            if self.monitor.entered:
                self.monitor.advance(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Close."""
            if self._mine:
                self._mine = False
                atexit.unregister(self.monitor.close)
                self.monitor.__exit__(None, None, None)

    return MonitorCallback
