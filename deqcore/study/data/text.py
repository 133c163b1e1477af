"""A text as a language model's data: windows of characters or words, each with its successors as targets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deqcore.study.data.base import DataError, Dataset, Split
from deqcore.study.settings import DataChoice

RARE: Final = "<rare>"
STOPS: Final = (0.8, 0.9)  # where training and validation end


def load(choice: DataChoice) -> Dataset:
    """Read a text file, or a folder with `train.txt`, `validation.txt` (or `valid.txt`) and `test.txt`.

    One file is cut into its first 80 % for training, the next 10 % for validation and the rest for test. The
    vocabulary is made from the training part: the most frequent `words`, everything else is `<rare>`.

    Raises:
        DataError: a file is missing, empty, too short, or no UTF-8 text.
    """
    tokens = _read(choice)
    kept = [word for word, _ in Counter(tokens[0]).most_common(choice.words - 1)]
    numbers = {word: number for number, word in enumerate((RARE, *kept))}
    train, validation, test = (_windows(part, numbers, choice) for part in tokens)
    return Dataset(choice.label, "tokens", tuple(numbers), train, validation, test, f"text, {choice.level} level")


def _read(choice: DataChoice) -> list[list[str]]:
    path = Path(choice.path)
    if choice.path and path.is_dir():
        names = ("train.txt", "validation.txt" if (path / "validation.txt").exists() else "valid.txt", "test.txt")
        return [_tokens(path / name, choice.level) for name in names]
    if not choice.path or not path.is_file():
        raise DataError(f"data 'text': path must be a text file or a folder of three (got {choice.path!r}).")
    whole = _tokens(path, choice.level)
    first, second = (round(share * len(whole)) for share in STOPS)
    return [whole[:first], whole[first:second], whole[second:]]


def _tokens(path: Path, level: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"The text file {str(path)!r} does not exist. Set path to an existing file.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read as UTF-8 text: {error}.") from error
    result = list(text) if level == "char" else text.split()
    if not result:
        raise DataError(f"The text {str(path)!r} is empty: name a file with text in it.")
    return result


def _windows(tokens: list[str], numbers: dict[str, int], choice: DataChoice) -> Split:
    """Return windows side by side, `(samples, length)`; the targets are one token on."""
    coded: NDArray[Any] = np.asarray([numbers.get(token, 0) for token in tokens], dtype=np.int64)
    count = (len(coded) - 1) // choice.length
    if count < 1:
        raise DataError(
            f"A part of the text {choice.path!r} has {len(coded)} tokens, but at least {choice.length + 1} "
            f"are needed for one window of length = {choice.length}."
        )
    count = min(count, choice.samples) if choice.samples else count
    stop = count * choice.length
    return Split(coded[:stop].reshape(count, -1), coded[1 : stop + 1].reshape(count, -1))
