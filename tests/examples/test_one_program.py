"""The example that runs on three frameworks by one line of its config: the same numbers on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_program"
SCRIPT = "import json, runpy, sys; print('#', json.dumps(runpy.run_path(sys.argv[1])['main'](sys.argv[2])))"


def losses(backend: str) -> list[float]:
    """Run the script in a process of its own, as a user does."""
    import json

    command = [sys.executable, "-c", SCRIPT, str(EXAMPLE / "fit.py"), str(EXAMPLE / f"{backend}.toml")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    assert out.startswith(f"{backend}: loss ")
    found: list[float] = json.loads(out.split("#")[1])
    return found


@pytest.fixture(scope="module")
def truth() -> list[float]:
    """The same descent with SciPy's root finder and a dense adjoint solve."""
    import runpy

    program = runpy.run_path(str(EXAMPLE / "fit.py"))
    w, x, target = program["data"]().values()
    found = []
    for _ in range(program["STEPS"]):
        z = np.stack(
            [scipy.optimize.fsolve(lambda z, row=row, w=w: np.tanh(z @ w + row) - z, 0 * row, xtol=1e-12) for row in x]
        )
        error = z - target
        found.append(float(np.sum(error**2)) / 2)
        slope = 1 - z**2
        u = np.stack([np.linalg.solve(np.eye(len(w)) - w * s, e) for s, e in zip(slope, error, strict=True)])
        w = w - program["RATE"] * z.T @ (slope * u) / len(x)
    return found


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_every_framework_finds_the_same_numbers(backend: str, truth: list[float]) -> None:
    pytest.importorskip(backend)
    found = losses(backend)
    assert found == pytest.approx(truth, rel=1e-9)
    assert found[-1] < 0.9 * found[0]


def test_the_configs_differ_in_one_line() -> None:
    first, *others = [(EXAMPLE / f"{name}.toml").read_text().splitlines() for name in ("numpy", "torch", "jax")]
    for other in others:
        assert sum(a != b for a, b in zip(first, other, strict=True)) == 1
