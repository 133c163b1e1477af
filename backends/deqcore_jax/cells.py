"""Parts of cells that help equilibrium models train, as pure functions and pytrees for any JAX library.

A mask or a spectral norm must be the same in every evaluation of one solve. In JAX that needs no bookkeeping: an array
made *before* the solve and closed over by the cell is a constant of the solve. So dropout is a mask that a training
step draws, and weight and spectral normalisation are applied to a weight before the solve. `equinox.nn.SpectralNorm`,
`equinox.nn.WeightNorm` and `flax.nnx.SpectralNorm` update a state at each call: call them before the solve, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deqcore.errors import ConfigError


def dropout_mask(key: jax.Array, like: jax.Array, p: float = 0.5, shared: tuple[int, ...] = ()) -> jax.Array:
    """Draw a mask of 0 and 1 / (1 − p) before a solve; the cell multiplies by it.

    Args:
        key: a `jax.random` key, a new one for each solve.
        like: an array with the shape, dtype and batch of the array to drop from.
        p: probability that a number becomes zero, from 0 to below 1.
        shared: axes (the batch, 0, is not among them) along which one mask serves all, such as `(1,)` for the tokens
            of `(batch, tokens, width)`.

    Raises:
        ConfigError: p or an axis is out of range.

    Source: Gal & Ghahramani (2016), "A theoretically grounded application of dropout in recurrent neural networks".

    Example:
        >>> import jax, jax.numpy as jnp, deqcore
        >>> from deqcore_jax.cells import dropout_mask
        >>> x = jnp.ones((2, 3))
        >>> mask = dropout_mask(jax.random.key(0), x, 0.1)
        >>> deqcore.fixed_point(lambda z, x, mask: 0.5 * jnp.tanh(mask * z) + x, x, x, mask).value.shape
        (2, 3)
    """
    if not 0.0 <= p < 1.0:
        raise ConfigError.bad_value("dropout_mask", "p", p, "a number from 0 to below 1")
    if not all(0 < axis < like.ndim for axis in shared):
        raise ConfigError.bad_value("dropout_mask", "shared", shared, f"axes from 1 to {like.ndim - 1}")
    shape = tuple(1 if axis in shared else size for axis, size in enumerate(like.shape))
    return jax.random.bernoulli(key, 1.0 - p, shape).astype(like.dtype) / (1.0 - p)


def weight_normalized(v: jax.Array, g: jax.Array) -> jax.Array:
    """Return `g v / ‖v‖`, with the norm over all axes but the first.

    Args:
        v: directions `(out, ...)`.
        g: lengths `(out,)`.

    Returns:
        A weight like v, whose rows have the norms |g|.

    Source: Salimans & Kingma (2016), "Weight normalization", eq. (2).

    Example:
        >>> import jax.numpy as jnp
        >>> weight_normalized(jnp.array([[3.0, 4.0]]), jnp.array([10.0])).tolist()
        [[6.0, 8.0]]
    """
    norm = jnp.sqrt(jnp.sum(v * v, axis=tuple(range(1, v.ndim)), keepdims=True))
    return v * (g.reshape(-1, *[1] * (v.ndim - 1)) / norm)


def spectrally_normalized(
    w: jax.Array, u: jax.Array, bound: float = 1.0, steps: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Return `w` scaled down so that its spectral norm, found by power iteration from `u`, is at most `bound`.

    Call it once before a solve; within the solve the weight is then one constant.

    Args:
        w: a weight `(out, ...)`, seen as a matrix `(out, rest)`.
        u: the last left singular vector `(out,)`; any non-zero vector at the start.
        bound: largest spectral norm, above 0.
        steps: power iterations; one is enough while `u` is carried from step to step of a training.

    Returns:
        The weight, and the vector for the next call. The vectors carry no gradient, as usual.

    Raises:
        ConfigError: the bound is not above 0, or steps is below 1.

    Source: Miyato, Kataoka, Koyama & Yoshida (2018), "Spectral normalization for GANs", algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> w, u = spectrally_normalized(jnp.diag(jnp.array([4.0, 1.0])), jnp.ones(2), bound=0.5, steps=20)
        >>> w.round(3).tolist()
        [[0.5, 0.0], [0.0, 0.125]]
    """
    if not bound > 0.0:
        raise ConfigError.bad_value("spectrally_normalized", "bound", bound, "a number above 0")
    if steps < 1:
        raise ConfigError.bad_value("spectrally_normalized", "steps", steps, "at least 1")
    matrix = w.reshape(w.shape[0], -1)
    still = lax.stop_gradient(matrix)
    v = still[0]
    for _ in range(steps):
        v = _unit(still.T @ u)
        u = _unit(still @ v)
    sigma = u @ (matrix @ v)
    return w / jnp.maximum(1.0, sigma / bound), u


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x)), jnp.finfo(x.dtype).tiny)


class Monotone(NamedTuple):
    """z ← relu(z − α (z − (W z + x U + b))) with W = (1 − m) I − AᵀA + B − Bᵀ, which converges for any weights.

    I − W is strongly monotone with constant m, so z = relu(W z + x U + b) has exactly one solution, and this
    forward–backward step contracts towards it for α = m/‖I − W‖². The solution does not depend on α, so neither do
    its gradients. A named tuple of weights: a pytree for optax, equinox and flax alike.

    Attributes:
        a: A `(width, width)`.
        b: B `(width, width)`.
        u: U `(inputs, width)`.
        bias: `(width,)`.

    Source: Winston & Kolter (2020), "Monotone operator equilibrium networks", eq. (8) and §3.2.

    Example:
        >>> import jax, jax.numpy as jnp, deqcore
        >>> from deqcore_jax.cells import Monotone
        >>> weights = Monotone.new(jax.random.key(0), inputs=3, width=8)
        >>> x = jnp.ones((2, 3))
        >>> sol = deqcore.fixed_point(weights.cell(0.5), jnp.zeros((2, 8)), x, forward__max_steps=100)
        >>> sol.value.shape, bool(sol.converged.all())
        ((2, 8), True)
    """

    a: jax.Array
    b: jax.Array
    u: jax.Array
    bias: jax.Array

    @classmethod
    def new(cls, key: jax.Array, inputs: int, width: int) -> Monotone:
        """Draw random weights of about unit norm."""
        a, b, u = (
            jax.random.normal(subkey, (rows, width)) / rows**0.5
            for subkey, rows in zip(jax.random.split(key, 3), (width, width, inputs), strict=True)
        )
        return cls(a, b, u, jnp.zeros(width))

    def apply_w(self, z: jax.Array, margin: float) -> jax.Array:
        """Return W z for z `(batch, width)`."""
        return (1.0 - margin) * z - (z @ self.a.T) @ self.a + z @ self.b.T - z @ self.b

    def cell(self, margin: float = 0.1) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the step as `cell(z, x)` for z `(batch, width)` and x `(batch, inputs)`, with the current weights.

        Args:
            margin: m, above 0.

        Raises:
            ConfigError: the margin is not above 0.
        """
        if not margin > 0.0:
            raise ConfigError.bad_value("Monotone", "margin", margin, "a number above 0")
        step = self.step_size(margin)

        def cell(z: jax.Array, x: jax.Array) -> jax.Array:
            return jax.nn.relu(z + step * (self.apply_w(z, margin) + x @ self.u + self.bias - z))

        return cell

    def step_size(self, margin: float) -> jax.Array:
        """Return m / (m + ‖A‖² + ‖B − Bᵀ‖)², a lower bound of m/‖I − W‖² by norms that need no decomposition.

        The spectral norm is at most the root of the largest sum of a row times the largest of a column.
        """
        a, b = lax.stop_gradient((self.a, self.b))
        size = margin + _norm_bound(a) ** 2 + _norm_bound(b - b.T)
        return margin / size**2


def _norm_bound(a: jax.Array) -> jax.Array:
    """Return √(‖A‖₁ ‖A‖_∞) ≥ ‖A‖₂."""
    size = jnp.abs(a)
    return jnp.sqrt(jnp.max(jnp.sum(size, axis=0)) * jnp.max(jnp.sum(size, axis=1)))
