"""Items of one part in a process of their own: a line of JSON for each, on what was the standard output."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final, TextIO

DEAD: Final = 3  # exit code: the device no longer answers; a fresh process may continue with the next item


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the items in order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator.worker")
    parser.add_argument("part")
    parser.add_argument("items", nargs="+")
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    return answer(given.part, given.items, given.device, given.seconds, given.quick, lines)


def answer(part: str, items: Sequence[str], device: str, seconds: float, quick: bool, lines: TextIO) -> int:
    """Write a line per item; returns the exit code."""
    from benchmarks.accelerator.parts import PARTS, Setting

    chosen = PARTS[part]
    until = time.perf_counter() + seconds
    for i, name in enumerate(items):
        start = time.perf_counter()
        rest = sum(chosen.weights[item] for item in items[i:])
        share = max(0.1, (until - start) * chosen.weights[name] / rest)
        try:
            result: Mapping[str, Any] = chosen.measure(name, Setting(device, quick, share, say))
        except Exception as error:  # what an item raises is its result
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        took = round(time.perf_counter() - start, 2)
        lines.write(json.dumps({"item": name, **result, "took": took}) + "\n")
        lines.flush()
        if not alive(device):
            return DEAD
    return 0


def alive(device: str) -> bool:
    """Return whether the device still works: after a fault in a kernel it is unusable for this process."""
    import torch

    from benchmarks.accelerator.device import settle

    if device == "cuda" and not torch.cuda.is_available():
        return False
    try:
        settle(device)
    except RuntimeError:
        return False
    return True


def say(text: str) -> None:
    """Print a message."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
