"""Complex arrays as real ones with a last axis of 2, real and imaginary part."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pairs(x: NDArray[Any]) -> NDArray[Any]:
    """Return a complex array as pairs of real numbers."""
    return np.stack((np.real(x), np.imag(x)), axis=-1)


def from_pairs(x: NDArray[Any]) -> NDArray[Any]:
    """Undo `pairs`.

    Raises:
        TypeError: the pairs are complex themselves, as in a complex step, which needs the imaginary part for itself.
    """
    if np.iscomplexobj(x):
        raise TypeError("A complex step cannot go through the parts of a complex state.")
    z = np.empty(x.shape[:-1], np.promote_types(x.dtype, np.complex64))
    z.real, z.imag = x[..., 0], x[..., 1]
    return z
