"""Results on disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from deqcore.study import store
from deqcore.study.store import Store, StudyError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "result.json"
    store.write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudyError, match="No space left on device"):
        store.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_json_that_other_readers_refuse_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="Out of range float"):
        store.write_json(tmp_path / "a.json", {"loss": float("nan")})


def test_progress_comes_back_bit_by_bit(tmp_path: Path):
    tensors = {"weight.W": np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)}
    history = {"epochs": 2, "loss": [0.1, 1 / 3]}
    store.write_progress(tmp_path, tensors, history)
    found, stored = store.read_progress(tmp_path) or ({}, {})
    assert stored == history
    assert found["weight.W"].tobytes() == tensors["weight.W"].tobytes()


def test_two_studies_in_one_directory(tmp_path: Path):
    with Store(tmp_path).lock(), pytest.raises(StudyError, match="Another study runs"), Store(tmp_path).lock():
        pass
    with Store(tmp_path).lock():  # free again
        pass


def test_results_of_another_version_are_refused(tmp_path: Path):
    place = Store(tmp_path)
    place.open({"settings": {}})
    place.open({"settings": {}})  # the same version continues
    about = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps(about | {"deqcore": "0.0.1"}))
    with pytest.raises(StudyError, match=r"deqcore 0\.0\.1"):
        place.open({"settings": {}})


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StudyError, match="holds no study"):
        Store(tmp_path).open({})
