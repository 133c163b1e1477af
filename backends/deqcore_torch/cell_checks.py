"""Warn once about operations in a cell under which it has no fixed point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deqcore.errors import LayerWarning
from deqcore.layer import batch_norm_text
from deqcore.solve.user_line import warn


def _buffers(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of modules with their full names."""
    for path, module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield (f"{path}.{name}" if path else name), buffer


class Watch:
    """A check of a cell around each solve.

    Batch normalisation in training mode couples the samples and moves its statistics with every evaluation. A write to
    a buffer makes f another function at each step; version counters of the buffers reveal it without reading values.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    @contextmanager
    def over(self, cell: Any, training: bool) -> Iterator[None]:
        """Watch one solve.

        Args:
            cell: a module; anything else is not checked.
            training: whether the layer is in training mode.
        """
        if not isinstance(cell, nn.Module):
            yield
            return
        modules = list(cell.named_modules())  # once, because a walk takes as long as a small solve
        before = {name: buffer._version for name, buffer in _buffers(modules)}
        yield
        changed = [name for name, buffer in _buffers(modules) if before.get(name) != buffer._version]
        norms = [name for name, module in modules if isinstance(module, _BatchNorm) and module.training]
        if training and norms:
            self.warn(f"{batch_norm_text(norms)}eval() mode.")
        elif changed:
            self.warn(
                f"The cell wrote to its buffers {', '.join(changed)} while the solver evaluated it, so it is another "
                f"function at each step and has no fixed point. Compute the values that change before the solve, and "
                f"pass them as an input."
            )

    def warn(self, text: str) -> None:
        """Warn the first time."""
        if text not in self.given:
            self.given.add(text)
            warn(text, LayerWarning)
