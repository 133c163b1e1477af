"""The published table of known failures is what happens, and the suite names what an author did wrong."""

from __future__ import annotations

import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.plugins.builtin import SOLVERS
from deqcore.testing import known_failures
from deqcore.testing.problems import golden, names, raveled
from deqcore.testing.suite.fixtures import Kit
from deqcore.testing.suite.import_cost import check_light
from deqcore.testing.tolerances import tolerance

try:
    import jax
except ImportError:
    jax = None

NAMES = [spec.name for spec in SOLVERS]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance" / "known-failures.md"


def rows(text: str, backend: str) -> set[tuple[str, ...]]:
    found = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines())
    return {row for row in found if len(row) == 6 and row[2] == backend}


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_the_table_is_true(backend, solver):
    pytest.importorskip(backend)
    published = rows(PAGE.read_text(encoding="utf-8"), backend)
    assert published
    found = known_failures.failures([backend], [solver])
    assert {row for row in published if row[0] == solver} == set(map(tuple, found))


class OneProgram:
    """All golden problems as one function of JAX, so that a solver is compiled once a dtype and not for each problem.

    States are padded with samples and numbers that are 0, where f is 0: they change no norm, product or status.
    """

    def __init__(self, dtype):
        self.kit, self.dtype = Kit(deqcore.get_backend(backend="jax")), dtype
        self.data = {name: self.kit.data(golden(name), dtype) for name in names()}
        self.starts = {name: raveled(golden(name).problem.z0, self.batch(name)) for name in names()}
        self.shape = tuple(max(z.shape[axis] for z in self.starts.values()) for axis in (0, 1))

    def batch(self, name):
        return len(golden(name).truth.healthy)

    def padded(self, z):
        return jax.numpy.pad(z, [(0, whole - part) for whole, part in zip(self.shape, z.shape, strict=True)])

    def f(self, z, number, every):
        branches = [partial(self.branch, name, args) for name, args in zip(self.data, every, strict=True)]
        return jax.lax.switch(number, branches, z)

    def branch(self, name, args, z):
        f, z0, _ = self.data[name]
        leaves, structure = jax.tree.flatten(z0)
        batch, width = self.starts[name].shape
        ends = np.cumsum([leaf[0].size for leaf in leaves])[:-1]
        parts = jax.numpy.split(z[:batch, :width], ends, axis=1)
        state = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        found = jax.tree.leaves(f(jax.tree.unflatten(structure, state), *args))
        return self.padded(jax.numpy.concatenate([leaf.reshape(batch, -1) for leaf in found], axis=1))

    def statuses(self, solver, name):
        available = golden(name)
        rtol = tolerance(float(np.finfo(self.dtype).eps), available.truth.jacobian.shape[1])
        z0 = self.padded(self.kit.array(self.starts[name], self.dtype))
        args = jax.numpy.int32(list(self.data).index(name)), [args for _, _, args in self.data.values()]
        sol = self.kit.solve(self.f, z0, *args, solver=solver, rtol=rtol, max_steps=known_failures.MAX_STEPS)
        return self.kit.numpy(sol.status)[: self.batch(name)]


@pytest.mark.slow
@pytest.mark.parametrize("solver", NAMES)
def test_the_table_is_true_for_jax(solver):
    pytest.importorskip("jax")
    published = rows(PAGE.read_text(encoding="utf-8"), "jax")
    assert published
    found = set()
    with deqcore.get_backend(backend="jax").harness.high_precision(), np.errstate(all="ignore"):
        for dtype in known_failures.DTYPES:
            program = OneProgram(dtype)
            for name in names():
                found |= set(known_failures.failure(solver, name, "jax", dtype, program.statuses(solver, name)))
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
