"""`reversible` against the same two-state iteration written by hand and differentiated by the framework."""

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, ProblemError, StrategyError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)
W, X, G = RNG.standard_normal((5, 5)), RNG.standard_normal((3, 5)), RNG.standard_normal((3, 5))
W *= 0.6 / np.linalg.norm(W, 2)


def settings(steps, damping):
    return {"backward__strategy": "reversible", "backward__options": {"steps": steps, "damping": damping}}


def by_hand(w, x, steps, damping, dtype=torch.float64):
    """The iteration, its states in `dtype`, f in the dtype of x."""
    f = lambda z: torch.tanh(z.to(x.dtype) @ w + x).to(dtype)
    y = z = torch.zeros_like(x, dtype=dtype)
    for _ in range(steps):
        y = (1 - damping) * y + damping * f(z)
        z = (1 - damping) * z + damping * f(y)
    return z.to(x.dtype)


def truth(steps, damping, dtype="float64"):
    w, x = (torch.tensor(a, dtype=getattr(torch, dtype), requires_grad=True) for a in (W, X))
    value = by_hand(w, x, steps, damping)
    return value.detach().numpy(), [g.numpy() for g in torch.autograd.grad(value, [w, x], torch.tensor(G).to(value))]


@pytest.mark.parametrize(("steps", "damping"), [(1, 0.5), (12, 0.5), (12, 0.8), (60, 0.3)])
def test_value_and_gradients_are_those_of_the_iteration(every, steps, damping):
    be = every
    if be.name == "numpy" and steps > 12:
        pytest.skip("differences of so many steps are slow")
    f = lambda z, w, x: be.xp.tanh(z @ w + x)
    args = [be.asarray(a) for a in (W, X)]
    z, gradients = deqcore.vjp(f, 0 * args[1], *args, cotangent=be.asarray(G), **settings(steps, damping))
    value, expected = truth(steps, damping)
    np.testing.assert_allclose(be.to_numpy(z), value, rtol=1e-12)
    for found, right in zip(gradients, expected, strict=True):
        assert np.linalg.norm(be.to_numpy(found) - right) <= 1e-6 * np.linalg.norm(right)


@pytest.mark.parametrize(("steps", "damping"), [(12, 0.5), (12, 0.8)])
def test_single_precision_is_carried_in_double(steps, damping):
    w, x = (torch.tensor(a, dtype=torch.float32) for a in (W, X))
    f = lambda z, w, x: torch.tanh(z @ w + x)
    g = torch.tensor(G, dtype=torch.float32)
    _, gradients = deqcore.vjp(f, 0 * x, w, x, cotangent=g, **settings(steps, damping))
    for found, right in zip(gradients, truth(steps, damping, "float32")[1], strict=True):
        assert np.linalg.norm(found.numpy() - right) <= 1e-6 * np.linalg.norm(right)


def test_a_damping_that_no_dtype_can_undo_is_refused(every):
    x = every.asarray(X)
    with pytest.raises(ConfigError, match=r"cannot undo 60 steps with damping = 0.5.*damping below 0.3"):
        deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x, **settings(60, 0.5))


def test_jax_without_double_precision_refuses_what_it_cannot_undo():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(ConfigError, match=r"cannot undo 16 steps.*damping below 0\.12, fewer steps or.*jax_enable_x64"):
        deqcore.fixed_point(lambda z: 0.5 * z, jnp.ones((1, 2)), backward__strategy="reversible")


@pytest.mark.parametrize(("steps", "damping"), [(3, 0.5), (1, 0.8), (16, 0.12)])
def test_jax_in_single_precision_is_exact_up_to_the_limit(steps, damping):
    jax = pytest.importorskip("jax")
    args = [jax.numpy.asarray(a, "float32") for a in (W, X)]
    f = lambda z, w, x: jax.numpy.tanh(z @ w + x)
    _, gradients = deqcore.vjp(
        f, 0 * args[1], *args, cotangent=jax.numpy.asarray(G, "float32"), **settings(steps, damping)
    )
    for found, right in zip(gradients, truth(steps, damping)[1], strict=True):
        assert found.dtype == "float32"
        assert np.linalg.norm(found - right) <= 1e-6 * np.linalg.norm(right)
    with pytest.raises(ConfigError, match="jax_enable_x64"):
        deqcore.fixed_point(f, 0 * args[1], *args, **settings(steps + 1, damping))


def test_parameters_that_f_closes_over_get_gradients_and_second_derivatives():
    linear = torch.nn.Linear(5, 5).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(W.T))
        linear.bias.zero_()
    x = torch.tensor(X, requires_grad=True)
    f = lambda z, x: torch.tanh(linear(z) + x)
    sol = deqcore.fixed_point(f, torch.zeros_like(x), x, **settings(12, 0.5))
    inputs = [linear.weight, x]
    first = torch.autograd.grad((sol.value * torch.tensor(G)).sum(), inputs, create_graph=True)
    _, expected = truth(12, 0.5)
    np.testing.assert_allclose(first[0].detach().numpy(), expected[0].T, rtol=1e-8)
    second = torch.autograd.grad(first[1].square().sum(), x)[0]
    w, x = torch.tensor(W), torch.tensor(X, requires_grad=True)
    right = torch.autograd.grad((by_hand(w, x, 12, 0.5) * torch.tensor(G)).sum(), x, create_graph=True)[0]
    np.testing.assert_allclose(second.numpy(), torch.autograd.grad(right.square().sum(), x)[0].numpy(), rtol=1e-8)


@pytest.mark.parametrize("change", ["dropout", "parameter"])
def test_an_f_that_is_not_the_same_in_the_backward_pass_is_an_error(change):
    w, x = torch.tensor(W, requires_grad=True), torch.tensor(X)
    factor = torch.ones(())

    def f(z, w):
        z = torch.tanh(z @ w + x) * factor
        return torch.nn.functional.dropout(z) if change == "dropout" else z

    sol = deqcore.fixed_point(
        f, torch.zeros_like(x), w, forward__on_failure="ignore", backward__verify_every=0, **settings(12, 0.5)
    )
    factor.mul_(1.001)
    with pytest.raises(ProblemError, match="did not come back to z0"):
        sol.value.sum().backward()


def test_a_tensor_with_a_history_must_be_an_argument():
    x = torch.tensor(X, requires_grad=True)
    hidden = 2 * x
    with pytest.raises(StrategyError, match="closes over a tensor that has a history.*Pass it through args"):
        deqcore.fixed_point(lambda z: 0.5 * z + hidden, torch.zeros_like(x), **settings(2, 0.5))
    sol = deqcore.fixed_point(lambda z, h: 0.5 * z + h, torch.zeros_like(x), hidden, **settings(1, 0.5))
    (dx,) = torch.autograd.grad(sol.value.sum(), x)
    np.testing.assert_allclose(dx.numpy(), 2 * 0.625)  # z = (y/2 + x)/2 with y = x/2


def held(steps):
    """Bytes that the graph keeps between the passes, in states."""
    sizes = []
    x = torch.zeros(64, 32, requires_grad=True)
    w = torch.zeros(32, 32, requires_grad=True)

    def pack(t):
        sizes.append(t.numel() * t.element_size() * (t.data_ptr() not in (x.data_ptr(), w.data_ptr())))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        deqcore.fixed_point(
            lambda z, x: torch.tanh(z @ w + x), torch.zeros(64, 32), x, backward__verify_every=0, **settings(steps, 0.5)
        )
    return sum(sizes) / (64 * 32 * 4)


def test_the_graph_keeps_no_more_states_for_more_steps():
    short, long = held(4), held(24)
    assert short == long  # beyond 3 steps the states are carried in double precision
    assert long <= 4 + 3  # two double states, and one recorded evaluation that shows what f depends on


def test_torch_func_records_every_step():
    x = torch.tensor(X)
    f = lambda x: deqcore.fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, 0 * x, x, **settings(3, 0.5)).value.sum()
    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(plain), plain)
    np.testing.assert_allclose(torch.func.grad(f)(x).numpy(), expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("closed", [False, True], ids=["argument", "closure, too"])
def test_an_argument_that_is_computed_from_another_counts_once(closed):
    """The engine continues beyond h to x, which is an argument, too."""
    w, x = (torch.tensor(a, requires_grad=True) for a in (W, X))
    h = torch.sin(x @ w)
    f = lambda z, h_, x_: torch.tanh(z @ w + (h if closed else h_) + x_)
    value = deqcore.fixed_point(f, 0 * x.detach(), h, x, **settings(6, 0.5)).value
    expected = by_hand(w, torch.sin(x @ w) + x, 6, 0.5)
    undone = [torch.autograd.grad(each.sum(), (w, x), retain_graph=True) for each in (value, expected)]
    for found, right in [*zip(*undone, strict=True), *_two_orders(value, expected, (w, x))]:
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def _two_orders(value, expected, sources):
    """Pairs of first and second derivatives."""
    first = [torch.autograd.grad(each.square().sum(), sources, create_graph=True) for each in (value, expected)]
    second = [torch.autograd.grad(sum(part.square().sum() for part in parts), sources) for parts in first]
    return [pair for parts in (first, second) for pair in zip(*parts, strict=True)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_layers_may_share_a_cell(checkpointed):
    from deqcore_torch.nn import DEQ
    from torch.utils.checkpoint import checkpoint

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(W))

        def forward(self, z, x):
            return torch.tanh(z @ self.w + x)

    cell = Cell()
    model = torch.nn.Sequential(DEQ(cell, **settings(6, 0.5)), DEQ(cell, **settings(6, 0.5)))
    x = torch.tensor(X, requires_grad=True)
    value = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    expected = by_hand(cell.w, by_hand(cell.w, x, 6, 0.5), 6, 0.5)
    found, right = (torch.autograd.grad(each.sum(), (cell.w, x)) for each in (value, expected))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_a_hook_may_keep_the_cotangents_that_it_gets():
    """They are those of the iteration, and no later half step writes to them."""
    w, x = (torch.tensor(a, requires_grad=True) for a in (W, X))

    def seen(run):
        found = []

        def f(z):
            value = torch.tanh(z @ w + x)
            if value.requires_grad:
                value.register_hook(found.append)
            return value

        value = run(f)
        found.clear()
        torch.autograd.grad(value, [w, x], torch.tensor(G))
        return found

    def by_hand_of(f):
        y = z = torch.zeros_like(x)
        for _ in range(4):
            y = 0.2 * y + 0.8 * f(z)
            z = 0.2 * z + 0.8 * f(y)
        return z

    quiet = {"forward__on_failure": "ignore", "backward__verify_every": 0, **settings(4, 0.8)}
    kept = seen(lambda f: deqcore.fixed_point(lambda z, w, x: f(z), torch.zeros_like(x), w, x, **quiet).value)
    expected = seen(by_hand_of)
    assert len(kept) == len(expected) == 8
    for found, right in zip(kept, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
