"""Arrays in files: one NPZ, or a folder with the four IDX files of MNIST and its kin."""

from __future__ import annotations

import gzip
import math
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deqcore.errors import listing
from deqcore.study.data.base import DataError, Dataset, Split, split_by_class
from deqcore.study.models.base import DataKind
from deqcore.study.settings import DataChoice

SHARE: Final = 0.2
IDX: Final = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
DIMENSIONS: Final = {1: "vector", 2: "image", 3: "image"}


def load(choice: DataChoice) -> Dataset:
    """Read arrays.

    An NPZ holds `x_train` and `y_train`, and may hold `x_validation`, `y_validation`, `x_test`, `y_test`; what is
    missing is held out of the training data. A folder holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
    `t10k-…`, with `.gz` or without. Inputs are `(samples, n)`, `(samples, height, width)` or
    `(samples, channels, height, width)`; bytes are scaled to 0 … 1.

    Raises:
        DataError: a file is missing, damaged, or holds arrays that do not fit together.
    """
    path = Path(choice.path)
    if choice.path and path.is_dir():
        result = {
            f"{axis}_{part}": _idx(path, f"{prefix}-{kind}")
            for part, prefix in (("train", "train"), ("test", "t10k"))
            for axis, kind in (("x", "images-idx3-ubyte"), ("y", "labels-idx1-ubyte"))
        }
    elif choice.path and path.is_file():
        result = _npz(path)
    else:
        raise DataError(f"data 'arrays': path must be an NPZ file or a folder of IDX files (got {choice.path!r}).")
    return _dataset(choice, result)


def _dataset(choice: DataChoice, arrays: dict[str, NDArray[Any]]) -> Dataset:
    if "x_train" not in arrays or "y_train" not in arrays:
        raise DataError(f"{choice.path!r} must hold x_train and y_train (got {listing(arrays)}).")
    x, y = _inputs(arrays["x_train"]), _targets(arrays["y_train"], choice.path)
    if len(x) != len(y):
        raise DataError(f"{choice.path!r}: x_train and y_train must have equal lengths (got {len(x)} and {len(y)}).")
    given = {part: _given(arrays, part, choice.path) for part in ("validation", "test")}
    shares = tuple(0.0 if given[part] else SHARE for part in ("validation", "test"))
    train, validation, test = split_by_class(x, y, (shares[0], shares[1]))
    kind: DataKind = "vector" if x.ndim == 2 else "image"
    names = tuple(str(number) for number in range(int(y.max()) + 1))
    parts = (given["validation"] or validation, given["test"] or test)
    return Dataset(choice.label, kind, names, train, *parts, f"arrays of {Path(choice.path).name}")


def _given(arrays: dict[str, NDArray[Any]], part: str, path: str) -> Split | None:
    if f"x_{part}" not in arrays or f"y_{part}" not in arrays:
        return None
    return Split(_inputs(arrays[f"x_{part}"]), _targets(arrays[f"y_{part}"], path))


def _inputs(x: NDArray[Any]) -> NDArray[np.float32]:
    if x.ndim - 1 not in DIMENSIONS:
        raise DataError(f"Inputs must have shape (samples, n) or (samples, [channels,] height, width) (got {x.shape}).")
    scaled = x.astype(np.float32) / np.float32(255 if x.dtype == np.uint8 else 1)
    return scaled[:, None] if x.ndim == 3 else scaled


def _targets(y: NDArray[Any], path: str) -> NDArray[np.int64]:
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1 or not y.size:
        raise DataError(f"{path!r}: targets must be integers of shape (samples,) (got {y.dtype} of shape {y.shape}).")
    return y.astype(np.int64)


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, TypeError) as error:
        raise DataError(f"{str(path)!r} cannot be read as NPZ without pickle: {error}.") from error


def _idx(folder: Path, name: str) -> NDArray[Any]:
    """Return an IDX file: two zero bytes, type, number of dimensions, the dimensions, the data, all big-endian."""
    packed, plain = folder / f"{name}.gz", folder / name
    if not packed.exists() and not plain.exists():
        raise DataError(f"{str(folder)!r} has neither {name!r} nor {name + '.gz'!r}.")
    try:
        raw = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{name!r} in {str(folder)!r} cannot be read: {error}.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX:
        raise DataError(f"{name!r} in {str(folder)!r} must be an IDX file (got other bytes at its start).")
    start = 4 + 4 * raw[3]
    shape = tuple(int(item) for item in np.frombuffer(raw[4:start], ">u4"))
    dtype = np.dtype(IDX[raw[2]])
    if len(raw) - start != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{name!r} in {str(folder)!r} is cut off: {shape} of {dtype} does not fit its size.")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape)
