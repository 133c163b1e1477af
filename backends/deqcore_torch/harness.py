"""The harness for tests, diagnostics and benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import optree
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from deqcore.abc.arrays import is_inexact, precision_of
from deqcore.abc.harness import Harness
from deqcore.types import Tree

# Name of a global setting, how it is read and how it is set.
SETTINGS: Final[dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]] = {
    "torch default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch deterministic algorithms": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "torch threads": (torch.get_num_threads, torch.set_num_threads),
    "torch matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch random state": (torch.get_rng_state, torch.set_rng_state),
}


class TorchHarness(Harness):
    """Switches TF32 off, waits for CUDA, and takes modules apart."""

    @contextmanager
    def high_precision(self) -> Iterator[None]:
        switches = [torch.backends.cuda.matmul, torch.backends.cudnn]
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = False
            yield
        finally:
            for switch, allowed in zip(switches, before, strict=True):
                switch.allow_tf32 = allowed

    def parameters(self, cell: Any) -> tuple[Any, Callable[[Any], Callable[..., Any]]]:
        if not isinstance(cell, torch.nn.Module):
            return super().parameters(cell)
        return _trained(cell), lambda given: lambda *args: torch.func.functional_call(cell, given, args)

    def module_arrays(self, module: Any) -> dict[str, Tensor]:
        if not isinstance(module, torch.nn.Module):
            return {}
        return dict(module.named_parameters()) | dict(module.named_buffers())

    @contextmanager
    def preserved(self, module: Any) -> Iterator[Any]:
        before = {name: value.detach().clone() for name, value in self.module_arrays(module).items()}
        try:
            yield module
        finally:
            with torch.no_grad():
                for name, value in self.module_arrays(module).items():
                    if name in before and not torch.equal(value, before[name]):
                        value.copy_(before[name])

    def module_gradients(
        self, module: Any, call: Callable[..., Tensor], inputs: tuple[Tree, ...], cotangent: Tensor
    ) -> dict[str, Tensor]:
        trained = _trained(module) if isinstance(module, torch.nn.Module) else {}
        wanted = dict(trained)

        def leaf(name: str, x: Any) -> Any:
            if not (isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())):
                return x
            wanted[name] = x.detach().clone().requires_grad_()
            return wanted[name]

        moved = []
        for i, tree in enumerate(inputs):
            leaves, structure = optree.tree_flatten(tree)
            names = [f"inputs[{i}]" if len(leaves) == 1 else f"inputs[{i}] leaf {k}" for k in range(len(leaves))]
            moved.append(optree.tree_unflatten(structure, [leaf(*pair) for pair in zip(names, leaves, strict=True)]))
        with torch.enable_grad():
            value = call(module, *moved)
        if not wanted or not value.requires_grad:
            return {name: torch.zeros_like(x) for name, x in wanted.items()}
        gradients = torch.autograd.grad(value, list(wanted.values()), cotangent, allow_unused=True)
        pairs = zip(wanted.items(), gradients, strict=True)
        return {name: torch.zeros_like(x) if gradient is None else gradient for (name, x), gradient in pairs}

    def converted(self, module: Any, *, dtype: str | None = None, device: str | None = None) -> Any:
        if not isinstance(module, torch.nn.Module):
            return super().converted(module, dtype=dtype, device=device)
        made = copy.deepcopy(module).to(device=device)

        def change(x: Tensor) -> Tensor:
            kind = str(x.dtype).removeprefix("torch.")
            return x.to(getattr(torch, precision_of(kind, dtype))) if dtype is not None and is_inexact(kind) else x

        return made._apply(change)  # `Module.to` with a real dtype drops imaginary parts

    def devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def global_state(self) -> dict[str, Any]:
        return {name: read() for name, (read, _) in SETTINGS.items()}

    def restore_global_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            SETTINGS[name][1](value)

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def peak_memory(self, fn: Callable[..., Any], *args: Tensor) -> int:
        if any(arg.is_cuda for arg in args):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fn(*args)
            return int(torch.cuda.max_memory_allocated()) - before
        with _Live(args) as live:
            fn(*args)
        return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return and that are still there; CPU allocators keep no count."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {arg.untyped_storage()._cdata for arg in known}
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(result, namespace="torch"):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._sizes = {key: each for key, each in self._sizes.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._sizes.values()))
        return result


def _trained(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
