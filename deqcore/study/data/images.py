"""An image folder: `root/train/CLASS/*.jpg`, and `root/test/CLASS/*.jpg` if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deqcore.errors import MissingExtraError, listing
from deqcore.study.data.base import DataError, Dataset, Split, split_by_class
from deqcore.study.settings import DataChoice

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm"})
SHARE: Final = 0.2  # of the samples, held out for validation, and for test where it has no folder


def load(choice: DataChoice) -> Dataset:
    """Read a folder of images: RGB, from 0 to 1, `(samples, 3, height, width)`.

    Raises:
        DataError: the folder is missing, a class is empty, an image is unreadable, or sizes differ.
    """
    root = Path(choice.path)
    if not choice.path or not root.is_dir():
        raise DataError(f"data 'images': path must be an existing folder (got {choice.path!r}).")
    if not (root / "train").is_dir():
        raise DataError(f"{str(root)!r} has no folder 'train'. Use the layout train/CLASS/*.jpg, test/CLASS/*.jpg.")
    names = sorted(item.name for item in (root / "train").iterdir() if item.is_dir())
    if not names:
        raise DataError(f"{str(root / 'train')!r} has no folders of classes. Use the layout train/CLASS/*.jpg.")
    x, y = _part(root / "train", names, choice)
    if (root / "test").is_dir():
        train, validation, _ = split_by_class(x, y, (SHARE, 0.0))
        test = Split(*_part(root / "test", names, choice))
    else:
        train, validation, test = split_by_class(x, y, (SHARE, SHARE))
    return Dataset(choice.label, "image", tuple(names), train, validation, test, f"image folder {root.name}")


def _part(folder: Path, names: list[str], choice: DataChoice) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    strange = sorted({item.name for item in folder.iterdir() if item.is_dir()} - set(names))
    if strange:
        raise DataError(f"{str(folder)!r} has classes that are not in 'train': {listing(strange)}.")
    pixels, targets = [], []
    for number, name in enumerate(names):
        files = sorted(item for item in (folder / name).glob("*") if item.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"The class {name!r} has no image in {str(folder)!r}.")
        for file in files[: choice.per_class or None]:
            pixels.append(_image(file, choice.size))
            targets.append(number)
    sizes = sorted({pixel.shape[1:] for pixel in pixels})
    if len(sizes) > 1:
        raise DataError(f"Images in {str(folder)!r} have sizes from {sizes[0]} to {sizes[-1]}: set size = 32 or so.")
    return np.stack(pixels), np.asarray(targets, dtype=np.int64)


def _image(file: Path, size: int) -> NDArray[np.float32]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError.of("A folder of images", "pillow", "study") from None
    try:
        with Image.open(file) as opened:
            image: Any = opened.convert("RGB")
            if size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{str(file)!r} cannot be read as an image: {error}.") from error
