"""An array whose values must not be read, as in a traced function: NumPy numbers behind a guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np

from deqcore.errors import DeqcoreError


class StrictError(DeqcoreError, TypeError):
    """Code did what a tracing framework cannot do."""


REFUSED: Final = {
    "__bool__": "was asked for its truth value. Choose with xp.where or backend.select; repeat with backend.loop",
    "__float__": "was turned into a Python float. Keep it an array",
    "__int__": "was turned into a Python int. Keep it an array",
    "__index__": "was used as an index or a length. Sizes must be known before the solve (shape, options)",
    "__complex__": "was turned into a Python complex. Keep it an array",
    "__setitem__": "was written to. Use xp.where or backend.select, which return a new array",
    "__array__": "was given to a NumPy function. Use backend.xp, which is the framework's own namespace",
    "__iter__": "was iterated over. Work on whole arrays, one operation for all samples",
    "__hash__": "was hashed. Arrays cannot be keys",
}

UNARY: Final = ("__neg__", "__pos__", "__abs__", "__invert__")
ARITHMETIC: Final = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
COMPARISON: Final = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
ATOMS: Final = frozenset([int, float, bool, complex, str, slice, type(None), type(Ellipsis), type])
BINARY: Final = (*(f"__{side}{name}__" for name in ARITHMETIC for side in ("", "r")), *COMPARISON)


class StrictArray:
    """A NumPy array that can be computed with, but not looked at.

    Attributes:
        hidden: the NumPy array. Only the strict backend itself touches it.
    """

    __slots__ = ("hidden",)
    __array_priority__ = 1000
    __array_ufunc__ = None  # NumPy's operators leave mixed expressions to this class

    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden if type(hidden) is np.ndarray else np.asarray(hidden)

    @property
    def shape(self) -> tuple[int, ...]:
        """Known without running anything."""
        return self.hidden.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.hidden.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.hidden.size

    @property
    def dtype(self) -> Any:
        """NumPy's dtype."""
        return self.hidden.dtype

    @property
    def device(self) -> str:
        """The host."""
        return "cpu"

    @property
    def T(self) -> StrictArray:
        """The transposed matrix."""
        return StrictArray(self.hidden.T)

    @property
    def mT(self) -> StrictArray:
        """The transposed matrices of a stack."""
        return StrictArray(self.hidden.mT)

    def __getitem__(self, key: Any) -> StrictArray:
        for part in key if isinstance(key, tuple) else (key,):
            if type(part) is StrictArray and part.dtype == bool:
                raise StrictError(
                    "A strict array was indexed with a mask: the shape of the result depends on values, which "
                    "tracing does not know. Use xp.where."
                )
        return StrictArray(self.hidden[unwrap(key)])

    def __len__(self) -> int:
        return len(self.hidden)

    def __repr__(self) -> str:
        return f"StrictArray({self.dtype}{list(self.shape)})"


def wrap(value: Any) -> Any:
    """Return NumPy arrays as strict ones, also within tuples and lists."""
    if type(value) is np.ndarray:
        return StrictArray(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return StrictArray(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(wrap, value))
    return type(value)(map(wrap, value)) if isinstance(value, tuple | list) else value


def unwrap(value: Any) -> Any:
    """Return the NumPy arrays inside, also within tuples, lists and dicts."""
    kind = type(value)
    if kind is StrictArray:
        return value.hidden
    if kind in ATOMS:
        return value
    if isinstance(value, dict):
        return {key: unwrap(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(unwrap, value))
    return type(value)(map(unwrap, value)) if isinstance(value, tuple | list) else value


def _unary(name: str) -> Callable[[StrictArray], StrictArray]:
    method = getattr(np.ndarray, name)
    return lambda self: StrictArray(method(self.hidden))


def _binary(name: str) -> Callable[[StrictArray, Any], Any]:
    method = getattr(np.ndarray, name)

    def operator(self: StrictArray, other: Any) -> Any:
        kind = type(other)
        if kind is StrictArray:
            other = other.hidden
        elif kind not in ATOMS and isinstance(other, np.ndarray):
            raise StrictError(
                f"{self!r} met a NumPy array in {name}: convert it with backend.asarray, or it ends on the host."
            )
        result = method(self.hidden, other)
        return NotImplemented if result is NotImplemented else StrictArray(result)

    return operator


def _refusal(name: str, text: str) -> Callable[..., NoReturn]:
    def refuse(self: StrictArray, *_: Any) -> NoReturn:
        raise StrictError(f"{self!r} {text}. Use only array operations: a tracing framework has no values here.")

    return refuse


for _name in UNARY:
    setattr(StrictArray, _name, _unary(_name))
for _name in BINARY:
    setattr(StrictArray, _name, _binary(_name))
for _name, _text in REFUSED.items():
    setattr(StrictArray, _name, _refusal(_name, _text))
