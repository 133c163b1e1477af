"""Retraining in rounds: data that drifts, weights that stay, a gap that may grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deqcore.errors import ConfigError
from deqcore.study import data, store
from deqcore.study.data.base import Dataset, Split
from deqcore.study.data.drift import drifted
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.settings import DataChoice, read
from deqcore.study.train.loop import CellTraining, audited, rate

DIGITS = data.load(DataChoice(name="digits"))


def cell(rounds: int, **training: Any) -> Cell:
    table = {
        "models": [{"name": "dense", "width": 16}],
        "solvers": ["picard"],
        "strategies": ["jacobian-free"],
        "training": {"epochs": 2, "batch": 128, "audits": 1, **training},
        "drift": {"rounds": rounds, "amount": 0.5},
    }
    return cells(read(table, "x"), UserCode(), ("torch",))[0]


def test_features_drift_along_a_line():
    near, far = drifted(DIGITS, 0.1), drifted(DIGITS, 0.2)
    for part in ("train", "validation", "test"):
        start, one, two = (getattr(each, part) for each in (DIGITS, near, far))
        np.testing.assert_allclose(two.x - start.x, 2 * (one.x - start.x), atol=1e-5)
        assert one.x.dtype == start.x.dtype
        assert (one.y == start.y).all()
    moved, before = near.train.x[:, 0, 3, 4], DIGITS.train.x[:, 0, 3, 4]
    assert stats.linregress(before, moved).rvalue == pytest.approx(1.0)
    moves = float(np.sqrt(np.mean((near.train.x - DIGITS.train.x) ** 2)))
    assert moves == pytest.approx(0.1 * np.sqrt(np.var(DIGITS.train.x) + np.mean(DIGITS.train.x**2)), rel=0.3)
    assert drifted(DIGITS, 0.0) is DIGITS


def test_words_drift_by_changing_places():
    x = np.random.default_rng(0).integers(0, 20, (9, 7))
    split = Split(x[:, :-1], x[:, 1:])
    text = Dataset("t", "tokens", tuple(map(str, range(20))), split, split, split)
    moved = drifted(text, 0.25)
    table = dict(zip(split.x.ravel().tolist(), moved.train.x.ravel().tolist(), strict=True))
    assert sum(old != new for old, new in table.items()) == 5
    assert len(set(table.values())) == len(table)
    assert (moved.train.x[:, 1:] == moved.train.y[:, :-1]).all()


def test_rates_and_audits_restart_in_each_round():
    asked = cell(3, rate=1.0, epochs=4)
    assert [rate(asked, step, 30) for step in range(10)] == [rate(asked, step, 30) for step in range(10, 20)]
    assert rate(asked, 10, 30) == 1.0
    assert [epoch for epoch in range(12) if audited(asked, epoch)] == [0, 4, 8]
    assert asked.epochs == 12


def test_a_single_training_has_the_key_it_always_had():
    one = cell(1)
    assert "drift" not in one.as_dict()
    assert Cell.of(cell(3).as_dict()) == cell(3)
    assert cell(3).key != cell(2).key != one.key


def test_rounds_go_on_where_a_killed_training_stopped(tmp_path: Path):
    pytest.importorskip("torch")
    from deqcore_torch.study import TorchTrainer

    def quiet(_: object) -> None:
        pass

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress["epoch"] == 4 and progress["step"] % 8 == 4:  # in the second half of the second round
            raise Stop

    asked = cell(3)
    whole = CellTraining(asked, DIGITS, TorchTrainer, tmp_path / "whole", quiet).run()
    with pytest.raises(Stop):
        CellTraining(asked, DIGITS, TorchTrainer, tmp_path / "cut", stop).run()
    saved = store.read_progress(tmp_path / "cut")
    assert saved is not None
    assert (saved[1]["epochs"], len(saved[1]["rounds"])) == (3, 1)
    resumed = CellTraining(asked, DIGITS, TorchTrainer, tmp_path / "cut", quiet).run()
    assert resumed["rounds"] == whole["rounds"]
    assert resumed["history"]["steps"]["loss"] == whole["history"]["steps"]["loss"]
    assert len(whole["rounds"]) == 3
    assert whole["test_accuracy"] == whole["rounds"][-1]["test_accuracy"]
    alone = CellTraining(cell(1), DIGITS, TorchTrainer, tmp_path / "alone", quiet).run()
    assert alone["rounds"] == whole["rounds"][:1]


@pytest.mark.parametrize(
    ("drift", "words"),
    [({"rounds": 0}, "rounds = 0"), ({"amount": -1.0}, "amount = -1.0"), ({"round": 3}, "Did you mean 'rounds'")],
)
def test_unfit_settings(drift: dict[str, object], words: str):
    with pytest.raises(ConfigError) as caught:
        read({"drift": drift}, "study.toml")
    assert words in str(caught.value)
