"""Peak memory of the process while it trains, apart from what evaluation and audits take."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Final

CLEAR: Final = Path("/proc/self/clear_refs")
STATUS: Final = Path("/proc/self/status")


class PeakMemory:
    """The largest resident set of the process between `start` and `stop`.

    Linux can restart the measurement. Elsewhere the peak covers the whole life of the process.

    Attributes:
        resets: whether it can.
        most: largest peak so far, bytes.
    """

    def __init__(self) -> None:
        self.resets = self._reset()
        self.most = 0

    def start(self) -> None:
        """Forget what happened until now."""
        self._reset()

    def stop(self) -> None:
        """Take what happened since `start` into account."""
        self.most = max(self.most, self._peak())

    @staticmethod
    def now() -> int:
        """Return the resident set as it is, bytes."""
        import psutil

        return int(psutil.Process().memory_info().rss)

    @staticmethod
    def _reset() -> bool:
        try:
            CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def _peak(self) -> int:
        if self.resets:
            for line in STATUS.read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
