"""The layer in other people's training loops: it learns, its solves are logged, and a restart costs no number."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deqcore.monitor.log.reader import read

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
TRAINERS = Path(__file__).parents[2] / "examples" / "trainers"
IMAGES = 400  # eight steps of an epoch: two batches of 25 each
pytestmark = [
    pytest.mark.slow,
    # What the engines say of themselves: deprecated calls, a folder that is not empty, few workers of a loader.
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


@pytest.fixture(params=["lightning", "accelerate", "transformers"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip(request.param)
    monkeypatch.syspath_prepend(TRAINERS)
    digits = importlib.import_module("digits")
    train, test = digits.data()
    few = torch.utils.data.TensorDataset(*(part[:IMAGES] for part in train.tensors))
    monkeypatch.setattr(digits, "data", lambda: (few, test))
    yield importlib.import_module(f"with_{request.param}")
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(TRAINERS))]:
        del sys.modules[name]


def logged_steps(folder: Path) -> list[int]:
    return [row.step for row in read(folder / "monitor.jsonl").rows]


def test_a_restart_goes_on_with_the_same_numbers(engine: Any, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    whole = engine.main(["--epochs", "3", "--out", str(once)])
    first = engine.main(["--epochs", "2", "--out", str(twice)])
    again = engine.main(["--epochs", "3", "--out", str(twice), "--resume"])
    assert (whole["steps"], first["steps"], again["steps"]) == (24, 16, 24)
    for name, value in whole["weights"].items():
        assert torch.equal(again["weights"][name], value), name
    assert not torch.equal(first["weights"]["deq.cell.linear.weight"], whole["weights"]["deq.cell.linear.weight"])
    assert whole["accuracy"] == again["accuracy"] > 0.3  # ten digits: guessing gives a tenth
    # Two solves a step, numbered on where the restart begins.
    assert logged_steps(twice) == logged_steps(once) == sorted(2 * list(range(24)))


def test_a_restart_without_a_checkpoint_is_told(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Train without --resume first"):
        engine.main(["--out", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit):
        engine.main(["--epochs", "0"])


def test_two_processes_take_half_the_steps_of_an_epoch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(TRAINERS / "with_accelerate.py"), "--epochs", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("15 steps") == 1  # 30 in one process; the first one tells
    assert logged_steps(tmp_path) == sorted(2 * list(range(15)))  # two batches of its own make a step
