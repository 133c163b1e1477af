"""Gradients on every installed backend against closed forms and finite differences."""

import warnings

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.errors import ConvergenceWarning, StrategyError

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

N, B = 10, 3


@pytest.fixture
def be(every):
    return every


@pytest.fixture
def affine():
    """z* = (I − A)⁻¹ b, gradients of ⟨g, z*⟩ in closed form."""
    r = np.random.default_rng(0)
    a = 0.6 * r.standard_normal((N, N)) / np.sqrt(N)
    b, g = r.standard_normal((B, N)), r.standard_normal((B, N))
    z = np.linalg.solve(np.eye(N) - a, b.T).T
    u = np.linalg.solve(np.eye(N) - a.T, g.T).T
    return {"a": a, "b": b, "g": g, "z": z, "u": u, "da": u.T @ z}


def gradients(be, affine, strategy, options=None, solver="broyden", **overrides):
    def f(z, a, b):
        return be.xp.matmul(z, a.T) + b

    args = [be.asarray(affine[k]) for k in ("a", "b")]
    z, (da, db) = deqcore.vjp(
        f,
        be.asarray(np.zeros((B, N))),
        *args,
        cotangent=be.asarray(affine["g"]),
        **{
            "forward__solver": solver,
            "forward__rtol": 1e-12,
            "forward__max_steps": 100,
            "backward__strategy": strategy,
            "backward__options": options or {},
            **overrides,
        },
    )
    return be.to_numpy(z), be.to_numpy(da), be.to_numpy(db)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "newton-krylov"])
def test_exact_gradients_equal_the_closed_form(be, affine, solver):
    z, da, db = gradients(be, affine, "exact-ift", {"rtol": 1e-12}, solver)
    assert relative(z, affine["z"]) < 1e-9
    assert relative(da, affine["da"]) < 1e-8
    assert relative(db, affine["u"]) < 1e-8


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"solver": "broyden", "rtol": 1e-12}, 1e-8),
        ({"solver": "anderson", "rtol": 1e-12, "start": "zero"}, 1e-8),
        ({"start": "reuse", "rtol": 1e-12}, 1e-8),
        ({"start": "cotangent", "rtol": 1e-12}, 1e-8),
    ],
    ids=str,
)
def test_exact_gradients_by_other_solvers_and_starts(be, affine, options, tolerance):
    _, da, db = gradients(be, affine, "exact-ift", options)
    assert relative(da, affine["da"]) < tolerance
    assert relative(db, affine["u"]) < tolerance


@pytest.mark.parametrize(
    ("strategy", "options", "tolerance"),
    [
        ("neumann", {"terms": 80}, 1e-8),
        ("phantom", {"steps": 120, "damping": 0.9}, 1e-8),
        ("broyden-reuse", {"max_relative_error": 0.1}, 0.1),
        ("broyden-reuse", {"max_relative_error": 0.001}, 0.001),
        ("broyden-reuse", {"max_relative_error": 0.01, "fallback": "exact-ift", "max_refine_vjps": 1}, 0.9),
        ("broyden-reuse", {"max_relative_error": 0.01, "fallback": "none"}, 0.01),
    ],
    ids=str,
)
def test_other_strategies_come_as_near_as_they_promise(be, affine, strategy, options, tolerance):
    with warnings.catch_warnings():  # one product is not enough for an exact adjoint, which says so
        warnings.simplefilter("ignore" if options.get("max_refine_vjps") == 1 else "error", ConvergenceWarning)
        _, _, db = gradients(be, affine, strategy, options)
    assert relative(db, affine["u"]) <= tolerance


def test_unrolled_is_the_gradient_of_its_steps(be, affine):
    a, g = affine["a"], affine["g"]
    powers = [np.linalg.matrix_power(a.T, k) for k in range(3)]
    expected = sum(g @ p.T for p in powers)
    _, _, db = gradients(be, affine, "unrolled", {"steps": 3}, "picard")
    assert relative(db, expected) < 1e-8


def test_jacobian_free_is_one_step(be, affine):
    _, da, db = gradients(be, affine, "jacobian-free")
    assert relative(db, affine["g"]) < 1e-12
    assert relative(da, affine["g"].T @ affine["z"]) < 1e-8


def test_plain_reuse_is_minus_h_transposed_of_a_dense_broyden(be, affine):
    """Textbook good Broyden with dense H, ten steps, one sample at a time."""
    expected = []
    for b, g in zip(affine["b"], affine["g"], strict=True):
        z, h = np.zeros(N), -np.eye(N)
        r = affine["a"] @ z + b - z
        for _ in range(10):
            s = -h @ r
            z = z + s
            new = affine["a"] @ z + b - z
            y = new - r
            h = h + np.outer(s - h @ y, s @ h) / (s @ h @ y)
            r = new
        expected.append(-h.T @ g)
    plain = {"certify": False, "max_relative_error": None, "fallback": "none"}
    quiet = {"forward__rtol": 0.0, "forward__max_steps": 10, "forward__on_failure": "ignore"}
    _, _, db = gradients(be, affine, "broyden-reuse", plain, **quiet)
    assert relative(db, np.stack(expected)) < 1e-7
    certified = {"certify": True, "max_relative_error": None, "fallback": "none"}
    _, _, same = gradients(be, affine, "broyden-reuse", certified, **quiet)
    assert relative(same, np.stack(expected)) < 1e-7


def test_pytree_states_and_several_arguments(be):
    r = np.random.default_rng(1)
    x, y = r.standard_normal((2, 3)), r.standard_normal((2, 2, 2))

    def f(z, x, y):
        return {"p": 0.3 * z["p"] + x, "q": [0.2 * z["q"][0] + y]}

    zero = {"p": be.asarray(0 * x), "q": [be.asarray(0 * y)]}
    one = {"p": be.asarray(np.ones_like(x)), "q": [be.asarray(np.ones_like(y))]}
    z, (dx, dy) = deqcore.vjp(f, zero, be.asarray(x), be.asarray(y), cotangent=one, **TIGHT, forward__solver="picard")
    assert np.allclose(be.to_numpy(z["p"]), x / 0.7)
    assert np.allclose(be.to_numpy(z["q"][0]), y / 0.8)
    assert np.allclose(be.to_numpy(dx), 1 / 0.7)
    assert np.allclose(be.to_numpy(dy), 1 / 0.8)


def test_a_strategy_that_reuses_needs_a_solver_with_an_estimate(be, affine):
    with pytest.raises(StrategyError, match="anderson, auto, broyden"):
        gradients(be, affine, "broyden-reuse", solver="picard")


@pytest.mark.usefixtures("no_plugins")
def test_the_solvers_that_are_proposed_are_those_that_can_be_imported(affine):
    plugins.register(plugins.SolverSpec("absent", "no_such_module:Absent"))
    plugins.register(plugins.SolverSpec("odd", "pathlib:Path"))
    with pytest.raises(StrategyError, match="anderson, auto, broyden"):
        gradients(deqcore.get_backend(backend="numpy"), affine, "broyden-reuse", solver="picard")


# -- torch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cell():
    generator = torch.Generator().manual_seed(0)
    a = 0.6 * torch.randn(N, N, dtype=torch.float64, generator=generator) / N**0.5
    b = torch.randn(2, N, dtype=torch.float64, generator=generator)
    return a.requires_grad_(), b.requires_grad_()


TIGHT = {"forward__rtol": 1e-12, "backward__options": {"rtol": 1e-12}}


def solve(a, b, f=None, **overrides):
    f = f or (lambda z, b: torch.tanh(z @ a.T + b))
    return deqcore.fixed_point(f, torch.zeros_like(b), b, **{**TIGHT, **overrides})


def test_torch_closures_and_arguments_to_second_order(cell):
    small = [part.detach()[:3, :3].clone().requires_grad_() for part in cell]  # each number costs two solves
    assert torch.autograd.gradcheck(lambda a, b: solve(a, b).value, small)
    assert torch.autograd.gradgradcheck(lambda a, b: solve(a, b).value, small)


def test_torch_backward_twice_and_two_forwards_before_one_backward(cell):
    a, b = cell
    first, second = solve(a, b), solve(a, 2 * b)
    loss = first.value.sum() + second.value.sum()
    (once,) = torch.autograd.grad(loss, a, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, a)
    assert torch.equal(once, twice)
    assert first.backward is not None
    assert first.backward.status.tolist() == [1, 1]


@pytest.mark.parametrize("strategy", ["broyden-reuse", "jacobian-free"])
def test_torch_refuses_the_derivative_of_an_approximation(cell, strategy):
    a, b = cell
    value = solve(a, b, forward__rtol=1e-6, backward__strategy=strategy, backward__options={}).value
    (da,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    with pytest.raises(StrategyError, match="exact-ift"):
        da.sum().backward()


def test_torch_refuses_second_derivatives_through_a_hidden_tensor(cell):
    a, b = cell
    hidden = 2 * a
    value = solve(a, b, lambda z, b: torch.tanh(0.5 * z @ hidden.T + b)).value
    (da,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    with pytest.raises(StrategyError, match="Pass it through args"):
        da.sum().backward()


def test_torch_unrolled_checkpointed_equals_kept(cell):
    a, b = cell
    found = []
    for checkpoint in (False, True):
        options = {"steps": 12, "checkpoint": checkpoint}
        settings = {"backward__strategy": "unrolled", "backward__options": options}
        value = solve(a, b, forward__solver="broyden", **settings).value
        found.append(torch.autograd.grad((value**2).sum(), a)[0])
    exact = torch.autograd.grad((solve(a, b).value ** 2).sum(), a)[0]
    assert torch.equal(*found)
    assert relative(found[0].numpy(), exact.numpy()) < 1e-4


# -- jax --------------------------------------------------------------------------------------------------------


def test_jax_hessians_and_jit_against_the_closed_form():
    with jax.enable_x64(True):
        jnp = jax.numpy

        def loss(a, solver="picard"):  # the gradient is the same, and "auto" takes long to compile
            z0 = jnp.zeros((1, 1))
            sol = deqcore.fixed_point(lambda z, a: a * z + 1.0, z0, a, forward__solver=solver, **TIGHT)
            return sol.value.sum()  # 1 / (1 − a)

        a = jnp.asarray(0.4)
        assert jax.jit(jax.grad(lambda a: loss(a, "auto")))(a) == pytest.approx(0.6**-2, rel=1e-9)
        assert jax.grad(jax.grad(loss))(a) == pytest.approx(2 * 0.6**-3, rel=1e-8)
        assert jax.jacfwd(loss)(a) == pytest.approx(0.6**-2, rel=1e-9)
        assert jax.vmap(jax.grad(loss))(jnp.asarray([0.1, 0.4])) == pytest.approx([0.9**-2, 0.6**-2], rel=1e-8)


def test_jax_closed_over_values_get_their_gradient():
    with jax.enable_x64(True):
        jnp = jax.numpy

        def loss(a, strategy):
            z0, settings = jnp.zeros((1, 2)), {"forward__solver": "broyden", "forward__rtol": 1e-12}
            sol = deqcore.fixed_point(lambda z: a * z + 1.0, z0, **settings, backward__strategy=strategy)
            return sol.value[0, 0]

        assert jax.grad(loss)(0.4, "exact-ift") == pytest.approx(0.6**-2, rel=1e-6)
        assert jax.grad(loss)(0.4, "broyden-reuse") == pytest.approx(0.6**-2, rel=1e-6)


def test_no_convergence_warns_once_with_the_numbers():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deqcore.fixed_point(lambda z: 0.99 * z + 1, np.zeros((1, 2)), forward__solver="picard", forward__max_steps=3)
    assert len(caught) == 1
    assert "forward.max_steps = 3" in str(caught[0].message)
