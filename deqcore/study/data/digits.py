"""The default data: 1797 handwritten digits that come with scikit-learn, so no network is needed."""

from __future__ import annotations

import numpy as np

from deqcore.study.data.base import Dataset, split_by_class
from deqcore.study.settings import DataChoice


def load(_: DataChoice | None = None) -> Dataset:
    """Return 8×8 images of ten digits: 60 % training, 20 % validation, 20 % test, every digit in proportion.

    Source: Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; test part, as in scikit-learn.
    """
    from sklearn.datasets import load_digits

    result = load_digits()
    x = np.asarray(result.images[:, None] / 16.0, dtype=np.float32)
    y = np.asarray(result.target, dtype=np.int64)
    train, validation, test = split_by_class(x, y, (0.2, 0.2))
    names = tuple(str(number) for number in range(10))
    return Dataset("digits", "image", names, train, validation, test, "scikit-learn's handwritten digits, 8×8")
