"""PyTorch: products J v of functions without forward mode, the solver that needs them, and Functions used twice."""

from __future__ import annotations

import gc
import weakref

import pytest

import deqcore
from deqcore.errors import BackendError, StrategyError

torch = pytest.importorskip("torch")

N = 3


class Tanh(torch.autograd.Function):
    """No `jvp`; its backward may be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - torch.tanh(x) ** 2)


class Once(Tanh):
    backward = staticmethod(torch.autograd.function.once_differentiable(Tanh.backward))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    a = 0.4 * torch.randn(N, N, dtype=torch.float64, generator=generator)
    return a, *torch.randn(2, 2, N, dtype=torch.float64, generator=generator)


def cell(tanh, a, b):
    return lambda z: tanh(z @ a.T) + b


def attention(a, b):
    def f(z):
        k = (z @ a.T)[:, None, :, None]
        return 0.3 * torch.nn.functional.scaled_dot_product_attention(k, k, k)[:, 0, :, 0] + b

    return f


@pytest.mark.parametrize("recording", [False, True])
def test_products_without_forward_mode_are_those_of_a_dense_jacobian(data, recording):
    a, b, v = data
    with torch.set_grad_enabled(recording):
        product = deqcore.get_backend(backend="torch").autodiff.jvp(cell(Tanh.apply, a, b), b)
        found = [product(v), product(2 * v)]
    slope = 1 - torch.tanh(b @ a.T) ** 2
    assert torch.allclose(found[0], slope * (v @ a.T), rtol=1e-12)
    assert torch.allclose(found[1], 2 * slope * (v @ a.T), rtol=1e-12)


def test_products_of_a_backward_that_takes_logarithms_of_its_cotangent(data):
    a, b, v = data

    def f(z, b):
        return 0.3 * Tanh.apply((z @ a.T).logcumsumexp(1)) + b

    found = deqcore.get_backend(backend="torch").autodiff.jvp(lambda z: f(z, b), b)(v)
    step = 1e-5 * v
    assert torch.allclose(found, (f(b + step, b) - f(b - step, b)) / 2e-5, rtol=1e-7, atol=1e-9)

    def value(b):
        smooth = lambda z, b: 0.3 * (z @ a.T).logcumsumexp(1) + b
        return deqcore.fixed_point(smooth, torch.zeros_like(b), b, forward__rtol=1e-13, forward__max_steps=200).value

    found = torch.func.jvp(value, (b,), (v,))[1]
    with torch.no_grad():
        differences = (value(b + step) - value(b - step)) / 2e-5
    assert torch.allclose(found, differences, rtol=1e-6, atol=1e-8)


def test_a_solve_that_records_nothing_evaluates_f_once_for_all_products(data):
    a, b, v = data
    slope = 1 - torch.tanh(b @ a.T) ** 2
    for recording, evaluations in ((False, 1), (True, 3)):
        calls = []

        def f(z, calls=calls):
            calls.append(z)
            return torch.tanh(z @ a.T) + b

        with torch.set_grad_enabled(recording):
            product = deqcore.get_backend(backend="torch").autodiff.jvp(f, b)
            found = [product(s * v) for s in (1.0, 1e20, 1e-25)]
        assert len(calls) == evaluations
        for one, s in zip(found, (1.0, 1e20, 1e-25), strict=True):
            assert torch.allclose(one / s, slope * (v @ a.T), rtol=1e-12)


class Detached(Tanh):
    """Its backward cannot be differentiated and does not say so; its forward mode is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        return Tanh.backward(ctx, g.detach())

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * (1 - torch.tanh(x) ** 2)


def unrecorded(x):
    with torch.no_grad():
        return torch.tanh(x)


def hooked(x):
    y = torch.tanh(x)
    if y.requires_grad:
        y.register_hook(lambda g: 0.1 * g)
    return y


@pytest.mark.parametrize("tanh", [Detached.apply, unrecorded, hooked], ids=["detached", "no_grad", "hook"])
def test_products_do_not_rely_on_a_vjp_that_the_user_changes(data, tanh):
    a, b, v = data
    with torch.no_grad():
        found = deqcore.get_backend(backend="torch").autodiff.jvp(cell(tanh, a, b), b)(v)
    assert torch.allclose(found, (1 - torch.tanh(b @ a.T) ** 2) * (v @ a.T), rtol=1e-12)


def test_products_leave_no_graph_behind(data):
    """Without a collection: the graph holds the values of each operation of f."""
    a, b, v = data
    kept = []

    def f(z):
        y = torch.tanh(z @ a.T)
        kept.append(weakref.ref(y))
        return y + b

    gc.disable()
    try:
        with torch.no_grad():
            product = deqcore.get_backend(backend="torch").autodiff.jvp(f, b)
            product(v)
        del product
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("recording", [False, True])
def test_products_of_fused_attention_are_those_of_central_differences(data, recording):
    a, b, v = data
    f = attention(a.requires_grad_(), b)
    with torch.set_grad_enabled(recording):
        found = deqcore.get_backend(backend="torch").autodiff.jvp(f, b)(v)
    step = 1e-5 * v
    assert torch.allclose(found, (f(b + step) - f(b - step)) / 2e-5, rtol=1e-7, atol=1e-9)
    assert found.requires_grad is recording


def test_newton_krylov_solves_fused_attention(data):
    f, b = attention(data[0].requires_grad_(), data[1]), data[1]
    sol = deqcore.fixed_point(f, torch.zeros_like(b), forward__solver="newton-krylov", forward__rtol=1e-12)
    assert sol.converged.all()
    assert torch.allclose(f(sol.value), sol.value, rtol=1e-11)


def test_attention_whose_kernel_the_user_insists_on_is_refused(data):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    free, b, v = attention(data[0].requires_grad_(), data[1]), *data[1:]

    def f(z):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return free(z)

    with pytest.raises(BackendError, match="products"):
        deqcore.get_backend(backend="torch").autodiff.jvp(f, b)(v)


def test_a_function_that_reads_no_state_has_products_of_zero(data):
    _, b, v = data
    jvp = deqcore.get_backend(backend="torch").autodiff.jvp
    assert not jvp(lambda z: Tanh.apply(b), b)(v).any()
    assert not jvp(lambda z: Tanh.apply(b.clone().requires_grad_()), b)(v).any()


def test_newton_krylov_solves_without_forward_mode(data):
    a, b, _ = data
    settings = {"forward__solver": "newton-krylov", "forward__rtol": 1e-12}
    solve = lambda tanh: deqcore.fixed_point(cell(tanh, 3 * a, b), torch.zeros_like(b), **settings)
    found, expected = solve(Tanh.apply), solve(torch.tanh)
    assert found.converged.all()
    assert found.steps.tolist() == expected.steps.tolist()  # J v was right: with another one Newton is slower
    assert torch.allclose(found.value, expected.value, rtol=1e-10)


@pytest.mark.parametrize("kind", ["once", "once beside another"])
def test_where_no_product_can_be_had_the_error_names_solvers_that_need_none(data, kind):
    a, b, _ = data
    f = {
        "once": cell(Once.apply, a, b),
        "once beside another": cell(lambda x: 0.5 * Once.apply(x) + 0.1 * Tanh.apply(x), a, b),
    }[kind]
    with pytest.raises(BackendError, match="anderson, broyden or picard"):
        deqcore.fixed_point(f, torch.zeros_like(b), forward__solver="newton-krylov")
    assert deqcore.fixed_point(f, torch.zeros_like(b), forward__solver="broyden").converged.all()


@pytest.mark.parametrize("tanh", [torch.tanh, Tanh.apply], ids=["forward mode", "without"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_unrolled_newton_krylov_is_the_gradient_of_its_steps(data, tanh, checkpoint, steps):
    """Central differences of what the steps compute, and after enough of them the exact gradient."""
    a, b, t = data[0], data[1], torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(a, **settings):
        f = lambda z, a: tanh(z @ a.T) + b
        return (deqcore.fixed_point(f, torch.zeros_like(b), a, **settings).value ** 2).sum()

    unrolled = {
        "forward__solver": "newton-krylov",
        "backward__strategy": "unrolled",
        "backward__options": {"steps": steps, "checkpoint": checkpoint},
    }
    leaf = a.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, **unrolled), leaf)
    h = 1e-5
    slope = (loss(a + h * t, **unrolled) - loss(a - h * t, **unrolled)) / (2 * h)
    assert (found * t).sum().item() == pytest.approx(slope.item(), rel=1e-7)
    if steps == 6:
        exact = {"forward__rtol": 1e-13, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-13}}
        (expected,) = torch.autograd.grad(loss(leaf, **exact), leaf)
        assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["alone", "beside another"])
def test_a_function_that_is_differentiable_once_gives_first_derivatives_and_no_second(share):
    """`torch.autograd.grad` goes round the node that would raise; the part that is left is not a derivative."""
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    tight = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}

    def first(tanh, create_graph):
        f = lambda z, a: share * tanh(a * z) + (1 - share) * a * z + 1
        value = deqcore.fixed_point(f, torch.zeros(1, 1, dtype=torch.float64), a, **tight).value
        return torch.autograd.grad(value.sum(), a, create_graph=create_graph)[0]

    assert torch.allclose(first(Once.apply, False), first(torch.tanh, False), rtol=1e-10)
    kept = first(Once.apply, True)
    assert torch.allclose(kept, first(torch.tanh, False), rtol=1e-10)
    with pytest.raises(StrategyError, match="once_differentiable"):
        torch.autograd.grad(kept, a)
    found, expected = (torch.autograd.grad(first(tanh, True), a)[0] for tanh in (Tanh.apply, torch.tanh))
    assert torch.allclose(found, expected, rtol=1e-9)
