"""PyTorch Lightning: a callback that runs a monitor through `Trainer.fit`."""

from __future__ import annotations

from functools import cache
from typing import Any

from deqcore.errors import MissingExtraError
from deqcore.monitor.monitor import Monitor
from deqcore.plugins.lookup import is_installed


def lightning_callback(monitor: Monitor) -> Any:
    """Return a `lightning.pytorch.Callback` for `Trainer(callbacks=[...])`.

    The monitor is entered when fitting starts, counts the trainer's global steps, and is closed when fitting ends or
    fails. It runs in the process of global rank zero only. A monitor that is inside its own `with` block is left to
    that block; the callback then only counts the steps.

    Args:
        monitor: a fresh monitor; it serves one `fit`.

    Raises:
        MissingExtraError: neither lightning nor pytorch_lightning is installed.

    Example:
        trainer = Trainer(callbacks=[lightning_callback(Monitor(config))])
    """
    return _class()(monitor)


@cache
def _class() -> Any:
    if is_installed("lightning"):
        from lightning.pytorch import Callback
    elif is_installed("pytorch_lightning"):
        from pytorch_lightning import Callback
    else:
        raise MissingExtraError.of("lightning_callback", "lightning", "lightning")

    class MonitorCallback(Callback):  # type: ignore[misc]
        """Runs a monitor through `fit`."""

        def __init__(self, monitor: Monitor) -> None:
            self.monitor = monitor
            self._mine = False

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            """Enter, on rank zero."""
            if trainer.is_global_zero and not self.monitor.entered:
                self.monitor.__enter__()
                self._mine = True

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Count from where a restored trainer stands."""
            if self.monitor.entered:
                self.monitor.advance(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """Count."""
            if self.monitor.entered:
                self.monitor.advance(trainer.global_step)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            """Close."""
            self._leave(None)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Close the monitor, and let the exception propagate."""
            self._leave(exception)

        def _leave(self, error: BaseException | None) -> None:
            if self._mine:
                self._mine = False
                self.monitor.__exit__(type(error) if error else None, error, None)

    return MonitorCallback
