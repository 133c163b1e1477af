"""Warn once about operations in a cell under which it has no fixed point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from deqcore.errors import LayerWarning
from deqcore.layer import batch_norm_text
from deqcore.solve.user_line import warn


def _versions(modules: list[tuple[str, nn.Module]]) -> dict[str, int]:
    """Return the version of each buffer of these modules; inference tensors keep none, lazy ones are empty."""
    versions = {}
    for path, module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_lazy(buffer):
                versions[f"{path}.{name}" if path else name] = -1 if buffer.is_inference() else buffer._version
    return versions


class CellWatch:
    """A check of a cell around each solve.

    Batch normalisation in training mode couples the samples and moves its statistics with every evaluation. A write to
    a buffer makes f another function at each step; version counters of the buffers reveal it without reading values.
    What the cell registers during a solve is watched from the next one on.
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
        before = _versions(modules)
        yield
        changed = [name for name, version in _versions(modules).items() if before.get(name, version) != version]
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
