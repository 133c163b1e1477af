"""Small linear algebra by LAPACK and cuSOLVER."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.linalg import SmallLinalg
from deqcore_torch import functorch
from deqcore_torch.kernels import native_steps


class TorchLinalg(SmallLinalg):
    """Solves without a check of each system, which would wait for the device."""

    def invert(self, x: Tensor, floor: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or functorch.active():
            return super().invert(x, floor)
        seen = x.numpy()
        out = np.zeros_like(seen)
        np.divide(1.0, seen, out=out, where=np.abs(seen) > floor.numpy())
        return torch.from_numpy(out)

    def solve(self, a: Tensor, b: Tensor) -> Tensor:
        x, info = torch.linalg.solve_ex(a, b if b.dim() == 3 else b[..., None])
        x = x.masked_fill(info[:, None, None] != 0, float("nan"))
        return x if b.dim() == 3 else x[..., 0]

    def solve_positive(self, a: Tensor, b: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled() and b.requires_grad
        steps = None if recorded else native_steps(self.be.host, a)
        solution: Tensor | None = None if steps is None else steps.solve_positive(a, b)
        return self.solve(a, b) if solution is None else solution
