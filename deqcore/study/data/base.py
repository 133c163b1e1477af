"""A data set: three splits of arrays, made once and shared by all cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.errors import DeqcoreError, listing
from deqcore.study.models.base import DataKind, Shape

Part: TypeAlias = Literal["train", "validation", "test"]
PARTS: Final[tuple[Part, ...]] = ("train", "validation", "test")
SPLIT_SEED: Final = 0


class DataError(DeqcoreError, ValueError):
    """Data that cannot be used: unreadable, empty, a class without samples, shapes that do not fit."""


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        x: inputs `(samples, …)`, floating-point, or integers for tokens.
        y: targets, integers `(samples,)`, or `(samples, length)` for tokens.

    Example:
        >>> len(Split(np.zeros((5, 3)), np.zeros(5, dtype=np.int64)))
        5
    """

    x: NDArray[Any]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """Data for a study.

    Attributes:
        name: for tables and reports.
        kind: of its inputs, see `Shape`.
        classes: names of the classes (or words), in the order of their numbers.
        train: to fit the weights.
        validation: to choose the epoch.
        test: evaluated once, at the end.
        note: where it came from.

    Example:
        >>> part = Split(np.zeros((4, 3)), np.array([0, 1, 0, 1]))
        >>> Dataset("ours", "vector", ("no", "yes"), part, part, part).shape
        Shape(kind='vector', sample=(3,), classes=2)
    """

    name: str
    kind: DataKind
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    note: str = ""

    def __post_init__(self) -> None:
        for part in PARTS:
            split: Split = getattr(self, part)
            if len(split) == 0 or len(split.x) != len(split.y):
                raise DataError(
                    f"The {part} part of {self.name!r} must have as many inputs as targets, at least 1 (got "
                    f"{len(split.x)} inputs and {len(split.y)} targets)."
                )
            if not np.issubdtype(split.y.dtype, np.integer) or split.y.min() < 0 or split.y.max() >= len(self.classes):
                raise DataError(
                    f"The targets of the {part} part of {self.name!r} must be integers from 0 to "
                    f"{len(self.classes) - 1}, one for each class."
                )
            if np.issubdtype(split.x.dtype, np.floating) and not np.isfinite(split.x).all():
                raise DataError(f"The {part} part of {self.name!r} has NaN or infinite inputs. Remove or replace them.")
        absent = sorted(set(range(len(self.classes))) - set(np.unique(self.train.y).tolist()))
        if absent and self.kind != "tokens":
            names = listing(self.classes[number] for number in absent)
            raise DataError(f"The train part of {self.name!r} has no sample of these classes: {names}.")

    @property
    def shape(self) -> Shape:
        """The shape that a model is built for."""
        return Shape(self.kind, tuple(self.train.x.shape[1:]), len(self.classes))


def split_by_class(x: NDArray[Any], y: NDArray[np.int64], fractions: tuple[float, float]) -> tuple[Split, Split, Split]:
    """Split data into training, validation and test parts with equal class proportions and a fixed seed.

    Args:
        x: inputs.
        y: targets.
        fractions: of validation and test.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    rows: list[list[int]] = [[], [], []]
    for number in np.unique(y):
        mixed = rng.permutation(np.flatnonzero(y == number))
        stops = np.cumsum([round(fraction * len(mixed)) for fraction in fractions])
        for part, chosen in zip(rows, np.split(mixed, stops)[-1:] + np.split(mixed, stops)[:-1], strict=True):
            part.extend(chosen.tolist())
    train, validation, test = (np.sort(np.asarray(part, dtype=np.int64)) for part in rows)
    return Split(x[train], y[train]), Split(x[validation], y[validation]), Split(x[test], y[test])
