"""States whose first axis is not the batch: the wrong gradient is reported, and batch = false gives the right one.

The truth is dense implicit differentiation of the whole state by hand.
"""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

import deqcore
from deqcore import Status
from deqcore.errors import ConvergenceError, CoupledRowsWarning
from deqcore.solve import failures, ledger
from deqcore.solve.verification import coupled_rows, leak_everywhere, random_halves

torch = pytest.importorskip("torch")

ROWS, WIDTH = 6, 4
RNG = np.random.default_rng(3)
WEIGHTS = 0.9 * np.linalg.qr(RNG.standard_normal((ROWS, ROWS)))[0]  # of features, which are the first axis
ADJACENCY = 0.9 * np.full((WIDTH, WIDTH), 1 / WIDTH) + 0.1 * np.eye(WIDTH)
X = RNG.standard_normal((ROWS, WIDTH))
G = RNG.standard_normal((ROWS, WIDTH))


def graph(xp, z, x):
    """An implicit graph network: features × nodes."""
    return xp.tanh(xp.asarray(WEIGHTS) @ z @ xp.asarray(ADJACENCY)) + x


def normalized(xp, z, x):
    """Batch normalization in training mode."""
    centred = z - z.mean(0)
    return 0.6 * centred / ((centred**2).mean(0) + 1e-3) ** 0.5 + x


def attention(xp, z, x):
    """Attention over the first axis."""
    scores = z @ z.T
    weights = xp.exp(scores - scores.max())
    return 0.5 * (weights / weights.sum(1)[:, None]) @ xp.tanh(z) + x


def shifted(xp, z, x):
    """Each row depends on the next one only."""
    return 0.5 * xp.tanh(xp.concatenate([z[1:], z[:1]])) + x


def one_pair(xp, z, x):
    """The last row alone depends on another one."""
    return 0.3 * xp.tanh(z) + xp.concatenate([0 * z[1:], 0.6 * z[2:3]]) + x


COUPLED = [graph, normalized, attention, shifted]


def f_of(name, backend):
    xp = torch if backend == "torch" else np

    def f(z, x):
        return name(xp, z, x)

    return f


def arrays(backend, *values):
    return tuple(torch.tensor(v) if backend == "torch" else v.copy() for v in values)


@pytest.fixture(autouse=True)
def first_pass():
    ledger.forget()


def truth(name):
    """z* by plain and Newton steps, and (I − J)^-T g of the whole state, by dense linear algebra."""
    x = torch.tensor(X)
    z = torch.zeros_like(x)
    for _ in range(60):
        jacobian = torch.autograd.functional.jacobian(lambda z: name(torch, z, x), z).reshape(z.numel(), -1)
        step = torch.linalg.solve(torch.eye(z.numel()) - jacobian, (name(torch, z, x) - z).flatten())
        z = z + step.reshape(z.shape)
    assert float((name(torch, z, x) - z).norm()) < 1e-10
    u = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - jacobian.T, torch.tensor(G).flatten())
    return z.numpy(), u.reshape(z.shape).numpy()


def gradient(name, backend, z0, **settings):
    z0, x, g = arrays(backend, z0, X, G)
    settings = {"forward__rtol": 1e-10, "forward__max_steps": 200, **settings}
    _, (dx,) = deqcore.vjp(f_of(name, backend), z0, x, cotangent=g, **settings)
    return np.asarray(dx)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", COUPLED, ids=lambda f: f.__name__)
def test_it_is_named_with_the_cure_and_the_cure_is_right(name, backend):
    z, u = truth(name)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        gradient(name, backend, z)
    kinds = {each.category for each in shown}
    assert kinds == {CoupledRowsWarning}, [str(each.message) for each in shown]
    text = str(shown[0].message)
    assert "of f(z) changes when row" in text
    assert "Set forward.batch = false" in text
    assert shown[0].filename == __file__
    alone = gradient(name, backend, z, forward__batch=False)
    assert np.linalg.norm(alone - u) <= 1e-6 * np.linalg.norm(u)


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse"])
@pytest.mark.parametrize("name", COUPLED, ids=lambda f: f.__name__)
def test_the_report_is_measured(name, strategy):
    z, _ = truth(name)
    x = torch.tensor(X, requires_grad=True)
    sol = deqcore.fixed_point(f_of(name, "torch"), torch.tensor(z), x, backward__strategy=strategy)
    with pytest.warns(CoupledRowsWarning):
        (u,) = torch.autograd.grad(sol.value, x, torch.tensor(G))
    report = sol.backward
    u = u.detach()
    at = torch.tensor(z, requires_grad=True)
    (back,) = torch.autograd.grad(name(torch, at, x.detach()), at, u)
    left = (torch.tensor(G) + back - u).norm(dim=1) / torch.tensor(G).norm(dim=1)
    assert torch.allclose(report.residual, left, rtol=1e-4)
    assert (report.coupling > 0).any()
    assert (report.verify_vjps >= 2).all()
    wrong = left > 0.5
    assert (report.status[wrong] != int(Status.CONVERGED)).all()
    assert report.error.isnan().all(), "an estimate that assumes independent rows is void"
    assert "f couples the rows" in repr(report)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", [*COUPLED, one_pair], ids=lambda f: f.__name__)
def test_moving_rows_finds_every_pair(name, backend):
    be = deqcore.get_backend(backend=backend)
    z, x = arrays(backend, X, X)
    f = f_of(name, backend)
    i, j = coupled_rows(be, lambda z: f(z, x), z)
    moved = X.copy()
    moved[j] += 0.1
    assert i != j
    assert not np.array_equal(name(np, moved, X)[i], name(np, X, X)[i])
    _, vjp = be.autodiff.linearize(lambda z: f(z, x), z)
    assert leak_everywhere(be, vjp, z) > 0


def test_a_solve_that_drifts_is_not_called_random():
    """Broyden freezes rows one by one, so that the values of a coupled f differ at the end; f is deterministic."""
    x = torch.tensor(X, dtype=torch.float32, requires_grad=True)
    with pytest.warns(CoupledRowsWarning, match="row 0 of f"):
        deqcore.fixed_point(f_of(shifted, "torch"), torch.zeros_like(x), x)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_a_row_that_stopped_too_early_is_named_without_a_gradient(backend):
    """z = (max(z₁ − 5, 0), 0.9 z₁ + 1): row 0 is at a fixed point, and stops, until row 1 passes 5 on its way to 10."""
    be = pytest.importorskip("deqcore").get_backend(backend=backend)
    first, calls = be.asarray([[1.0], [0.0]]), []

    def f(z, share=1.0):
        calls.append(0)
        return share * first * be.xp.abs(be.xp.clip(z[1:], min=5.0) - 5.0) + (1 - first) * (0.9 * z + 1.0) + 0 * z

    settings = {"forward__solver": "picard", "forward__rtol": 1e-2}
    with pytest.warns(CoupledRowsWarning, match="row 0 of f.z. changes when row 1 of z does"):
        deqcore.fixed_point(f, 0 * first, **settings)
    for apart in (lambda z: f(z, 0.0), lambda z: 0.9 * z + 1.0):
        deqcore.fixed_point(apart, 0 * first, **settings)  # warnings are errors in these tests
    counts = []
    for every in (1, 0):
        calls.clear()
        ledger.forget()
        sol = deqcore.fixed_point(lambda z: f(z, 0.0), 0 * first, **settings, backward__verify_every=every)
        counts.append(len(calls))
    assert len(set(be.to_numpy(sol.steps).tolist())) == 2
    assert counts[0] - counts[1] == 1


def test_an_error_on_request():
    z, _ = truth(shifted)
    x = torch.tensor(X, requires_grad=True)
    sol = deqcore.fixed_point(f_of(shifted, "torch"), torch.tensor(z), x, backward__on_failure="raise")
    with pytest.raises(ConvergenceError, match="rows of the state are coupled"):
        sol.value.sum().backward()


def test_the_schedule_and_what_it_costs():
    f, x = f_of(lambda xp, z, x: 0.5 * xp.tanh(z) + x, "torch"), torch.tensor(X, requires_grad=True)
    spent = []
    for _ in range(7):
        sol = deqcore.fixed_point(f, torch.zeros_like(x), x, backward__verify_every=3)
        sol.value.sum().backward()
        spent.append(int(sol.backward.verify_vjps[0]))
    assert spent == [2, 0, 0, 2, 0, 0, 2]
    ledger.forget()
    sol = deqcore.fixed_point(f, torch.zeros_like(x), x, backward__verify_every=0)
    sol.value.sum().backward()
    assert not sol.backward.verify_vjps.any()


def test_a_layer_counts_for_itself_and_a_coupled_one_is_measured_each_time():
    from deqcore_torch.nn import DEQ

    class Cell(torch.nn.Module):
        def forward(self, z, x):
            return normalized(torch, z, x)

    x, settings = torch.randn(8, 4, requires_grad=True), {"forward__solver": "picard", "forward__rtol": 1e-4}
    for kind in ({}, {"checkpoint": True}):
        for layer in (DEQ(Cell(), **settings, **kind), DEQ(Cell(), **settings, **kind)):
            with warnings.catch_warnings(record=True) as shown:
                warnings.simplefilter("always")
                for batch in (8, 7, 6):  # another shape is not another layer
                    sol = layer.solve(x[:batch])
                    (sol.value * x[:batch].detach()).sum().backward()
                    assert (sol.backward.coupling > 0).any()
            assert {each.category for each in shown} == {CoupledRowsWarning}
            assert len([each for each in shown if "adjoint" in str(each.message)]) == 1


# -- no false alarms --------------------------------------------------------------------------------------------


def per_row(name):
    torch.manual_seed(0)
    width, half = 16, torch.float32
    linear = torch.nn.Linear(width, width, dtype=half)
    with torch.no_grad():
        linear.weight.mul_(0.6)
    conv = torch.nn.Conv1d(4, 4, 3, padding=1)
    norm, mask = torch.nn.LayerNorm(width), (torch.rand(9, width) < 0.7) / 0.7
    running = torch.nn.BatchNorm1d(width).eval()
    cells = {
        "linear": lambda z, x: torch.tanh(linear(z) + x),
        "layer norm": lambda z, x: 0.5 * norm(torch.relu(linear(z) + x)),
        "dropout mask": lambda z, x: torch.tanh(mask * linear(z) + x),
        "conv": lambda z, x: 0.5 * torch.tanh(conv(z.reshape(-1, 4, 4)).flatten(1) + x),
        "group norm": lambda z, x: 0.4 * torch.nn.functional.group_norm(z, 4) + x,
        "attention inside": lambda z, x: (
            0.2 * torch.nn.functional.scaled_dot_product_attention(*[z.reshape(-1, 1, 4, 4)] * 3).reshape(-1, 16) + x
        ),
        "evaluation mode": lambda z, x: 0.4 * running(linear(z)) + x,
        "einsum": lambda z, x: torch.tanh(torch.einsum("bi,ji->bj", z, linear.weight) + x),
        "softmax": lambda z, x: torch.softmax(linear(z) + x, 1),
    }
    return cells[name]


PER_ROW = (
    "linear",
    "layer norm",
    "dropout mask",
    "conv",
    "group norm",
    "attention inside",
    "evaluation mode",
    "einsum",
    "softmax",
)


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "neumann"])
@pytest.mark.parametrize("name", PER_ROW)
def test_rows_that_are_samples_are_not_suspected(name, strategy):
    """Warnings are errors in these tests."""
    f = per_row(name)
    for seed in range(4):
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        settings = {"backward__strategy": strategy, "backward__verify_every": 1, "forward__max_steps": 100}
        sol = deqcore.fixed_point(f, torch.zeros(9, 16), x, **settings)
        sol.value.square().sum().backward()
        assert not sol.backward.coupling.any()
        be = sol.backend
        assert coupled_rows(be, lambda z, x=x: f(z, x).detach(), sol.value.detach()) is None


def test_a_sample_of_nan_is_no_coupling():
    f, x = (lambda z, x: 0.5 * torch.tanh(z) + x), torch.randn(5, 3)
    x[2, 1] = float("nan")
    x.requires_grad_()
    sol = deqcore.fixed_point(
        f, torch.zeros(5, 3), x, forward__on_failure="ignore", backward__on_failure="ignore", backward__verify_every=1
    )
    sol.value.nansum().backward()
    assert not sol.backward.coupling.any()


def test_noise_is_still_called_noise():
    from deqcore.errors import NonDeterministicWarning

    x = torch.ones(4, 3, requires_grad=True)
    with pytest.warns(NonDeterministicWarning):
        deqcore.fixed_point(
            lambda z, x: torch.nn.functional.dropout(0.5 * torch.tanh(z), 0.5) + x, 0 * x.detach(), x, forward__rtol=0.5
        )


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("strategy", ["unrolled", "phantom"])
def test_strategies_of_steps_warn_of_coupled_rows(strategy, backend):
    ledger.forget()
    calls = []
    roll = (lambda z: z.roll(1, 0)) if backend == "torch" else lambda z: np.roll(z, 1, 0)

    def gradient(share, **settings):
        def f(z, x):
            calls.append(0)
            return 0.5 * z + share * roll(z) + x

        x = np.ones((6, 2)) if backend == "numpy" else torch.ones(6, 2, dtype=torch.float64)
        settings |= {"forward__solver": "picard", "forward__on_failure": "ignore"}
        deqcore.vjp(f, 0 * x, x, cotangent=x, backward__strategy=strategy, **settings)

    with pytest.warns(CoupledRowsWarning, match="row [0-5] of f"):
        gradient(0.3)
    for share, settings in ((0.0, {}), (0.3, {"backward__verify_every": 0}), (0.3, {"backward__on_failure": "ignore"})):
        ledger.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("error", CoupledRowsWarning)
            gradient(share, **settings)
    counts = []
    for every in (0, 1):
        ledger.forget()
        calls.clear()
        gradient(0.0, backward__verify_every=every)
        counts.append(len(calls))
    assert counts[1] - counts[0] == 2 * 3 + 1  # 2 log₂(batch) evaluations and one to compare with


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("strategy", ["unrolled", "phantom"])
def test_verification_changes_no_random_number_of_the_user(strategy, backend):
    ones = np.ones((6, 4)) if backend == "numpy" else torch.ones(6, 4, dtype=torch.float64)
    noise = (lambda: np.random.standard_normal(4)) if backend == "numpy" else lambda: torch.randn(4, dtype=ones.dtype)
    following = []
    for every in (0, 1):
        ledger.forget()
        np.random.seed(0)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # f is not deterministic
            deqcore.vjp(
                lambda z, x: 0.5 * z + 1e-9 * noise() + x,
                0 * ones,
                ones,
                cotangent=ones,
                backward__strategy=strategy,
                backward__verify_every=every,
                forward__solver="picard",
                forward__max_steps=7,
            )
        following.append(np.asarray(noise()))
    assert np.array_equal(*following)


@pytest.mark.parametrize("strategy", ["unrolled", "phantom"])
def test_jax_strategies_of_steps_warn_of_coupled_rows(strategy):
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((6, 4))

    def gradient(share, transform=lambda f: f, **settings):
        ledger.forget()
        f = lambda z, x: 0.5 * z + share * jax.numpy.roll(z, 1, 0) + x
        settings |= {"backward__strategy": strategy, "forward__solver": "picard", "forward__on_failure": "ignore"}
        solved = lambda x: deqcore.fixed_point(f, 0 * x, x, **settings).value.sum()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            transform(solved)(x)
        return [str(each.message) for each in caught if issubclass(each.category, CoupledRowsWarning)]

    (text,) = gradient(0.3, jax.grad)
    assert re.search(r"row [0-5] of f", text)
    assert not gradient(0.0, jax.grad)
    assert not gradient(0.3)  # not differentiated
    assert not gradient(0.3, lambda f: jax.jit(jax.grad(f)))
    assert not gradient(0.3, jax.grad, backward__verify_every=0)


def test_one_row_that_reads_another_is_named_where_a_random_half_holds_both():
    """Row 63 of 64 reads row 0: the residual contradicts the report, and the search over bits finds the pair."""
    ledger.forget()
    seed = next(i for i in range(99) if random_halves(64, 3, i).rows[[0, 63]].all())
    link = torch.zeros(64, 64, dtype=torch.float64)
    link[63, 0] = 0.4
    x = torch.ones(64, 3, dtype=torch.float64)
    original = failures.random_halves
    failures.random_halves = lambda batch, n, **_: original(batch, n, seed=seed)
    try:
        with pytest.warns(CoupledRowsWarning, match="row 63 of f.z. changes when row 0 of z does"):
            deqcore.vjp(
                lambda z, x: 0.5 * torch.tanh(z) + link @ z + x, 0 * x, x, cotangent=x, forward__on_failure="ignore"
            )
    finally:
        failures.random_halves = original
