"""Tables and plots of rows with synthetic numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from deqcore.bench import plots, report
from deqcore.bench.rows import BenchRow
from deqcore.bench.sweeps import Point
from deqcore.errors import MissingExtraError


def row(
    contender: str = "deqcore broyden", seconds: tuple[float, ...] = (0.004, 0.002, 0.003), **changes: object
) -> BenchRow:
    reference = [0.0001] * len(seconds)
    made = {"evaluations": 10, "reached": True, "state": 2**20, "memory": 3 * 2**20, **changes}
    return BenchRow(
        framework="numpy", case="dense", contender=contender, residual_max=9e-6, residual_median=1e-6, tolerance=1e-5,
        first_seconds=0.5, seconds=list(seconds), reference=reference, disturbance=[0.0, 0.9, 0.01], **made,
    )  # type: ignore[arg-type]  # fmt: skip


def test_cells_are_medians_and_quartiles() -> None:
    found = report.cells(row())
    assert found["ms (quartiles)"] == "3 (2.5–3.5)"
    assert found["overhead (quartiles)"] == "3 (2.5–3.5)"  # 3 ms / (10 × 0.1 ms)
    assert found["ms per f"] == "0.1"
    assert found["memory"] == "3.0 states"
    assert found["residual (max / median)"] == "9.0e-06 / 1.0e-06"


def test_what_was_not_timed_says_why() -> None:
    assert report.cells(row(seconds=(), reached=False))["ms (quartiles)"] == "residual not reached"
    assert report.cells(row(seconds=(), reached=False, error="TypeError: x"))["ms (quartiles)"] == "raised TypeError"
    assert report.cells(row(state=16))["memory"] == ""


def test_a_markdown_table_has_a_line_per_row() -> None:
    lines = report.markdown([report.cells(row("a|b")), report.cells(row())]).splitlines()
    assert len(lines) == 4
    assert "a\\|b" in lines[2]
    assert all(line.count("|") - line.count("\\|") == len(report.COLUMNS) + 1 for line in lines)


def test_disturbed_rounds_are_counted_once_per_comparison() -> None:
    assert report.disturbed([row("a"), row("b")]) == 1


def test_machine_text() -> None:
    machine = {"cpu": "C", "cores": 2, "memory_gib": None, "system": "S", "python": "3.11", "packages": {"numpy": "2"}}
    assert report.machine_text({**machine, "date": "today"}) == "C, 2 cores, S, Python 3.11; numpy 2; today."


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("deqcore broyden", "peer broyden")
    plots.overheads([row(name) for name in names] + [row("none", seconds=())], tmp_path / "a.png", "title")
    made = [
        Point("numpy", "dense", name, 4, 8, k, k + 1, 10.0**-k, 1e-3 * k, 1e-4) for name in names for k in (1, 2, 3)
    ]
    plots.curves(made, tmp_path / "b.png", "title", "evaluations", "residual")
    plots.curves(made, tmp_path / "c.png", "title", "seconds", "residual")
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "is_installed", lambda name: False)
    assert not plots.available()
    with pytest.raises(MissingExtraError, match=r"deqcore\[study\]"):
        plots.overheads([], tmp_path / "a.png", "title")
