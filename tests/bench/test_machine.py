"""What a machine says about itself, and where results may go."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deqcore.bench import machine
from deqcore.bench.folder import result_folder
from deqcore.errors import ConfigError


def test_a_description_names_versions_that_are_installed_only() -> None:
    found = machine.describe(["scipy", "no-such-distribution"])
    packages = found["packages"]
    assert isinstance(packages, dict)
    assert packages["numpy"] == np.__version__
    assert "scipy" in packages
    assert "no-such-distribution" not in packages
    assert found["usable_cores"] == machine.usable_cores() >= 1
    assert found["cores"] == os.cpu_count()
    assert str(found["python"]) == sys.version.split()[0]


def test_a_system_without_proc_is_described_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    found = machine.describe()
    assert found["memory_gib"] is None
    assert found["cpu"]
    assert machine.peak_memory(lambda: None) is None
    with machine.Bystanders() as others:
        pass
    assert math.isnan(others.share)


@pytest.mark.parametrize(("busy", "share"), [(10.0, 0.25), (2.0, 0.0)])
def test_bystanders_are_what_was_busy_and_not_us(monkeypatch: pytest.MonkeyPatch, busy: float, share: float) -> None:
    # 8 seconds on 4 cores; the machine was busy for 10 s of processor time, 2 of them ours: 8 of 32 were others'.
    monkeypatch.setattr(machine, "_busy_seconds", iter([100.0, 100.0 + busy]).__next__)
    monkeypatch.setattr(time, "process_time", iter([5.0, 7.0]).__next__)
    monkeypatch.setattr(time, "perf_counter", iter([50.0, 58.0]).__next__)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with machine.Bystanders() as others:
        pass
    assert others.share == pytest.approx(share)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_peak_memory_sees_what_was_held_only_for_a_while() -> None:
    size = 64 * 2**20

    def task() -> None:
        np.ones(size, np.uint8)

    grown = machine.peak_memory(task)
    if grown is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.9 * size < grown < 1.5 * size


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_are_limited_by_the_cores(threads: int) -> None:
    with pytest.raises(ConfigError, match="a number from 1 to"):
        machine.limit_threads(threads)


def test_a_limit_of_threads_reaches_the_pools() -> None:
    script = (
        "from deqcore.bench.machine import limit_threads; limit_threads(1); import os\n"
        "print(os.environ['OMP_NUM_THREADS'], len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert out.split() == ["1", "1"]


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    assert result_folder(tmp_path / "a" / "b").is_dir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"--out must be a folder \(.* is a file\)"):
        result_folder(tmp_path / "taken")
    with pytest.raises(ConfigError, match="cannot be made"):
        result_folder(tmp_path / "taken" / "below")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not writable"):
        result_folder(tmp_path)
