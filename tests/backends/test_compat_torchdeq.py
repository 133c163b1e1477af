"""torchdeq's call shape: its own results are the truth where it is installed."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

from deqcore.errors import ConfigError

torch = pytest.importorskip("torch")
from deqcore_torch.compat import torchdeq as ours  # noqa: E402
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
    theirs = pytest.importorskip("torchdeq")
    words = ["--f_tol", "1e-9", "--f_max_iter", "200", "--ift", "--b_tol", "1e-10", "--b_max_iter", "200"]
    w = torch.nn.Parameter(torch.full((), 0.5, dtype=torch.float64))
    a0, b0, c0 = (torch.zeros(2, 3, dtype=torch.float64) for _ in range(3))

    def fn(a, b, c):
        return torch.tanh(w * b) + 1, 0.5 * torch.sin(a * c), 0.3 * torch.cos(w * a)

    found = []
    for torchdeq in (theirs, ours):
        parser = argparse.ArgumentParser()
        torchdeq.add_deq_args(parser)
        args = parser.parse_args(words)
        deq = torchdeq.get_deq(args)
        z_out, info = deq(fn, (a0, b0, c0))
        loss = sum(part.square().sum() for part in z_out[-1])
        found.append((float(loss.detach()), *torch.autograd.grad(loss, w), vars(args)))
        assert float(info["nstep"].max()) < 200
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-8)
    assert float(found[1][1]) == pytest.approx(float(found[0][1]), rel=1e-6)
    assert abs(float(found[0][1])) > 1e-3
    assert found[1][2] == found[0][2]  # the same options with the same defaults


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
    assert get_deq({"grad": [2]}).options.phantom_steps(0) == 2
    with pytest.raises(ConfigError, match="Did you mean 'f_tol'"):
        get_deq(f_toll=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"core": "sliced_"}, "core must be one of indexing"),
        ({"f_solver": "newton"}, "fixed_point_iter"),
        ({"f_stop_mode": "max"}, "'abs' or 'rel'"),
        ({"grad": [1, 2]}, "one for each of the 1 states"),
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
        get_deq()(func, z0, sradius=True)
    with pytest.raises(ConfigError, match="ridge is relative"):
        get_deq(f_solver="anderson")(func, z0, solver_kwargs={"lam": 1e-2})


def collection(monkeypatch, own):
    """Load the cells, which import torchdeq, with deqcore in its place (`own`) or with torchdeq itself."""
    pytest.importorskip("torchdeq")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchdeq"]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # restored at the end
    ours.uninstall()
    if own:
        ours.install()
    path = Path(__file__).parents[1] / "helpers" / "torchdeq_cells.py"
    spec = importlib.util.spec_from_file_location("torchdeq_cells", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.get_deq is get_deq) == own
    return module


def both(monkeypatch, run):
    """Return what `run(module)` gives with torchdeq and with deqcore, from the same random numbers in float64."""
    found = []
    for own in (False, True):
        with monkeypatch.context() as context:
            module = collection(context, own)
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float64)
            try:
                found.append(run(module))
            finally:
                torch.set_default_dtype(torch.float32)
    return found


TIGHT = ("--f_tol", "1e-11", "--b_tol", "1e-11", "--f_max_iter", "100", "--b_max_iter", "100")


@pytest.mark.filterwarnings("ignore:The rows of the state are coupled")
@pytest.mark.parametrize("words", [("--grad", "3", "--tau", "0.8"), ("--ift", "--f_solver", "broyden")], ids=str)
@pytest.mark.parametrize("name", ["multiscale", "flow", "filters", "sequence", "graph"])
def test_the_kinds_of_cells_of_its_collection_run_unmodified(monkeypatch, name, words):
    def run(module):
        cell = module.cells[name](module.options(*TIGHT, *words))
        z_out, info = cell(torch.randn(*module.inputs[name]))
        value = z_out[-1]
        grads = torch.autograd.grad(value.square().sum(), [*cell.parameters()])
        assert float(info["nstep"].mean()) < 100
        return [value.detach(), *grads]

    theirs, mine = both(monkeypatch, run)
    assert theirs[0].norm() > 0.1
    assert max(other.norm() for other in theirs[1:]) > 0.01
    for own, other in zip(mine, theirs, strict=True):  # a gate has no gradient at the equilibrium
        assert (own - other).norm() <= 1e-6 * other.norm() + 1e-9


def test_a_loss_over_states_on_the_way_equals_torchdeqs(monkeypatch):
    def run(module):
        words = (*TIGHT, "--n_states", "3", "--f_max_iter", "9", "--grad", "1", "2", "1", "--f_tol", "0")
        cell = module.Sequence(module.options(*words))
        loss = cell.loss(torch.randn(2, 5, 8))
        return [loss.detach(), *torch.autograd.grad(loss, [*cell.parameters()])]

    theirs, mine = both(monkeypatch, run)
    # torchdeq's value of a slice is f of its iterate already, so it is one step ahead in each of the three slices
    for own, other in zip(mine, theirs, strict=True):
        assert (own - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize("words", [("--sup_gap", "2"), ("--sup_loc", "1", "3")], ids=str)
def test_phantom_steps_on_the_way_equal_torchdeqs(monkeypatch, words):
    def run(module):
        cell = module.Filters(module.options(*TIGHT, "--grad", "4", *words))
        z_out, _ = cell(torch.randn(3, 8))
        total = sum((k + 1) * z.square().sum() for k, z in enumerate(z_out))
        return [torch.tensor(len(z_out) + 0.0), *z_out, *torch.autograd.grad(total, [*cell.parameters()])]

    theirs, mine = both(monkeypatch, run)
    for own, other in zip(mine, theirs, strict=True):
        assert torch.allclose(own, other, rtol=1e-7, atol=1e-8)


def test_no_step_evaluation_and_figures_equal_torchdeqs(monkeypatch):
    heard = []

    def run(module):
        cell = module.Flow(module.options(*TIGHT, "--ift"))
        x = torch.randn(2, 4, 4, 4)
        cell(x, writer=lambda info: heard.append(float(info["abs_lowest"].max())))[0][-1].sum().backward()
        cell.eval()
        z_out, info = cell(x, sradius_mode=True)
        filters = module.Filters(module.options("--eval_f_max_iter", "1")).eval()
        filters(torch.randn(3, 8), skip=False)
        assert filters.steps == 1
        assert cell(x)[1]["sradius"].tolist() == [0.0]
        return z_out[-1].detach(), info["sradius"], info["nstep"]

    theirs, mine = both(monkeypatch, run)
    assert torch.allclose(mine[0], theirs[0], atol=1e-9)
    assert torch.allclose(mine[1], theirs[1], rtol=0.05)
    assert mine[2].dtype == torch.float64
    assert len(heard) == 2
    assert max(heard) < 1e-8


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("words", [(), ("--norm_no_scale", "--norm_target_norm", "0.7"), ("--norm_clip",)], ids=str)
def test_normalized_weights_and_their_gradients_equal_torchdeqs(monkeypatch, kind, words):
    def run(module):
        cell = module.Filters(module.options("--norm_type", kind, *words))
        cell.double()
        torch.manual_seed(1)
        for _, buffer in sorted(cell.named_buffers()):
            buffer.copy_(torch.nn.functional.normalize(torch.randn(len(buffer)), dim=0))
        for _ in range(3):
            module.reset_norm(cell)
        weights = [linear.weight for linear in cell.maps]
        grads = torch.autograd.grad(
            sum(w.square().sum() + w.sum() for w in weights), [*cell.parameters()], allow_unused=True
        )
        names = sorted(cell.state_dict())
        return [names, *weights, *(g for g in grads if g is not None)]

    theirs, mine = both(monkeypatch, run)
    assert mine[0] == theirs[0]
    for own, other in zip(mine[1:], theirs[1:], strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-10)


def test_norms_are_removed_with_the_values_they_had():
    cell = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ConvTranspose1d(2, 3, 2))
    ours.apply_norm(cell, "spectral_norm", prefix_filter_out="0")
    assert hasattr(cell[0], "bias")
    assert "0.weight" in dict(cell.named_parameters())
    cell.eval()
    ours.reset_norm(cell)
    before = cell[1].weight.detach().clone()
    ours.remove_norm(cell)
    assert torch.equal(cell[1].weight, before)
    assert sorted(dict(cell.named_parameters())) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_losses_equal_torchdeqs():
    theirs = pytest.importorskip("torchdeq")
    args = ([torch.ones(2), 3 * torch.ones(2), 5 * torch.ones(2)], torch.zeros(2))
    crit = lambda z, y: (z - y).sum()
    for kwargs in ({}, {"gamma": 0.5}, {"weight_func": "linear", "gamma": 0.3, "bias": 0.1}):
        expected = theirs.fp_correction(crit, args, return_loss_values=True, **kwargs)
        assert ours.fp_correction(crit, args, return_loss_values=True, **kwargs) == expected
    z = torch.randn(4, 3, requires_grad=True)
    values = [lib.jac_reg(torch.tanh(2 * z), z, vecs=3) for lib in (theirs, ours) if torch.manual_seed(0)]
    assert torch.allclose(*values)


def test_the_power_method_finds_a_complex_pair():
    turn = torch.tensor([[0.0, -0.9], [0.9, 0.0]])
    z = torch.ones(1, 2, requires_grad=True)
    assert float(ours.power_method(z @ turn.T, z)[1]) == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize(("kind", "shape", "first"), [("1d", (3, 4, 5), True), ("2d", (3, 5, 4, 2), False)])
def test_dropout_masks_have_torchdeqs_shapes(kind, shape, first):
    theirs = pytest.importorskip("torchdeq")
    for name in (f"VariationalDropout{kind}", f"VariationalDropToken{kind}"):
        masks = []
        for lib in (theirs, ours):
            layer = getattr(lib, name)(0.5, token_first=first)
            layer(torch.ones(*shape))
            masks.append(layer.mask)
            lib.reset_dropout(layer)
            assert layer.mask is None
        assert masks[0].shape == masks[1].shape
        assert set(masks[1].unique().tolist()) <= {0.0, 2.0}


def test_a_solver_function_of_ones_own_gets_the_implicit_gradient(problem):
    tight = {"f_tol": 1e-12, "f_max_iter": 200, "b_tol": 1e-12, "b_max_iter": 200, "ift": True}

    def plain(func, x0, max_iter, **kwargs):
        for _ in range(max_iter):
            x0 = func(x0)
        return x0, [], {}

    ours.register_solver("plain_for_test", plain)
    own = gradient(get_deq(f_solver="plain_for_test", **tight), *problem)
    usual = gradient(get_deq(**tight), *problem)
    assert torch.allclose(own[1], usual[1], rtol=1e-8)
    with pytest.raises(ConfigError, match="backward pass"):
        get_deq(b_solver="plain_for_test", ift=True)


@pytest.mark.parametrize("start", [torch.zeros(3), (torch.zeros(3), torch.zeros(3, 2))], ids=["one", "several"])
def test_a_tensor_of_one_axis_is_a_batch_of_numbers(start):
    theirs = pytest.importorskip("torchdeq")
    func = (lambda z: 0.5 * torch.cos(z) + 1) if isinstance(start, torch.Tensor) else _two
    found = []
    for library in (theirs, ours):
        state = library.get_deq(f_tol=1e-6, f_max_iter=100)(func, start)[0][-1]
        found.append([state] if isinstance(state, torch.Tensor) else state)
    for mine, other in zip(found[1], found[0], strict=True):
        assert mine.shape == other.shape
        assert torch.allclose(mine, other, atol=1e-5)


def _two(a, b):
    return 0.5 * torch.cos(a) + b.mean(1) / 4, 0.3 * b + a[:, None] / 10 + 1


def test_coupled_rows_are_solved_as_one_system():
    torch.manual_seed(0)
    mix = torch.nn.Parameter(0.3 * torch.randn(4, 4, dtype=torch.float64))
    func = lambda z: torch.tanh(mix @ z + 1)
    tight = {"f_tol": 1e-12, "b_tol": 1e-12, "f_solver": "broyden", "ift": True, "b_solver": "gmres", "batch": False}
    z_out, info = get_deq(**tight)(func, torch.zeros(4, 2, dtype=torch.float64))
    assert info["abs_lowest"].shape == info["rel_lowest"].shape
    (found,) = torch.autograd.grad(z_out[-1].sum(), mix)
    z = torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(200):
        z = func(z)
    (true,) = torch.autograd.grad(z.sum(), mix)
    assert torch.allclose(found, true, rtol=1e-8)


@pytest.mark.parametrize("name", ["multiscale", "flow"])
def test_gradients_of_an_unconverged_solve_are_those_of_the_point_that_info_describes(monkeypatch, name):
    """With Broyden both ways, deqcore takes all derivatives at z; torchdeq takes the Jacobian at f(z) instead."""

    def run(module):
        words = ("--ift", "--f_solver", "broyden", "--b_solver", "broyden", "--f_max_iter", "2", "--norm_type", "none")
        cell = module.cells[name](module.options(*words, "--f_tol", "1e-9", "--b_tol", "1e-11", "--b_max_iter", "200"))
        x, params = torch.randn(*module.inputs[name]), [*cell.parameters()]
        cell.deq = module.Spy(cell.deq)
        z_out, info = cell(x)
        weights = torch.linspace(-1, 1, z_out[-1].shape[1]).expand_as(z_out[-1])
        found = torch.cat([g.flatten() for g in torch.autograd.grad((z_out[-1] * weights).sum(), params)])
        assert float(info["abs_lowest"].min()) > 1e-4
        spy = cell.deq.eval()
        z = torch.cat([part.detach().flatten(1) for part in spy(spy.func, tuple(spy.start))[0][-1]], 1)
        return found, [dense_gradient(spy, z, at, params, weights) for at in ("z", "f(z)")]

    (theirs, _), (mine, _) = found = both(monkeypatch, run)
    for (gradient, truths), own in zip(found, (1, 0), strict=True):
        errors = [float((gradient - truth).norm() / truth.norm()) for truth in truths]
        assert errors[own] < 1e-9
        assert errors[1 - own] > 1e3 * errors[own]
    assert (mine - theirs).norm() > 1e-7 * theirs.norm()


def dense_gradient(spy, z, at, params, weights):
    """Return (∂f/∂θ)ᵀ (I − J)⁻ᵀ g with the Jacobian of f at z or at f(z), by dense linear algebra."""
    like, n = spy.start, z.shape[1]

    def f(flat):
        parts = flat.split([part[0].numel() for part in like], 1)
        out = spy.func(*(part.reshape(like.shape) for part, like in zip(parts, like, strict=True)))
        return torch.cat([part.flatten(1) for part in out], 1)

    point = z if at == "z" else f(z).detach()
    jacobian = torch.autograd.functional.jacobian(lambda flat: f(flat).sum(0), point)
    rows = [torch.linalg.solve((torch.eye(n) - jacobian[:, b]).T, weights[b]) for b in range(len(z))]
    return torch.cat([g.flatten() for g in torch.autograd.grad(f(z), params, torch.stack(rows))])
