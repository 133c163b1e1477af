"""What a solve costs the machine without f: bytes kept, waits for a device."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.abc.linalg import SmallLinalg
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.types import StoppingCriteria

torch = pytest.importorskip("torch")


@pytest.fixture
def backend():
    return deqcore.get_backend(backend="torch")


def spectrum(n, seed=0):
    """A symmetric matrix with eigenvalues −0.9 … 0.9, so that no method is done soon."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return torch.from_numpy((q * np.linspace(-0.9, 0.9, n)) @ q.T).to(torch.float32)


def stored(state):
    """Bytes in the histories of vectors as wide as the state."""
    return sum(chunk.nbytes for chunk in state.basis.store.chunks)


@pytest.mark.parametrize(("dtype", "size"), [(None, 4), ("bfloat16", 2)])
@pytest.mark.parametrize("steps", [1, 6, 17])
def test_broyden_keeps_one_vector_per_step(backend, dtype, size, steps):
    n = 8192  # wide enough that chunks hold four slots
    rates = torch.linspace(-0.9, 0.9, n)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, n))).float()
    solver = Broyden(history_size=100, history_dtype=dtype)
    with torch.no_grad():
        end = iterate(backend, solver, lambda z: rates * z + x, 0 * x, StoppingCriteria(0.0, max_steps=steps))
    vectors = steps + 1
    slots = stored(end.carry.state) / (2 * n * size)
    assert vectors <= slots < vectors + 4
    # What is wide beside the history: z, fz, and the best of both, which are mostly the same.
    wide = {a.data_ptr() for a in (end.carry.z, end.carry.fz, end.carry.best_z, end.carry.best_fz)}
    assert len(wide) <= 4


@pytest.mark.parametrize("solver", [Broyden(), Anderson()], ids=repr)
def test_a_bfloat16_history_reaches_what_float32_reaches(backend, solver):
    w = spectrum(64)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((8, 64))).float()
    narrow = type(solver)(history_dtype="bfloat16")
    with torch.no_grad():
        full, half = (
            iterate(backend, s, lambda z: z @ w + x, 0 * x, StoppingCriteria(1e-5, max_steps=200))
            for s in (solver, narrow)
        )
    truth = np.linalg.solve(np.eye(64) - w.double().numpy(), x.double().numpy().T).T
    for found in (full, half):
        assert (found.status == 1).all()
        np.testing.assert_allclose(found.fz.numpy(), truth, atol=2e-3)
    assert half.steps.max() <= 2 * full.steps.max()


class Elsewhere:
    """Counts what would wait for a device: every look of the host at a tensor's numbers."""

    def __init__(self, monkeypatch, backend):
        self.waits = 0
        for name in ("__bool__", "item", "tolist", "nonzero", "__int__", "__float__"):
            self._watch(monkeypatch, name)
        # The backend sees the host's own memory: pretend that it does not.
        monkeypatch.setattr(type(backend.host), "numpy_view", lambda self, x: None)
        monkeypatch.setattr(
            type(backend),
            "select",
            lambda self, mask, new, old: torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old),
        )
        monkeypatch.setattr(type(backend.linalg), "invert", SmallLinalg.invert)

    def _watch(self, monkeypatch, name):
        real = getattr(torch.Tensor, name)

        def watched(tensor, *args, **kwargs):
            self.waits += 1
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)


@pytest.mark.parametrize("every", [1, 4, 8])
@pytest.mark.parametrize(
    "solver", [Anderson(), Broyden(history_size=40), Broyden(history_size=4), Broyden(history_size=2)], ids=repr
)
def test_a_solve_waits_no_more_often_than_it_checks(monkeypatch, backend, solver, every):
    w = spectrum(32)
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 32))).float()
    watch = Elsewhere(monkeypatch, backend)
    steps = 24
    with torch.no_grad():
        end = iterate(
            backend, solver, lambda z: z @ w + x, 0 * x, StoppingCriteria(0.0, max_steps=steps, check_every=every)
        )
    assert watch.waits <= -(-steps // every)
    monkeypatch.undo()
    assert end.steps.tolist() == [steps] * 4


@pytest.mark.parametrize("history_size", [4, 8])
def test_a_continued_solve_in_which_samples_fill_at_different_times(backend, history_size):
    w, solver = spectrum(32).double(), Broyden(history_size=history_size)
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((3, 32)))
    x[0] *= 1e-3  # is done long before the others
    first = iterate(
        backend, solver, lambda z: z @ w + x, 0 * x, StoppingCriteria(0.0, atol=1e-2, max_steps=6 + history_size)
    )
    end = iterate(
        backend, solver, lambda z: z @ w + x, 0 * x, StoppingCriteria(0.0, atol=1e-9, max_steps=300), first.carry
    )
    assert first.steps[0] < first.steps[1]
    assert end.status.tolist() == [1, 1, 1]
    np.testing.assert_allclose(end.fz.numpy(), np.linalg.solve(np.eye(32) - w.numpy(), x.numpy().T).T, atol=1e-7)
