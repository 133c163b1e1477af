"""The comparison on a device: what it counts, what it writes down of failures, and its page. Nothing is timed."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deqcore.errors import DeqcoreError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("small_heap")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def setting(**changes: Any) -> Any:
    from benchmarks.accelerator.parts import Setting

    return Setting(**{"device": "cpu", "quick": True, "seconds": 1.0, "say": lambda _: None} | changes)


def asked(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "quick": True, "budget": 60.0, "part": None} | changes)


def row(contender: str, *seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "framework": "torch", "case": "conv", "contender": contender, "evaluations": 10, "residual_max": 9e-6,
        "residual_median": 1e-6, "reached": True, "tolerance": 1e-5, "first_seconds": 0.1, "memory": 5 * 2**20,
        "state": 2**20, "seconds": [*seconds] * 3, "reference": [0.001] * 3, "disturbance": [0.0] * 3, "dropped": 0,
        "error": "", "waits": 4, **changes,
    }  # fmt: skip


def results() -> dict[str, Any]:
    device = {
        "device": "cuda", "name": "Card", "memory_gib": 80.0, "multiprocessors": 132, "cuda": "13.0",
        "driver_version": "580", "clocks.sm": "345 MHz", "clocks.mem": "2619 MHz", "temperature.gpu": "30",
        "power.limit": "700 W", "power.draw": "70 W", "tf32": {"convolutions": True, "matrix products": False},
    }  # fmt: skip
    step = {
        "layer": "deqcore", "case": "conv", "error": 0.1,
        "forward_evaluations": 11, "backward_evaluations": 1, "solver_evaluations": 10,
        "residual": 9e-5, "cosine": 0.99, "note": "", "forward": [0.02] * 3, "backward": [0.01] * 3, "step": [0.03] * 3,
        "reference": [0.001] * 3, "disturbance": [0.0] * 3,
    }  # fmt: skip
    broken = row("torchdeq broyden", reached=False, memory=None, error="RuntimeError: no bfloat16")
    cost = {"f": {"ms": 0.02}, "broyden": {"ms per call": 0.5, "ms per step": 0.25}}
    points = [{"held": 10, "bytes": 2_000_000_000, "seconds": [0.001, 0.001, 0.001]}]
    copy = {
        "bytes": 2,
        "bytes per second": [4e12],
        "median": 4e12,
        "clocks under load": {**device, "clocks.sm": "1980 MHz"},
    }
    work = {"points": points, "wall": [0.001], "native": 24, "of": 24}
    return {
        "quick": False, "device": "cuda", "budget": 240.0, "commit": "abc", "seconds": 100.0,
        "machine": {
            "cpu": "C", "cores": 16, "memory_gib": 128.0, "system": "S", "python": "3", "packages": {}, "date": "d",
        },
        "parts": {
            "device": {"before": device},
            "steps": {"copy": copy, "fixed cost": {"facts": cost}, "64×262144 float32": work},
            "steps-portable": {"64×262144 float32": {**work, "native": 0}},
            "cases": {"conv": {"rows": [row("deqcore broyden", 0.014), broken], "note": "a block"}},
            "cases-portable": {"conv": {"rows": [row("deqcore broyden", 0.028, waits=5)], "note": "a block"}},
            "training": {"conv": {"steps": [step], "failed": {"peer": "ValueError: x"}}},
            "jax": {"dense": {"error": "jax is not installed"}},
        },
    }  # fmt: skip


def test_the_least_bytes_of_a_step_are_counted_by_hand() -> None:
    from benchmarks.accelerator.parts import StepResult, least_bytes

    vector = 4 * 10  # numbers of a batch of 4
    assert least_bytes(StepResult(4, 10, "float32"), 1) == (4 + 4) * vector * 4
    assert least_bytes(StepResult(4, 10, "float32", "bfloat16"), 10) == 22 * vector * 2 + 4 * vector * 4


def test_residuals_on_the_device_are_those_of_numpy() -> None:
    from benchmarks.accelerator.device import relative

    rng = np.random.default_rng(0)
    z, fz = rng.standard_normal((2, 3, 4, 5))
    apart, size = ((np.linalg.norm(a.reshape(3, -1), axis=1)) for a in (fz - z, fz))
    assert relative(torch.from_numpy(z), torch.from_numpy(fz)) == pytest.approx(apart / size, rel=1e-12)


def test_waits_are_warnings_in_torchs_words() -> None:
    from benchmarks.accelerator.device import SAID, counted_warnings

    def task() -> None:
        for _ in range(3):
            warnings.warn(f"called a {SAID}", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert counted_warnings(task, SAID) == 3


@pytest.mark.parametrize("name", ["dense", "conv-tf32", "conv-large", "attention-large", "mixed-conv"])
def test_our_solvers_reach_the_residual_of_each_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.accelerator import parts

    monkeypatch.setattr(parts, "SETTLING", 1.0)
    found = parts.portable(name, setting(seconds=600.0))
    assert {each["contender"].split()[0] for each in found["rows"]} == {"deqcore"}
    reached = [each for each in found["rows"] if each["reached"]]
    assert {f"deqcore {solver}" for solver in parts.SOLVERS[:3]} <= {each["contender"] for each in reached}
    assert all(each["residual_max"] <= 1.01 * parts.CASES[name].rtol for each in reached)
    assert all(each["waits"] is None for each in reached)  # a CPU is not waited for
    assert ("deqcore picard (compact)" in {each["contender"] for each in reached}) == (name == "mixed-conv")


def test_no_task_begins_once_the_time_is_over() -> None:
    from benchmarks.accelerator import parts

    found = parts.cases("dense", setting(seconds=0.0))
    assert len(found["rows"]) >= len(parts.SOLVERS)
    assert all("larger --budget" in each["error"] for each in found["rows"])


def test_a_library_that_cannot_be_imported_is_a_contender_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.accelerator import parts

    def broken(name: str) -> Any:
        raise ImportError(f"{name} asks for what is gone")

    monkeypatch.setattr(parts, "LIBRARIES", {"torch": ("json", "no_such_library")})
    monkeypatch.setattr(parts, "import_module", broken)
    (only,) = parts._peers("torch")
    assert only.name == "json (import)"
    with pytest.raises(ImportError, match="is gone"):
        only.prepare(None, None, 1)


def test_steps_are_measured_by_vectors_held() -> None:
    from benchmarks.accelerator import parts

    found = parts.steps("64×262144 float32, history in bfloat16", setting(seconds=0.0))
    assert [point["held"] for point in found["points"]] == [1, 2, 3, 4, 5]
    assert all(len(point["seconds"]) == 2 for point in found["points"])
    assert found["native"] == 0  # no native step stores a narrower history on a CPU
    assert parts.steps("copy", setting())["median"] > 0
    assert set(parts.steps("fixed cost", setting())["facts"]) == {"f", "auto", "picard", "anderson", "broyden"}


def test_a_layer_that_raises_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import training
    from benchmarks.accelerator import parts

    def broken(rtol: float) -> Any:
        raise ValueError("no such layer\nat all")

    def good(rtol: float) -> Any:
        return training.Ours("picard", "jacobian-free", rtol)

    monkeypatch.setattr(training, "layers", lambda _: {"broken": (broken, ""), "good": (good, "")})
    found = parts.training("conv", setting())
    assert found["failed"] == {"broken": "ValueError: no such layer"}
    assert [step["layer"] for step in found["steps"]] == ["good"]


def test_what_an_item_raises_is_its_answer_and_the_next_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.accelerator import parts, worker

    def measure(name: str, _: Any) -> dict[str, Any]:
        if name == "a":
            raise RuntimeError("out of memory\nmore")
        return {"figure": 1}

    monkeypatch.setattr(parts, "PARTS", {"cases": parts.Part(measure, {"a": 1.0, "b": 1.0}, 1.0, {})})
    lines = io.StringIO()
    assert worker.answer("cases", ["a", "b"], "cpu", 1.0, True, lines) == 0
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert first["error"] == "RuntimeError: out of memory"
    assert second["figure"] == 1


@pytest.mark.parametrize(("code", "lost"), [(3, []), (-9, ["b"])])
def test_after_a_process_that_ends_early_another_goes_on(monkeypatch: pytest.MonkeyPatch, code: int, lost: list[str]):
    """One that says that its device is dead has answered; any other end is what the next item has come to."""
    from benchmarks.accelerator import __main__ as command

    class Process:
        def __init__(self, items: list[str]) -> None:
            self.stdout = iter([json.dumps({"item": items[0]}) + "\n"])
            self.code = code if len(items) > 1 else 0

        def wait(self) -> int:
            return self.code

        def kill(self) -> None: ...

    runs = command._Processes("cpu", True)
    monkeypatch.setattr(runs, "_process", lambda part, items, seconds: Process(list(items)))
    answers = list(runs("cases", ["a", "b", "c"], 60.0))
    assert [each["item"] for each in answers] == ["a", "b", "c"]
    assert [each["item"] for each in answers if "error" in each] == lost


def test_results_are_kept_after_each_item_and_a_spent_budget_is_reported() -> None:
    from benchmarks.accelerator import __main__ as command
    from benchmarks.accelerator.parts import PARTS

    kept: list[int] = []

    def run(part: str, items: Any, seconds: float) -> Any:
        yield from ({"item": name, "rows": []} for name in items)

    def keep(found: Any) -> None:
        kept.append(sum(map(len, found["parts"].values())))

    command.measure(asked(), keep, run)
    assert kept[-2:] == [kept[-1]] * 2
    assert kept[:-1] == list(range(1, 1 + sum(len(part.weights) for part in PARTS.values())))
    spent = list(command._Processes("cpu", True)("cases", ["dense"], -1.0))
    assert spent == [{"item": "dense", "error": "left out: the budget was spent"}]


def test_no_device_and_no_such_part_are_errors() -> None:
    from benchmarks.accelerator import __main__ as command

    def run(part: str, items: Any, seconds: float) -> Any:
        yield {"item": "before", "error": "no driver"}

    with pytest.raises(DeqcoreError, match="no driver"):
        command.measure(asked(device="cuda"), lambda _: None, run)
    with pytest.raises(DeqcoreError, match="Did you mean 'steps'"):
        command.measure(asked(part=["stepz"]), lambda _: None, run)


def test_the_page_has_the_figures_and_what_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.accelerator import __main__ as command

    (tmp_path / "accelerator.json").write_text(json.dumps(results()))
    assert command.main(["--render", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "accelerator.md").read_text()
    assert "Card, 80.0 GiB, 132 multiprocessors, driver 580" in text
    assert "345 MHz before (memory 2619 MHz, 70 W, 30 °C), 1980 MHz while copying" in text
    assert "| conv | deqcore broyden | 14 (14–14) | 28 (28–28) | 2.00 | 4 / 5 | 5.0 / 5.0 |" in text
    assert "| 64×262144 float32 | native | 10 | 2000 | 1 (1–1) | 2000 | 50% | 24 of 24 | 1 |" in text
    assert "| native | 0.020 | broyden | 0.500 | 0.250 |" in text
    assert "- cases, conv: torchdeq broyden: RuntimeError: no bfloat16" in text
    assert "- training, conv: peer: ValueError: x" in text
    assert "- jax, dense: jax is not installed" in text
    assert "no result" not in text
    for name in ("overhead", "bandwidth"):
        assert (tmp_path / f"accelerator-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_figures_there_is_nothing_to_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.accelerator import __main__ as command

    assert command.main(["--render", "--out", str(tmp_path)]) == 2
    assert "Run without --render first" in capsys.readouterr().err
