"""Second derivatives on PyTorch's tape: against closed forms and differentiated unrolling; refused where not right."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

import deqcore
from deqcore.errors import StrategyError

torch = pytest.importorskip("torch")

N = 4
TIGHT = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}


@pytest.fixture
def module():
    torch.manual_seed(0)
    made = torch.nn.Linear(N, N, dtype=torch.float64)
    made.weight.data *= 0.6
    return made


@pytest.fixture
def x():
    return torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def solved(f, x, *args, **overrides):
    return deqcore.fixed_point(f, torch.zeros_like(x), *args, **{**TIGHT, **overrides}).value


def unrolled(f, x, *args):
    z = torch.zeros_like(x)
    for _ in range(90):
        z = f(z, *args)
    return z


@pytest.mark.parametrize("way", ["passed", "closed over", "both"])
def test_the_scalar_closed_form_to_second_order(way):
    """z* = 1 / (1 − a): dz = (1 − a)^-2, d²z = 2 (1 − a)^-3."""
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    share = {"passed": 1.0, "closed over": 0.0, "both": 0.5}[way]
    f = lambda z, b: share * b * z + (1 - share) * a * z + 1
    value = solved(f, torch.zeros(1, 1, dtype=torch.float64), a).sum()
    (first,) = torch.autograd.grad(value, a, create_graph=True)
    assert first.item() == pytest.approx(0.6**-2, rel=1e-9)
    assert torch.autograd.grad(first, a)[0].item() == pytest.approx(2 * 0.6**-3, rel=1e-9)


def test_hessian_vector_products_of_a_linear_equilibrium_have_their_closed_form():
    """z* = (I − A)^-1 b, L = ½‖z*‖²: H_b v = (I − A)^-T (I − A)^-1 v."""
    r = np.random.default_rng(0)
    a = 0.5 * r.standard_normal((N, N)) / np.sqrt(N)
    b, v = r.standard_normal((1, N)), r.standard_normal((1, N))
    tensor = torch.tensor(b, requires_grad=True)
    z = solved(lambda z, b: z @ torch.tensor(a).T + b, tensor, tensor)
    (g,) = torch.autograd.grad((z**2).sum() / 2, tensor, create_graph=True)
    (found,) = torch.autograd.grad(g, tensor, torch.tensor(v))
    inverse = np.linalg.inv(np.eye(N) - a)
    assert np.allclose(found.numpy(), v @ inverse.T @ inverse, rtol=1e-9)


@pytest.mark.parametrize("twice", [False, True], ids=["plain", "create_graph"])
@pytest.mark.parametrize("passed", [False, True], ids=["closed over", "passed"])
def test_losses_of_forces_train_the_parameters(module, x, twice, passed):
    """E = Σ z*², forces −∂E/∂x, a loss of forces and energy, and its gradient for parameters and positions."""

    def gradients(solve):
        f = (lambda z, x: torch.tanh(module(z) + x)) if passed else (lambda z: torch.tanh(module(z) + x))
        energy = (solve(f, x, *([x] if passed else [])) ** 2).sum()
        (forces,) = torch.autograd.grad(-energy, x, create_graph=True)
        loss = (forces**3).sum() + energy
        return torch.autograd.grad(loss, [x, *module.parameters()], create_graph=twice)

    for found, expected in zip(gradients(solved), gradients(unrolled), strict=True):
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_backward_fills_grad_of_parameters_in_a_second_pass(module, x):
    def filled(solve):
        module.zero_grad()
        z = solve(lambda z: torch.tanh(module(z) + x), x)
        (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        (g**2).sum().backward()
        return [p.grad.clone() for p in module.parameters()]

    for found, expected in zip(filled(solved), filled(unrolled), strict=True):
        assert torch.allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize(
    "options", [{"solver": "broyden"}, {"solver": "picard", "max_steps": 200}, {"start": "reuse"}], ids=str
)
@pytest.mark.supports("forward mode and second derivatives", backends="torch", strategies="exact-ift")
def test_second_derivatives_by_any_adjoint_solver(module, x, options):
    settings = {"backward__options": {"rtol": 1e-12, "max_steps": 60, **options}}

    def second(solve, **overrides):
        z = solve(lambda z, x: torch.tanh(module(z) + x), x, x, **overrides)
        (g,) = torch.autograd.grad((z**2).sum(), x, create_graph=True)
        return torch.autograd.grad((g**2).sum(), module.weight)[0]

    assert torch.allclose(second(solved, **settings), second(unrolled), rtol=1e-8)


def test_gradcheck_and_gradgradcheck_with_trees(module):
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.randn(2, k, dtype=torch.float64, generator=generator).requires_grad_() for k in (2, 3))
    w = (0.2 * torch.randn(2, 3, dtype=torch.float64, generator=generator)).requires_grad_()

    def value(p, q, w):
        f = lambda z, p, q: {"p": torch.tanh(z["q"] @ w.T + p), "q": [torch.sin(0.3 * z["p"] @ w + q)][0]}
        z = deqcore.fixed_point(f, {"p": torch.zeros_like(p), "q": torch.zeros_like(q)}, p, q, **TIGHT).value
        return z["p"], z["q"]

    assert torch.autograd.gradcheck(value, (p, q, w))
    assert torch.autograd.gradgradcheck(value, (p, q, w))


@pytest.mark.supports("third derivatives", backends="torch", strategies="any", answer="refused")
def test_third_order_is_refused():
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    value = solved(lambda z, a: a * z + 1, torch.zeros(1, 1, dtype=torch.float64), a).sum()
    (first,) = torch.autograd.grad(value, a, create_graph=True)
    (second,) = torch.autograd.grad(first, a, create_graph=True)
    with pytest.raises(StrategyError, match="order 3"):
        torch.autograd.grad(second, a)


@pytest.mark.parametrize("strategy", ["broyden-reuse", "jacobian-free", "neumann"])
@pytest.mark.supports(
    "forward mode and second derivatives", backends="torch", strategies="approximate ones", answer="refused"
)
def test_approximations_give_first_derivatives_with_create_graph_and_no_second(module, x, strategy):
    def first(create_graph):
        options = {"backward__strategy": strategy, "backward__options": {}, "forward__rtol": 1e-6}
        z = solved(lambda z, x: torch.tanh(module(z) + x), x, x, **options)
        return torch.autograd.grad((z**2).sum(), [x, module.weight], create_graph=create_graph)

    for kept, plain in zip(first(True), first(False), strict=True):
        assert torch.equal(kept, plain)
        with pytest.raises(StrategyError, match="exact-ift"):
            kept.sum().backward(retain_graph=True)


def test_a_hidden_history_is_refused_only_where_it_is_differentiated_twice(module, x):
    hidden = 2 * x
    z = solved(lambda z: torch.tanh(module(z) + hidden), x)
    (plain,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    (kept,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert torch.equal(plain, kept)
    with pytest.raises(StrategyError, match="Pass it through args"):
        kept.sum().backward()
    # What the message recommends:
    z = solved(lambda z, hidden: torch.tanh(module(z) + hidden), x, 2 * x)
    (found,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(found.sum(), x)
    z = unrolled(lambda z: torch.tanh(module(z) + 2 * x), x)
    (expected,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert torch.allclose(found, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-8)


@pytest.mark.parametrize("order", [1, 2])
def test_no_backward_pass_evaluates_f(module, x, order):
    """What autocast, the random state and closed-over values were at the call is what all derivatives see."""
    calls = []

    def f(z, x):
        calls.append(torch.rand(()).item())
        return torch.tanh(module(z) + x)

    z = solved(f, x, x)
    count, state = len(calls), torch.get_rng_state()
    (g,) = torch.autograd.grad((z**2).sum(), x, create_graph=order == 2)
    if order == 2:
        (g**2).sum().backward()
    assert len(calls) == count
    assert torch.equal(torch.get_rng_state(), state)


def derivatives(loss, *wanted):
    """First and second derivatives of a scalar, with unused tensors as zeros."""
    first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum((g**3).sum() for g in first), wanted, materialize_grads=True)
    return [*first, *second]


def agree(build, *wanted):
    """Hold derivatives of every order through `solved` to those through unrolled steps."""
    for found, expected in zip(derivatives(build(solved), *wanted), derivatives(build(unrolled), *wanted), strict=True):
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


# ruff: noqa: B023 (late binding is what is tested)
def loop_variable(module, x, solve):
    xs = [k * x for k in (1.0, 0.3, -2.0)]
    return sum((solve(lambda z, v: torch.tanh(module(z) + scale * v), x, v) ** 2).sum() for scale, v in enumerate(xs))


def leaves_of_a_loop(module, x, solve):
    weights = [module.weight, module.bias, torch.ones((), dtype=x.dtype)]
    total = 0.0
    for t in range(3):
        total = total + (solve(lambda z: 0.3 * torch.tanh(z + weights[t].mean() * z + weights[t].sum()), x) ** 2).sum()
    return total


def list_that_changes(module, x, solve):
    held = [module.weight, 0.7]
    value = solve(lambda z, x: torch.tanh(held[1] * z @ held[0].T + x), x, x)
    held[0], held[1] = 2 * module.weight, -3.0
    return (value**2).sum()


def mode_that_changes(module, x, solve):
    batch_norm = torch.nn.BatchNorm1d(N, dtype=x.dtype, momentum=0.0)
    batch_norm.running_var *= 9.0
    batch_norm.eval()
    value = solve(lambda z, x: torch.tanh(0.3 * batch_norm(z) + x), x, x)
    batch_norm.train()
    return (value**2).sum() + 0.0 * module.weight.sum()


@pytest.mark.parametrize("build", [loop_variable, leaves_of_a_loop, list_that_changes, mode_that_changes])
def test_derivatives_see_what_f_saw_at_the_call(module, x, build):
    agree(lambda solve: build(module, x, solve), x, module.weight)


def closed_and_passed(module, x, solve):
    h = torch.tanh(x)
    return solve(lambda z, h_, x_: torch.tanh(module(z) + h + x_), x, h, x)


def both_passed(module, x, solve):
    return solve(lambda z, h, x: torch.tanh(module(z) + h * x), x, torch.tanh(x), x)


def a_chain(module, x, solve):
    h = torch.sin(x)
    k = h * h
    return solve(lambda z, k_, h_: torch.tanh(module(z) + h * k_ + x), x, k, h)


def views(module, x, solve):
    return solve(lambda z, a, b: torch.tanh(module(z) + a.reshape(3, N) * b[0] + x), x, x.view(-1), x[1:])


def passed_twice(module, x, solve):
    h = 2 * x
    return solve(lambda z, a, b: torch.tanh(module(z) + a * b + h), x, h, h)


def outputs_of_one_node(module, x, solve):
    a, b = torch.tanh(x).unbind(1)[:2]
    return solve(lambda z, a_, b_: torch.tanh(module(z) + b[:, None] + a_[:, None] * b_[:, None]), x, a, b)


def a_parameter_and_its_function(module, x, solve):
    w = module.weight / (1 + module.weight.norm())
    return solve(lambda z, w_, x: torch.tanh(z @ w_ + z @ module.weight.T * 0.3 + x), x, w, x)


def broadcast(module, x, solve):
    h = x.sum()
    return solve(lambda z, h_, x_: torch.tanh(module(z) + 0.1 * h_ + h.expand(3, N) * 0.1 + x_), x, h, x)


DEPENDENT = [
    closed_and_passed,
    both_passed,
    a_chain,
    views,
    passed_twice,
    outputs_of_one_node,
    a_parameter_and_its_function,
    broadcast,
]


@pytest.mark.parametrize("build", DEPENDENT)
def test_each_path_counts_once_where_sources_depend_on_each_other(module, x, build):
    agree(lambda solve: (build(module, x, solve) ** 2).sum(), x, module.weight)


@pytest.mark.parametrize("build", DEPENDENT)
def test_dependent_sources_against_finite_differences(module, x, build):
    def loss(x, w):
        module.weight.data = w.data
        with torch.nn.utils.parametrize.cached():
            return torch.func.functional_call(_Built(module, build), {"module.weight": w}, (x,))

    w = module.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)


class _Built(torch.nn.Module):
    def __init__(self, module, build):
        super().__init__()
        self.module = module
        self.build = build

    def forward(self, x):
        return self.build(self.module, x, solved)


def test_gradients_of_an_intermediate_tensor_that_depends_on_another_source(module, x):
    """PyTorch's own meaning: the gradient of h and that of x, which includes the path through h."""

    def found(solve):
        h = torch.tanh(x)
        value = solve(lambda z, h_, x_: torch.tanh(module(z) + h * h_ + x_), x, h, x)
        return torch.autograd.grad((value**2).sum(), [h, x], create_graph=True)

    for got, expected in zip(found(solved), found(unrolled), strict=True):
        assert torch.allclose(got, expected, rtol=1e-8)


def test_hooks_on_tensors_run_once_each(module, x):
    """A hook that scales the gradient of a parameter or an argument scales it once, also under create_graph."""

    def found(create_graph):
        h = torch.tanh(x)
        handles = [module.weight.register_hook(lambda g: 2 * g), h.register_hook(lambda g: 3 * g)]
        value = solved(lambda z, h: torch.tanh(module(z) + h), x, h)
        got = torch.autograd.grad((value**2).sum(), [module.weight, x], create_graph=create_graph)
        for handle in handles:
            handle.remove()
        return got

    for plain, kept in zip(found(False), found(True), strict=True):
        assert torch.allclose(plain, kept, rtol=1e-12)


def test_a_tensor_from_another_thread_is_refused_and_not_forgotten(module, x):
    """Threads count their nodes apart: a history made in a young thread looks older, in an old one newer."""
    for length in (0, 3000):
        made = []

        def make(length=length, made=made):
            h = x
            for _ in range(length):
                h = h * 1.0
            made.append(torch.tanh(h))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        z = solved(lambda z, made=made: torch.tanh(module(z) + made[0]), x)
        (g,) = torch.autograd.grad(z.sum(), made[0], create_graph=True)
        with pytest.raises(StrategyError, match="Pass it through args"):
            g.sum().backward()


@pytest.mark.parametrize("returned", ["argument", "parameter"])
def test_f_that_returns_a_tensor_from_outside(x, returned):
    f = (lambda z, x: x) if returned == "argument" else (lambda z: x)
    args = (x,) if returned == "argument" else ()
    value = solved(f, x, *args)
    (g,) = torch.autograd.grad((value**3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert torch.allclose(g, 3 * x**2)
    assert torch.allclose(h, 6 * x)


@dataclasses.dataclass
class Inputs:
    """No tree of optree's."""

    h: object
    name: str = "text"


def test_tensors_in_a_dataclass_are_found(module, x):
    def build(solve):
        f = lambda z, p: torch.tanh(module(z) + p.h["x"] * p.h["x"])
        return (solve(f, x, Inputs({"x": torch.sin(x)})) ** 2).sum()

    agree(build, x, module.weight)


def test_an_object_with_tensors_is_found_too(module, x):
    class Holder:
        def __init__(self, h):
            self.h = h

    agree(lambda solve: (solve(lambda z, p: torch.tanh(module(z) + p.h), x, Holder(2 * x)) ** 2).sum(), x)


@pytest.mark.parametrize("inside", [True, False], ids=["inside f", "before"])
def test_an_equilibrium_of_an_equilibrium(module, x, inside):
    """The passes of the inner one begin within those of the outer one, and meet the same nodes."""

    def build(solve):
        inner = lambda z, x: solve(lambda y, z, x: torch.tanh(module(y) + z + x), x, z, x)
        if inside:
            return (solve(lambda z, x: 0.3 * inner(z, x), x, x) ** 2).sum()
        return (solve(lambda z, h, x: torch.tanh(module(z) + h * x), x, inner(x, x), x) ** 2).sum()

    agree(build, x, module.weight)


def test_sparse_gradients(x):
    table = torch.nn.Embedding(5, N, sparse=True, dtype=x.dtype)
    value = solved(lambda z: torch.tanh(0.5 * z + table(torch.tensor([0, 2, 2]))), x)
    (plain,) = torch.autograd.grad(value.sum(), table.weight, retain_graph=True)
    (kept,) = torch.autograd.grad(value.sum(), table.weight, create_graph=True)
    assert torch.allclose(plain.to_dense(), kept.to_dense())


def _cubed(a):
    """L(x) = Σ z*(x)³ for z* = tanh(z* a + x), by the layer and by unrolling."""
    f = lambda z, x: torch.tanh(z @ a + x)
    return lambda x: (solved(f, x, x) ** 3).sum(), lambda x: (unrolled(f, x, x) ** 3).sum()


@pytest.fixture
def cubed():
    return _cubed(0.3 * torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("product", ["hvp", "vhp", "hessian"])
def test_products_of_torch_autograd_functional(cubed, x, product):
    call = getattr(torch.autograd.functional, product)
    found, truth = (call(loss, x.detach(), *([torch.cos(x.detach())] * (product != "hessian"))) for loss in cubed)
    found, truth = (each if product == "hessian" else each[1] for each in (found, truth))
    assert torch.allclose(found, truth, rtol=1e-8, atol=1e-9)


def test_a_double_backward_product_is_differentiated_in_its_vector(cubed, x):
    """d/dv of 1ᵀHv + Σv is H1 + 1."""
    found = []
    for loss in cubed:
        v = torch.ones_like(x).requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (hv,) = torch.autograd.grad(g, x, v, create_graph=True)
        found += torch.autograd.grad(hv.sum() + v.sum(), v)
    assert torch.allclose(*found, rtol=1e-8, atol=1e-9)


def test_gradgradcheck_agrees(module, x):
    f = lambda z, x: torch.tanh(module(z) + x)
    small = x.detach()[:1].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: solved(f, x, x), (small,))


@pytest.mark.parametrize("wanted", ["x", "a factor of the loss", "a product's vector, twice"])
def test_derivatives_of_a_product_in_anything_else_are_refused(cubed, x, wanted):
    factor, v = (torch.tensor(2.0, dtype=x.dtype, requires_grad=True) for _ in range(2))
    (g,) = torch.autograd.grad(factor * cubed[0](x), x, create_graph=True)
    (hv,) = torch.autograd.grad(g, x, v.expand(x.shape), create_graph=True)
    with pytest.raises(StrategyError, match="order 3"):
        if wanted == "a product's vector, twice":
            (h,) = torch.autograd.grad((hv**2).sum(), v, create_graph=True)
            torch.autograd.grad(h, v)
        else:
            torch.autograd.grad(hv.sum(), x if wanted == "x" else factor)


def test_torch_func_inside_the_tape_is_right_or_refused(cubed, x):
    v = torch.ones_like(x).requires_grad_()
    with pytest.raises(StrategyError, match="order 3"):
        hv = torch.func.vjp(torch.func.grad(cubed[0]), x.detach())[1](v)[0]
        torch.autograd.grad(hv.sum() + v.sum(), v)
