"""Cells on a cluster: what is copied, and that the numbers are those of one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deqcore.cli.app import main
from deqcore.study import data, store
from deqcore.study.executors import ray
from deqcore.study.executors.worker import train
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.settings import DataChoice, read
from deqcore.study.store import Store, StudyError

pytest.importorskip("torch")


def tiny(epochs: int = 2) -> Cell:
    table = {
        "models": [{"name": "dense", "width": 16}],
        "solvers": ["picard"],
        "strategies": ["jacobian-free"],
        "max_steps": 10,
        "training": {"epochs": epochs, "audits": 0},
    }
    return cells(read(table, "x"), UserCode(), ("torch",))[0]


def test_a_machine_sends_progress_and_files_and_goes_on_from_what_it_gets(tmp_path: Path):
    from deqcore_torch.study import TorchTrainer

    from deqcore.study.train.loop import CellTraining

    cell = tiny()
    whole = train(cell, tmp_path / "whole", lambda _: None)

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress["epoch"] == 2:
            raise Stop

    digits = data.load(DataChoice(name="digits"))
    with pytest.raises(Stop):
        CellTraining(cell, digits, TorchTrainer, tmp_path / "cut", stop).run()
    half = (tmp_path / "cut" / "progress.safetensors").read_bytes()
    sent = list(ray.train(cell.as_dict(), {"progress.safetensors": half}))
    files = {name: content for each in sent for name, content in each["files"].items()}
    assert set(files) == {"progress.safetensors", "result.json"}
    assert {each["progress"]["epoch"] for each in sent if each["progress"]} == {2}  # the first epoch is not repeated
    result = json.loads(files["result.json"])
    assert result["test_loss"] == whole["test_loss"]
    assert result["history"]["steps"]["loss"] == whole["history"]["steps"]["loss"]


class Refused(Exception):
    """Of a cluster that loses its tasks."""


class Lossy:
    """Stands for ray, with a machine that goes away."""

    exceptions = SimpleNamespace(RayError=Refused)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def remote(self, **options: Any) -> Any:
        assert options == {"num_returns": "streaming", "num_cpus": 1, "num_gpus": 0}
        return lambda function: SimpleNamespace(remote=lambda *_: iter([1]))

    def wait(self, tasks: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return tasks[:num_returns], []

    def get(self, reference: Any) -> Any:
        raise Refused("the node died")


def test_a_lost_machine_is_reported_with_what_to_do(tmp_path: Path):
    watcher: Any = None
    with pytest.raises(StudyError, match="the cluster lost it: the node died. What was finished is kept"):
        ray._run(Lossy(), Store(tmp_path), [tiny()], watcher)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, tiny_study: Any):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "study.toml").write_text(tiny_study(epochs=2))
    with pytest.raises(SystemExit) as ended:
        main(["study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--executor", "ray"])
    assert ended.value.code == 2
    assert 'pip install "deqcore[ray]"' in capsys.readouterr().err


def test_an_executor_that_there_is_not(capsys: Any):
    with pytest.raises(SystemExit) as ended:
        main(["study", "--executor", "slurm"])
    assert ended.value.code == 2
    assert "must be 'local' or 'ray'" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_ray_ends_in_the_numbers_of_one_machine(tmp_path: Path, tiny_study: Any):
    pytest.importorskip("ray")
    (tmp_path / "study.toml").write_text(tiny_study(epochs=2))
    found = []
    for executor in ("local", "ray"):
        command = [sys.executable, "-m", "deqcore.cli.app", "study", "study.toml", "--out", executor]
        done = subprocess.run(
            [*command, "--executor", executor], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        (cell,) = json.loads((tmp_path / executor / "results.json").read_text())["cells"]
        (folder,) = (tmp_path / executor / "cells").iterdir()
        progress = store.read_progress(folder)
        assert progress is not None
        found.append((cell["test_loss"], cell["history"]["steps"]["loss"], progress[0]["weight.W"].tobytes()))
    assert found[0] == found[1]
