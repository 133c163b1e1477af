"""`deqcore check gradients`: tables, JSON, exit codes and bad input, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deqcore.cli.app import main

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("project")


def run(capture: Capture, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["check", "gradients", *args])
    out, err = capture.readouterr()
    return int(exit.value.code or 0), out, err


QUICK = ("--backend", "numpy", "--dtype", "float64")

PROBLEM = """
import numpy as np
from deqcore.testing import Problem

def cell(xp, p, z, x):
    return xp.tanh(xp.matmul(z, p["W"])) + x

def reversed_cell(p, z, x):
    return np.tanh(z @ p["W"])[..., ::-1] + x

data = {"W": 0.2 * np.arange(9.0).reshape(3, 3) / 9}, np.ones((2, 3)), np.zeros((2, 3))
good = Problem("good", *data, cell)
wrong = Problem("wrong", *data, {"numpy": reversed_cell, "torch": lambda p, z, x: (z @ p["W"]).tanh() + x})
"""


def test_a_table_and_exit_0_where_all_agree(capsys: Capture) -> None:
    code, out, err = run(capsys, *QUICK, "--solver", "picard", "--strategy", "exact-ift", "--strategy", "neumann")
    assert code == 0, out
    assert err == ""
    assert "numpy f64" in out
    assert "reference" in out
    assert "✓" in out
    assert "comparisons agree, the worst at" in out


def test_json_and_exit_0_for_ones_own_problem(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PROBLEM)
    code, out, _ = run(capsys, *QUICK, "--problem", "mine.py:good", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["ok"] is True
    found = {(each["quantity"], each["against"]) for each in report["comparisons"]}
    assert ("params['W']", "dense reference") in found
    assert all(each["error"] <= each["bound"] and each["cosine"] > 0.999999 for each in report["comparisons"])


def test_exit_1_and_the_first_disagreement_where_two_functions_differ(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "mine.py").write_text(PROBLEM)
    code, out, _ = run(capsys, "--dtype", "float64", "--problem", "mine.py:wrong")
    assert code == 1
    assert "differs" in out
    assert "First disagreement of torch float64 (broyden) with numpy: z." in out


def test_a_solver_of_the_projects_deqfile_is_checked_in_the_workers_too(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "deqfile.py").write_text(
        "from deqcore.plugins import SolverSpec, hookimpl\n@hookimpl\ndef deqcore_solvers():\n"
        "    yield SolverSpec('mine', 'deq_hasty:Hasty')\n"
    )
    (tmp_path / "deq_hasty.py").write_text(
        "from dataclasses import dataclass\nfrom deqcore.solvers.picard import Picard\n\n@dataclass(frozen=True)\n"
        "class Hasty(Picard):\n    def residual_norm(self, backend, state):\n        return self.zero\n"
        "    def step(self, backend, f, z, fz, state):\n        object.__setattr__(self, 'zero', 0 * backend.norm(z))\n"
        "        return super().step(backend, f, z, fz, state)\n"
    )
    (tmp_path / "deq.toml").write_text("plugins.deqfile = true\n")
    code, out, _ = run(capsys, *QUICK, "--solver", "mine", "--strategy", "exact-ift", "--json")
    assert code == 1, "a solver that reports convergence after one step"
    report = json.loads(out)
    assert report["errors"] == []
    assert {"z", "cotangent"} <= {each["quantity"] for each in report["comparisons"] if not each["ok"]}


@pytest.mark.parametrize("args", [("gradients", *QUICK), ("solver", "picard")])
def test_a_deqfile_that_is_not_there_is_reported_once(capsys: Capture, tmp_path: Path, args: tuple[str, ...]) -> None:
    (tmp_path / "deq.toml").write_text("plugins.deqfile = true\n")
    with pytest.raises(SystemExit) as exit:
        main(["check", *args])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.count("cannot be read") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--backend", "tourch"], "Did you mean 'torch'?"),
        (["--solver", "broiden"], "Did you mean 'broyden'?"),
        (["--strategy", "exact"], "No strategy is registered as 'exact'"),
        (["--dtype", "float46"], "Did you mean 'float64'?"),
        (["--problem", "nothing.py:f"], "the file 'nothing.py' does not exist"),
        (["--solver", "picard", "--strategy", "broyden-reuse"], "keeps the estimate"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(capsys: Capture, args: list[str], words: str) -> None:
    code, out, err = run(capsys, *args)
    assert code == 2
    assert out == ""
    assert words in err
