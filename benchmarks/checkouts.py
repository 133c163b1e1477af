"""Times one workload in two checkouts of this project, in alternation, and prints the ratio of their times.

    python -m benchmarks.checkouts ../earlier            # this checkout over another one
    python -m benchmarks.checkouts ../earlier --rounds 9 --only conv

Each round runs the workload once in a process of each checkout, on one thread, and the order changes from round to
round. A ratio is the median over rounds of the paired times, with the interval that holds the middle half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOLVERS = ("picard", "anderson", "broyden")
STRATEGIES = ("exact-ift", "broyden-reuse", "jacobian-free")


def workload(only: str) -> dict[str, float]:
    """Time forward solves and training steps of cells that both checkouts have: seconds per call by name."""
    import torch

    import deqcore

    torch.set_num_threads(1)
    torch.manual_seed(0)
    w = torch.nn.init.orthogonal_(torch.empty(512, 512)) * 0.9
    kernel = torch.randn(48, 48, 3, 3) * (0.4 / (3 * 48**0.5))
    cells: dict[str, tuple[Callable[..., Any], Any]] = {
        "dense 256x512": (lambda z, x, w: torch.tanh(z @ w + x), (torch.randn(256, 512), w)),
        "conv 16x48x16x16": (
            lambda z, x, k: torch.tanh(torch.nn.functional.conv2d(z, k, padding=1) + x),
            (torch.randn(16, 48, 16, 16), kernel),
        ),
        "tiny 1x4": (lambda z, x, w: w * torch.tanh(z) + x, (torch.randn(1, 4), torch.full((1,), 0.5))),
    }
    jobs: dict[str, Callable[[], object]] = {}
    for cell, (f, (x, p)) in cells.items():
        z0 = torch.zeros_like(x)
        for solver in SOLVERS:
            settings: Any = {"forward__solver": solver, "forward__max_steps": 60, "forward__on_failure": "ignore"}
            jobs[f"{cell} {solver}"] = lambda f=f, z0=z0, x=x, p=p, s=settings: _forward(deqcore, f, z0, x, p, s)
        for strategy in STRATEGIES:
            settings = {"backward__strategy": strategy, "forward__max_steps": 60, "forward__on_failure": "ignore"}
            jobs[f"{cell} step, {strategy}"] = lambda f=f, z0=z0, x=x, p=p, s=settings: _step(deqcore, f, z0, x, p, s)
    return {name: _seconds(job) for name, job in jobs.items() if only in name}


def _forward(deqcore: Any, f: Any, z0: Any, x: Any, p: Any, settings: Any) -> object:
    import torch

    with torch.no_grad():
        return deqcore.fixed_point(f, z0, x, p, **settings)


def _step(deqcore: Any, f: Any, z0: Any, x: Any, p: Any, settings: Any) -> object:
    p = p.detach().requires_grad_()
    value = deqcore.fixed_point(f, z0, x, p, **settings).value
    (value * value).sum().backward()
    return p.grad


def _seconds(job: Callable[[], object], least: float = 0.4) -> float:
    """Return the median time of a call, from `least` seconds of calls and at least five."""
    job(), job()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(checkout: Path, only: str) -> dict[str, float]:
    """Run the workload in a separate process."""
    paths = f"{checkout}{os.pathsep}{checkout / 'backends'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--only", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The workload failed in {checkout}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table, the slowest ratio first."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("earlier", nargs="?", type=Path, help="folder of the other checkout")
    asked.add_argument("--rounds", type=int, default=7)
    asked.add_argument("--only", default="", help="names that contain this text")
    asked.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.worker:
        print(json.dumps(workload(given.only)))
        return
    if given.earlier is None:
        asked.error("the folder of the other checkout is missing")
    pairs = []
    for number in range(given.rounds):
        order = (ROOT, given.earlier.resolve()) if number % 2 else (given.earlier.resolve(), ROOT)
        found = {checkout: run(checkout, given.only) for checkout in order}
        pairs.append((found[ROOT], found[given.earlier.resolve()]))
    print("| workload | ms | ratio to the earlier checkout | middle half |\n|---|---|---|---|")
    rows = []
    for name in pairs[0][0]:
        ratios = sorted(now[name] / then[name] for now, then in pairs)
        quarter = len(ratios) // 4
        rows.append((statistics.median(ratios), name, ratios[quarter], ratios[-1 - quarter]))
    for ratio, name, low, high in sorted(rows, reverse=True):
        milliseconds = 1e3 * statistics.median(now[name] for now, _ in pairs)
        print(f"| {name} | {milliseconds:.2f} | {ratio:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
