"""`python -m benchmarks`: compare deqcore with other libraries; writes results.json, a page of tables, and plots."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import LIBRARIES, SKIPPED
from benchmarks.worker import ALL
from deqcore.bench.folder import result_folder
from deqcore.bench.machine import check_threads, describe, usable_cores
from deqcore.errors import DeqcoreError, did_you_mean, listing

ROOT: Final = Path(__file__).resolve().parents[1]
INSTALL: Final = "pip install -r benchmarks/requirements.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections, each in its own process, then render. Returns the exit code."""
    given = _parse(arguments)
    try:
        out = result_folder(given.out)
        sections = _sections(given.section)
        check_threads(given.threads)
        for line in absent():
            _say(line)
        results = _earlier(out, given.quick)
        if not given.render:
            for name in sections:
                results["sections"][name] = _measure(name, given.threads, given.quick)
                (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        from benchmarks.page import write

        write(results, out)
    except DeqcoreError as error:
        _say(f"Error: {error}")
        return 2
    failed = [name for name, section in results["sections"].items() if "error" in section]
    for name in failed:
        _say(f"{name} was not measured: {results['sections'][name]['error']}")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare deqcore with other libraries: 10 minutes for torch on 2 quiet cores.",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for tables and plots")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()), help="default: 2")
    parser.add_argument("--quick", action="store_true", help="small and short (2 minutes): a first look")
    parser.add_argument(
        "--section",
        action="append",
        help=f"measure only this, keep the rest of results.json; may be repeated: {listing(_names())}",
    )
    parser.add_argument("--render", action="store_true", help="measure nothing: page and plots from results.json")
    return parser.parse_args(arguments)


def _names() -> list[str]:
    return [f"{section}-{framework}" for section, framework in ALL]


def _sections(named: Sequence[str] | None) -> list[str]:
    for name in named or ():
        if name not in _names():
            raise DeqcoreError(
                f"--section {name!r}: no such section.{did_you_mean(name, _names())} There are: {listing(_names())}."
            )
    return list(dict.fromkeys(named or _names()))


def absent() -> list[str]:
    """Return what is not measured because it is not installed, with the remedy."""
    lines = []
    for framework, libraries in LIBRARIES.items():
        if find_spec(framework) is None:
            lines.append(f"{framework} is not installed, nothing is measured on it: pip install 'deqcore[{framework}]'")
        missing = [name for name in libraries if name not in SKIPPED and find_spec(name) is None]
        if missing:
            lines.append(f"not installed, so left out: {', '.join(missing)}. All peers: {INSTALL}")
    return [*lines, *(f"{name} is left out: {why}" for name, why in SKIPPED.items())]


def _earlier(out: Path, quick: bool) -> dict[str, Any]:
    path = out / "results.json"
    if path.is_file():
        results: dict[str, Any] = json.loads(path.read_text())
        if results.get("quick") == quick:
            return results
    return {"quick": quick, "sections": {}}


def _measure(name: str, threads: int, quick: bool) -> dict[str, Any]:
    """Run one section in a fresh process; no other framework runs at the same time."""
    section, framework = name.split("-")
    if find_spec(framework) is None:
        return {"error": f"{framework} is not installed"}
    start = time.perf_counter()
    machine = describe(["torch", "jax", "jaxlib", *(n for group in LIBRARIES.values() for n in group)])
    result = _run(section, framework, threads, quick)
    elapsed = round(time.perf_counter() - start, 1)
    _say(f"{name}: {elapsed} s")
    return {"machine": machine, "threads": threads, "commit": commit(), "seconds": elapsed, **result}


def _run(section: str, framework: str, threads: int, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.worker", section, framework, str(answer)]
        command += ["--threads", str(threads), *(["--quick"] if quick else [])]
        paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if process.returncode or not answer.is_file():
            return {"error": f"its process ended with code {process.returncode}; see its message above"}
        results: dict[str, Any] = json.loads(answer.read_text())
        return results


def commit() -> str:
    """Return the commit measured, with a + if the tree had uncommitted changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
