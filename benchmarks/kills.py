"""Kill studies at random times and continue them: `python -m benchmarks.kills` (`--times 20`, `--seed 0`).

Each study is killed with SIGKILL once, at a time drawn evenly from the duration of the unbroken one, started again, and
compared with the unbroken one: every number of its results but times and memory, and every bit of its weights and of
the optimiser. Exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from deqcore.study.store import read_progress

STUDY: Final = """
[study]
name = "kills"
backends = ["torch"]
solvers = ["broyden"]
strategies = ["exact-ift", "broyden-reuse"]
models = [{ name = "dense", width = 16 }]
[study.training]
epochs = 3
batch = 128
audits = 1
[study.drift]
rounds = 2
"""
CLOCKS: Final = frozenset({"seconds", "times", "warm_up", "peak_memory", "training_memory", "serial"})
PARTS: Final = frozenset({"forward", "backward", "update"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, continue, compare. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the times to kill at")
    given = parser.parse_args(arguments)
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "study.toml").write_text(STUDY)
        start = time.monotonic()
        subprocess.run(command("whole"), cwd=root, check=True, stdout=subprocess.DEVNULL)
        duration = time.monotonic() - start
        whole, equal = outcome(root / "whole"), 0
        print(f"an unbroken study: {duration:.1f} s", flush=True)
        number = tries = 0
        while number < given.times:
            after, result, tries = rng.uniform(0, duration), f"cut-{tries}", tries + 1
            killed, epochs = cut(root, result, after)
            same = outcome(root / result) == whole
            if killed or not same:  # one that ended before the kill proves nothing, unless it differs
                number += 1
                equal += same
                text = f"killed after {after:.1f} s, {epochs} epochs were on disk"
                print(f"{number:>3}/{given.times} {text}: {'equal' if same else 'DIFFERENT'}", flush=True)
        print(f"{equal} of {given.times} equal the unbroken study")
    return 0 if equal == given.times else 1


def command(out: str) -> list[str]:
    """Return the command that starts a study."""
    return [sys.executable, "-m", "deqcore.cli.app", "study", "study.toml", "--out", out]


def cut(root: Path, out: str, after: float) -> tuple[bool, int]:
    """Kill a study, and continue it to its end.

    Returns:
        Whether it still ran at the time of the kill, and the epochs that were on disk then.
    """
    process = subprocess.Popen(command(out), cwd=root, stdout=subprocess.DEVNULL)
    try:
        process.wait(after)
        killed = False
    except subprocess.TimeoutExpired:
        process.kill()
        killed = True
    process.wait()
    epochs = sum(progress[1]["epochs"] for progress in map(read_progress, folders(root / out)) if progress is not None)
    subprocess.run(command(out), cwd=root, check=True, stdout=subprocess.DEVNULL)
    return killed, epochs


def folders(root: Path) -> list[Path]:
    """Return the folders of the cells."""
    return sorted(path for path in root.glob("cells/*") if path.is_dir())


def outcome(root: Path) -> list[Any]:
    """Return everything that two equal studies agree on: results without clocks, and all tensors as bytes."""
    results: list[Any] = []
    for folder in folders(root):
        result = json.loads((folder / "result.json").read_text())
        kept = {name: value for name, value in result.items() if name not in CLOCKS}
        steps = kept["history"]["steps"]
        kept["history"]["steps"] = {name: value for name, value in steps.items() if name not in PARTS}
        progress = read_progress(folder)
        assert progress is not None
        results.append((folder.name, kept, {name: value.tobytes() for name, value in progress[0].items()}))
    return results


if __name__ == "__main__":
    sys.exit(main())
