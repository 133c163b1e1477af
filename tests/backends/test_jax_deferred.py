"""JAX traces the solve that a derivative needs, and no other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqcore
from deqcore.solve.adjoint import Adjoint

SLOPES = np.asarray([[0.5, -0.25]], np.float32)
TANGENTS = np.asarray([[[1.0, 2.0]], [[-3.0, 0.5]]], np.float32)


def solve(x: jax.Array) -> jax.Array:
    """Return z = SLOPES·z + x, whose derivative is 1/(1 − SLOPES)."""
    value: jax.Array = deqcore.fixed_point(
        lambda z, x: SLOPES * z + x, 0 * x, x, forward__solver="picard", backward__strategy="exact-ift"
    ).value
    return value


def test_reverse_mode_traces_one_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    turned, call = [], Adjoint.__call__

    def counted(self: Adjoint, *args: Any) -> tuple[Any, Any]:
        turned.append(self.turned)
        return call(self, *args)

    monkeypatch.setattr(Adjoint, "__call__", counted)
    jax.make_jaxpr(jax.grad(lambda x: jnp.sum(solve(x))))(jnp.ones((1, 2)))
    assert turned == [False]


def test_forward_mode_in_lanes_solves_the_equation_of_the_tangent() -> None:
    lanes = jax.jit(jax.vmap(lambda t: jax.jvp(solve, (jnp.ones((1, 2)),), (t,))[1]))
    np.testing.assert_allclose(lanes(TANGENTS), TANGENTS / (1 - SLOPES), rtol=1e-4)
