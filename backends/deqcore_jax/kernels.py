"""The projection of GMRES in a form that XLA fuses, and its small algebra in one that compiles soon."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deqcore.abc.history import History
from deqcore.abc.kernels import FusedKernels, Krylov
from deqcore.linear.norms import project
from deqcore_jax import krylov
from deqcore_jax.dtypes import single
from deqcore_jax.loop import is_recorded


class JaxKernels(FusedKernels):
    """A projection with norms by plain sums of squares, repeated where products cancel."""

    def orthogonalize(
        self, basis: History, w: jax.Array, twice: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        # w is the product with a unit vector, so that its square is far from any limit. A condition makes the host wait
        # for an accelerator, and several devices for each other.
        free = not is_recorded() and jax.default_backend() == "cpu" and jax.device_count() == 1
        return project(self.be, basis, w, twice, _plain_norm, conditional=free)

    def least_squares(self, space: Krylov, inverse: jax.Array | bool) -> tuple[jax.Array, ...] | None:
        if is_recorded():
            return None  # loops over the dimensions in use have no reverse mode
        return krylov.least_squares(space, inverse is not False)


def _plain_norm(v: jax.Array) -> jax.Array:
    """Return the 2-norm of each row by one sum of squares."""
    wider = v.astype(single(v.dtype))
    return root(jnp.sum(wider * wider, axis=1))


def root(square: jax.Array) -> jax.Array:
    """Return the square root, with the derivative 0 at 0."""
    zero = square == 0  # the root's derivative there is infinite, and 0·inf would spoil a recorded step
    return jnp.where(zero, square, jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square)))
