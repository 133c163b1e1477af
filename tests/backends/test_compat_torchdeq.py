"""torchdeq's call shape: its own results are the truth where it is installed."""

import argparse

import pytest

from deqcore.errors import ConfigError

torch = pytest.importorskip("torch")
from deqcore_torch.compat.torchdeq import get_deq  # noqa: E402


@pytest.fixture
def problem():
    torch.manual_seed(0)
    w = torch.nn.Parameter(0.5 * torch.randn(8, 8, dtype=torch.float64) / 8**0.5)
    x = torch.randn(3, 8, dtype=torch.float64)
    return w, lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x)


def gradient(deq, w, func, z0):
    z_out, info = deq(func, z0)
    value = z_out[-1] if isinstance(z_out[-1], torch.Tensor) else z_out[-1][0]
    (found,) = torch.autograd.grad(value.square().sum(), w)
    return value.detach(), found, info


@pytest.mark.parametrize(
    "options",
    [
        {"f_solver": "fixed_point_iter", "grad": 1},
        {"f_solver": "anderson", "grad": 5, "tau": 0.8},
        {"f_solver": "broyden", "ift": True, "b_solver": "fixed_point_iter"},
        {"f_solver": "broyden", "ift": True, "b_solver": "broyden", "f_stop_mode": "rel", "b_stop_mode": "rel"},
    ],
    ids=str,
)
def test_values_and_gradients_equal_torchdeqs(problem, options):
    torchdeq = pytest.importorskip("torchdeq")
    tight = {"f_tol": 1e-11, "b_tol": 1e-11, "f_max_iter": 200, "b_max_iter": 200} | options
    theirs = gradient(torchdeq.get_deq(**tight, core="indexing"), *problem)
    ours = gradient(get_deq(**tight, core="indexing"), *problem)
    assert torch.allclose(ours[0], theirs[0], atol=1e-9)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-6, atol=1e-8)
    assert (ours[2]["abs_lowest"] < 1e-9).all()


def test_several_tensors_go_in_and_out_by_position(problem):
    torchdeq = pytest.importorskip("torchdeq")
    a0 = [torch.zeros(2, 3), torch.zeros(2, 4, 2)]

    def func(a, b):
        return 0.5 * torch.tanh(a) + b.mean((1, 2))[:, None] + 1, 0.3 * b + a.sum(1)[:, None, None] / 10

    options = {"f_tol": 1e-6, "f_max_iter": 100}
    ours = get_deq(**options)(func, a0)[0][-1]
    theirs = torchdeq.get_deq(**options)(func, tuple(a0))[0][-1]
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_the_quick_start_of_its_readme():
    """Options from its parser, a system of three tensors, the solution taken as ordinary tensors."""
    torchdeq = pytest.importorskip("torchdeq")
    from torchdeq.utils import add_deq_args

    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    args = parser.parse_args(
        ["--f_tol", "1e-9", "--f_max_iter", "200", "--ift", "--b_tol", "1e-10", "--b_max_iter", "200"]
    )
    w = torch.nn.Parameter(torch.full((), 0.5, dtype=torch.float64))
    start = tuple(torch.zeros(2, 3, dtype=torch.float64) for _ in range(3))

    def fn(a, b, c):
        return torch.tanh(w * b) + 1, 0.5 * torch.sin(a * c), 0.3 * torch.cos(w * a)

    found = []
    for library in (torchdeq.get_deq, get_deq):
        z_out, info = library(args)(fn, start)
        loss = sum(part.square().sum() for part in z_out[-1])
        found.append((float(loss.detach()), *torch.autograd.grad(loss, w)))
        assert float(info["nstep"].max()) < 200
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-8)
    assert float(found[1][1]) == pytest.approx(float(found[0][1]), rel=1e-6)
    assert abs(float(found[0][1])) > 1e-3


class Filters(torch.nn.Module):
    """The cell of the zoo's implicit representations (deq-inr): z ← W₁(W₀(z + sin u₀) ⊙ sin u₁) ⊙ sin u₂."""

    def __init__(self, width):
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(width, width, dtype=torch.float64) for _ in range(2))

    def forward(self, z, u):
        z = z + torch.sin(u[0])
        for linear, phase in zip(self.maps, u[1:], strict=True):
            z = linear(z) * torch.sin(phase)
        return z


@pytest.mark.parametrize(
    "options", [{"f_solver": "anderson", "grad": 3}, {"f_solver": "broyden", "ift": True}], ids=str
)
def test_a_cell_of_its_zoo(options):
    torchdeq = pytest.importorskip("torchdeq")
    torch.manual_seed(0)
    cell, u = Filters(16), torch.randn(3, 20, 16, dtype=torch.float64)
    tight = {"f_tol": 1e-10, "b_tol": 1e-10, "f_max_iter": 200, "b_max_iter": 200} | options
    found = []
    for library in (torchdeq.get_deq, get_deq):
        z = library(**tight)(lambda z: cell(z, u), torch.zeros(20, 16, dtype=torch.float64))[0][-1]
        grads = torch.autograd.grad(z.square().sum(), [*cell.parameters()])
        found.append([z.detach(), *grads])
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_states_on_the_way_end_in_the_solution(problem):
    _, func, z0 = problem
    deq = get_deq(n_states=3, f_max_iter=30, f_tol=1e-9)
    z_out, info = deq(func, z0)
    assert len(z_out) == 3
    assert torch.allclose(z_out[0], list(_iterate(func, z0, 11))[-1])  # ten steps, then f of it
    assert torch.allclose(z_out[-1], func(z_out[-1]), atol=1e-8)
    assert (info["nstep"] <= 30).all()
    assert len(get_deq(indexing=[2, 4])(func, z0)[0]) == 3
    assert len(deq.eval()(func, z0)[0]) == 1


def _iterate(func, z, count):
    for _ in range(count):
        z = func(z)
        yield z


def test_a_namespace_may_hold_more_but_a_keyword_may_not():
    args = argparse.Namespace(f_solver="broyden", lr=0.1, sup_gap=-1, hook_ift=True)
    assert get_deq(args).options.ift
    assert get_deq(args, f_solver="anderson").options.f_solver == "anderson"
    assert get_deq({"grad": [2]}).options.grad == 2
    with pytest.raises(ConfigError, match="Did you mean 'f_tol'"):
        get_deq(f_toll=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sup_gap": 2}, "n_states or indexing"),
        ({"f_solver": "newton"}, "fixed_point_iter"),
        ({"f_stop_mode": "max"}, "'abs' or 'rel'"),
        ({"grad": [1, 2]}, "one number"),
        ({"n_states": 0}, ">= 1"),
        ({"tau": 2.0}, "damping"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(options, words):
    with pytest.raises(ConfigError, match=words):
        deq = get_deq(**options)
        deq(lambda z: 0.5 * z, torch.zeros(1, 2))


def test_a_calls_own_budget(problem):
    _, func, z0 = problem
    _, info = get_deq(f_tol=0.0, f_max_iter=9)(func, z0, solver_kwargs={"f_max_iter": 4})
    assert info["nstep"].tolist() == [4, 4, 4]
    with pytest.raises(ConfigError, match="f_max_iter"):
        get_deq()(func, z0, solver_kwargs={"max_iter": 4})
    with pytest.raises(ConfigError, match="sradius_mode"):
        get_deq()(func, z0, sradius_mode=True)
