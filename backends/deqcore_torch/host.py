"""Views of tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqcore.abc.host import HostViews
from deqcore_torch import functorch


class TorchHost(HostViews):
    """NumPy's view of a tensor on the CPU, outside of transformations."""

    def numpy_view(self, x: Tensor) -> Any | None:
        if not x.is_cpu or functorch.active():
            return None
        return (x.detach() if x.requires_grad else x).numpy()

    def from_numpy_view(self, x: Any) -> Tensor:
        return torch.from_numpy(x)
