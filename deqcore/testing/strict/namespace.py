"""The array namespace of the strict backend: the functions of the array API standard, and no others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from deqcore.testing.strict.array import StrictArray, StrictError, unwrap, wrap

# https://data-apis.org/array-api/2024.12, without what has a shape that depends on values.
NAMES: Final = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "all",
        "any",
        "arange",
        "argmax",
        "argmin",
        "argsort",
        "asin",
        "asinh",
        "astype",
        "atan",
        "atan2",
        "atanh",
        "bitwise_and",
        "bitwise_invert",
        "bitwise_or",
        "bitwise_xor",
        "broadcast_arrays",
        "broadcast_to",
        "can_cast",
        "ceil",
        "clip",
        "concat",
        "conj",
        "copysign",
        "cos",
        "cosh",
        "cumulative_prod",
        "cumulative_sum",
        "diff",
        "divide",
        "empty",
        "empty_like",
        "equal",
        "exp",
        "expand_dims",
        "expm1",
        "eye",
        "finfo",
        "flip",
        "floor",
        "floor_divide",
        "full",
        "full_like",
        "greater",
        "greater_equal",
        "hypot",
        "iinfo",
        "imag",
        "isdtype",
        "isfinite",
        "isinf",
        "isnan",
        "less",
        "less_equal",
        "linspace",
        "log",
        "log10",
        "log1p",
        "log2",
        "logaddexp",
        "logical_and",
        "logical_not",
        "logical_or",
        "logical_xor",
        "matmul",
        "matrix_transpose",
        "max",
        "maximum",
        "mean",
        "meshgrid",
        "min",
        "minimum",
        "moveaxis",
        "multiply",
        "negative",
        "nextafter",
        "not_equal",
        "ones",
        "ones_like",
        "outer",
        "permute_dims",
        "positive",
        "pow",
        "prod",
        "real",
        "reciprocal",
        "remainder",
        "repeat",
        "reshape",
        "result_type",
        "roll",
        "round",
        "searchsorted",
        "sign",
        "signbit",
        "sin",
        "sinh",
        "sort",
        "sqrt",
        "square",
        "squeeze",
        "stack",
        "std",
        "subtract",
        "sum",
        "take",
        "take_along_axis",
        "tan",
        "tanh",
        "tensordot",
        "tile",
        "tril",
        "triu",
        "trunc",
        "unstack",
        "var",
        "vecdot",
        "where",
        "zeros",
        "zeros_like",
    ]
)
LINALG: Final = frozenset(
    [
        "cholesky",
        "cross",
        "det",
        "diagonal",
        "eigh",
        "eigvalsh",
        "inv",
        "matmul",
        "matrix_norm",
        "matrix_power",
        "matrix_rank",
        "matrix_transpose",
        "outer",
        "pinv",
        "qr",
        "slogdet",
        "solve",
        "svd",
        "svdvals",
        "tensordot",
        "trace",
        "vecdot",
        "vector_norm",
    ]
)
DTYPES: Final = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "pi",
        "e",
        "inf",
        "nan",
    ]
)
DYNAMIC: Final = frozenset(
    ["nonzero", "unique_all", "unique_counts", "unique_inverse", "unique_values", "count_nonzero"]
)


class Namespace(SimpleNamespace):
    """`xp` of the strict backend."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # Python's own questions
        if name in DTYPES:
            return getattr(np, name)
        if name in DYNAMIC:
            raise StrictError(
                f"xp.{name} has a result whose shape depends on values, which tracing does not know: use xp.where."
            )
        if name == "asarray":
            raise StrictError("xp.asarray loses the device: use backend.asarray(a, like=z).")
        if name not in NAMES:
            raise StrictError(f"xp.{name} is not in the array API standard. Use a function that is.")
        return self.__dict__.setdefault(name, _strict(getattr(np, name)))


class Linalg(SimpleNamespace):
    """`xp.linalg` of the strict backend."""

    def __getattr__(self, name: str) -> Any:
        if name not in LINALG:
            raise StrictError(f"xp.linalg.{name} is not in the array API standard. Use a function that is.")
        return self.__dict__.setdefault(name, _strict(getattr(np.linalg, name)))


def _strict(function: Callable[..., Any]) -> Callable[..., Any]:
    def strict(*args: Any, **kwargs: Any) -> Any:
        hidden = [*map(_hidden, args)]
        if not kwargs:
            return wrap(function(*hidden))
        kwargs.pop("device", None)  # NumPy's own has "cpu" alone
        return wrap(function(*hidden, **{key: _hidden(value) for key, value in kwargs.items()}))

    def _hidden(value: Any) -> Any:
        if type(value) is StrictArray:
            return value.hidden
        if isinstance(value, np.ndarray):
            raise StrictError(f"xp.{function.__name__} was given a NumPy array: convert it with backend.asarray.")
        return unwrap(value)

    return strict


XP: Final = Namespace(linalg=Linalg())
