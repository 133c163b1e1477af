"""Dtypes by explicit rules: JAX's own promotion is an error under `jax_numpy_dtype_promotion = "strict"`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def wide() -> jnp.dtype:
    """Return the dtype of coefficients: double precision if it is switched on."""
    return jnp.dtype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)


def single(dtype: DTypeLike) -> jnp.dtype:
    """Return this dtype, or float32 if it is narrower."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def common(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """Return a dtype that holds numbers of both exactly."""
    one, other = jnp.dtype(a), jnp.dtype(b)
    if one == other:
        return one
    if one.itemsize == other.itemsize:
        return jnp.dtype(jnp.float32)  # float16 and bfloat16
    return one if one.itemsize > other.itemsize else other
