"""`python -m benchmarks.certificates`: every figure on certified reuse, in one run of at most six minutes.

Writes certificates.md, certificates.json and two plots, after each section, so that a run that is killed loses only
the section that it was in. Exit code 0: every target holds; 1: some miss (the page says which, by how much and
where), or a section was not measured; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.certificates.measure import Result
from benchmarks.certificates.report import page, plots, verdicts
from benchmarks.certificates.sections import IMAGES, names, unpack
from benchmarks.certificates.trained import Training
from deqcore.bench.machine import describe

ROOT: Final = Path(__file__).resolve().parents[2]


def main() -> int:
    options = _parse()
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "certificates.json"
    setting = {"samples": options.samples, "quick": options.quick}
    result: dict[str, Any] = {"machine": describe(("torch",)), **setting, "sections": {}}
    if store.is_file():
        earlier = json.loads(store.read_text())
        if "sections" in earlier and all(earlier.get(name) == value for name, value in setting.items()):
            result["sections"] = earlier["sections"]
    lock = threading.Lock()

    def section(name: str) -> None:
        measured = _measure(name, options, deadline - time.monotonic())
        with lock:
            result["sections"][name] = measured
            store.write_text(json.dumps(result, default=float) + "\n")
            _render(result, options.out, drawn=False)

    if not options.render:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(section, options.section or names(options.quick, options.images is not None)))
    return _render(result, options.out, drawn=True)


def _parse() -> argparse.Namespace:
    every = names(False, True)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certificates", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the results")
    parser.add_argument("--images", type=Path, help="image folder with a folder per class, such as CIFAR-10's train")
    parser.add_argument("--samples", type=int, default=32, help="samples of each problem")
    parser.add_argument("--section", action="append", choices=every, help="measure only this, keep the others")
    parser.add_argument("--render", action="store_true", help="measure nothing: page and plots from certificates.json")
    parser.add_argument("--jobs", type=int, default=2, help="sections at a time, each on one thread")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which a section that still runs is ended")
    parser.add_argument("--quick", action="store_true", help="few samples, no training: a check, not evidence")
    options = parser.parse_args()
    if options.quick:
        options.samples = min(options.samples, 4)
    for name in ("samples", "jobs", "minutes"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0 (got {getattr(options, name)})")
    if options.images is not None and not options.images.is_dir():
        parser.error(f"--images {options.images}: the folder does not exist")
    if IMAGES in (options.section or ()) and options.images is None:
        parser.error(f"--section {IMAGES}: which images? Give their folder as --images")
    return options


def _measure(name: str, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """Return one section in its own process; what it had measured when its time ran out is kept."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        module = "benchmarks.certificates.sections"
        command = [sys.executable, "-m", module, name, str(answer), "--samples", str(options.samples)]
        if options.images is not None:
            command += ["--images", str(options.images.resolve())]
        try:
            code = subprocess.run(
                command, check=False, cwd=ROOT, timeout=max(left, 1.0), env=os.environ | {"OMP_NUM_THREADS": "1"}
            ).returncode
            error = f"its process ended with exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            error = f"ended after {max(left, 1.0):.0f} s: --minutes {options.minutes:g} had passed"
        empty: dict[str, Any] = {"seconds": 0.0, "results": [], "trainings": []}
        measured: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else empty
        return measured | {"error": error}


def _render(found: dict[str, Any], out: Path, drawn: bool) -> int:
    """Return the page of all that is there; the plots and the verdicts at the end only."""
    results: list[Result] = []
    trainings: list[Training] = []
    missing = {name: each["error"] for name, each in found["sections"].items() if each["error"]}
    for name in names(False, True):
        if name in found["sections"]:
            more, learnt = unpack(found["sections"][name])
            results, trainings = [*results, *more], [*trainings, *learnt]
    if not results:
        print("Nothing was measured.", *(f"{name}: {why}" for name, why in missing.items()), sep="\n", file=sys.stderr)
        return 1
    seconds = sum(item["seconds"] for item in found["sections"].values())
    text = page(results, trainings, seconds, f"{found['machine']['cpu']}, one thread a section", missing)
    (out / "certificates.md").write_text(text)
    if not drawn:
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        plots(results, out)
    judged = verdicts(results)
    for v in judged:
        print(f"{'holds ' if v.holds else 'MISSES'}  {v.figure}: {v.found} (target {v.target}) {v.remark}")
    for name, why in missing.items():
        print(f"not measured in full  {name}: {why}")
    return 0 if all(v.holds for v in judged) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
