"""Views of arrays in the host's memory."""

from __future__ import annotations

from typing import Any

from deqcore.abc.arrays import ArrayOps
from deqcore.types import Array


class HostViews:
    """Shares arrays with NumPy where this costs neither a wait nor a copy. The default shares nothing.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.host.numpy_view(be.asarray([True, False])).any()
        np.True_
    """

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

    def numpy_view(self, x: Array) -> Any | None:
        """Return `x` as a NumPy array that shares its memory, or None if that would cost a wait or a copy.

        The loop's own decisions, a dozen operations on `(batch,)`, cost a fifth as much on such views.
        """
        return None

    def from_numpy_view(self, x: Any) -> Array:
        """Undo `numpy_view`: return an array that shares the memory of the NumPy array `x`."""
        raise NotImplementedError(f"{type(self).__name__} has no NumPy views.")
