"""`deqcore monitor` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore.cli.app import main
from deqcore.monitor import Monitor, Trigger

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.jsonl"
    trigger = Trigger("deq_forward_steps", "> 2", "retrain", window=2)
    sinks = [{"sink": "jsonl", "path": str(path)}]
    monitor = Monitor(sinks=sinks, triggers=[trigger], every=100)
    with monitor:
        for _ in range(10):
            deqcore.fixed_point(lambda z: 0.5 * np.tanh(z) + 1.0, np.zeros((2, 3)))
        with pytest.warns(UserWarning, match="marked for retraining"):
            monitor.flush()
    return path


def run(capture: Capture, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["monitor", *args])
    out, err = capture.readouterr()
    return int(exit.value.code or 0), out, err


def test_watch_prints_one_frame_where_there_is_no_terminal(capsys: Capture, log: Path) -> None:
    code, out, _ = run(capsys, "watch", str(log))
    assert code == 0
    assert "RETRAIN" in out
    assert "10 solves" in out
    assert "forward_steps" in out


def test_report_writes_a_page_beside_the_log(capsys: Capture, log: Path) -> None:
    code, out, _ = run(capsys, "report", str(log))
    assert (code, out.strip()) == (0, str(log.with_suffix(".html")))
    assert "Retrain: " in log.with_suffix(".html").read_text()
    assert run(capsys, "report", str(log), "-o", "other.html")[0] == 0
    assert Path("other.html").exists()
    code, _, err = run(capsys, "report", str(log), "--out", "no/such/folder.html")
    assert code == 2
    assert "cannot be written" in err


@pytest.mark.parametrize("command", ["watch", "report"])
def test_bad_logs_are_one_message(capsys: Capture, tmp_path: Path, command: str) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n")
    for name, message in (
        ("none.jsonl", "none.jsonl' does not exist"),
        ("bad.csv", "is not a log of the monitor"),
    ):
        code, out, err = run(capsys, command, str(tmp_path / name))
        assert (code, out) == (2, "")
        assert message in err


def test_listings(capsys: Capture) -> None:
    names = {row["metric"] for row in json.loads(run(capsys, "metrics", "--json")[1])}
    assert {"deq_forward_steps", "deq_solves_total"} <= names
    sinks = {row["name"]: row for row in json.loads(run(capsys, "sinks", "--json")[1])}
    assert set(sinks) >= {"jsonl", "csv", "tensorboard", "prometheus", "prometheus-textfile", "mlflow", "wandb"}
    assert sinks["jsonl"]["options"] == {"path": "monitor.jsonl"}
    assert all(row["status"] == "ok" for row in sinks.values())


def test_dashboard_prints_json(capsys: Capture) -> None:
    code, out, _ = run(capsys, "dashboard")
    assert code == 0
    assert json.loads(out)["title"] == "deqcore"
