"""`python -m benchmarks.certificates`: every figure on certified reuse, in one run of a few minutes.

Writes certificates.md, certificates.json and two plots. Exit code 0: every target holds; 1: some miss (the page says
which, by how much and where); 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.certificates.measure import measure
from benchmarks.certificates.problems import synthetic
from benchmarks.certificates.report import as_json, page, plots, verdicts
from benchmarks.certificates.trained import cells
from deqcore.bench.machine import describe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certificates", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the results")
    parser.add_argument("--images", type=Path, help="image folder with a folder per class, such as CIFAR-10's train")
    parser.add_argument("--samples", type=int, default=32, help="samples of each problem")
    parser.add_argument("--quick", action="store_true", help="few samples, no training: a check, not evidence")
    options = parser.parse_args()
    if options.samples < 1:
        parser.error(f"--samples {options.samples}: at least 1 is expected")
    if options.images is not None and not options.images.is_dir():
        parser.error(f"--images {options.images}: there is no such folder")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    results, trainings = [], []
    for case in synthetic(4 if options.quick else options.samples):
        results.append(measure(case))
        _tell(results[-1].case, start)
    if not options.quick:
        for case, training in cells(options.samples, 40, options.images, 512):
            results.append(measure(case))
            trainings.append(training)
            _tell(results[-1].case, start)
    seconds = time.perf_counter() - start
    machine = describe(("torch",))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "certificates.json").write_text(
        json.dumps(as_json(results, trainings, seconds, machine), indent=1, default=float) + "\n"
    )
    text = page(results, trainings, seconds, f"{machine['cpu']}, one thread")
    (options.out / "certificates.md").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        plots(results, options.out)
    found = verdicts(results)
    for v in found:
        print(f"{'holds ' if v.holds else 'MISSES'}  {v.figure}: {v.found} (target {v.target}) {v.remark}")
    return 0 if all(v.holds for v in found) else 1


def _tell(name: str, start: float) -> None:
    print(f"{time.perf_counter() - start:6.1f} s  {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
