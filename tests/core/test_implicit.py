"""The gradient of a custom solver, steps one at a time, and states with more in them than numbers."""

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConvergenceError, ConvergenceWarning, InitialIterateError, ProblemError
from deqcore.halting import Within, until

torch = pytest.importorskip("torch")
TIGHT = {"forward__rtol": 1e-12, "forward__max_steps": 200, "backward__options": {"rtol": 1e-12}}


def own(f, steps=200):
    def solver(z0, *args):
        for _ in range(steps):
            z0 = f(z0, *args)
            if float(z0.detach().abs().max()) > 1e6:  # a branch on a number, which no framework could trace
                break
        return z0

    return solver


def test_the_gradient_of_a_solver_of_ones_own_is_that_of_its_unrolled_steps():
    torch.manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    f = lambda z, w, x: torch.tanh(0.3 * z @ w + x)
    z0 = torch.zeros(3, 4, dtype=torch.float64)
    truth = torch.autograd.grad(own(f)(z0, w, x).square().sum(), (w, x))
    value = deqcore.custom_fixed_point(f, **TIGHT)(own(f))(z0, w, x)
    found = torch.autograd.grad(value.square().sum(), (w, x), create_graph=True)
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    (second,) = torch.autograd.grad(found[1].sum(), x)
    again = torch.autograd.grad(own(f)(z0, w, x).square().sum(), x, create_graph=True)[0]
    assert torch.allclose(second, torch.autograd.grad(again.sum(), x)[0], rtol=1e-7)


def test_a_root_has_the_gradient_of_its_closed_form():
    a = torch.tensor([[2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    solve = deqcore.custom_root(lambda z, a: z**3 - a, **TIGHT)(lambda z0, a: a ** (1 / 3))
    (found,) = torch.autograd.grad(solve(torch.ones(1, 2, dtype=torch.float64), a).sum(), a)
    assert torch.allclose(found, (a ** (-2 / 3) / 3).detach(), rtol=1e-10)


def test_the_solver_gets_no_gradient_and_its_aux_is_passed_on():
    a = torch.tensor(0.5, requires_grad=True)

    def solver(z0, a, count=3):
        assert not torch.is_grad_enabled()
        assert not a.requires_grad
        for _ in range(count):
            z0 = a * torch.cos(z0)
        return z0, {"count": count}

    f = lambda z, a: a * torch.cos(z)
    solve = deqcore.custom_fixed_point(f, has_aux=True)(solver)
    with pytest.warns(ConvergenceWarning, match="misses the tolerance for 2 of 2 samples"):
        assert solve(torch.zeros(2, 1), a, count=2)[1] == {"count": 2}
    with pytest.raises(ProblemError, match="must return"):
        deqcore.custom_fixed_point(f, has_aux=True)(lambda z0, a: z0)(torch.zeros(2, 1), a)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "jit"])
def test_a_solver_that_fails_raises_if_asked_to(backend, request):
    framework = pytest.importorskip("jax" if backend == "jit" else backend)
    if backend in ("jax", "jit"):
        request.getfixturevalue("quick_compiles")
        framework = framework.numpy
    solve = deqcore.custom_fixed_point(lambda z, a: 0.5 * z + a, forward__on_failure="raise")(lambda z0, a: z0 + a)
    if backend == "jit":
        compiled = pytest.importorskip("jax").jit(solve)
        with pytest.raises(Exception, match="2 of 2 samples MAX_STEPS"):  # JAX wraps errors of callbacks
            compiled(framework.zeros((2, 1)), framework.ones((2, 1))).block_until_ready()
        return
    with pytest.raises(ConvergenceError, match="misses the tolerance for 2 of 2 samples"):
        solve(framework.zeros((2, 1)), framework.ones((2, 1)))


def test_aux_is_that_of_the_solution_with_its_gradient():
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    f = lambda z, a: (a * torch.cos(z), {"energy": (a * z).sum()})
    sol = deqcore.fixed_point(f, torch.zeros(1, 1, dtype=torch.float64), a, has_aux=True, **TIGHT)
    (found,) = torch.autograd.grad(sol.aux["energy"], a)
    z = float(sol.value.detach())
    slope = np.cos(z) / (1 + 0.5 * np.sin(z))
    assert float(found) == pytest.approx(z + 0.5 * slope, rel=1e-9)
    with pytest.raises(ProblemError, match=r"must return \(z, aux\)"):
        deqcore.fixed_point(lambda z: z, torch.zeros(1, 1), has_aux=True)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_steps_one_at_a_time_are_the_whole_solve(solver):
    f = lambda z: 0.9 * np.cos(z) + 0.1
    z0, settings = np.ones((2, 3)), {"forward__solver": solver, "forward__rtol": 1e-10, "forward__max_steps": 200}
    whole = deqcore.fixed_point(f, z0, **settings)
    stepper = deqcore.Stepper(f, overrides=settings)
    sol, count = stepper.init(z0), 0
    while not sol.converged.all():
        sol, count = stepper.update(sol), count + 1
    assert count == whole.steps.max()
    assert np.allclose(sol.value, whole.value, atol=1e-12)


def test_integers_and_flags_are_carried_along():
    mask = np.array([[True, False], [True, True]])

    def f(state):
        assert state["mask"].dtype == bool
        z = np.where(state["mask"], 0.5 * state["z"] + 1.0, state["level"])
        return {"z": z, "mask": state["mask"], "level": state["level"] + 1, "name": "other"}

    sol = deqcore.fixed_point(f, {"z": np.zeros((2, 2)), "mask": mask, "level": 3, "name": "mine"})
    assert np.allclose(sol.value["z"], [[2, 3], [2, 2]], atol=1e-5)
    assert sol.value["level"] == 3
    assert sol.value["name"] == "mine"
    assert np.array_equal(sol.value["mask"], mask)


def test_a_root_of_ones_own_carries_flags_along_and_names_another_tree(be):
    a = be.asarray(np.array([[2.0], [3.0]]))
    z0 = {"a": 0 * a + 1, "on": be.asarray(np.array([True, False]))}
    solved = deqcore.custom_root(lambda z, a: {"a": z["a"] ** 2 - a, "on": z["on"]}, forward__rtol=1e-5)
    found = solved(lambda z0, a: {**z0, "a": a**0.5})(z0, a)
    assert be.to_numpy(found["on"]).tolist() == [True, False]
    assert np.allclose(be.to_numpy(found["a"]) ** 2, [[2.0], [3.0]], rtol=1e-5)
    with pytest.raises(ProblemError, match="must return a tree like z"):
        deqcore.custom_root(lambda z, a: z["a"] - a)(lambda z0, a: z0)(z0, a)


def test_a_python_number_is_a_state():
    f = lambda z, a: {"z": a * np.cos(z["z"])}
    sol = deqcore.fixed_point(f, {"z": 1.0}, np.array(0.5), forward__batch=False, forward__rtol=1e-10)
    assert float(sol.value["z"]) == pytest.approx(0.4501836, abs=1e-6)
    with pytest.raises(InitialIterateError, match="must have a floating-point dtype"):
        deqcore.fixed_point(lambda z: z, np.array([[1, 2]]))


def test_a_norm_of_ones_own_decides():
    rates = torch.tensor([[0.5, 0.9]])
    f = lambda z: rates * z + (1 - rates)
    first = lambda z: z[:, 0].abs()
    settings = {"forward__solver": "picard", "forward__rtol": 0.0, "forward__max_steps": 500}
    sol = deqcore.fixed_point(until(f, Within(first, atol=1e-3)), torch.zeros(1, 2), **settings)
    assert int(sol.steps) == 9  # 2^-(k+1) <= 1e-3
    assert float(sol.value[0, 1].detach()) < 0.7  # the second number has hardly moved
    relative = deqcore.fixed_point(until(f, Within(first, rtol=0.01)), torch.zeros(1, 2), **settings)
    assert 5 <= int(relative.steps) <= 7
    for bad in ({}, {"rtol": -1.0}):
        with pytest.raises(deqcore.errors.ConfigError, match="at least one of them above 0"):
            Within(first, **bad)
