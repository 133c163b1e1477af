"""torch.func and forward mode against differentiated unrolling, which shares no code with the implicit gradient."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import ProblemError, StrategyError

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quiet_forward_mode")
N = 5
OPTIONS = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}


@pytest.fixture
def data():
    r = np.random.default_rng(0)
    a, da = 0.5 * r.standard_normal((N, N)) / np.sqrt(N), r.standard_normal((N, N))
    return [torch.tensor(x) for x in (a, da, r.standard_normal((3, N)))]


def cell(z, a, b):
    return torch.tanh(z @ a.T + b)


def solved(a, b, **overrides):
    return deqcore.fixed_point(cell, torch.zeros_like(b), a, b, **{**OPTIONS, **overrides}).value


def closed_over(a, b, **overrides):
    """The same with a hidden, non-leaf tensor in a closure."""
    hidden = 1.0 * a
    return deqcore.fixed_point(
        lambda z: torch.tanh(z @ hidden.T + b), torch.zeros_like(b), **{**OPTIONS, **overrides}
    ).value


def unrolled(a, b):
    z = torch.zeros_like(b)
    for _ in range(80):
        z = cell(z, a, b)
    return z


def loss(value, b):
    return lambda a: (value(a, b) ** 3).sum()


def gradient(value, a, da, b):
    return torch.func.grad(loss(value, b))(a)


def vjp(value, a, da, b):
    return torch.func.vjp(lambda b: value(a, b), b)[1](torch.ones_like(b))[0]


def jvp(value, a, da, b):
    return torch.func.jvp(lambda a: value(a, b), (a,), (da,))[1]


def grad_of_grad(value, a, da, b):
    return torch.func.grad(lambda a: (torch.func.grad(loss(value, b))(a) * da).sum())(a)


def forward_over_reverse(value, a, da, b):
    return torch.func.jvp(torch.func.grad(loss(value, b)), (a,), (da,))[1]


def reverse_over_forward(value, a, da, b):
    return torch.func.grad(lambda a: torch.func.jvp(loss(value, b), (a,), (da,))[1])(a)


def tape_over_func(value, a, da, b):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    inner = torch.func.grad(lambda a: loss(value, b)(a * scale))(a)
    return torch.autograd.grad((inner * da).sum(), scale)[0]


def tape_over_grad_of_grad(value, a, da, b):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    line = lambda t: loss(value, b)(scale * a + t * da)
    second = torch.func.grad(torch.func.grad(line))(torch.zeros((), dtype=torch.float64))
    return torch.autograd.grad(second, scale)[0]


def dual_numbers(value, a, da, b):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(value(forward_ad.make_dual(a, da), b)).tangent


def tape_over_dual_numbers(value, a, da, b):
    from torch.autograd import forward_ad

    leaf = b.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(value(forward_ad.make_dual(a, da), leaf)).tangent
    return torch.autograd.grad((tangent**2).sum(), leaf)[0]


def vjp_of_grad(value, a, da, b):
    """Its backward pass runs after the levels that f was called in have ended."""
    return torch.func.vjp(torch.func.grad(loss(value, b)), a)[1](da)[0]


def vjp_of_vjp(value, a, da, b):
    one = torch.ones((), dtype=a.dtype)
    return torch.func.vjp(lambda a: torch.func.vjp(loss(value, b), a)[1](one)[0], a)[1](da)[0]


def vjp_of_jvp(value, a, da, b):
    one = torch.ones((), dtype=a.dtype)
    return torch.func.vjp(lambda a: torch.func.jvp(loss(value, b), (a,), (da,))[1], a)[1](one)[0]


def jacobian_of_grad(value, a, da, b):
    return torch.func.jacrev(torch.func.grad(loss(value, b)), chunk_size=1)(a)


DERIVATIVES = [
    vjp_of_grad,
    vjp_of_vjp,
    vjp_of_jvp,
    jacobian_of_grad,
    gradient,
    vjp,
    jvp,
    grad_of_grad,
    forward_over_reverse,
    reverse_over_forward,
    tape_over_func,
    dual_numbers,
    tape_over_dual_numbers,
]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("value", [solved, closed_over])
def test_derivatives_of_transformations(data, value, derivative):
    a, da, b = data
    found, expected = derivative(value, a, da, b), derivative(unrolled, a, da, b)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", ["picard", "anderson", "newton-krylov"])
def test_every_solver_runs_under_transformations(data, solver):
    a, da, b = data
    value = lambda a, b: solved(a, b, forward__solver=solver, forward__max_steps=100)
    assert torch.allclose(gradient(value, a, da, b), gradient(unrolled, a, da, b), rtol=1e-8)
    assert torch.allclose(jvp(value, a, da, b), jvp(unrolled, a, da, b), rtol=1e-8)


def test_an_adjoint_that_starts_from_the_estimate_starts_forward_mode_from_its_transpose(data):
    """With no step allowed, the tangent is the start: -H (df/da) da, and H is exact where the pairs span the space."""
    a, da, b = data
    options = {"backward__options": {"start": "reuse", "max_steps": 40, "rtol": 1e-12}}
    value = lambda a, b: solved(a, b, **options)
    assert torch.allclose(jvp(value, a, da, b), jvp(unrolled, a, da, b), rtol=1e-8)


def test_modules_by_functional_call():
    torch.manual_seed(0)
    module = torch.nn.Linear(N, N, dtype=torch.float64)
    module.weight.data *= 0.5
    b = torch.randn(3, N, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def solved_loss(parameters, steps=None):
        f = lambda z: torch.tanh(torch.func.functional_call(module, parameters, z) + b)
        if steps is None:
            return (deqcore.fixed_point(f, torch.zeros_like(b), **OPTIONS).value ** 2).sum()
        z = torch.zeros_like(b)
        for _ in range(steps):
            z = f(z)
        return (z**2).sum()

    found, expected = torch.func.grad(solved_loss)(parameters), torch.func.grad(solved_loss)(parameters, 80)
    for name in parameters:
        assert torch.allclose(found[name], expected[name], rtol=1e-9)


@pytest.mark.parametrize("strategy", ["broyden-reuse", "jacobian-free", "neumann"])
def test_approximate_strategies_have_reverse_mode_of_first_order_only(data, strategy):
    a, da, b = data
    value = lambda a, b: solved(a, b, backward__strategy=strategy, backward__options={}, forward__rtol=1e-3)
    leaf = a.clone().requires_grad_()
    expected = torch.autograd.grad(loss(value, b)(leaf), leaf)[0]  # the tape's own way
    assert torch.allclose(gradient(value, a, da, b), expected, rtol=1e-9)
    with pytest.raises(StrategyError, match="exact-ift"):
        jvp(value, a, da, b)
    with pytest.raises(StrategyError, match="exact-ift"):
        grad_of_grad(value, a, da, b)
    with pytest.raises(StrategyError, match="exact-ift"):
        dual_numbers(value, a, da, b)


@pytest.mark.parametrize("strategy", ["phantom", "unrolled"])
def test_steps_differentiate_to_any_order_and_in_any_mode(data, strategy):
    """They are the gradients of what was computed, so nothing about them is approximate."""
    a, da, b = data
    steps = 25

    def by_hand(a, b):
        z = torch.zeros_like(b) if strategy == "unrolled" else solved(a.detach(), b).detach()
        for _ in range(steps):
            z = cell(z, a, b)
        return z

    options = {"steps": steps, "damping": 1.0} if strategy == "phantom" else {"steps": steps}
    value = lambda a, b: solved(
        a, b, forward__solver="picard", forward__max_steps=200, backward__strategy=strategy, backward__options=options
    )
    for derivative in (gradient, jvp, grad_of_grad, forward_over_reverse):
        assert torch.allclose(derivative(value, a, da, b), derivative(by_hand, a, da, b), rtol=1e-8)


@pytest.mark.parametrize("nested", [False, True])
def test_products_of_a_solver_see_the_derivative_of_f(nested):
    """Newton–Krylov took J v = 0 inside transformations, and `root` a factor of 1: from 1 it found −√a."""
    a = torch.tensor([[4.0]], dtype=torch.float64)
    seen = []

    def total(a, solve=deqcore.root, g=lambda z, a: z**2 - a, solver="auto"):
        sol = solve(g, torch.ones_like(a), a, forward__solver=solver, forward__rtol=1e-12)
        seen.append((sol.steps + 0).sum())
        return sol.value.sum()

    derivative = torch.func.grad(total)
    if nested:
        found = torch.func.grad(lambda a: derivative(a).sum())(a)
        assert found.item() == pytest.approx(-1 / 32, rel=1e-8)
        return
    assert derivative(a).item() == pytest.approx(0.25, rel=1e-8)
    steep = {"solve": deqcore.fixed_point, "g": lambda z, a: a - 3.0 * torch.tanh(z), "solver": "newton-krylov"}
    seen.clear()
    total(a, **steep)
    torch.func.grad(lambda a: total(a, **steep))(a)
    counts = [int(deqcore.get_backend(backend="torch").to_numpy(count)) for count in seen]
    assert counts[0] == counts[1] < 10


@pytest.mark.supports(
    "batched cotangents of `torch.autograd.grad`", backends="torch", strategies="any", answer="refused; `jacrev` works"
)
def test_batched_cotangents_of_the_tape_are_refused(data):
    a, _, b = data
    with pytest.raises(StrategyError, match="vectorize = False"):
        torch.autograd.functional.jacobian(lambda a: solved(a, b), a, vectorize=True)


def test_what_the_refusal_recommends_works(data):
    a, _, b = data
    expected = torch.autograd.functional.jacobian(lambda a: unrolled(a, b), a)
    assert torch.allclose(torch.func.jacrev(lambda a: solved(a, b), chunk_size=1)(a), expected, rtol=1e-8)
    assert torch.allclose(torch.autograd.functional.jacobian(lambda a: solved(a, b), a), expected, rtol=1e-8)


def test_forward_over_forward_and_a_third_level_are_refused(data):
    a, da, b = data
    along = lambda f: lambda a: torch.func.jvp(f, (a,), (da,))[1]
    with pytest.raises(StrategyError, match="forward over reverse"):
        along(along(loss(solved, b)))(a)
    line = lambda t: loss(solved, b)(a + t * da)
    for _ in range(3):
        line = torch.func.grad(line)
    with pytest.raises(StrategyError, match="order 3 and more"):
        line(torch.zeros((), dtype=torch.float64))
    with pytest.raises(StrategyError, match="order 3 and more"):
        tape_over_grad_of_grad(solved, a, da, b)
    with pytest.raises(StrategyError, match="order 3 and more"):
        leaf = a.clone().requires_grad_()
        torch.autograd.grad(vjp_of_grad(solved, leaf, da, b).sum(), leaf)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_what_f_reads_must_stay_until_the_backward_pass(data, scale):
    """torch.func evaluates f again there; what has changed since the call is an error and no other derivative."""
    a, _, b = data

    def total(a):
        held = [0.5]
        solve = lambda z: scale * cell(z / scale, a * held[0], b)
        value = deqcore.fixed_point(solve, 0 * b, **OPTIONS).value
        held[0] = 1.0
        return ((value / scale) ** 2).sum()

    with pytest.raises(ProblemError, match="another value in the backward pass"):
        torch.func.grad(total)(a)

    def passed(a):
        solve = lambda k: deqcore.fixed_point(lambda z, c: cell(z, c, b), 0 * b, a * k, **OPTIONS).value
        return sum((solve(k) ** 2).sum() for k in (0.5, 1.0))

    expected = torch.func.grad(lambda a: sum((unrolled(a * k, b) ** 2).sum() for k in (0.5, 1.0)))(a)
    assert torch.allclose(torch.func.grad(passed)(a), expected, rtol=1e-8)


@pytest.mark.parametrize("derivative", [gradient, grad_of_grad, vjp_of_grad, forward_over_reverse])
def test_each_path_counts_once_where_sources_depend_on_each_other(data, derivative):
    a, da, b = data

    def value(a, b):
        h = torch.tanh(a)
        f = lambda z, h_, a_: cell(z, a_ + h * h_, b)
        return deqcore.fixed_point(f, torch.zeros_like(b), h, a, **OPTIONS).value

    expected = derivative(lambda a, b: unrolled(a + torch.tanh(a) ** 2, b), a, da, b)
    assert torch.allclose(derivative(value, a, da, b), expected, rtol=1e-7, atol=1e-9)
