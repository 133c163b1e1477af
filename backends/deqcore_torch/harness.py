"""The harness for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deqcore.abc.harness import Harness, Switch


class TorchHarness(Harness):
    """Switches TF32 off, and waits for CUDA."""

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
        trained = {name: value for name, value in cell.named_parameters() if value.requires_grad}
        return trained, lambda given: lambda *args: torch.func.functional_call(cell, given, args)

    def switches(self) -> dict[str, Switch]:
        return {
            "torch default dtype": Switch(torch.get_default_dtype, torch.set_default_dtype),
            "torch grad mode": Switch(torch.is_grad_enabled, torch.set_grad_enabled),
            "torch anomaly mode": Switch(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
            "torch threads": Switch(torch.get_num_threads, torch.set_num_threads),
            "torch deterministic algorithms": Switch(
                torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
            ),
            "torch seed": Switch(
                lambda: torch.get_rng_state().numpy().tobytes(),
                lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
            ),
        }

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
