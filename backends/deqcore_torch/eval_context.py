"""What an evaluation of f depends on besides its inputs: recording, autocast, the state of random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad


@contextmanager
def nothing_recorded() -> Iterator[None]:
    """Switch recording off, in reverse and forward mode, and inference mode, whose tensors do not count writes.

    Autocast forgets the narrow copies of parameters that it made inside: they have no gradients, and PyTorch before
    2.8 would still use them outside.
    """
    try:
        if torch.is_inference_mode_enabled() or forward_ad._current_level >= 0:
            with torch.inference_mode(False), torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
                yield
        else:
            with torch.no_grad():
                yield
    finally:
        torch.clear_autocast_cache()


def output_eps(x: Tensor) -> float:
    """Return the machine epsilon of operations on `x`, which autocast may run in a narrower dtype."""
    kind = x.device.type
    narrowed = x.dtype is torch.float32 and torch.is_autocast_enabled(kind)
    return float(torch.finfo(torch.get_autocast_dtype(kind) if narrowed else x.dtype).eps)


@dataclass(frozen=True)
class Ambient:
    """The autocast and random state with which f was recorded, to evaluate it again in a backward pass."""

    device: torch.device
    dtype: torch.dtype
    enabled: bool
    cached: bool
    host_state: Tensor
    device_state: Tensor | None

    @classmethod
    def now(cls, x: Tensor) -> Ambient:
        """Return the context at this point, for the device of `x`."""
        kind = x.device.type
        return cls(
            device=x.device,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cached=torch.is_autocast_cache_enabled(),
            host_state=torch.get_rng_state(),
            device_state=torch.cuda.get_rng_state(x.device) if x.is_cuda else None,
        )

    def around(self, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap f so that it runs in this context wherever it is called; the random state there does not change."""

        def again(*args: object) -> Tensor:
            with self._restored():
                return f(*args)

        return again

    @contextmanager
    def _restored(self) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cached)
        with torch.random.fork_rng([self.device] if self.device_state is not None else []), autocast:
            torch.set_rng_state(self.host_state)
            if self.device_state is not None:
                torch.cuda.set_rng_state(self.device_state, self.device)
            yield
