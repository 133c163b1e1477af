"""Callbacks of Lightning and of transformers, driven as those trainers drive them."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest

import deqcore
from deqcore.errors import MissingExtraError
from deqcore.monitor import Monitor
from deqcore.monitor.adapters import lightning, lightning_callback, transformers, transformers_callback
from deqcore.solve.observer import observer


@pytest.fixture(autouse=True)
def _fresh():
    lightning._class.cache_clear()
    transformers._class.cache_clear()
    yield
    lightning._class.cache_clear()
    transformers._class.cache_clear()


def stand_in(monkeypatch, name: str, **members: object) -> None:
    """A package with one class instead of the real one."""
    for part in (name.partition(".")[0], name):
        module = types.ModuleType(part)
        module.__spec__ = ModuleSpec(part, None)
        monkeypatch.setitem(sys.modules, part, module)
    vars(sys.modules[name]).update(members)


class Base:
    """What both libraries' callback classes are: every hook does nothing."""

    def __getattr__(self, name: str):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def solve() -> None:
    deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)))


def fit(callback, steps: int, *, rank_zero: bool = True, fail_at: int | None = None, begin: int = 0) -> None:
    """The hooks of `lightning.pytorch.Trainer.fit`, in its order."""
    trainer = types.SimpleNamespace(is_global_zero=rank_zero, global_step=begin)
    callback.on_fit_start(trainer, None)
    callback.on_train_start(trainer, None)
    try:
        for index in range(steps):
            callback.on_train_batch_start(trainer, None, None, index)
            if index == fail_at:
                raise ValueError("loss is NaN")
            solve()
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, None, None, None, index)
    except ValueError as error:
        callback.on_exception(trainer, None, error)
        raise
    callback.on_train_end(trainer, None)
    callback.on_fit_end(trainer, None)


def train(callback, steps: int, *, rank_zero: bool = True, begin: int = 0) -> None:
    """The hooks of `transformers.Trainer.train`, in its order."""
    state = types.SimpleNamespace(is_world_process_zero=rank_zero, global_step=begin)
    callback.on_train_begin(None, state, None, model=None)
    for _ in range(steps):
        callback.on_step_begin(None, state, None, model=None)
        solve()
        state.global_step += 1
        callback.on_step_end(None, state, None, model=None)
    callback.on_train_end(None, state, None, model=None)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning", "transformers"])
def loop(request, monkeypatch):
    """A library: how its callback is made, and how it drives one."""
    name = "TrainerCallback" if request.param == "transformers" else "Callback"
    if request.param == "pytorch_lightning":
        monkeypatch.setattr(lightning, "is_installed", lambda package: package == "pytorch_lightning")
    stand_in(monkeypatch, request.param, **{name: Base})
    return (transformers_callback, train) if request.param == "transformers" else (lightning_callback, fit)


def test_a_run_is_observed_with_the_trainers_steps_and_closed(loop) -> None:
    make, drive = loop
    monitor = Monitor(sinks=[], every=2)
    callback = make(monitor)
    assert isinstance(callback, Base)
    drive(callback, 5)
    assert [row.step for row in monitor.rows] == [0, 1, 2, 3, 4]
    assert observer() is None
    solve()
    assert len(monitor.rows) == 5


def test_a_restored_run_goes_on_counting(loop) -> None:
    make, drive = loop
    monitor = Monitor(sinks=[])
    drive(make(monitor), 2, begin=7)
    assert [row.step for row in monitor.rows] == [7, 8]


def test_other_ranks_observe_nothing(loop) -> None:
    make, drive = loop
    monitor = Monitor(sinks=[])
    drive(make(monitor), 3, rank_zero=False)
    assert not monitor.rows
    assert observer() is None


def test_a_monitor_of_the_users_own_block_is_left_to_it(loop) -> None:
    make, drive = loop
    with Monitor(sinks=[]) as monitor:
        drive(make(monitor), 2)
        assert observer() is monitor
        solve()
    assert [row.step for row in monitor.rows] == [0, 1, 2]


def test_lightning_closes_the_monitor_when_training_fails(monkeypatch) -> None:
    stand_in(monkeypatch, "lightning.pytorch", Callback=Base)
    monitor = Monitor(sinks=[], every=100)
    with pytest.raises(ValueError, match="loss is NaN"):
        fit(lightning_callback(monitor), 5, fail_at=3)
    assert len(monitor.rows) == 3
    assert observer() is None


def test_missing_libraries_are_reported(monkeypatch) -> None:
    for module in (lightning, transformers):
        monkeypatch.setattr(module, "is_installed", lambda package: False)
    with pytest.raises(MissingExtraError, match=r"'lightning'.*deqcore\[lightning\]"):
        lightning_callback(Monitor(sinks=[]))
    with pytest.raises(MissingExtraError, match=r"'transformers'.*deqcore\[transformers\]"):
        transformers_callback(Monitor(sinks=[]))
