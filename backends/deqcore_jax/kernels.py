"""The projection of GMRES in a form that XLA fuses, and its small algebra in one that compiles soon."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deqcore.abc.history import History
from deqcore.abc.kernels import FusedKernels, Krylov
from deqcore.abc.scaling import least_plain_norm
from deqcore.linear.norms import project
from deqcore_jax import krylov
from deqcore_jax.dtypes import single
from deqcore_jax.loop import anywhere, is_recorded


class JaxKernels(FusedKernels):
    """Norms by plain sums of squares where no row's square leaves the range, and a projection by them."""

    def orthogonalize(
        self, basis: History, w: jax.Array, twice: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        # w is the product with a unit vector, so that its square is far from any limit.
        return project(self.be, basis, w, twice, _plain_norm, conditional=_conditions_are_free())

    def residual_norms(self, z: jax.Array, fz: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if not _conditions_are_free():
            return None
        norms = _plain_norm(fz - z), _plain_norm(fz)
        low = least_plain_norm(jnp, norms[0].dtype)
        safe = [(norm > low) & (norm < 1 / low) for norm in norms]

        def scaled() -> tuple[jax.Array, jax.Array]:
            residual, size = self.be.norm(fz - z), self.be.norm(fz)
            return jnp.where(safe[0], norms[0], residual), jnp.where(safe[1], norms[1], size)

        chosen: tuple[jax.Array, jax.Array] = lax.cond(anywhere(~jnp.all(safe[0] & safe[1])), scaled, lambda: norms)
        return chosen

    def least_squares(self, space: Krylov, inverse: jax.Array | bool) -> tuple[jax.Array, ...] | None:
        if is_recorded():
            return None  # loops over the dimensions in use have no reverse mode
        return krylov.least_squares(space, inverse is not False)


def _conditions_are_free() -> bool:
    """Return whether a condition makes neither the host wait for an accelerator nor several devices for each other."""
    return not is_recorded() and jax.default_backend() == "cpu" and jax.device_count() == 1


def _plain_norm(v: jax.Array) -> jax.Array:
    """Return the 2-norm of each row by one sum of squares."""
    wider = v.astype(single(v.dtype))
    return root(jnp.sum(wider * wider, axis=1))


def root(square: jax.Array) -> jax.Array:
    """Return the square root, with the derivative 0 at 0."""
    zero = square == 0  # the root's derivative there is infinite, and 0·inf would spoil a recorded step
    return jnp.where(zero, square, jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square)))
