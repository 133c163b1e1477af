"""`python -m benchmarks.accelerator`: deqcore and its peers on a CUDA device; accelerator.json, .md and plots.

Each part runs in separate processes (native steps are chosen when a process begins, and a fault in a kernel ends what
a process can do on a device); the results are on disk after every item.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.__main__ import ROOT, commit
from benchmarks.accelerator.worker import DEAD
from benchmarks.peers import LIBRARIES
from deqcore.bench.folder import result_folder
from deqcore.bench.machine import describe
from deqcore.errors import DeqcoreError, did_you_mean, listing

WHOLE: Final = 210.0  # seconds, of the default budget
GRACE: Final = 30.0  # beyond a part's share, before its process is ended
PACKAGES: Final = ("torch", "triton", "jax", "jaxlib", *(name for group in LIBRARIES.values() for name in group))
Run = Callable[[str, Sequence[str], float], Iterator[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, render. Returns the exit code: 1 if an item could not be measured."""
    given = _parse(arguments)
    try:
        out = result_folder(given.out)
        path = out / "accelerator.json"
        if given.render:
            if not path.is_file():
                raise DeqcoreError(f"--render: {path} must exist. Run without --render first, on a machine with a GPU.")
            results = json.loads(path.read_text())
        else:
            results = measure(given, lambda found: path.write_text(json.dumps(found, indent=1) + "\n"))
    except DeqcoreError as error:
        say(f"Error: {error}")
        return 2
    from benchmarks.accelerator.report import failures, write

    write(results, out)
    failed = failures(results)
    for line in failed:
        say(f"not measured: {line}")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for tables and plots")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the program itself")
    parser.add_argument("--budget", type=float, default=WHOLE, help=f"seconds for everything, default {WHOLE:g}")
    parser.add_argument("--quick", action="store_true", help="small problems and few rounds: a first look, no result")
    parser.add_argument("--part", action="append", help="measure and show only this part; may be repeated")
    parser.add_argument("--render", action="store_true", help="measure nothing: page and plots from accelerator.json")
    return parser.parse_args(arguments)


def measure(given: argparse.Namespace, keep: Callable[[Mapping[str, Any]], object], run: Run | None = None) -> Any:
    """Return all parts, in order; `keep` is given everything known so far after each item.

    Raises:
        DeqcoreError: no such part, or no such device.
    """
    from benchmarks.accelerator.parts import PARTS

    for name in given.part or ():
        if name not in PARTS:
            meant = did_you_mean(name, PARTS)
            raise DeqcoreError(f"--part {name!r}: no such part.{meant} There are: {listing(PARTS)}.")
    start = time.perf_counter()
    results: dict[str, Any] = {
        "quick": given.quick,
        "device": given.device,
        "budget": given.budget,
        "commit": commit(),
        "machine": describe(PACKAGES),
        "parts": {},
    }
    chosen = [name for name in PARTS if name in (given.part or PARTS) or name == "device"]
    for i, name in enumerate(chosen):
        left = given.budget - (time.perf_counter() - start)
        share = left * PARTS[name].seconds / sum(PARTS[item].seconds for item in chosen[i:])
        items = results["parts"][name] = {}
        if find_spec(PARTS[name].needs) is None:
            items.update({weight: {"error": f"{PARTS[name].needs} is not installed"} for weight in PARTS[name].weights})
        else:
            for answer in (run or _Processes(given.device, given.quick))(name, list(PARTS[name].weights), share):
                items[answer.pop("item")] = answer
                results["seconds"] = round(time.perf_counter() - start, 1)
                keep(results)
        say(f"{name}: {time.perf_counter() - start:.0f} s of {given.budget:.0f} s")
        if name == "device" and "error" in items["before"]:
            raise DeqcoreError(f"--device {given.device}: it cannot be used ({items['before']['error']}).")
    keep(results)
    return results


class _Processes:
    """Runs the items of a part; when a process ends early, another continues with the next item."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick

    def __call__(self, part: str, items: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
        start, left = time.perf_counter(), list(items)
        while left:
            rest = seconds - (time.perf_counter() - start)
            if rest <= 0:
                yield from ({"item": name, "error": "left out: the budget was spent"} for name in left)
                return
            answered = 0
            process = self._process(part, left, rest)
            end = threading.Timer(rest + GRACE, process.kill)
            end.start()
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
                answered += 1
            code = process.wait()
            late = end.finished.is_set()
            end.cancel()
            left = left[answered:]
            if left and not (code == DEAD and answered):
                why = "it took too long and was ended" if late else f"its process ended with code {code}"
                yield {"item": left.pop(0), "error": f"{why}; see its message in the log"}

    def _process(self, part: str, items: Sequence[str], seconds: float) -> subprocess.Popen[str]:
        from benchmarks.accelerator.parts import PARTS

        command = [sys.executable, "-m", "benchmarks.accelerator.worker", part, *items]
        command += ["--device", self.device, "--seconds", str(seconds), *(["--quick"] if self.quick else [])]
        paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **PARTS[part].environment}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def say(text: str) -> None:
    """Print a message."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
