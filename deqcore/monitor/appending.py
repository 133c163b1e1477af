"""A text file that is appended to in whole blocks of lines, so that a full disk leaves none of them torn."""

from __future__ import annotations

import os


class AppendFile:
    """A file whose every append either stands in it completely or not at all.

    A killed process leaves at most its last line torn; the next one that appends begins a line of its own.

    Args:
        path: the file; its folder is made.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        folder = os.path.dirname(path)
        if folder:
            os.makedirs(folder, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)

    @property
    def size(self) -> int:
        """In bytes."""
        return os.lseek(self._file, 0, os.SEEK_END)

    def append(self, text: str) -> None:
        """Append lines (without the last line's end).

        Raises:
            OSError: they were not written, none of them.
        """
        start = self.size
        torn = start > 0 and os.pread(self._file, 1, start - 1) != b"\n"
        rest = (b"\n" if torn else b"") + text.encode() + b"\n"
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self._take_back(start)
            raise

    def first_line(self) -> str:
        """The first line, without its end."""
        return os.pread(self._file, 1 << 16, 0).split(b"\n", 1)[0].decode(errors="replace").rstrip("\r")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _take_back(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError:  # no plain file
            return
