"""Notice what a cell does that a fixed point does not survive, and say it once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deqcore.errors import LayerWarning
from deqcore.layer import batch_norm_text


class Watch:
    """Looks at a cell around each solve.

    Batch normalisation in training mode couples the samples and moves its statistics with every evaluation; a buffer
    that is written to makes f another function at each step. Writes are found by the version counters of the buffers,
    which costs no look at their values.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()

    @contextmanager
    def over(self, cell: Any, training: bool) -> Iterator[None]:
        """Watch one solve.

        Args:
            cell: a module; anything else is not looked at.
            training: whether the layer is in training mode.
        """
        if not isinstance(cell, nn.Module):
            yield
            return
        before = {name: buffer._version for name, buffer in cell.named_buffers()}
        yield
        changed = [name for name, buffer in cell.named_buffers() if before.get(name) != buffer._version]
        norms = [name for name, module in cell.named_modules() if isinstance(module, _BatchNorm) and module.training]
        if training and norms:
            self.tell(f"{batch_norm_text(norms)}eval() mode.")
        elif changed:
            self.tell(
                f"The cell wrote to its buffers {', '.join(changed)} while the solver evaluated it: it is then "
                f"another function at each step, and has no fixed point. Compute what changes before the solve, and "
                f"pass it as an input."
            )

    def tell(self, text: str) -> None:
        """Warn, the first time."""
        if text not in self.told:
            self.told.add(text)
            warnings.warn(text, LayerWarning, stacklevel=6)
