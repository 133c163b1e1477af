"""The comparison with peers: verdicts, the page, and messages on missing parts. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def timed(framework: str, case: str, contender: str, seconds: float, evaluations: int = 10) -> dict[str, Any]:
    return {
        "framework": framework, "case": case, "contender": contender, "evaluations": evaluations, "residual_max": 9e-6,
        "residual_median": 1e-6, "reached": True, "tolerance": 1e-5, "first_seconds": 0.1, "memory": 5 * 2**20,
        "state": 2**20, "seconds": [seconds] * 3, "reference": [0.001] * 3, "disturbance": [0.0] * 3, "dropped": 0,
        "error": "",
    }  # fmt: skip


def step(layer: str, forward: float, backward: float, **changes: object) -> dict[str, Any]:
    return {
        "layer": layer, "case": "conv", "forward_evaluations": 11, "backward_evaluations": 0, "solver_evaluations": 10,
        "residual": 9e-5, "cosine": 0.99, "error": 0.08, "note": "",
        "forward": [forward] * 3, "backward": [backward] * 3,
        "step": [forward + backward] * 3, "reference": [0.001] * 3, "disturbance": [0.0] * 3, **changes,
    }  # fmt: skip


MACHINE = {
    "machine": {
        "cpu": "C", "cores": 2, "memory_gib": 4.0, "system": "S", "python": "3", "packages": {}, "date": "d",
        "load_before": [0.1],
    },
    "threads": 2,
    "commit": "abc",
    "seconds": 1.0,
}  # fmt: skip


def results(quick: bool = False) -> dict[str, Any]:
    rows = [
        timed("torch", "conv", "deqcore auto", 0.012),
        timed("torch", "conv", "deqcore broyden", 0.014),
        timed("torch", "conv", "torchdeq fixed_point_iter", 0.0104),
        timed("torch", "conv", "torchdeq broyden", 0.060),
        {**timed("torch", "conv", "xitorch broyden1", 0.0), "seconds": [], "reached": False},
        timed("torch", "dense", "deqcore anderson", 0.018, 22),
        timed("torch", "mixed-conv", "deqcore picard", 0.100),
        timed("torch", "mixed-conv", "deqcore picard (compact)", 0.030),
    ]
    facts = {
        "limited memory": {"seeds": 200, "failures": 3, "median steps": 80.0, "torchdeq failures": 74},
        "slow modes": {"newton-krylov": {"evaluations": 60}, "broyden": {"evaluations": 60}},
        "bandwidth": {"bytes per second": 2**30},
        "memory of the default": {"steps": 24, "picard": 9.0, "auto": 12.0},
        "stored vectors": {"steps": 24, "float32": 31.0, "bfloat16": 19.0, "torchdeq": 113.0},
        "not a contraction": {"newton-krylov": {"converged": False, "distance": 1e-12}},
    }
    steps = [
        step("deqcore broyden, certified reuse", 0.02, 0.01),
        step("deqcore broyden, plain reuse", 0.02, 0.011),
        step("deqcore broyden, jacobian-free", 0.02, 0.010),
        step("deqcore, defaults", 0.02, 0.01),
        step("torchdeq broyden, IFT broyden", 0.05, 0.05),
        step("torchdeq defaults", 0.018, 0.002, error=0.6),
    ]
    jax = [timed("jax", "dense", "deqcore broyden", 0.03), timed("jax", "dense", "jaxopt anderson", 0.02)]
    sections = {
        "cases-torch": {**MACHINE, "rows": rows, "notes": {"conv": "a block"}},
        "cases-jax": {**MACHINE, "rows": jax, "notes": {"dense": "a cell"}},
        "facts-torch": {**MACHINE, **facts},
        "training-torch": {**MACHINE, "steps": steps},
        "curves-jax": {"error": "its process ended with code 1"},
    }
    return {"quick": quick, "sections": sections}


def test_verdicts_follow_from_the_numbers() -> None:
    from benchmarks.targets import targets

    found = {target.what: target for target in targets(results())}
    assert found["broyden: overhead, conv"].figure == pytest.approx(1.4)  # 14 ms / (10 × 1 ms)
    assert found["broyden: overhead, conv"].verdict == "met"
    assert found["broyden: overhead, conv"].peer.startswith("torchdeq 6")
    assert found["broyden: seconds / torchdeq's, equal residual, conv"].figure == pytest.approx(14 / 60)
    assert found["broyden: overhead, dense"].verdict == "not measured"
    assert found["anderson: evaluations to 1e-5, dense"].verdict == "met"
    assert found["broyden: failures with 10 pairs, linear ρ = .95, 200 steps"].verdict == "missed: 1.50 × the limit"
    assert found["newton-krylov: evaluations and products, 20 slow modes, 1e-8"].verdict == "missed: 1.00 × the limit"
    assert found["newton-krylov: distance to the solution where f does not contract"].verdict.startswith("missed")
    assert found["broyden: states of memory after 24 steps, float32 history"].verdict == "met"
    assert found["broyden: states of memory after 24 steps, bfloat16 history"].verdict == "missed: 1.03 × the limit"
    assert found["picard: seconds with compaction / without, 1 hard sample of 64"].verdict == "missed: 1.20 × the limit"
    assert found["JAX broyden: seconds / jaxopt's Anderson, dense"].figure == pytest.approx(1.5)
    assert found["backward of plain reuse / of jacobian-free, conv"].verdict == "met"
    beside = found["default: seconds / our best other solver, torch, conv"]
    assert beside.figure == pytest.approx(12 / 14)
    assert beside.peer == "deqcore broyden"
    # The peer takes 10.4 ms of which 10 are spent in f, so that 0.95 of it cannot be reached: 1.05 × 10 ms can.
    assert found["default: seconds / the best peer, torch, conv"].limit == pytest.approx(1.05 * 10 / 10.4)
    assert found["default: seconds / the best peer, torch, conv"].figure == pytest.approx(12 / 10.4)
    assert found["default: states of memory beyond picard's where f contracts well"].figure == 3
    defaults = found["training step, our defaults / torchdeq's default, conv"]
    assert defaults.figure == pytest.approx(1.5)
    assert defaults.peer == "gradient error 0.08, torchdeq's 0.6"
    heavy = found["training step, certified reuse (0.1) / torchdeq Broyden forward and backward, conv"]
    assert heavy.figure == pytest.approx(0.3)
    assert found["evaluations of f in a training step beyond the solver's"].figure == 1


def test_the_least_overhead_counts_the_bytes_of_each_step() -> None:
    from benchmarks.roofline import least_overhead, states_moved

    assert states_moved("picard", 3) == 6
    assert states_moved("anderson", 8) == 8 * 7 + 2 * (0 + 1 + 2 + 3 + 4 + 5 + 6 + 6)
    # 6 states of 1 MiB at 1 GiB/s are 5.9 ms beside 3 evaluations of 2 ms.
    assert least_overhead("picard", 3, 2**20, [0.002] * 3, 2**30) == pytest.approx(1 + 6 / 1024 / 0.006)


def test_every_layer_of_the_training_step_takes_its_settings() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.cells import case
    from benchmarks.harnesses import torch_harness
    from benchmarks.training import layers

    ready = torch_harness().ready(case("conv", quick=True))
    for parameter in ready.params.values():
        parameter.requires_grad_()
    for name, (make, _) in layers(ready).items():
        value = make(1e-2)(ready).value
        (gradient, *_) = torch.autograd.grad(value.square().sum(), list(ready.params.values()))
        assert gradient.isfinite().all(), name


def test_the_memory_that_is_measured_belongs_to_settings_that_exist() -> None:
    pytest.importorskip("torch")
    from benchmarks.facts import default_memory, stored_vectors

    assert set(default_memory(quick=True)) == {"steps", "picard", "auto"}
    assert set(stored_vectors(quick=True, steps=4)) >= {"steps", "float32", "bfloat16"}


def test_a_solve_with_compaction_is_compared_with_others_that_compact() -> None:
    from benchmarks.targets import targets

    measured = results()
    for contender, seconds in (("deqcore auto", 0.120), ("deqcore auto (compact)", 0.060)):
        measured["sections"]["cases-torch"]["rows"].append(timed("torch", "mixed-conv", contender, seconds))
    ratios = {target.what: target.figure for target in targets(measured)}
    assert ratios["default: seconds / our best other solver, torch, mixed-conv"] == pytest.approx(1.2)
    compact = "default, compact: seconds / our best other solver, compact, torch, mixed-conv"
    assert ratios[compact] == pytest.approx(2.0)


def test_the_floor_of_a_step_stands_beside_its_ratio() -> None:
    from benchmarks.targets import targets

    measured = results()
    ours, peer = measured["sections"]["training-torch"]["steps"][3:], step("torchdeq defaults", 0.02, 0.0, error=0.6)
    ours[0].update(vjps=3, floor=[0.025] * 3)
    measured["sections"]["training-torch"]["steps"].append(peer)
    (beside,) = [
        t.peer for t in targets(measured) if t.what == "training step, our defaults / torchdeq's default, conv"
    ]
    assert beside == "gradient error 0.08, torchdeq's 0.6; floor 1.25"


def test_nothing_measured_is_a_verdict_too() -> None:
    from benchmarks.targets import targets

    found = targets({"quick": False, "sections": {}})
    assert {target.verdict for target in found} == {"not measured"}


def test_the_page_has_the_tables_and_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import page

    monkeypatch.setattr(page.plots, "available", lambda: False)
    page.write(results(quick=True), tmp_path)
    text = (tmp_path / "index.md").read_text()
    assert "| broyden: overhead, conv | ≤ 1.4 | 1.4 (1.4–1.4) |" in text
    assert "is the fastest on 0 of 1 problems" in text
    assert (
        "| torch | conv | 12 ms | torchdeq fixed_point_iter: 0.87 ×; xitorch: no solver reached the residual |" in text
    )
    assert text.index("0.87 ×") < text.index("C, 2 cores") < text.index("## Targets")
    verdicts = [line.split(" | ")[-1] for line in text[text.index("## Targets") :].splitlines() if " | met |" in line]
    assert len(verdicts) > 5, "no target is met"
    assert text.rindex("| missed") < text.index("| met |"), "a missed target stands below one that is met"
    assert "no result" in text
    assert "**Not measured: curves-jax (its process ended with code 1).**" in text
    assert "C, 2 cores, 4.0 GiB" in text
    assert "commit abc" in text


def test_rendering_needs_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.__main__ import main

    found = results()
    found["sections"].pop("curves-jax")
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert main(["--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "torch-overhead.png").is_file()
    assert "torch-overhead.png" in (tmp_path / "index.md").read_text()
    assert "banax is left out: it needs Python 3.12" in capsys.readouterr().err


def test_missing_libraries_are_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.__main__ as command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    lines = command.absent()
    assert any("pip install 'deqcore[torch]'" in line for line in lines)
    assert any("torchdeq, xitorch" in line and "benchmarks/requirements.txt" in line for line in lines)
    assert command._measure("cases-torch", 1, True) == {"error": "torch is not installed"}


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    assert main(["--section", "cases-torc", "--out", str(tmp_path)]) == 2
    assert "Did you mean 'cases-torch'?" in capsys.readouterr().err
    assert main(["--threads", "0", "--out", str(tmp_path)]) == 2
    assert "a number from 1 to" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
