"""Dtypes by explicit rules: JAX's own promotion is an error under `jax_numpy_dtype_promotion = "strict"`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide() -> Any:
    """Return the dtype of coefficients: double precision if it is switched on."""
    return jnp.dtype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)


def single(dtype: Any) -> Any:
    """Return this dtype, or float32 if it is narrower."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def common(a: Any, b: Any) -> Any:
    """Return a dtype that holds numbers of both exactly."""
    a, b = jnp.dtype(a), jnp.dtype(b)
    if a == b:
        return a
    if a.itemsize == b.itemsize:
        return jnp.dtype(jnp.float32)  # float16 and bfloat16
    return a if a.itemsize > b.itemsize else b
