"""`deqcore bench` on tiny problems: what it prints and writes, and what it says of wrong input. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deqcore import plugins
from deqcore.cli import bench
from deqcore.cli.app import main
from deqcore.plugins import BackendSpec

pytestmark = pytest.mark.usefixtures("small_heap")
Capture = pytest.CaptureFixture[str]
TINY = ("--backend", "numpy", "--batch", "4", "--size", "8", "--rounds", "1", "--budget", "0")
PROBLEM = """
import numpy as np
from deqcore.testing import Problem
def f(xp, params, z, x):
    return 0.5 * z + x
def own():
    return Problem("own", {}, np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), f)
torch_only = Problem("torch_only", {}, np.ones((2, 3)), np.zeros((2, 3)), {"torch": lambda p, z, x: z})
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "limit_threads", lambda threads: None)  # cannot be undone
    monkeypatch.chdir(tmp_path)


def run(capture: Capture, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deqcore bench ARGS`."""
    with pytest.raises(SystemExit) as exit:
        main(["bench", *args])
    out, err = capture.readouterr()
    return int(exit.value.code or 0), out, err


def test_rows_as_json(capsys: Capture) -> None:
    code, out, _ = run(capsys, *TINY, "-c", "mixed", "-s", "picard", "-s", "broyden", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    names = [row["contender"] for row in found["rows"]]
    assert names == [
        "deqcore picard", "deqcore picard (compact)", "deqcore broyden", "deqcore broyden (compact)",
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["reached"]
        assert row["residual_max"] <= 1e-5 * 1.001
        assert row["evaluations"] > 1
        assert len(row["seconds"]) == len(row["reference"]) >= 1
    assert found["machine"]["packages"]["numpy"]


def test_all_cases_by_default_as_a_table(capsys: Capture) -> None:
    code, out, _ = run(capsys, *TINY, "-s", "anderson", "--rtol", "1e-3")
    assert code == 0
    for name in ("dense", "affine", "slow-modes", "badly-scaled", "non-normal", "mixed", "overhead"):
        assert name in out


def test_a_folder_of_results(capsys: Capture, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    assert run(capsys, *TINY, "-c", "dense", "-s", "picard", "--out", str(folder))[0] == 0
    assert json.loads((folder / "results.json").read_text())["rows"][0]["case"] == "dense"
    assert "| dense | picard |" in (folder / "report.md").read_text()
    pytest.importorskip("matplotlib")
    assert (folder / "overhead.png").read_bytes().startswith(b"\x89PNG")


def test_a_problem_of_ones_own(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PROBLEM)
    code, out, _ = run(capsys, *TINY, "-c", "mine.py:own", "-s", "picard", "--rtol", "1e-3", "--json")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert (row["case"], row["evaluations"]) == ("own", 10)  # 2^-(k+1)/(1 − 2^-(k+1)) ≤ 1e-3 first at k = 9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-c", "dens"), "Did you mean 'dense'?"),
        (("-s", "broyde"), "Did you mean 'broyden'?"),
        (("--backend", "nunpy"), "Did you mean 'numpy'?"),
        (("--backend", "absent"), 'pip install "deqcore[absent]"'),
        (("--out", "taken"), "--out must be a folder ('taken' is a file)"),
        (("--backend", "numpy", "-c", "mine.py:torch_only"), "written for torch, not for 'numpy'"),
        (("--backend", "numpy", "-c", "mine.py:none"), "defines no 'none'"),
        (("--batch", "0"), "--batch"),
        (("--size", "1"), "--size"),
    ],
)
def test_wrong_input_is_one_message(args: tuple[str, ...], message: str, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "mine.py").write_text(PROBLEM)
    plugins.register(BackendSpec("absent", "a:b", package="no_such_framework", extra="absent"))
    try:
        code, out, err = run(capsys, *args)
    finally:
        plugins.reset()
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())


def test_threads_are_checked_and_set_before_numpy_is_imported(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("deqcore")
    command = [str(script), "bench", *TINY, "-c", "dense", "-s", "picard", "--json", "--threads"]
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run([*command, "1"], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["machine"]["usable_cores"] == 1
    done = subprocess.run([*command, "0"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "a number from 1 to" in done.stderr


def test_solvers_of_the_deqfile_are_known(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "deq.toml").write_text("plugins.deqfile = true\n")
    (tmp_path / "deqfile.py").write_text(
        "from deqcore.plugins import SolverSpec, hookimpl\n\n@hookimpl\ndef deqcore_solvers():\n"
        "    yield SolverSpec('mine', 'deqcore.solvers.picard:Picard', summary='own')\n"
    )
    code, out, _ = run(capsys, *TINY, "-c", "dense", "-s", "mine", "--json")
    plugins.reset()
    assert code == 0
    assert [row["contender"] for row in json.loads(out)["rows"]] == ["deqcore mine"]


def test_quick_leaves_out_what_does_not_fit_into_its_time(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    code, out, err = run(capsys, *TINY, "--quick", "-s", "picard", "--json")
    assert code == 0
    assert {row["case"] for row in json.loads(out)["rows"]} == {"dense"}
    assert "Not measured: affine" in err
