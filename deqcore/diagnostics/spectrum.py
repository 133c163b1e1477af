"""The spectral radius of the Jacobian, by Arnoldi's process: right for complex pairs and for each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.diagnostics.linearization import linearize
from deqcore.errors import ConfigError
from deqcore.types import Array, Map, Tree


@dataclass(frozen=True)
class Spectrum:
    """The largest eigenvalue of J in modulus, per sample; NumPy arrays on the host.

    Attributes:
        radius: |λ| `(batch,)`; NaN where f or its derivative is not finite.
        eigenvalue: λ `(batch,)` complex; of a conjugate pair the one above the real axis.
        error: ‖Jᵀx − λx‖ for its unit vector x `(batch,)`: λ is an eigenvalue of a matrix that near to J. For a normal
            J it bounds the error of λ; a non-normal J can amplify it.
        products: vector–Jacobian products of the whole batch that were spent.

    Example:
        >>> import numpy as np
        >>> from deqcore.diagnostics import spectral_radius
        >>> turn = 0.5 * np.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> spectral_radius(lambda z: z @ turn, np.zeros((1, 2))).eigenvalue.round(3).tolist()
        [0.5j]
    """

    radius: NDArray[np.float64]
    eigenvalue: NDArray[np.complex128]
    error: NDArray[np.float64]
    products: int


def spectral_radius(
    f: Callable[..., Tree],
    z: Tree,
    *args: Any,
    batch: bool | Literal[2] = True,
    tolerance: float = 0.01,
    max_products: int = 60,
    seed: int = 0,
) -> Spectrum:
    """Spectral radius of ∂f/∂z at `z`, usually a solution: below 1, plain iteration converges near it.

    Arnoldi's process with Jᵀ, which has the eigenvalues of J, on all samples at once. A quotient of powers
    (‖J^k v‖/‖J^{k−1} v‖) never settles for a complex pair; Ritz values have no such trouble, and their residuals say
    how accurate they are.

    Cost: one evaluation of f and `products` vector–Jacobian products, each for the whole batch: until `error` is at
    most `tolerance`·radius in every sample, `max_products` or n (then it is exact to rounding) at most; as many
    vectors of memory. On a backend without autodiff a dense Jacobian comes first. Not for traced code.

    Args:
        f: `f(z, *args)` returns a tree like z. If it couples the samples, `batch=False` looks at the whole.
        z: the point, a tree of floating-point arrays.
        *args: further arguments of f.
        batch: whether the first axis of z is the batch, as `forward.batch`; 2 is the same as true here.
        tolerance: relative residual at which a sample is done.
        max_products: products at most.
        seed: of the random start vectors.

    Returns:
        Radius, eigenvalue and error of each sample `(batch,)`, see `Spectrum`.

    Raises:
        ConfigError: tolerance or max_products is out of range.
        InitialIterateError: z is unfit as a state.
        ProblemError: f returned something that is not like z.

    Source: Saad (2011), "Numerical methods for large eigenvalue problems", sections 6.2 and 6.3.

    Example:
        >>> import numpy as np
        >>> turn = 0.9 * np.array([[0.0, -1.0], [1.0, 0.0]])  # eigenvalues ±0.9 i
        >>> found = spectral_radius(lambda z: z @ turn.T, np.zeros((1, 2)))
        >>> found.radius.round(6).item(), found.products
        (0.9, 2)
    """
    if not tolerance >= 0.0:
        raise ConfigError.bad_value("spectral_radius", "tolerance", tolerance, "a number of at least 0")
    if max_products < 1:
        raise ConfigError.bad_value("spectral_radius", "max_products", max_products, "at least 1")
    at = linearize(f, z, args, batch)
    rows, n = at.z.shape
    if not rows or not n:
        return Spectrum(np.zeros(rows), np.zeros(rows, complex), np.zeros(rows), 0)
    with at.backend.errstate():
        _, vjp = at.backend.autodiff.linearize(at.f, at.z)
        start = np.random.default_rng(seed).standard_normal((rows, n))
        v = at.backend.cast(at.backend.asarray(start, like=at.z), at.z)
        return _arnoldi(at.backend, vjp, v, tolerance, min(max_products, n))


def _arnoldi(backend: Backend, vjp: Map, v: Array, tolerance: float, most: int) -> Spectrum:
    """Grow the space, and look at its Ritz values now and then (after 2, 4, 6, 9, … products)."""
    v = v / backend.norm(v)[:, None]
    basis = backend.history(v, most + 1).append(v)
    hessenberg = np.zeros((v.shape[0], most + 1, most))
    following, result = 2, None
    for k in range(most):
        basis, v, column = _extend(backend, basis, vjp(v))
        hessenberg[:, : k + 2, k] = column[:, : k + 2]
        if k + 1 >= min(following, most):
            result = _dominant(hessenberg[:, : k + 2, : k + 1])
            following = max(following + 2, following * 3 // 2)
            if np.all(~(result[1] > tolerance * np.abs(result[0]))):  # NaN is as done as it will be
                break
    assert result is not None
    value, error = result
    return Spectrum(np.abs(value), value, error, k + 1)


def _extend(backend: Backend, basis: History, w: Array) -> tuple[History, Array, Any]:
    """Orthogonalise twice and append; an invariant space gives a zero vector, which adds nothing from then on."""
    scale = backend.norm(w)
    h = basis.dot(w)
    w = w - basis.combine(h)
    more = basis.dot(w)
    w = w - basis.combine(more)
    height = backend.norm(w)
    broke = height <= 8 * backend.eps(w) * scale
    xp = backend.xp
    inverse = xp.where(broke, xp.zeros_like(height), 1.0 / xp.where(broke, xp.ones_like(height), height))
    v = w * backend.cast(inverse, w)[:, None]
    column = np.array(backend.to_numpy(h + more), dtype=np.float64)
    slots = np.flatnonzero(backend.to_numpy(basis.slot()))
    column[:, int(slots[0]) + 1] = np.where(backend.to_numpy(broke), 0.0, backend.to_numpy(height))
    return basis.append(v), v, column


def _dominant(hessenberg: Any) -> tuple[Any, Any]:
    """Return Ritz value of the largest modulus of each H̄ `(batch, k + 1, k)`, and its residual."""
    k = hessenberg.shape[2]
    finite = np.isfinite(hessenberg).all(axis=(1, 2))
    square = np.where(finite[:, None, None], hessenberg[:, :k], 0.0)
    values, vectors = np.linalg.eig(square)
    # Of a pair the modulus is the same up to rounding: the one above the real axis is taken.
    best = np.argmax(np.abs(values) * (1.0 + 1e-12 * np.sign(values.imag)), axis=1)
    rows = np.arange(len(best))
    value = values[rows, best].astype(complex)
    error = np.abs(hessenberg[:, k, k - 1] * vectors[rows, k - 1, best])
    return np.where(finite, value, np.nan), np.where(finite, error, np.nan)
