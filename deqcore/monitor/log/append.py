"""A text file that is appended to in whole blocks of lines, by several processes, and on a disk that may be full."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRIES: Final = 50
PAUSE: Final = 0.02  # seconds; so a process that is stopped while it holds the lock delays the others by one second


class AppendFile:
    """A file that holds each append either completely or not at all.

    A block is one write at the end of the file, under an advisory lock where the system has one, so that blocks of
    several processes do not mix. A killed process leaves at most its last line torn; the next one that appends begins
    a new line.

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
        """Append lines (without the last line's end). Lone surrogates become question marks.

        Raises:
            OSError: they were not written, none of them.
        """
        data = text.encode(errors="replace") + b"\n"
        with self._locked():
            start = self.size
            torn = start > 0 and os.pread(self._file, 1, start - 1) != b"\n"
            self._write(b"\n" + data if torn else data, start)

    def first_line(self) -> str:
        """Return the first line, without its end."""
        return os.pread(self._file, 1 << 16, 0).split(b"\n", 1)[0].decode(errors="replace").rstrip("\r")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, data: bytes, start: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        except BaseException:  # an interrupt, too, must leave no torn line
            self._take_back(start, done)
            raise

    def _take_back(self, start: int, done: int) -> None:
        with suppress(OSError):  # no plain file
            if self.size == start + done:  # else another process has appended without a lock
                os.ftruncate(self._file, start)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        held = self._lock()
        try:
            yield
        finally:
            if held:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        """Take the lock; continue without it if the file system has none or another process holds it."""
        for _ in range(0 if fcntl is None else TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(PAUSE)
            except OSError:
                return False
            else:
                return True
        return False
