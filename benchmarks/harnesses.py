"""The two frameworks that have peers."""

from __future__ import annotations

import os
from typing import Any

from deqcore.bench.harness import Harness


def torch_harness(device: str = "cpu", dtype: str = "float32") -> Harness:
    """Eager PyTorch."""
    import array_api_compat.torch as xp
    import torch

    def wait(value: Any) -> None:
        if value.is_cuda:
            torch.cuda.synchronize()

    return Harness(
        name="torch",
        xp=xp,
        asarray=lambda a: torch.from_numpy(a).to(device=device, dtype=getattr(torch, dtype)),
        to_numpy=lambda a: a.detach().cpu().float().numpy(),
        block=wait,
        quiet=torch.no_grad,
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
    )


def harness(framework: str, threads: int, device: str = "cpu", dtype: str = "float32") -> Harness:
    """One of the two; call it before anything else has imported the framework."""
    if framework == "torch":
        import torch

        torch.set_num_threads(threads)
        return torch_harness(device, dtype)
    if threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return jax_harness()
