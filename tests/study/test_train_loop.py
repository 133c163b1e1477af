"""One cell in training, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deqcore.study import data, store
from deqcore.study.executors.worker import train
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.settings import DataChoice, read
from deqcore.study.train.loop import CellFailure, CellTraining, audited, batches, initial_weights

DIGITS = data.load(DataChoice(name="digits"))


def cell(backend: str, strategy: str = "exact-ift", **training: Any) -> Cell:
    table = {
        "models": [{"name": "dense", "width": 32}],
        "training": {"epochs": 2, "batch": 128, "audits": 0, **training},
    }
    return next(each for each in cells(read(table, "x"), UserCode(), (backend,)) if each.strategy.name == strategy)


def trainer(backend: str) -> Any:
    pytest.importorskip(backend)
    if backend == "torch":
        from deqcore_torch.study import TorchTrainer

        return TorchTrainer
    pytest.importorskip("optax")
    from deqcore_jax.study import JaxTrainer

    return JaxTrainer


_made: dict[str, tuple[Any, Any]] = {}


def reused(backend: str) -> Any:
    """The trainer's class, except for what is compiled: every test starts from the same weights, with one strategy."""
    made = trainer(backend)

    def make(*args: Any) -> Any:
        if backend not in _made:
            _made[backend] = (first := made(*args)), first.save()
        found, start = _made[backend]
        found.restore(start)
        return found

    return make


def quiet(_: object) -> None:
    pass


@pytest.fixture(params=["torch", "jax"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_backend_starts_from_the_same_weights_and_sees_the_same_batches():
    one, two = cell("torch"), cell("jax")
    first, second = initial_weights(one, DIGITS)[1], initial_weights(two, DIGITS)[1]
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert (batches(one, 1000, 3) == batches(two, 1000, 3)).all()


def test_an_epoch_sees_each_sample_once_and_epochs_differ():
    one, two = batches(cell("torch"), 1000, 0), batches(cell("torch"), 1000, 1)
    assert one.shape == (7, 128)
    assert len(np.unique(one)) == one.size
    assert (one != two).any()


def test_the_dense_cell_contracts_at_the_start():
    weights = initial_weights(cell("torch"), DIGITS)[1]
    np.testing.assert_allclose(np.linalg.svd(weights["W"], compute_uv=False)[0], 0.8, rtol=1e-6)


def test_audits_are_spread_over_the_training():
    assert [epoch for epoch in range(10) if audited(cell("torch", epochs=10, audits=4), epoch)] == [0, 2, 5, 8]
    assert not any(audited(cell("torch", epochs=10), epoch) for epoch in range(10))


def test_the_first_steps_agree_between_torch_and_jax(tmp_path: Path):
    losses = []
    for backend in ("torch", "jax"):
        run = CellTraining(cell(backend, epochs=3), DIGITS, reused(backend), tmp_path / backend, quiet)
        losses.append(run.run()["history"]["steps"]["loss"][:20])
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.3  # they learn, so the agreement is not that of standing still


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "jacobian-free"])
def test_torch_measures_what_each_strategy_did(tmp_path: Path, strategy: str):
    found = CellTraining(cell("torch", strategy, audits=1), DIGITS, trainer("torch"), tmp_path, quiet).run()
    figures = found["figures"]
    steps = found["history"]["steps"]
    assert len(steps["loss"]) == 2 * (len(DIGITS.train) // 128)
    assert found["times"]["training"] == pytest.approx(
        sum(map(sum, (steps[p] for p in ("forward", "backward", "update"))))
    )
    assert 4 < figures["evaluations"] <= figures["evaluations_most"] <= 41
    if strategy == "jacobian-free":
        assert figures["vjps"] == 0
        assert 0.5 < found["cosine"] < 0.999
    if strategy == "exact-ift":
        assert figures["vjps"] > 4
        assert figures["adjoint_residual"] < 1e-4
        assert found["cosine"] > 0.99999
    if strategy == "broyden-reuse":
        assert 1 <= figures["vjps"] < 10
        assert figures["adjoint_residual"] < 0.1
        assert found["cosine"] > 0.99
    assert 0.2 < found["history"]["audits"][0]["radius"] < 0.8  # the spectral norm starts at 0.8
    assert found["peak_memory"] > 50e6
    (audit,) = found["history"]["audits"]
    law = audit["ratio"] ** 2 - 2 * audit["ratio"] * audit["cosine"] + 1
    assert audit["error"] ** 2 == pytest.approx(law, rel=1e-3, abs=1e-8)
    assert (audit["error"] < 1e-3) == (strategy == "exact-ift")


def test_the_memory_of_a_step_repeats_and_grows_with_the_batch():
    import torch

    made = trainer("torch")
    run = CellTraining(cell("torch"), DIGITS, made, Path("unused"), quiet)

    def memory(count: int) -> int:
        return run.trainer.step_memory(DIGITS.train.x[:count], DIGITS.train.y[:count])

    memory(8)  # the first step makes Adam's state
    found = {count: memory(count) for count in (8, 64, 128)}
    assert found == {count: memory(count) for count in (8, 64, 128)}
    gradients = 4 * run.parameters
    assert gradients < found[8] < found[64] < found[128] < 32 * found[8]  # and with the steps of the slowest sample

    from deqcore_torch.study import _highest

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.zeros(1000)
        second = torch.zeros(3000)
        del first
        third = torch.zeros(2000)
        del second, third
    assert _highest(profile) == pytest.approx(4 * 5000, abs=256)  # 3000 + 2000 numbers at a time; blocks are rounded


def test_xlas_plan_holds_at_least_the_gradients():
    run = CellTraining(cell("jax"), DIGITS, reused("jax"), Path("unused"), quiet)
    x, y = DIGITS.train.x[:128], DIGITS.train.y[:128]
    found = run.trainer.step_memory(x, y)
    assert found == run.trainer.step_memory(x, y)
    assert 4 * run.parameters < found < 50e6


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, backend: str):
    make = reused(backend)
    asked = cell(backend, epochs=3)
    whole = CellTraining(asked, DIGITS, make, tmp_path / "whole", quiet).run()

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress["epoch"] == 3 and progress["step"] % 8 == 4:
            raise Stop

    with pytest.raises(Stop):
        CellTraining(asked, DIGITS, make, tmp_path / "cut", stop).run()
    saved = store.read_progress(tmp_path / "cut")
    assert saved is not None
    assert saved[1]["epochs"] == 2
    resumed = CellTraining(asked, DIGITS, make, tmp_path / "cut", quiet).run()
    assert resumed["history"]["steps"]["loss"] == whole["history"]["steps"]["loss"]
    assert resumed["test_loss"] == whole["test_loss"]
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    one, two = (store.read_progress(tmp_path / name) for name in ("whole", "cut"))
    assert one is not None
    assert two is not None
    assert all(one[0][name].tobytes() == two[0][name].tobytes() for name in one[0])


def test_a_loss_that_is_no_number_ends_the_cell_with_its_reason(tmp_path: Path):
    trainer("torch")
    asked = cell("torch", rate=3e37)
    with pytest.raises(CellFailure, match=r"the loss became (nan|inf) at step \d+"):
        CellTraining(asked, DIGITS, trainer("torch"), tmp_path, quiet).run()
    found = train(asked, tmp_path, quiet)
    assert found["status"] == "failed"
    assert found["reason"] == "diverged"
    assert store.read_json(tmp_path / "result.json")["detail"] == found["detail"]


def test_the_gradient_is_that_of_finite_differences(tmp_path: Path, backend: str):
    run = CellTraining(cell(backend), DIGITS, reused(backend), tmp_path, quiet)
    x, y = DIGITS.train.x[:128], DIGITS.train.y[:128]
    config = cell(backend).config()
    _, found = run.trainer.gradient(x, y, config)
    saved = run.trainer.save()
    names = sorted(name for name in saved if name.startswith("weight."))
    direction = {name: np.random.default_rng(1).standard_normal(saved[name].shape) for name in names}
    losses = []
    for sign in (1, -1):
        moved = {name: (saved[name] + sign * 1e-2 * direction[name]).astype(np.float32) for name in names}
        run.trainer.restore(saved | moved)
        losses.append(run.trainer.gradient(x, y, config)[0])
    expected = float(found @ np.concatenate([direction[name].ravel() for name in names]))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(expected, rel=0.02)
