"""CSV, TensorBoard, Prometheus, MLflow and W&B: what others read there is what was measured."""

from __future__ import annotations

import csv
import json
import socket
import sys
import types
import urllib.request
from importlib.machinery import ModuleSpec

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, MonitorWarning
from deqcore.monitor import Event, Metric, Metrics, Monitor, Row, RunInfo, Trigger
from deqcore.monitor.sinks.csv import CsvSink
from deqcore.monitor.sinks.mlflow import MlflowSink
from deqcore.monitor.sinks.prometheus import PrometheusSink, PrometheusTextfileSink
from deqcore.monitor.sinks.tensorboard import TensorBoardSink
from deqcore.monitor.sinks.wandb import WandbSink

RUN = RunInfo(Metrics(), 1000.0)
RECORDS = [
    Row(3, 7, 1001.0, {"deq_forward_steps": 4.5, "deq_forward_residual_max": float("inf")}, "encoder"),
    Event(3, 1002.0, "fired", 'steps, "many"\nof them', "deq_forward_steps", 4.5, "warn"),
    Row(4, 8, 1003.0, {"deq_forward_steps": 5.0, "deq_forward_residual_max": 0.25}, "encoder"),
    Row(4, 9, 1003.0, {"deq_backward_steps": 2.0}),
    Event(4, 1004.0, "retrain", "drifted", "deq_residual_psi", 0.5, "retrain"),
]


def write(sink, *batches):
    sink.open(RUN)
    for batch in batches or (RECORDS,):
        sink.write(batch)
    sink.close()


def test_csv_is_read_back_by_the_standard_library(tmp_path) -> None:
    path = tmp_path / "a" / "run.csv"
    write(CsvSink(str(path)), RECORDS[:2], RECORDS[2:])
    write(CsvSink(str(path)), RECORDS[:1])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert set(Metrics()) < set(rows[0])
    assert rows[0]["deq_forward_steps"] == "4.5"
    assert float(rows[0]["deq_forward_residual_max"]) == float("inf")
    assert rows[0]["deq_backward_steps"] == ""
    assert rows[0]["name"] == "encoder"
    assert rows[1]["message"] == 'steps, "many"\nof them'
    assert rows[5]["solve"] == "7"


def test_csv_refuses_a_file_with_other_columns(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "run.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.warns(MonitorWarning) as seen, Monitor(sinks=[CsvSink(str(path))], every=1):
        deqcore.fixed_point(lambda z: 0.5 * z, np.zeros((2, 2)))
    assert "has other columns than this run: name another file" in str(seen[0].message)
    assert path.read_text() == "a,b\n1,2\n"


def test_tensorboard_reads_the_scalars(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(TensorBoardSink(str(tmp_path)), RECORDS[:2], RECORDS[2:])
    found = EventAccumulator(str(tmp_path)).Reload()
    tensors = found.Tensors("encoder/deq_forward_steps")
    assert [(each.step, each.tensor_proto.float_val[0]) for each in tensors] == [(3, 4.5), (4, 5.0)]
    assert [each.step for each in found.Tensors("deq_backward_steps")] == [4]


EXPECTED = {
    ("deq_forward_steps", ("layer", "encoder")): 5.0,
    ("deq_forward_residual_max", ("layer", "encoder")): 0.25,
    ("deq_backward_steps", ("layer", "")): 2.0,
    ("deq_solves_total", ("layer", "encoder")): 2.0,
    ("deq_events_total", ("kind", "fired")): 1.0,
    ("deq_events_total", ("kind", "retrain")): 1.0,
}


def exposed(text: str) -> dict:
    parser = pytest.importorskip("prometheus_client.parser")
    families = parser.text_string_to_metric_families(text)
    return {(s.name, *s.labels.items()): s.value for family in families for s in family.samples}


def test_prometheus_serves_the_latest_values() -> None:
    sink = PrometheusSink(port=0)
    sink.open(RUN)
    try:
        sink.write(RECORDS[:2])
        sink.write(RECORDS[2:])
        url = f"http://127.0.0.1:{sink.bound}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    finally:
        sink.close()
    assert exposed(text) == EXPECTED
    assert "# HELP deq_forward_steps Solver steps, mean over the batch." in text
    assert "# TYPE deq_solves_total counter" in text


def test_the_textfile_holds_the_latest_values_and_counts_each_record_once(tmp_path, monkeypatch) -> None:
    import prometheus_client

    path = tmp_path / "node" / "deqcore.prom"
    sink = PrometheusTextfileSink(str(path))
    sink.open(RUN)
    real = prometheus_client.write_to_textfile

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prometheus_client, "write_to_textfile", full)
    with pytest.raises(OSError, match="No space"):
        sink.write(RECORDS)
    monkeypatch.setattr(prometheus_client, "write_to_textfile", real)
    sink.write(RECORDS)
    sink.close()
    assert exposed(path.read_text()) == EXPECTED
    assert [each.name for each in path.parent.iterdir()] == ["deqcore.prom"]


def test_a_port_in_use_is_reported_and_the_training_goes_on() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Monitor(sinks=[{"sink": "prometheus", "port": port}], every=1) as monitor:
            with pytest.warns(MonitorWarning, match=f"cannot listen on port {port} of 127.0.0.1"):
                deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 2)))
            for _ in range(2):
                deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 2)))
    assert len(monitor.rows) == 3


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"port must be from 0 to 65535 \(got 70000\)"):
        Monitor(sinks=[{"sink": "prometheus", "port": 70000}])
    with pytest.raises(ConfigError, match="port must be .*got -1"):
        Monitor(sinks=[{"sink": "prometheus", "port": -1}])
    with pytest.raises(ConfigError, match=r"path must end in \.prom"):
        Monitor(sinks=[{"sink": "prometheus-textfile", "path": "deq.txt"}])
    with pytest.raises(ConfigError, match="mode must be .*got 'onlin'"):
        Monitor(sinks=[{"sink": "wandb", "mode": "onlin"}])


def stand_in(monkeypatch, name: str, **members: object):
    """A module with the part of the interface that a sink uses."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("active", [False, True])
def test_mlflow_gets_metrics_by_step(monkeypatch, active: bool) -> None:
    calls: list[tuple] = []
    state = {"run": "theirs" if active else None}

    def start_run(run_name: str) -> None:
        state["run"] = run_name

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        assert state["run"]
        calls.append((step, metrics))

    module = stand_in(
        monkeypatch,
        "mlflow",
        active_run=lambda: state["run"],
        start_run=start_run,
        end_run=lambda: state.update(run=None),
        set_tracking_uri=lambda uri: state.update(uri=uri),
        set_experiment=lambda name: state.update(experiment=name),
        log_metrics=log_metrics,
        set_tag=lambda key, value: state.update({key: value}),
    )
    assert module.active_run() == state["run"]
    write(MlflowSink(tracking_uri="file:x", experiment="e"))
    assert calls[0] == (3, {"encoder/deq_forward_steps": 4.5, "encoder/deq_forward_residual_max": float("inf")})
    assert calls[-1] == (4, {"deq_backward_steps": 2.0})
    assert len(calls) == 3
    assert state["deqcore.retrain"] == "drifted"
    assert (state["uri"], state["experiment"]) == ("file:x", "e")
    assert state["run"] == ("theirs" if active else None)  # it ends its own run only


@pytest.mark.parametrize("active", [False, True])
def test_wandb_gets_metrics_over_the_training_step(monkeypatch, active: bool) -> None:
    class FakeRun:
        def __init__(self) -> None:
            self.logged: list[dict] = []
            self.alerts: list[str] = []
            self.axes: dict = {}
            self.finished = False

        def log(self, data: dict) -> None:
            self.logged.append(data)

        def alert(self, title: str, text: str) -> None:
            self.alerts.append(text)

        def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
            self.axes[name] = step_metric

        def finish(self) -> None:
            self.finished = True

    run = FakeRun()
    made: list[dict] = []
    stand_in(monkeypatch, "wandb", run=run if active else None, init=lambda **options: made.append(options) or run)
    write(WandbSink(project="p", mode="offline"))
    assert made == ([] if active else [{"project": "p", "name": None, "mode": "offline"}])
    assert run.logged[0]["deq_step"] == 3
    assert run.logged[0]["deq_forward_steps/encoder"] == 4.5
    assert run.logged[-1] == {"deq_step": 4, "deq_backward_steps": 2.0}
    assert run.alerts == ['steps, "many"\nof them']
    assert run.axes["deq_*"] == "deq_step"
    assert run.finished is not active


def test_a_users_metric_reaches_every_sink(tmp_path) -> None:
    path = tmp_path / "m.prom"
    with Monitor(
        sinks=[PrometheusTextfileSink(str(path)), CsvSink(str(tmp_path / "m.csv"))],
        metrics=[Metric("train_loss", "1", "Loss.")],
        triggers=[Trigger("train_loss", "> 1e9")],
    ) as monitor:
        monitor.log(train_loss=np.float64(2.5), layer="head")
    assert exposed(path.read_text())[("train_loss", ("layer", "head"))] == 2.5
    assert json.loads(json.dumps(monitor.rows[0].values)) == {"train_loss": 2.5}
    assert "train_loss" in (tmp_path / "m.csv").read_text()
