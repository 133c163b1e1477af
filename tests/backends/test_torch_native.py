"""Native steps are the steps that solvers define. Truth: the solvers' own steps, NumPy, and other batches."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore.linear.gmres import KrylovSpace, gmres
from deqcore.linear.norms import orthogonalize
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.auto import Auto
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.levels import ACCELERATED, NEWTON, PLAIN, Progress, Rules, judged
from deqcore.solvers.picard import Picard
from deqcore.types import Status, StoppingCriteria

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from deqcore_torch import compiled  # noqa: E402
from deqcore_torch.backend import TorchBackend  # noqa: E402
from deqcore_torch.native import kernels, krylov, linear, pool, steps  # noqa: E402
from deqcore_torch.native.entry import entry  # noqa: E402

SOLVERS = [
    Broyden(),
    Broyden(history_size=3),
    Anderson(),
    Anderson(history_size=2),
    Anderson(max_residual_growth=1.001),
    Auto(),
    Auto(history_size=2, slow=0.3),  # samples accelerate one after the other
    Auto(slow=0.3, patience=1, max_residual_growth=1.001),  # and some escalate
]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def problem(dtype, batch, n, gain=0.9):
    """A tanh cell; sample b has the gain b/batch of it, so that samples stop one after the other."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    x = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    gains = gain * torch.arange(1, batch + 1, dtype=torch.float64)[:, None] / batch
    w, x, gains = w.to(dtype), x.to(dtype), gains.to(dtype)
    return (lambda z: torch.tanh(gains * (z @ w) + x)), torch.zeros(batch, n, dtype=dtype)


def solve(f, z, solver, rtol=0.0, max_steps=8, atol=0.0):
    with torch.no_grad():
        return iterate(TorchBackend(), solver, f, z, StoppingCriteria(rtol=rtol, atol=atol, max_steps=max_steps))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "n", "rtol"), [(1, 3, 0.0), (20, 30, 0.0), (20, 30, 1e-2), (2, 5000, 0.0)])
def test_steps_are_those_of_the_solver(without, solver, dtype, batch, n, rtol):
    f, z = problem(dtype, batch, n)
    run = lambda: solve(f, z, solver, rtol, 6)
    found, expected = run(), without(run)
    assert torch.equal(found.steps, expected.steps)
    for ours, own in [(found.z, expected.z), (found.fz, expected.fz)]:
        assert float((ours - own).norm() / own.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 0.0), (1e-2, 0.0), (1e-2, 0.5), (0.0, 0.5)])
def test_first_figures_are_those_of_the_loop(without, dtype, rtol, atol):
    nan, inf, huge = float("nan"), float("inf"), 1e30
    starts = [0.0, 0.0, 1.0, 1.0, 1.0, nan, huge, 1 / huge, huge, 3.0]
    images = [0.0, 1.0, 1.0, 1.001, nan, 1.0, -huge, 2 / huge, inf, 2.0]
    z, fz = (torch.tensor(numbers, dtype=dtype)[:, None].expand(-1, 5).contiguous() for numbers in (starts, images))
    begin = lambda: solve(lambda z: fz.clone(), z, Picard(), rtol, 0, atol).carry
    found, expected = begin(), without(begin)
    for name, figure in found._asdict().items():
        if name not in ("state", "stale"):
            wanted = getattr(expected, name)
            assert figure.dtype == wanted.dtype, name
            assert torch.allclose(figure.double(), wanted.double(), rtol=1e-6, atol=0.0, equal_nan=True), name
    converged, lost = int(Status.CONVERGED), int(Status.NONFINITE)
    assert found.status[[0, 2, 4, 5, 8]].tolist() == [converged, converged, lost, lost, lost]


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Auto(slow=0.3)], ids=repr)
def test_the_estimates_are_those_of_the_solver(without, solver):
    f, z = problem(torch.float64, 7, 30)
    v = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    backend = TorchBackend()

    def applied():
        state = solve(f, z, solver, max_steps=5).carry.state
        found = [solver.inverse_jacobian(backend, state).apply(v), solver.secant_estimate(backend, state).apply(v)]
        return torch.stack(found)

    assert torch.allclose(applied(), without(applied), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "rtol"), [(30, 0.0), (30, 1e-2), (5000, 0.0)])
def test_products_of_low_rank_are_those_of_the_histories(dtype, n, rtol):
    f, z = problem(dtype, 5, n)  # with rtol samples stop one after the other, and see fewer slots
    v = torch.randn(5, n, dtype=dtype, generator=torch.Generator().manual_seed(1))
    backend, solver = TorchBackend(), Broyden()
    state = solve(f, z, solver, rtol=rtol, max_steps=6).carry.state
    assert backend.kernels.low_rank(state.basis, state.left, state.right, v) is not None
    h = solver.inverse_jacobian(backend, state)
    for name in ("apply", "apply_transpose", "solve_transpose"):
        found, expected = (getattr(each, name)(v) for each in (h, replace(h, kernels=None)))
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    one = torch.tensor([3])
    alone = replace(h, basis=h.basis.take(one), left=h.left.take(one), right=h.right.take(one))
    assert torch.equal(alone.solve_transpose(v[3:4])[0], h.solve_transpose(v)[3])


def test_a_native_step_is_taken(monkeypatch):
    taken = []
    for module in (steps, linear):
        monkeypatch.setattr(module, "run", lambda kernel, *rest: taken.append(kernel) or pool.run(kernel, *rest))
    f, z = problem(torch.float32, 3, 10)
    for solver in (Broyden(), Anderson(), Auto(), Picard()):
        solve(f, z, solver, rtol=1e-3)
    assert {kernels.broyden, kernels.anderson, kernels.steady, kernels.norms} <= set(taken)
    x = z.requires_grad_()
    deqcore.fixed_point(lambda z, x: torch.tanh(0.5 * z + x), z.detach(), x, backward__strategy="exact-ift").value.sum()
    taken.clear()
    value = deqcore.fixed_point(
        lambda z, x: torch.tanh(0.5 * z + x), z.detach(), x, backward__strategy="exact-ift"
    ).value
    value.sum().backward()
    assert krylov.arnoldi in taken


@pytest.fixture
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("solver", [Broyden(), Broyden(history_size=4), Anderson(), Auto(slow=0.3)], ids=repr)
@pytest.mark.usefixtures("_three_threads")
def test_bits_depend_neither_on_the_batch_nor_on_threads(monkeypatch, solver):
    monkeypatch.setattr(pool, "WORTH", 1)  # split whatever can be
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rates = torch.linspace(0.1, 0.9, 40)[:, None]
    x = torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    all_of_them = solve(lambda z: torch.tanh(rates * z.roll(1, 1) + x), torch.zeros(40, 600), solver, rtol=1e-4)
    for b in (0, 17, 39):
        alone = solve(lambda z, b=b: torch.tanh(rates[b] * z.roll(1, 1) + x[b]), torch.zeros(1, 600), solver, rtol=1e-4)
        assert torch.equal(alone.fz[0], all_of_them.fz[b])
        assert int(alone.steps[0]) == int(all_of_them.steps[b])


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Auto(slow=0.3)], ids=repr)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_neighbour_changes_nothing(solver, poison):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    bad = torch.zeros(5, 12)
    bad[2] = poison
    f = lambda z, shift: torch.tanh(0.7 * z.roll(1, 1) + x) + shift * (1 + z)
    clean, dirty = (solve(lambda z, s=s: f(z, s), torch.zeros(5, 12), solver) for s in (0 * bad.nan_to_num(0), bad))
    rows = [0, 1, 3, 4]
    assert torch.equal(clean.fz[rows], dirty.fz[rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("level", [(PLAIN,), (PLAIN, ACCELERATED), (PLAIN, ACCELERATED, NEWTON)], ids=str)
def test_the_rules_of_auto_are_those_of_the_core(dtype, level):
    """Each sample is a batch of its own, so that each rule decides alone whether the kernel takes the step."""
    rng, batch, known = np.random.default_rng(0), 400, 0
    rules = Rules(0.75, 6, 4, 3.0, True, 7)
    old = Progress(
        rng.choice(level, batch).astype(np.int32),
        *(rng.choice([0.0, 0.3, 0.5, 1.0, 1.0, 2.0, np.inf], batch).astype(dtype) for _ in range(3)),
        rng.integers(0, 9, batch).astype(np.int32),
        rng.choice([0.0, 0.8, 1.0], batch).astype(dtype),
    )
    norm = (rng.choice([0.1, 0.4, 0.74, 0.76, 1.9, 3.5, np.nan], batch) * old.norm).astype(dtype)
    with np.errstate(all="ignore"):
        expected, refused = judged(np, rules, norm, old)
    for b in range(batch):
        row = slice(b, b + 1)
        before = [field[row] for field in old]
        for running in (True, False):
            found = [np.empty_like(norm[row]) for _ in range(3)] + [np.empty_like(old.since[row])]
            event = np.zeros(1, bool)
            limits = rules.slow, rules.plain_steps, rules.patience, rules.trial, rules.max_residual_growth
            pool.run(kernels.steady, 1, 1, norm[row], *before, np.array([running]), *limits, *found, event)
            if not running:
                assert not event[0]
                for ours, own in zip(found, before[1:-1], strict=True):
                    np.testing.assert_array_equal(ours, own)
                continue
            same = expected.level[b] == old.level[b] and expected.rate[b] == old.rate[b] and not refused[b]
            if event[0]:
                # The end of a trial and a sample that was put somewhere are left to the core, whatever it decides.
                assert not same or old.norm[b] == 0.0 or old.since[b] + 1 >= rules.trial
                continue
            known += 1
            assert same
            for ours, own in zip(found, expected[1:-1], strict=True):
                np.testing.assert_array_equal(ours, own[row])
    assert known > batch / 10


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e36])
def test_norms_neither_overflow_nor_vanish(size):
    numbers = np.random.default_rng(0).standard_normal((3, 700)).astype("float32") * np.float32(size)
    z, fz = torch.from_numpy(numbers[:1].repeat(2, 0)), torch.from_numpy(numbers[1:])
    residual, length = steps.measure(z, fz)
    wide = numbers.astype("float64")
    assert np.allclose(residual, np.linalg.norm(wide[1:] - wide[:1], axis=1), rtol=1e-5, atol=0)
    assert np.allclose(length, np.linalg.norm(wide[1:], axis=1), rtol=1e-5, atol=0)


def test_norms_say_what_is_not_finite():
    z = torch.zeros(3, 5)
    fz = torch.ones(3, 5)
    fz[0, 2], fz[1, 4] = float("nan"), float("inf")
    residual, length = steps.measure(z, fz)
    for found in (residual, length):
        assert torch.isnan(found[0])
        assert torch.isinf(found[1])
    assert float(residual[2]) == pytest.approx(5**0.5)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_projection_is_that_of_the_contract(without, twice, masked):
    backend = TorchBackend()
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(4, 50, 6, generator=generator, dtype=torch.float64))
    basis = backend.history(q[:, :, 0], 9)
    for k in range(6):
        active = torch.tensor([True, k < 3, True, True]) if masked else None
        basis = basis.masked(active).append(q[:, :, k].contiguous())
    w = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    found, expected = (run(lambda: orthogonalize(backend, basis, w, twice)) for run in (lambda do: do(), without))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gmres_is_that_of_the_core(without, dtype, twice):
    """Samples that end at once, early, late and never: a zero, an identity, a full and a singular matrix."""
    generator = torch.Generator().manual_seed(5)
    a = torch.eye(24, dtype=torch.float64) + 0.1 * torch.randn(5, 24, 24, generator=generator, dtype=torch.float64)
    a[1] = torch.eye(24)
    a[3] = torch.diag_embed(torch.tensor([1.0] * 3 + [0.0] * 21))
    b = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    b[0], b[4, 2] = 0.0, float("nan")
    backend, a, b = TorchBackend(), a.to(dtype), b.to(dtype)
    product = lambda v: torch.einsum("bij,bj->bi", a, v)
    solve = lambda: gmres(backend, product, b, rtol=1e-4, max_steps=20, reorthogonalize=twice)
    found, expected = solve(), without(solve)
    assert torch.equal(found.products, expected.products)
    assert torch.equal(found.converged, expected.converged)
    assert found.converged.tolist() == [True, True, True, False, False]
    for ours, own in [(found.x, expected.x), (found.residual, expected.residual)]:
        assert torch.allclose(ours, own, rtol=1e-3, atol=10 * TOLERANCE[dtype], equal_nan=True)
    true = (b - product(found.x))[:3].norm(dim=1)
    assert bool((true <= 1.01e-4 * b[:3].norm(dim=1)).all())


def test_a_paused_space_grows_on(without):
    """Samples that pause and continue together, as certified reuse has them."""
    generator = torch.Generator().manual_seed(6)
    a = torch.eye(30, dtype=torch.float64) + 0.3 * torch.randn(6, 30, 30, generator=generator, dtype=torch.float64) / 3
    b = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    space = KrylovSpace(TorchBackend(), lambda v: torch.einsum("bij,bj->bi", a, v))

    def dimension():
        k = space.begin(b, 24)
        for goal in (0.5, 0.1, 1e-6):
            k = space.grow(k, goal * k.start, 24 - int(k.dimension), together=True)
        return space.grow(k, 1e-6 * k.start, 24 - int(k.dimension))

    found, expected = dimension(), without(dimension)
    assert torch.equal(found.steps, expected.steps)
    assert torch.allclose(space.solution(found), torch.linalg.solve(a, b), rtol=1e-4, atol=1e-5)
    assert torch.allclose(space.residual_vector(found), space.residual_vector(expected), rtol=1e-6, atol=1e-9)


def test_a_solve_holds_no_iterate_that_nobody_asks_for():
    f, z = problem(torch.float32, 3, 10)
    for solver, name in ((Broyden(), "basis"), (Anderson(), "values")):
        state = solve(f, z, solver).carry.state
        assert getattr(state, name).store.planned is None


def test_processes_that_compile_at_once_find_their_own_code(tmp_path):
    """Numba's own cache gave one dtype the code of the other."""
    program = """
import sys, torch, deqcore
dtype = getattr(torch, sys.argv[1])
x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(3, 8)
sol = deqcore.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), forward__rtol=1e-5)
assert sol.value.dtype is dtype and bool(sol.converged.all()), sol
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", program, dtype], env=environment, stderr=subprocess.PIPE, text=True)
        for dtype in ("float32", "float64")
    ]
    for each in runs:
        _, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors


def test_code_in_the_cache_is_of_all_present_sources(tmp_path):
    """Numba's own cache asks only for the file of a function, and compiled code contains functions of other files."""
    own, other = tmp_path / "kernels.py", tmp_path / "entry.py"
    own.write_bytes(Path(kernels.__file__).read_bytes())

    def names(text):
        other.write_text(text)
        spec = importlib.util.spec_from_file_location("kernels_here", own)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return {each.py_func.__qualname__ for each in (module.norms, module.broyden)}

    before = names("a = 1")
    assert names("a = 1") == before
    assert len(before) == 2
    assert not names("a = 2") & before
    assert entry(kernels.norms).py_func.__qualname__ == f"norms_entry_{kernels.SOURCES[:8]}"


def test_it_can_be_turned_off(monkeypatch):
    compiled.loaded.cache_clear()
    monkeypatch.setenv("DEQCORE_NATIVE", "0")
    assert compiled.loaded("cpu") is None
    compiled.loaded.cache_clear()
    monkeypatch.delenv("DEQCORE_NATIVE")
    assert compiled.loaded("cpu") is steps


def test_a_numba_that_does_not_import_is_told(monkeypatch):
    compiled.loaded.cache_clear()
    monkeypatch.setitem(sys.modules, "deqcore_torch.native.steps", None)
    with pytest.warns(UserWarning, match="Numba does not work here"):
        assert compiled.loaded("cpu") is None
    compiled.loaded.cache_clear()
