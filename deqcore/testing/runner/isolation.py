"""Run pytest in a process that may hang or die: the outcomes survive it, and the rest of the tests still run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

RESTARTS: Final = 3
NOT_RUN: Final = "not run"  # what the message of such a test begins with
START: Final = 300.0  # seconds for imports and collection
END: Final = 10.0  # seconds for a process to end after its last test; a thread that was left behind may keep it
PAUSE: Final = 0.1


@dataclass
class Journal:
    """What the plugin of the suite has written so far, a line of JSON per event.

    Attributes:
        collected: names of all tests.
        running: the test that has begun and not ended, or "".
        entries: an entry per test that has ended.
    """

    collected: list[str] = field(default_factory=list)
    running: str = ""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Journal:
        """Read a file that may not exist, and whose last line may be cut off."""
        journal = Journal()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            journal.collected = event.get("collected", journal.collected)
            journal.running = event.get("running", journal.running)
            if "test" in event:
                journal.entries[event["test"]] = event
                journal.running = ""
        return journal


def failed(test: str, message: str, seconds: float = 0.0) -> dict[str, Any]:
    """Return the entry of a test that could not report its own failure."""
    return {"test": test, "outcome": "failed", "message": message, "detail": message, "seconds": seconds}


@dataclass(frozen=True)
class Ended:
    """How the processes ended.

    Attributes:
        entries: of all tests, or None if pytest never ran any.
        returncode: of the last process.
        output: of the last process, stdout and stderr.
    """

    entries: list[dict[str, Any]] | None
    returncode: int
    output: str


def run(arguments: Sequence[str], env: Mapping[str, str], journal: Path, limit: float) -> Ended:
    """Run pytest with the suite's plugin until every test has an entry.

    Args:
        arguments: of pytest; the plugin writes to `journal` and skips the tests that have an entry there.
        env: of the process.
        journal: the file.
        limit: seconds that one test may take; then the process is killed, and the test has failed.

    Returns:
        The entries, with a failed one for each test that hung or killed the process. After four of these, the tests
        that are left have failed as "not run".
    """
    for attempt in range(RESTARTS + 1):
        code, output, late = _watched(arguments, env, journal, limit)
        state = Journal.read(journal)
        if not state.running:
            ran = bool(state.entries) or bool(state.collected)
            return Ended(list(state.entries.values()) if ran else None, code, output)
        message = (
            f"no end within {limit:g} s: the process was killed" if late else f"it ended the process: {_cause(code)}"
        )
        _append(journal, failed(state.running, message, limit if late else 0.0))
        if attempt == RESTARTS:
            break
    state = Journal.read(journal)
    rest = [test for test in state.collected if test not in state.entries]
    why = f"{NOT_RUN}: {RESTARTS + 1} tests before it hung or ended the process"
    return Ended([*state.entries.values(), *(failed(test, why) for test in rest)], code, output)


def _watched(arguments: Sequence[str], env: Mapping[str, str], journal: Path, limit: float) -> tuple[int, str, bool]:
    """Return the exit code, the output, and whether it was killed for being late."""
    log = journal.with_suffix(".log")
    late = False
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], env=env, stdout=out, stderr=out)
        size, since = -1, time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(PAUSE)
                now = journal.stat().st_size if journal.exists() else 0
                if now != size:
                    size, since = now, time.monotonic()
                late = time.monotonic() - since > _allowed(Journal.read(journal), limit)
                if late:
                    break
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace"), late


def _allowed(state: Journal, limit: float) -> float:
    """Return the seconds in which the next event is due."""
    if state.running:
        return limit
    return END if state.collected and state.entries.keys() >= set(state.collected) else max(START, limit)


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _append(journal: Path, entry: Mapping[str, Any]) -> None:
    with journal.open("a", encoding="utf-8") as out:
        out.write("\n" + json.dumps(entry) + "\n")
