"""The published table of known failures is what happens, and the suite names what an author did wrong."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from deqcore import plugins
from deqcore.plugins.builtin import SOLVERS
from deqcore.testing import known_failures
from deqcore.testing.suite.import_cost import check_light

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance" / "known-failures.md"


def rows(text: str, backend: str) -> set[tuple[str, ...]]:
    found = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines())
    return {row for row in found if len(row) == 6 and row[2] == backend}


@pytest.mark.parametrize("solver", [spec.name for spec in SOLVERS])  # one at a time: JAX keeps all that it compiles
@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_the_table_is_true(backend, solver):
    pytest.importorskip(backend)
    published = rows(PAGE.read_text(encoding="utf-8"), backend)
    assert published
    found = known_failures.failures([backend], [solver])
    assert {row for row in published if row[0] == solver} == set(map(tuple, found))


def test_every_reason_was_looked_into():
    assert "not looked into" not in PAGE.read_text(encoding="utf-8")


def test_a_solver_that_imports_a_framework_at_the_top_is_named(tmp_path, monkeypatch):
    (tmp_path / "torch.py").touch()  # found before the framework, whose import takes seconds
    (tmp_path / "heavy_solver.py").write_text(
        textwrap.dedent(
            """
            import torch
            from deqcore.solvers.picard import Picard as Heavy
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins.register(plugins.SolverSpec("heavy", "heavy_solver:Heavy"))
    try:
        with pytest.raises(AssertionError, match="heavy_solver imports torch"):
            check_light("solver", "heavy")
    finally:
        plugins.reset()
