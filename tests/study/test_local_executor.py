"""Studies in separate processes: run, killed, continued, failed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deqcore.cli.app import main
from deqcore.study import data, store
from deqcore.study.executors.local import run
from deqcore.study.executors.worker import Lines, train
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.settings import DataChoice, ModelChoice, read
from deqcore.study.store import Store

pytest.importorskip("torch")


def tiny(own: UserCode = UserCode(), **table: Any) -> Cell:  # noqa: B008 - frozen
    asked = {"solvers": ["picard"], "strategies": ["jacobian-free"], "training": {"epochs": 1, "audits": 0}, **table}
    return cells(read(asked, "x"), own, ("torch",))[0]


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path, tiny_study: Any):
    (tmp_path / "study.toml").write_text(tiny_study(epochs=8, batch=64, audits=1))
    command = [sys.executable, "-m", "deqcore.cli.app", "study", "study.toml", "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    rng = random.Random(0)
    kills = 0
    for epoch in (1, 2, 4, 5, 7):
        process = subprocess.Popen(
            [*command, "cut"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and _epochs(tmp_path / "cut") < epoch:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 4
    subprocess.run([*command, "cut"], cwd=tmp_path, check=True, capture_output=True)
    one, two = (_outcome(tmp_path / name) for name in ("whole", "cut"))
    assert one["test_loss"] == two["test_loss"]
    assert one["history"]["steps"]["loss"] == two["history"]["steps"]["loss"]
    assert one["history"]["audits"] == two["history"]["audits"]
    (first,), (second,) = (
        list((tmp_path / name / "cells").glob("*/progress.safetensors")) for name in ("whole", "cut")
    )
    weights = [store.read_progress(path.parent) for path in (first, second)]
    assert weights[0] is not None
    assert weights[1] is not None
    assert all(weights[0][0][name].tobytes() == weights[1][0][name].tobytes() for name in weights[0][0])


def test_a_worker_of_a_killed_study_records_no_result(tmp_path: Path, monkeypatch: Any):
    """Its progress finds a closed pipe, possibly before it notices the end of its standard input."""

    class Ended(BaseException):
        """Stands for the end of the process."""

    def end(code: int) -> None:
        raise Ended

    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed, pytest.raises(Ended):
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(os, "_exit", end)
        try:
            train(tiny(), tmp_path, Lines())
        finally:
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())  # what is buffered still goes somewhere
    assert not (tmp_path / "result.json").exists()


def _epochs(root: Path) -> int:
    for folder in root.glob("cells/*"):
        found = store.read_progress(folder)
        return 0 if found is None else int(found[1]["epochs"])
    return 0


def _outcome(root: Path) -> dict[str, Any]:
    (cell,) = json.loads((root / "results.json").read_text())["cells"]
    return dict(cell)


def test_the_command_trains_reports_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_study: Any
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(tiny_study(epochs=1, batch=64, audits=1))
    monkeypatch.setattr(sys, "exit", _raise)
    _run(["study", "study.toml", "--dry-run"])
    plan = capsys.readouterr().out
    assert "digits torch dense picard jacobian-free" in plan
    assert "0/1" in plan
    _run(["study", "study.toml", "--language", "ja"])
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "逆伝播の vjp" in printed
    for name in ("results.json", "results.csv", "results.md", "report.html", "study.json"):
        assert (tmp_path / "study-tiny" / name).stat().st_size > 100
    assert (
        "結論" in (tmp_path / "study-tiny" / "report.html").read_text()
        or "推奨" in (tmp_path / "study-tiny" / "report.html").read_text()
    )
    before = _outcome(tmp_path / "study-tiny")
    _run(["study", "study.toml"])
    assert "1 of 1 cells were finished before" in capsys.readouterr().out
    assert _outcome(tmp_path / "study-tiny") == before


def test_a_plan_that_cannot_be_timed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_study: Any
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(
        tiny_study(epochs=8).replace("models", 'data = [{ name = "images", path = "photos" }]\nmodels')
    )
    with pytest.raises(SystemExit) as ended:
        main(["study", "study.toml", "--dry-run"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert "together, 1 at a time" in out
    assert "path must be an existing folder (got 'photos')" in err


def _raise(code: object) -> None:
    raise SystemExit(code)


def _run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0


class Silent:
    """A watcher that does one thing when a cell starts."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.then = then

    def started(self, cell: Cell) -> None:
        self.then()

    def progressed(self, cell: Cell, progress: dict[str, Any]) -> None:
        pass

    def ended(self, cell: Cell, result: dict[str, Any]) -> None:
        pass


def test_a_process_that_the_system_kills_is_a_result(tmp_path: Path):
    import psutil

    def kill() -> None:
        for child in psutil.Process().children():
            if "deqcore.study.executors.worker" in child.cmdline():
                os.kill(child.pid, signal.SIGKILL)

    place, cell = Store(tmp_path), tiny()
    (found,) = run(place, [cell], Silent(kill))
    assert found["status"] == "failed"
    assert found["reason"] == "killed"
    assert "memory" in found["detail"]
    assert place.resume([cell], retry=False) == 1
    assert place.resume([cell], retry=True) == 0
    assert place.result(cell) is None


MODELS = """
from deqcore.study.models import Dense

class Hungry(Dense):
    def inject(self, ops, p, x):
        raise MemoryError

class Broken(Dense):
    def cell(self, ops, p, z, injected):
        return z @ p["no such weight"]

class Mine(Dense):
    def cell(self, ops, p, z, injected):
        return 0.5 * super().cell(ops, p, z, injected)
"""


@pytest.mark.parametrize(
    ("name", "reason", "detail"), [("Hungry", "out of memory", "memory"), ("Broken", "error", "no such weight")]
)
def test_a_model_of_ones_own_that_fails_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str, detail: str
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_study_models.py").write_text(MODELS)
    cell = tiny(UserCode(model=f"my_study_models:{name}"), models=["own"])
    found = train(cell, tmp_path / "cell", lambda _: None)
    assert (found["status"], found["reason"]) == ("failed", reason)
    assert detail in found["detail"]


def test_a_model_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_study_models.py").write_text(MODELS)
    found = train(tiny(UserCode(model="my_study_models:Mine"), models=["own"]), tmp_path / "cell", lambda _: None)
    assert found["status"] == "ok"
    assert found["test_accuracy"] > 0.3


def test_a_model_that_does_not_take_the_data_is_reported(tmp_path: Path):
    found = train(replace(tiny(), model=ModelChoice(name="attention")), tmp_path, lambda _: None)
    assert (found["status"], found["reason"]) == ("failed", "unfit")
    assert "takes tokens, not image" in found["detail"]


def test_data_that_is_missing_is_reported(tmp_path: Path):
    found = train(tiny(data=[{"name": "images", "path": "/no/such"}]), tmp_path, lambda _: None)
    assert "path must be an existing folder" in found["detail"]


def test_a_text_trains(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    choice = {"name": "text", "path": str(tmp_path / "a.txt"), "length": 8}
    training = {"epochs": 2, "batch": 32, "audits": 1, "rate": 1e-2}
    cell = tiny(data=[choice], models=[{"name": "attention", "width": 16}], training=training)
    assert data.load(DataChoice.model_validate(choice)).kind == "tokens"
    found = train(cell, tmp_path / "cell", lambda _: None)
    assert found["status"] == "ok", found
    assert found["history"]["steps"]["loss"][-1] < found["history"]["steps"]["loss"][0]
