"""Where a study's models live: what is asked for is used, named in the report, and refused where it does not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deqcore.cli.app import main
from deqcore.config import Config
from deqcore.errors import BackendError
from deqcore.study.executors.local import GPU, environment
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.models import find
from deqcore.study.models.base import Shape
from deqcore.study.settings import read

pytest.importorskip("torch")


def only(**table: Any) -> Cell:
    return cells(read({"strategies": ["exact-ift"], **table}, "x"), UserCode(), ("torch",))[0]


def trainer(backend: str, device: str) -> Any:
    if backend == "torch":
        from deqcore_torch.study import TorchTrainer as Made
    else:
        pytest.importorskip("jax")
        pytest.importorskip("optax")
        from deqcore_jax.study import JaxTrainer as Made  # type: ignore[assignment]
    model = find("dense")(Shape("vector", (12,), 3), 8)
    return Made(model, model.initial(np.random.default_rng(0)), Config(backend=backend), device)


def test_a_device_is_part_of_a_cell_and_none_leaves_old_results_valid():
    asked = only(device="cuda:1")
    assert Cell.of(asked.as_dict()) == asked
    assert "device" not in only().as_dict()  # keys of cells that were trained before there was a choice
    assert len({only().key, only(device="cpu").key, asked.key}) == 3


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_trainer_computes_on_its_device_and_refuses_what_is_not_there(backend: str):
    made = trainer(backend, "cpu")
    x, y = np.ones((4, 12), np.float32), np.zeros(4, np.int64)
    made.step(x, y, 1e-3)
    assert made.device() == "cpu"
    assert made.peak() is None
    made.restore(made.save())
    assert made.predict(x).shape == (4, 3)
    with pytest.raises(BackendError, match=f"{backend} cannot use the device 'cuda:99'"):
        trainer(backend, "cuda:99")


@pytest.mark.parametrize("given", [["--device", "cuda:99"], []])
def test_a_device_that_is_not_there_ends_the_study_before_it_trains(
    given: list[str], tmp_path: Path, capsys: Any, tiny_study: Any
):
    text = tiny_study(epochs=1)
    text = text if given else text.replace('name = "tiny"', 'name = "tiny"\ndevice = "cuda:99"')
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), *given])
    assert ended.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "device = 'cuda:99', but torch has none of that name here: torch cannot use the device" in printed
    assert not (tmp_path / "out").exists()


def test_the_report_says_which_device_trained(tmp_path: Path, tiny_study: Any):
    (tmp_path / "study.toml").write_text(tiny_study(epochs=1))
    with pytest.raises(SystemExit) as ended:
        main(["study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["command"].endswith("--device cpu")
    assert found["settings"]["device"] == "cpu"
    assert [cell["device"] for cell in found["cells"]] == ["cpu"]
    assert '<td class="text">device</td><td class="wide">cpu</td>' in (tmp_path / "out" / "report.html").read_text()


def test_workers_share_a_gpu_and_its_float32_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    for name in GPU:
        monkeypatch.delenv(name, raising=False)
    assert environment(1).items() >= GPU.items()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert environment(1)["NVIDIA_TF32_OVERRIDE"] == "1"


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_the_devices():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = trainer("torch", "cuda")
    made.reset_peak()
    made.step(np.ones((4, 12), np.float32), np.zeros(4, np.int64), 1e-3)
    assert made.device() == torch.cuda.get_device_name()
    assert made.peak() == torch.cuda.max_memory_allocated() > 0
