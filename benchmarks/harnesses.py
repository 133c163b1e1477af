"""The two frameworks that have peers."""

from __future__ import annotations

from typing import Any

from deqcore.bench.harness import Harness


def torch_harness(device: str = "cpu", dtype: str = "float32") -> Harness:
    """Eager PyTorch."""
    import array_api_compat.torch as xp
    import torch

    def wait(value: Any) -> None:
        if value.is_cuda:
            torch.cuda.synchronize()

    def to_numpy(a: Any) -> Any:
        held = a.detach().cpu()
        return (held.float() if held.dtype in (torch.bfloat16, torch.float16) else held).numpy()

    return Harness(
        name="torch",
        xp=xp,
        asarray=lambda a: torch.from_numpy(a).to(device=device, dtype=getattr(torch, dtype)),
        to_numpy=to_numpy,
        block=wait,
        quiet=torch.no_grad,
        package="torch",
    )


def jax_harness() -> Harness:
    """Compiled JAX."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    return Harness(
        name="jax",
        xp=jnp,
        asarray=jnp.asarray,
        to_numpy=np.asarray,
        block=jax.block_until_ready,
        jit=jax.jit,
        traced=True,
        package="jax",
    )


def harness(framework: str, threads: int) -> Harness:
    """Return the harness of a framework. Call `limit_threads` before importing JAX, which has no other switch."""
    if framework == "jax":
        return jax_harness()
    import torch

    torch.set_num_threads(threads)
    return torch_harness()
