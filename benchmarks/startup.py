"""`python -m benchmarks.startup`: seconds until deqcore is there and has solved something, in fresh processes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from benchmarks.targets import COLUMNS, Target
from deqcore.bench.machine import describe
from deqcore.bench.report import machine_text, markdown

RUNS: Final = 9
ARRAYS: Final = {"numpy": "np.ones((4, 8))", "torch": "torch.ones(4, 8)", "jax": "jnp.ones((4, 8))"}
IMPORTS: Final = {"numpy": "import numpy as np", "torch": "import torch", "jax": "import jax, jax.numpy as jnp"}


@dataclass(frozen=True)
class Probe:
    """What is timed in a fresh interpreter.

    Attributes:
        what: description.
        before: run first, not timed.
        timed: run under the clock.
        limit: seconds; None without a target.
    """

    what: str
    before: str
    timed: str
    limit: float | None = None


def probes() -> list[Probe]:
    """Return all that the installed frameworks allow."""
    solve = "deqcore.fixed_point(lambda z: 0.5 * z + x, 0 * x, {options})"
    result = [
        Probe("import deqcore", "", "import deqcore", 0.05),
        Probe(
            "to the first NumPy fixed_point, imports included",
            "",
            f"{IMPORTS['numpy']}\nimport deqcore\nx = {ARRAYS['numpy']}\n{solve.format(options='')}",
            0.4,
        ),
        Probe("deqcore --help", "", "from deqcore.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass"),
    ]
    for name in ("torch", "jax"):
        if find_spec(name) is not None:
            result.append(
                Probe(
                    f"to the first {name} fixed_point, after the import of {name}",
                    f"{IMPORTS[name]}\nx = {ARRAYS[name]}",
                    f"import deqcore\n{solve.format(options='')}",
                )
            )
    return result


def seconds(probe: Probe, runs: int) -> list[float]:
    """Return the processor seconds: a busy machine makes no import slow."""
    script = (
        f"import os, time\n{probe.before}\nstart = time.process_time()\nout = os.dup(1)\n"
        f"os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n{probe.timed}\n"
        f"spent = time.process_time() - start\nos.write(out, repr(spent).encode())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        result.append(float(done.stdout))
    return result


def main() -> int:
    """Measure and print a table; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"fresh processes per figure (default {RUNS})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    result = {probe: seconds(probe, given.runs) for probe in probes()}
    if given.json:
        rows = [{"what": probe.what, "limit": probe.limit, "seconds": times} for probe, times in result.items()]
        print(json.dumps({"machine": describe(["torch", "jax"]), "rows": rows}, indent=2))
    else:
        rows_shown = [_cells(probe, times) for probe, times in result.items()]
        print(f"{machine_text(describe(['torch', 'jax']))}\n\n{markdown(rows_shown, COLUMNS)}")
    missed = [p for p, times in result.items() if p.limit is not None and statistics.median(times) > p.limit]
    return 1 if missed else 0


def _cells(probe: Probe, times: list[float]) -> dict[str, str]:
    median = statistics.median(times)
    shown = f"{median:.3f} s ({min(times):.3f}–{max(times):.3f})"
    if probe.limit is None:
        return {"what": probe.what, "target": "", "measured": shown, "peer": "", "verdict": ""}
    return Target(probe.what, probe.limit, median, shown).cells()


if __name__ == "__main__":
    sys.exit(main())
