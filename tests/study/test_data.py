"""Data sets and their splits."""

from __future__ import annotations

import numpy as np
import pytest

from deqcore.errors import UnknownNameError
from deqcore.study import data
from deqcore.study.data import DataError, Dataset, Split
from deqcore.study.settings import DataChoice


def test_digits_are_split_by_class_without_overlap():
    found = data.load(DataChoice(name="digits"))
    parts = [found.train, found.validation, found.test]
    images = [{image.tobytes() for image in part.x} for part in parts]
    assert sum(map(len, parts)) == 1797
    assert not (images[0] & images[2])
    assert not (images[0] & images[1])
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        counts = np.bincount(part.y) / np.bincount(np.concatenate([each.y for each in parts]))
        np.testing.assert_allclose(counts, share, atol=0.01)
    assert found.train.x.dtype == np.float32
    assert found.train.x.min() == 0.0
    assert found.train.x.max() == 1.0


def test_the_split_is_always_the_same():
    one, two = data.load(DataChoice(name="digits")), data.load(DataChoice(name="digits"))
    assert one.test.x.tobytes() == two.test.x.tobytes()


def test_unknown_data():
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        data.load(DataChoice(name="digit"))


def split(x: object, y: object) -> Split:
    return Split(np.asarray(x, np.float32), np.asarray(y, np.int64))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (split([[1.0]], [0]), "No sample for training in these classes of 'mine': <b>"),
        (split([[1.0], [2.0]], [0, 2]), "integers from 0 to 1"),
        (split([[1.0], [np.nan]], [0, 1]), "NaN or infinite"),
        (split(np.zeros((0, 1)), []), "has 0 inputs and 0 targets"),
    ],
)
def test_unfit_data(train: Split, words: str):
    good = split([[1.0], [2.0]], [0, 1])
    with pytest.raises(DataError) as caught:
        Dataset("mine", "vector", ("a", "<b>"), train, good, good)
    assert words in str(caught.value)
