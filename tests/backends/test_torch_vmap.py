"""torch.func.vmap, jacrev, jacfwd and hessian through a solve, against differentiated unrolling and loops."""

from __future__ import annotations

import pytest

import deqcore
from deqcore.errors import ConfigError, ConvergenceWarning, InitialIterateError, StrategyError

torch = pytest.importorskip("torch")
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_forward_mode")
OPTIONS = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}
LANES, BATCH, N = 3, 2, 4


@pytest.fixture
def data():
    torch.manual_seed(0)
    a = 0.2 * torch.randn(LANES, N, N, dtype=torch.float64)
    return a, torch.randn(LANES, BATCH, N, dtype=torch.float64)


def cell(z, a, b):
    return torch.tanh(z @ a.T + b)


def solved(a, b, **overrides):
    return deqcore.fixed_point(cell, torch.zeros_like(b), a, b, **{**OPTIONS, **overrides}).value


def unrolled(a, b):
    z = torch.zeros_like(b)
    for _ in range(100):
        z = cell(z, a, b)
    return z


def on_tape(value, a, b):
    leaf = a.clone().requires_grad_()
    return torch.autograd.grad((vmap(value)(leaf, b) ** 3).sum(), leaf)[0]


TRANSFORMS = {
    "both": lambda value, a, b: vmap(value)(a, b),
    "parameters": lambda value, a, b: vmap(value, (0, None))(a, b[0]),
    "inputs, another axis": lambda value, a, b: vmap(value, (None, 1), 1)(a[0], b.transpose(0, 1)),
    "nested": lambda value, a, b: vmap(lambda a: vmap(lambda b: value(a, b))(b))(a),
    "gradients of each sample": lambda value, a, b: vmap(grad(lambda a, b: (value(a, b) ** 3).sum()), (None, 0))(
        a[0], b
    ),
    "grad of vmap": lambda value, a, b: grad(lambda a: (vmap(value)(a, b) ** 3).sum())(a),
    "tape around vmap": on_tape,
    "jacrev": lambda value, a, b: jacrev(lambda b: value(a[0], b))(b[0]),
    "jacrev in chunks": lambda value, a, b: jacrev(lambda b: value(a[0], b), chunk_size=3)(b[0]),
    "jacfwd": lambda value, a, b: jacfwd(lambda b: value(a[0], b))(b[0]),
    "hessian": lambda value, a, b: hessian(lambda b: (value(a[0], b) ** 3).sum())(b[0, :1]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.supports("`vmap` of a solve and of its gradient", backends="torch", strategies="exact-ift")
@pytest.mark.supports("`jacrev`, `jacfwd`, `hessian`", backends="torch", strategies="exact-ift")
def test_transformed_solves_are_those_of_unrolled_steps(data, name):
    transform = TRANSFORMS[name]
    assert torch.allclose(transform(solved, *data), transform(unrolled, *data), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", ["picard", "broyden", "newton-krylov"])
def test_each_sample_of_each_lane_stops_by_itself(data, solver):
    """Steps and values are those of a loop over lanes, with tensors that f closes over."""
    a, b = data
    a = a * torch.tensor([0.1, 1.0, 1.5])[:, None, None]

    def solve(a, b):
        sol = deqcore.fixed_point(lambda z: cell(z, a, b), 0 * b, forward__solver=solver, forward__rtol=1e-9)
        return sol.value, sol.steps, sol.status, sol.residual

    value, steps, status, residual = vmap(solve)(a, b)
    for lane in range(LANES):
        one = solve(a[lane], b[lane])
        assert torch.allclose(value[lane], one[0], atol=1e-10)
        assert steps[lane].tolist() == one[1].tolist()
        assert (status[lane] == 1).all()
    assert residual.shape == (LANES, BATCH)
    assert len(set(steps.flatten().tolist())) > 1


@pytest.mark.supports(
    "`functional_call`, ensembles, gradients of each sample", backends="torch", strategies="exact-ift"
)
def test_an_ensemble_of_modules_has_the_gradients_of_each(data):
    _, b = data
    cells = [torch.nn.Linear(N, N, dtype=torch.float64) for _ in range(LANES)]
    for each in cells:
        each.weight.data *= 0.5
    weights, buffers = stack_module_state(cells)

    def loss(weights, buffers, x):
        f = lambda z, weights: torch.tanh(functional_call(cells[0], (weights, buffers), (z,)) + x)
        return (deqcore.fixed_point(f, torch.zeros_like(x), weights, **OPTIONS).value ** 2).sum()

    found = vmap(grad(loss))(weights, buffers, b)
    for i, each in enumerate(cells):
        value = deqcore.fixed_point(lambda z, i=i, each=each: torch.tanh(each(z) + b[i]), 0 * b[i], **OPTIONS).value
        expected = torch.autograd.grad((value**2).sum(), each.weight)[0]
        assert torch.allclose(found["weight"][i], expected, rtol=1e-8, atol=1e-10)


def test_samples_that_fail_in_a_lane_are_reported(data):
    a, b = data
    with pytest.warns(ConvergenceWarning, match=r"of 6 samples"):
        vmap(lambda a, b: solved(a, b, forward__max_steps=1, forward__solver="picard"))(a, b)


@pytest.mark.supports(
    "`vmap` over a state without axes left", backends="torch", strategies="any", answer="refused with `batch = true`"
)
def test_a_state_without_axes_left_is_refused_and_the_remedy_works(data):
    a, b = data
    with pytest.raises(InitialIterateError, match=r"got the shape \(4,\).*forward.batch = false"):
        vmap(solved)(a, b[:, 0])
    value = vmap(lambda a, b: solved(a, b, forward__batch=False))(a, b[:, 0])
    assert torch.allclose(value, vmap(unrolled)(a, b[:, :1])[:, 0], atol=1e-10)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"backward__strategy": "unrolled", "backward__options": {}}, StrategyError, "exact-ift"),
        ({"backward__strategy": "phantom", "backward__options": {}}, StrategyError, "part of the batch"),
        ({"forward__compact": True}, ConfigError, "forward.compact = false"),
    ],
)
@pytest.mark.supports(
    "`vmap` of a solve and of its gradient", backends="torch", strategies="phantom, unrolled", answer="refused"
)
def test_what_vmap_cannot_do_is_refused_with_a_remedy(data, overrides, error, words):
    with pytest.raises(error, match=words):
        vmap(grad(lambda a, b: solved(a, b, **overrides).sum()))(*data)


@pytest.mark.parametrize("strategy", ["jacobian-free", "neumann"])
@pytest.mark.supports("`vmap` of a solve and of its gradient", backends="torch", strategies="jacobian-free, neumann")
def test_truncated_gradients_of_each_lane_are_those_of_a_loop(data, strategy):
    gradient = grad(lambda a, b: (solved(a, b, backward__strategy=strategy, backward__options={}) ** 3).sum())
    expected = torch.stack([gradient(a, b) for a, b in zip(*data, strict=True)])
    assert torch.allclose(vmap(gradient)(*data), expected, rtol=1e-10)


@pytest.mark.supports("`vmap` of a solve and of its gradient", backends="torch", strategies="broyden-reuse")
@pytest.mark.supports(
    "`jacrev`, `jacfwd`, `hessian`",
    backends="torch",
    strategies="broyden-reuse",
    answer="refused; `chunk_size = 1` works",
)
def test_an_estimate_of_other_samples_is_refused_for_batched_cotangents(data):
    a, b = data
    reuse = {"forward__solver": "broyden", "backward__strategy": "broyden-reuse", "backward__options": {}}
    with pytest.raises(StrategyError, match=r"chunk_size = 1"):
        jacrev(lambda b: solved(a[0], b, **reuse))(b[0])
    assert torch.isfinite(vmap(grad(lambda a, b: solved(a, b, **reuse).sum()))(a, b)).all()
