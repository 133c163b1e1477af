"""Second derivatives on PyTorch's tape: against closed forms and differentiated unrolling; refused where not right."""

from __future__ import annotations

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


def test_third_order_is_refused():
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    value = solved(lambda z, a: a * z + 1, torch.zeros(1, 1, dtype=torch.float64), a).sum()
    (first,) = torch.autograd.grad(value, a, create_graph=True)
    (second,) = torch.autograd.grad(first, a, create_graph=True)
    with pytest.raises(StrategyError, match="order 3"):
        torch.autograd.grad(second, a)


@pytest.mark.parametrize("strategy", ["broyden-reuse", "jacobian-free", "neumann"])
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


def test_the_evaluation_for_second_derivatives_has_the_autocast_and_random_state_of_the_first(module):
    """f records what it finds: the random number that it would draw, and whether autocast is on."""
    seen = []
    x = torch.randn(3, N).requires_grad_()
    cell = module.float()

    def f(z, x):
        seen.append((torch.rand(()).item(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return torch.tanh(cell(z) + x).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deqcore.fixed_point(f, torch.zeros(3, N), x, backward__strategy="exact-ift").value
    recorded = seen[-1]
    count, state = len(seen), torch.get_rng_state()
    torch.autograd.grad(z.sum(), x, create_graph=True)
    assert len(seen) == count + 1
    assert seen[-1] == recorded
    assert recorded[1:] == (True, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_autocast_enabled("cpu")
