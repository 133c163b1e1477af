"""The PyTorch backend: eager loops, histories that grow in place, gradients attached by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.numbers import NumberOps
from deqcore.abc.scaling import guarded_norm, scaled_norm
from deqcore.errors import BackendError, ConfigError
from deqcore.types import Capabilities, LoopVars, Tree
from deqcore_torch import functorch, kernels, trees
from deqcore_torch.autodiff import TorchAutodiff
from deqcore_torch.chunks import select_rows
from deqcore_torch.guards import TorchGuards
from deqcore_torch.harness import TorchHarness
from deqcore_torch.history import TorchHistory
from deqcore_torch.host import TorchHost
from deqcore_torch.linalg import TorchLinalg
from deqcore_torch.recorded_history import RecordedHistory

DEVICE_CHECK = 4  # steps between host checks where a check waits for the device


class TorchNumbers(NumberOps):
    """Exponents by `frexp`, views of complex numbers, and random numbers by generators."""

    def max_abs(self, v: Tensor, like: Tensor) -> Tensor:
        largest: Tensor = torch.linalg.vector_norm(v.detach(), float("inf"), dim=1) if v.shape[1] else like
        return largest.to(like.dtype)

    def power_of_two(self, x: Tensor) -> Tensor:
        return x / (2.0 * torch.frexp(x)[0])

    def to_pairs(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.resolve_conj())

    def from_pairs(self, x: Tensor) -> Tensor:
        return torch.complex(x[..., 0], x[..., 1])  # a view would need an even offset in memory

    def normal(self, like: Tensor, seed: int, index: Sequence[Any]) -> Tensor:
        (drawn,) = np.random.SeedSequence([seed, *map(int, index)]).generate_state(1, np.uint64)
        generator = torch.Generator(like.device).manual_seed(int(drawn) >> 1)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


class TorchBackend(Backend):
    """PyTorch tensors on any device."""

    name: ClassVar[str] = "torch"
    capabilities: Capabilities = Capabilities(
        jvp=True, vmap=True, bfloat16=True, accelerator=True, complex=True, second_derivatives=True, compaction=True
    )
    xp = xp
    registration = (
        "optree.dataclasses.dataclass with namespace = 'deqcore', or torch.utils._pytree.register_pytree_node"
    )
    linalg_class = TorchLinalg
    autodiff_class = TorchAutodiff
    numbers_class = TorchNumbers
    guards_class = TorchGuards
    host_class = TorchHost
    kernels_class = kernels.TorchKernels
    harness_class = TorchHarness

    def is_array(self, leaf: object) -> bool:
        return isinstance(leaf, Tensor)

    def asarray(self, a: object, *, dtype: str | None = None, like: Tensor | None = None) -> Tensor:
        kind = getattr(torch, dtype) if dtype else (like.dtype if like is not None else None)
        if not isinstance(a, Tensor):
            array = isinstance(a, np.ndarray | list | np.generic)
            a = torch.from_numpy(np.array(a)) if array else torch.tensor(a, dtype=kind)  # not through float32
        return a.to(device=like.device if like is not None else None, dtype=kind)

    def to_numpy(self, x: Tensor) -> Any:
        x = x.detach().cpu()
        return functorch.to_numpy(x.float() if x.dtype is torch.bfloat16 else x)

    def flatten(self, tree: Tree) -> tuple[list[Any], Any]:
        return trees.flatten(tree)

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Any:
        return trees.unflatten(structure, leaves)

    def dtype_name(self, x: Tensor) -> str:
        return str(x.dtype).removeprefix("torch.")

    def device_of(self, x: Tensor) -> torch.device:
        return x.device

    def astype(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(torch, dtype))

    def to_device(self, x: Tensor, device: str) -> Tensor:
        try:
            return x.to(device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"torch cannot use the device {device!r}: {error}") from error

    def eps(self, x: Tensor) -> float:
        return float(torch.finfo(x.dtype).eps)

    def to_accum_dtype(self, x: Tensor) -> Tensor:
        return x.to(_wide(x.device))

    def cast(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)

    def norm(self, v: Tensor) -> Tensor:
        narrow = v.dtype in (torch.float16, torch.bfloat16)
        if self.host.numpy_view(v.new_empty(0, dtype=torch.float32) if narrow else v) is not None:
            norms: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float32 if narrow else None)
            return guarded_norm(self, v, norms)
        steps = kernels.native_steps(self.host, v)  # on other devices reading the norms would wait
        if steps is not None:
            norms = steps.norm(v)
            return norms
        like = v.new_zeros(v.shape[0], dtype=torch.float32 if narrow else None)
        return scaled_norm(self, v, self.numbers.max_abs(v, like))

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.to_accum_dtype(a) * self.to_accum_dtype(b)).sum(1)

    def select(self, mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
        eager = not torch.is_grad_enabled() and not functorch.active()
        if eager and mask.device.type == "cpu" and new.dim() > 1:
            return select_rows(mask, new, old)
        return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)

    def put(self, x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        return x.index_copy(0, rows, part)

    def history(self, like: Tensor, history_size: int, dtype: str | None = None) -> History:
        stored = like.dtype if dtype is None else getattr(torch, dtype, None)
        if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
            expected = "float16, bfloat16, float32 or float64"
            raise ConfigError.bad_value("The solver", "history_dtype", dtype, expected)
        if (torch.is_grad_enabled() and like.requires_grad) or functorch.active():
            return RecordedHistory.empty(like, history_size, stored, _wide(like.device))
        return TorchHistory.empty(like, history_size, stored, _wide(like.device))

    def loop(
        self,
        running: Callable[[LoopVars], Tensor | bool],
        body: Callable[[LoopVars], LoopVars],
        carry: LoopVars,
        steps: Any,
        check_every: int | str = "auto",
    ) -> LoopVars:
        every = 0 if check_every == "auto" else int(check_every)
        for step in range(int(steps)):
            if every == 0 or step % every == 0:
                going = running(carry)
                if every == 0:
                    waits = isinstance(going, Tensor) and going.device.type != "cpu"
                    every = DEVICE_CHECK if waits else 1
                if not going:
                    break
            carry = body(carry)
        return carry

    def detach(self, x: Tensor) -> Tensor:
        return x.detach()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
