"""Data sets and their splits."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from deqcore.errors import ConfigError, UnknownNameError
from deqcore.study import data
from deqcore.study.data import DataError, Dataset, Split
from deqcore.study.settings import DataChoice


def test_digits_are_split_by_class_without_overlap():
    dataset = data.load(DataChoice(name="digits"))
    parts = [dataset.train, dataset.validation, dataset.test]
    images = [{image.tobytes() for image in part.x} for part in parts]
    assert sum(map(len, parts)) == 1797
    assert not (images[0] & images[2])
    assert not (images[0] & images[1])
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        counts = np.bincount(part.y) / np.bincount(np.concatenate([each.y for each in parts]))
        np.testing.assert_allclose(counts, share, atol=0.01)
    assert dataset.train.x.dtype == np.float32
    assert dataset.train.x.min() == 0.0
    assert dataset.train.x.max() == 1.0


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
        (split([[1.0]], [0]), "The train part of 'mine' has no sample of these classes: <b>"),
        (split([[1.0], [2.0]], [0, 2]), "integers from 0 to 1"),
        (split([[1.0], [np.nan]], [0, 1]), "NaN or infinite"),
        (split(np.zeros((0, 1)), []), "got 0 inputs and 0 targets"),
    ],
)
def test_unfit_data(train: Split, words: str):
    good = split([[1.0], [2.0]], [0, 1])
    with pytest.raises(DataError) as caught:
        Dataset("mine", "vector", ("a", "<b>"), train, good, good)
    assert words in str(caught.value)


def images(root: Path, part: str, sizes: dict[str, int], side: int = 6) -> None:
    from PIL import Image

    rng = np.random.default_rng(len(part))
    for name, count in sizes.items():
        (root / part / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / part / name / f"{number:03}.png")


def test_an_image_folder(tmp_path: Path):
    images(tmp_path, "train", {"cat": 10, "dog": 10})
    images(tmp_path, "test", {"cat": 2, "dog": 3})
    dataset = data.load(DataChoice(name="images", path=str(tmp_path)))
    assert dataset.classes == ("cat", "dog")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [16, 4, 5]
    assert dataset.train.x.shape[1:] == (3, 6, 6)
    from PIL import Image

    first = np.asarray(Image.open(tmp_path / "test" / "cat" / "000.png"))
    np.testing.assert_allclose(dataset.test.x[0].transpose(1, 2, 0) * 255, first, atol=1e-4)
    small = data.load(DataChoice(name="images", path=str(tmp_path), size=4, per_class=5))
    assert small.train.x.shape == (8, 3, 4, 4)


def test_unfit_image_folders(tmp_path: Path):
    choice = DataChoice(name="images", path=str(tmp_path))
    with pytest.raises(DataError, match="no folder 'train'"):
        data.load(choice)
    with pytest.raises(DataError, match="path must be an existing folder"):
        data.load(DataChoice(name="images"))
    images(tmp_path, "train", {"cat": 5, "dog": 5})
    (tmp_path / "train" / "none").mkdir()
    with pytest.raises(DataError, match="class 'none' has no image"):
        data.load(choice)
    (tmp_path / "train" / "none").rmdir()
    broken = tmp_path / "train" / "cat" / "000.png"
    whole = broken.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"000\.png' cannot be read as an image"):
            data.load(choice)
    broken.write_bytes(whole)
    images(tmp_path, "test", {"cat": 1, "dog": 1, "cow": 1})
    with pytest.raises(DataError, match="not in 'train': cow"):
        data.load(choice)


def test_images_of_two_sizes_need_one(tmp_path: Path):
    images(tmp_path, "train", {"cat": 5})
    images(tmp_path, "train", {"dog": 5}, side=7)
    with pytest.raises(DataError, match="set size = 32"):
        data.load(DataChoice(name="images", path=str(tmp_path)))
    assert data.load(DataChoice(name="images", path=str(tmp_path), size=5)).train.x.shape[2:] == (5, 5)


def test_npz(tmp_path: Path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (20, 4, 4), dtype=np.uint8), np.repeat([0, 1], 10)
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    dataset = data.load(DataChoice(name="arrays", path=str(path)))
    assert dataset.kind == "image"
    assert dataset.train.x.shape == (16, 1, 4, 4)
    np.testing.assert_array_equal(dataset.test.x[:, 0], x[:3] / np.float32(255))
    np.savez(path, x_train=x.reshape(20, -1), y_train=y)
    dataset = data.load(DataChoice(name="arrays", path=str(path)))
    assert dataset.kind == "vector"
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [12, 4, 4]


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def test_idx_files_as_mnist_has_them(tmp_path: Path):
    x, y = np.arange(20 * 9).reshape(20, 3, 3) % 256, np.repeat([0, 1], 10)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(y))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(x[:4]))
    choice = DataChoice(name="arrays", path=str(tmp_path))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte"):
        data.load(choice)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(y[:4]))
    dataset = data.load(choice)
    np.testing.assert_allclose(dataset.test.x[:, 0] * 255, x[:4], atol=1e-4)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(y[:4])[:-1])
    with pytest.raises(DataError, match="is cut off"):
        data.load(choice)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"no")
    with pytest.raises(DataError, match="must be an IDX file"):
        data.load(choice)


def test_unfit_arrays(tmp_path: Path):
    path = tmp_path / "mine.npz"
    choice = DataChoice(name="arrays", path=str(path))
    with pytest.raises(DataError, match="an NPZ file or a folder"):
        data.load(choice)
    path.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        data.load(choice)
    np.savez(path, x_train=np.zeros((4, 2)))
    with pytest.raises(DataError, match="must hold x_train and y_train"):
        data.load(choice)
    np.savez(path, x_train=np.zeros((4, 2)), y_train=np.zeros(4))
    with pytest.raises(DataError, match="integers"):
        data.load(choice)
    np.savez(path, x_train=np.array([{}], dtype=object), y_train=np.zeros(4, int))
    with pytest.raises(DataError, match="without pickle"):
        data.load(choice)


def test_a_text_becomes_windows_with_their_successors(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("abcde" * 40)
    dataset = data.load(DataChoice(name="text", path=str(path), length=8))
    assert dataset.train.x.shape == (19, 8)  # (160 − 1) // 8
    assert (dataset.train.x[:, 1:] == dataset.train.y[:, :-1]).all()
    letters = np.asarray(dataset.classes)
    assert "".join(letters[dataset.train.x[0]]) == "abcdeabc"
    assert "".join(letters[dataset.train.y[0]]) == "bcdeabcd"


def test_words_that_are_rare_share_a_number(tmp_path: Path):
    for part, text in (
        ("train", "the cat the dog the cow " * 9),
        ("valid", "the cat sat " * 9),
        ("test", "a the cat " * 9),
    ):
        (tmp_path / f"{part}.txt").write_text(text)
    dataset = data.load(DataChoice(name="text", path=str(tmp_path), level="word", length=4, words=3))
    assert dataset.classes == ("<rare>", "the", "cat")
    assert dataset.test.x[0].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff\xfe", "UTF-8"), (b"short", "one window")])
def test_unfit_texts(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        data.load(DataChoice(name="text", path=str(tmp_path / "a.txt")))


def test_data_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_study_data.py").write_text(
        "import numpy as np\n"
        "from deqcore.study.data import Dataset, Split\n"
        "s = Split(np.zeros((2, 3), np.float32), np.array([0, 1]))\n"
        "def load():\n    return Dataset('mine', 'vector', ('a', 'b'), s, s, s)\n"
        "def wrong():\n    return 3\n"
    )
    assert data.load(DataChoice(name="own"), "my_study_data:load").name == "mine"
    with pytest.raises(ConfigError, match=r"must return a deqcore.study.data.Dataset \(got a int\)"):
        data.load(DataChoice(name="own"), "my_study_data:wrong")
    with pytest.raises(ConfigError, match="Did you mean 'load'"):
        data.load(DataChoice(name="own"), "my_study_data:laod")
    with pytest.raises(ConfigError, match="cannot be imported"):
        data.load(DataChoice(name="own"), "no_such_module:load")
    (tmp_path / "my_script.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(ConfigError, match="cannot be imported: SystemExit: 0"):
        data.load(DataChoice(name="own"), "my_script:load")
    with pytest.raises(ConfigError, match="module:attribute"):
        data.load(DataChoice(name="own"), "load")
