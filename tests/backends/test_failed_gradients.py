"""Backward passes that fail: `backward.on_failure` in every framework's ways to ask for a gradient."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest

import deqcore
from deqcore.abc.backward import report
from deqcore.errors import ConvergenceError, ConvergenceWarning
from deqcore.solve import ledger
from deqcore.solve.verification import failing

torch = pytest.importorskip("torch")

N = 200
SHORT = {"backward__options": {"max_steps": 5}, "forward__max_steps": 2000, "forward__solver": "newton-krylov"}


@pytest.fixture(autouse=True)
def first_pass():
    ledger.forget()


def symmetric(batch=1):
    """M with eigenvalues .3 … .9999, x, and the solution of z = M z + x."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((N, N)))
    m = q @ np.diag(np.linspace(0.3, 0.9999, N)) @ q.T
    x = rng.standard_normal((batch, N))
    return m, x, np.linalg.solve(np.eye(N) - m, x.T).T


def half_hopeless():
    """Two samples: five steps solve the first one, whose J is 0.5 I, and not the second."""
    m, x, _ = symmetric(2)
    scale = np.stack([0.5 * np.eye(N), m])
    z = np.stack([x[0] / 0.5, np.linalg.solve(np.eye(N) - m, x[1])])
    return scale, x, z


def rows(z, a, x):
    return (a @ z[:, :, None])[:, :, 0] + x


def arrays(backend, *values):
    if backend == "jax":
        return tuple(pytest.importorskip("jax").numpy.asarray(v) for v in values)
    return tuple(torch.tensor(v) if backend == "torch" else v.copy() for v in values)


def by_vjp(on_failure):
    a, x, z, g = arrays("torch", *half_hopeless(), np.ones((2, N)))
    _, (_, dx) = deqcore.vjp(rows, z, a, x, cotangent=g, backward__on_failure=on_failure, **SHORT)
    return np.asarray(dx)


def test_a_warning_by_default_with_numbers_advice_and_the_users_line():
    a, x, z, g = arrays("torch", *half_hopeless(), np.ones((2, N)))
    with pytest.warns(ConvergenceWarning) as shown:
        deqcore.vjp(rows, z, a, x, cotangent=g, **SHORT)  # this line
    assert len(shown) == 1
    text = str(shown[0].message)
    assert text.startswith("The adjoint solve did not converge for 1 of 2 samples (1 MAX_STEPS after at most 5")
    assert "raise max_steps = 5 in backward.options" in text
    assert "backward.on_failure = 'warn'" in text
    assert shown[0].filename == __file__
    with open(__file__) as lines:
        assert "# this line" in lines.readlines()[shown[0].lineno - 1]


@pytest.mark.parametrize(("how", "value"), [("zero", 0.0), ("nan", float("nan"))])
def test_zero_and_nan_replace_failing_samples_only(how, value):
    found = by_vjp(how)
    assert np.allclose(found[0], 2.0, rtol=1e-6), "(1 − 0.5)^-1"
    assert np.array_equal(found[1], np.full(N, value), equal_nan=True)


def test_raise_and_ignore():
    with pytest.raises(ConvergenceError, match="1 of 2 samples"):
        by_vjp("raise")
    found = by_vjp("ignore")
    a, _, _ = half_hopeless()
    exact = np.linalg.solve(np.eye(N) - a[1].T, np.ones(N))
    assert np.linalg.norm(found[1] - exact) > 0.5 * np.linalg.norm(exact), "wrong by more than half, as reported"


def small(backend, on_failure, strategy="exact-ift", options=None):
    """Ten equations with a budget of two products: NumPy, too."""
    d = np.linspace(0.1, 0.95, 10)
    x, g = np.ones((2, 10)), np.ones((2, 10))
    g[0, 1:] = 0.0  # one direction: solved at once
    z0, x, g, d = arrays(backend, x / (1 - d), x, g, d)
    _, (dx,) = deqcore.vjp(
        lambda z, x: d * z + x,
        z0,
        x,
        cotangent=g,
        backward__on_failure=on_failure,
        backward__strategy=strategy,
        backward__options={"max_steps": 2} if options is None else options,
    )
    return np.asarray(dx)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_every_policy_in_each_backend(backend):
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples"):
        small(backend, "warn")
    with pytest.raises(ConvergenceError, match="1 of 2 samples"):
        small(backend, "raise")
    ignored = small(backend, "ignore")
    for how, value in (("zero", 0.0), ("nan", float("nan"))):
        found = small(backend, how)
        assert np.array_equal(found[0], ignored[0])
        assert np.array_equal(found[1], np.full(10, value), equal_nan=True)


@pytest.mark.parametrize("how", ["zero", "nan"])
def test_replacement_in_traced_code(how):
    """The same policy inside compiled code."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        d = np.linspace(0.1, 0.95, 10)
        g = np.ones((2, 10))
        g[0, 1:] = 0.0

        @jax.jit
        def gradient(x):
            def loss(x):
                sol = deqcore.fixed_point(
                    lambda z, x: d * z + x,
                    jax.numpy.ones((2, 10)) / (1 - d),
                    x,
                    backward__on_failure=how,
                    backward__options={"max_steps": 2},
                )
                return (sol.value * g).sum()

            return jax.grad(loss)(x)

        found = np.asarray(gradient(jax.numpy.ones((2, 10))))
    assert np.isclose(found[0, 0], 1 / (1 - d[0]))
    assert np.array_equal(found[1], np.full(10, 0.0 if how == "zero" else np.nan), equal_nan=True)


def test_a_singular_equation_is_not_silent():
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    f = lambda z, x: torch.stack([z[:, 0], 0.5 * z[:, 1], 0 * z[:, 2]], 1) + 0 * x
    sol = deqcore.fixed_point(f, torch.zeros(1, 3, dtype=torch.float64), x)
    with pytest.warns(ConvergenceWarning, match=r"STALLED.*singular"):
        sol.value.sum().backward()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("jacobian-free", {}),
        ("neumann", {"terms": 1}),
        ("broyden-reuse", {"certify": False, "max_relative_error": "none", "fallback": "none"}),
        ("phantom", {}),
        ("unrolled", {}),
    ],
)
def test_a_strategy_that_promises_nothing_is_silent(strategy, options):
    small("torch", "warn", strategy, options)


def test_what_a_fallback_replaced_has_not_failed():
    be = deqcore.get_backend(backend="numpy")
    solved = report(
        be, np.ones((3, 2)), status=np.array([1, 2, 2], np.int32), fallback=np.array([False, True, False]), vjps=4
    )
    assert failing(be, solved, np.ones((3, 2))).tolist() == [False, False, True]


def solved(how, **more):
    d = torch.linspace(0.1, 0.95, 10, dtype=torch.float64)
    start = (1 / (1 - d)).repeat(2, 1)
    return lambda x: (
        deqcore.fixed_point(
            lambda z, x: d * z + x, start, x, backward__on_failure=how, backward__options={"max_steps": 2}, **more
        ).value
    )


ASKED = {
    "backward": lambda f, x: f(x.requires_grad_()).sum().backward(),
    "create_graph": lambda f, x: torch.autograd.grad(f(x.requires_grad_()).sum(), x, create_graph=True),
    "torch.func": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "forward mode": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own forward mode
@pytest.mark.parametrize("ask", ASKED)
def test_every_way_to_ask_in_torch(ask):
    x = torch.ones(2, 10, dtype=torch.float64)
    with pytest.raises(ConvergenceError, match="2 of 2 samples"):
        ASKED[ask](solved("raise"), x.clone())
    with pytest.warns(ConvergenceWarning, match="2 of 2 samples"):
        ASKED[ask](solved("warn"), x.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        ledger.forget()
        for _ in range(2):  # an error does not count as a shown warning
            with pytest.raises(ConvergenceWarning):
                ASKED[ask](solved("warn"), x.clone())
        ASKED[ask](solved("ignore"), x.clone())


def test_zero_in_torch_func():
    x = torch.ones(2, 10, dtype=torch.float64)
    found = torch.func.grad(lambda x: solved("zero")(x).sum())(x)
    assert not found.any()


def test_from_another_thread():
    raised = []

    def work():
        try:
            solved("raise")(torch.ones(2, 10, dtype=torch.float64, requires_grad=True)).sum().backward()
        except ConvergenceError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_warnings_are_rare_for_a_layer_that_fails_each_time():
    from deqcore_torch.nn import DEQ

    d = torch.linspace(0.1, 0.95, 10)
    layer = DEQ(lambda z, x: d * z + x, backward__options={"max_steps": 2}, forward__max_steps=300)
    x = torch.ones(2, 10, requires_grad=True)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for _ in range(12):
            layer(x).sum().backward()  # the user's line
    assert [each.category for each in shown] == [ConvergenceWarning] * 2  # the first and the tenth
    with open(__file__) as lines:
        assert "# the user's line" in lines.readlines()[shown[0].lineno - 1]


def test_a_cotangent_that_is_not_finite_is_passed_on():
    """A gradient scaler must see that a loss overflowed; the solve is not to blame."""
    x = torch.ones(2, 10, requires_grad=True)
    for how in ("warn", "raise", "zero"):
        value = deqcore.fixed_point(lambda z, x: 0.5 * z + x, 2 * x.detach(), x, backward__on_failure=how).value
        g = torch.ones(2, 10)
        g[1] = float("inf")
        (found,) = torch.autograd.grad(value, x, g)
        assert not found[1].isfinite().any()
        assert found[0].tolist() == pytest.approx([2.0] * 10)


def _diagonal(on_failure, backend):
    """z = m z + x with 700 separate factors m, of which GMRES finds no solution in 3 steps; and x."""
    m = np.linspace(-0.5, 0.99999, 700)
    x = np.ones((1, 700))
    (m, x), z0 = arrays(backend, m, x), x / (1 - m)
    (z0,) = arrays(backend, z0)
    settings = {"backward__on_failure": on_failure, "backward__options": {"max_steps": 3}}
    return lambda x: deqcore.fixed_point(lambda z, x: z * m + x, z0, x, **settings).value, x


def _dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, x))).tangent


FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "dual_level": _dual,
    "reverse over forward": lambda f, x: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x,))[1].sum())(x),
    "forward over reverse": lambda f, x: torch.func.jvp(torch.func.grad(lambda x: (f(x) ** 2).sum()), (x,), (x,))[1],
}


@pytest.mark.parametrize("ask", FORWARD)
def test_nan_and_zero_in_forward_mode_of_torch(ask):
    assert torch.isnan(FORWARD[ask](*_diagonal("nan", "torch"))).all()
    assert not FORWARD[ask](*_diagonal("zero", "torch")).any()


@pytest.mark.parametrize("how", ["zero", "nan"])
def test_forward_mode_in_jax(how):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        f, x = _diagonal(how, "jax")
        tangent = np.asarray(jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])(x))
    assert np.isnan(tangent).all() if how == "nan" else not tangent.any()


@pytest.mark.parametrize("n", [3, 700])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("harm", [float("nan"), float("inf")])
def test_a_lone_cotangent_that_is_not_finite_is_passed_on(harm, backend, n):
    """There GMRES makes no step at all."""
    (x,) = arrays(backend, np.ones((1, n)))
    _, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, 0 * x, x, cotangent=harm * x)
    assert np.isnan(np.asarray(dx)).all()
