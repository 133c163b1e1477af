"""An exported solve is plain operators: it gives the fixed points of eager code, in a program without deqcore."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pytest

from deqcore.errors import BackendError, InitialIterateError, ProblemError
from deqcore.types import Status

torch = pytest.importorskip("torch")
from deqcore_torch import exported  # noqa: E402
from deqcore_torch.nn import DEQ  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

N = 6


class Cell(torch.nn.Module):
    def __init__(self, gain=0.7):
        super().__init__()
        self.linear = torch.nn.Linear(N, N)
        torch.nn.init.normal_(self.linear.weight, std=gain / N**0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Linear(torch.nn.Module):
    """z = A z + b with A = c R of a rotation: known in closed form."""

    def __init__(self, factor):
        super().__init__()
        turn = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]
        self.register_buffer("a", factor * turn)

    def forward(self, z, x):
        return z @ self.a.T + x


class Model(torch.nn.Module):
    def __init__(self, cell, **settings):
        super().__init__()
        self.layer = DEQ(cell, **settings)

    def forward(self, x):
        solution = self.layer.solve(x)
        return solution.value, solution.status, solution.steps, solution.residual


def dynamic(model, strict=False):
    shapes = {"x": {0: torch.export.Dim("batch")}}
    return torch.export.export(model.eval(), (torch.randn(3, N),), dynamic_shapes=shapes, strict=strict)


@pytest.fixture(scope="module")
def shared():
    """A model and its program for all batch sizes, which several tests run: tracing takes most of their time."""
    torch.manual_seed(0)
    model = Model(Cell(), evaluation={"forward__rtol": 1e-5})
    return model, dynamic(model)


@pytest.fixture(scope="module")
def picard():
    """The same with plain steps, traced by the compiler's front end (`strict`)."""
    torch.manual_seed(0)
    model = Model(Cell(), evaluation={"forward__rtol": 1e-5, "forward__solver": "picard"})
    return model, dynamic(model, strict=True)


@pytest.fixture
def untraced(monkeypatch):
    """Let Python run the loop, so that `solve` takes the steps of an exported program without the time of tracing."""

    def while_loop(cond, body, carried):
        while cond(*carried):
            carried = body(*carried)
        return carried

    def solve(cell, x, z0=None, batch=True, **settings):
        start = torch.zeros_like(x) if z0 is None else z0
        given = exported.numbers(None, settings | {"forward__batch": batch}, x.dtype)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "while_loop", while_loop)
            return exported.solve(cell, start, (x,), exported.Numbers(*given))

    return solve


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["shared", "picard"])
def test_one_program_serves_all_batch_sizes_and_each_sample_stops_by_itself(request, name):
    model, program = request.getfixturevalue(name)
    run = program.module()
    for batch in (1, 3, 8):
        x = torch.randn(batch, N) * torch.logspace(-3, 1, batch)[:, None]
        value, status, steps, residual = run(x)
        expected = model.layer.solve(x)
        error = (value - expected.value).norm(dim=1)
        assert (error <= 1e-4 * expected.value.norm(dim=1)).all()
        assert status.tolist() == expected.status.tolist() == [Status.CONVERGED] * batch
        z = torch.tanh(model.layer.cell.linear(value) + x)
        assert torch.allclose(residual, (z - value).norm(dim=1), atol=1e-6)
    assert len(set(steps.tolist())) > 1


@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_mixing_solves_linear_equations_also_where_plain_iteration_diverges(untraced, factor):
    cell = Linear(factor)
    x = torch.randn(2, N, dtype=torch.float64)
    value, _, status, *_ = untraced(cell, x, forward__rtol=1e-10, forward__max_steps=300)
    truth = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - cell.a, x.T).T
    assert status.tolist() == [Status.CONVERGED] * 2
    assert torch.allclose(value, truth, rtol=1e-7)


def test_more_unknowns_than_differences_take_few_steps(untraced):
    """Differences that a ring keeps orthogonal make short recurrences of symmetric equations, as in MINRES."""
    scale = torch.linspace(-0.9, 0.98, 40, dtype=torch.float64)
    x = torch.randn(2, 40, dtype=torch.float64)
    value, _, status, steps, _ = untraced(lambda z, x: scale * z + x, x, forward__rtol=1e-8, forward__max_steps=300)
    assert status.tolist() == [Status.CONVERGED] * 2
    assert steps.max() <= 45  # plain iteration takes more than 500
    error = (value - x / (1 - scale)).norm(dim=1)
    assert (error <= 1e-6 * value.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1e20, 1e25])
def test_other_units_give_the_same_steps(untraced, scale, dtype):
    """Squares of these numbers leave the range of float32."""
    a, b = 0.8 * torch.linalg.qr(torch.randn(N, N))[0].to(dtype), torch.randn(3, N).to(dtype)
    settings = {"forward__rtol": 1e-5 if dtype is torch.float32 else 1e-1, "forward__max_steps": 60}
    given = exported.Numbers(*exported.numbers(None, settings, dtype))
    f = lambda z, x: z @ a + x
    one, other = (exported.solve(f, 0 * b, (b * unit,), given) for unit in (1.0, 2.0 ** round(math.log2(scale))))
    assert torch.equal(other[0] / 2.0 ** round(math.log2(scale)), one[0])
    assert other[2].tolist() == one[2].tolist() == [Status.CONVERGED] * 3
    assert other[3].tolist() == one[3].tolist()


@pytest.mark.parametrize("solver", ["auto", "picard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_of_the_iterate_meets_no_tolerance(untraced, solver, dtype):
    """Maps without a fixed point, and two whose fixed point is a thousand and a million times the start."""
    zero = torch.zeros(2, 3, dtype=dtype)
    given = {"forward__solver": solver, "forward__rtol": 1e-4, "forward__max_steps": 600}
    for f in (lambda z, x: z + 1 + 0.5 * torch.tanh(z), lambda z, x: z + 1, lambda z, x: 1.01 * z + 0.01 * z.abs() + 1):
        assert Status.CONVERGED not in untraced(f, zero, **given)[2].tolist()
    for slope, z in ((0.98, 1e-3), (0.5, 1e6)):
        value, _, status, *_ = untraced(lambda z, x, a=slope, b=z: a * z + (1 - a) * b, zero, **given)
        assert status.tolist() == [Status.CONVERGED] * 2
        assert torch.allclose(value, torch.full_like(value, z), rtol=1e-2)


def test_a_step_that_fails_returns_to_the_best_iterate(untraced):
    """The slope below 1 leads a mixing step to 3, but f is not defined above 1.5."""

    def f(z, x):
        return torch.where(z < 1.0, 0.9 * z + 0.3, torch.where(z < 1.5, 0.2 * z + x, float("nan")))

    value, residual, status, *_ = untraced(f, torch.ones(1, 1), forward__rtol=1e-5, z0=torch.zeros(1, 1))
    assert status.tolist() == [Status.CONVERGED]
    assert torch.allclose(value, torch.full((1, 1), 1.25), rtol=1e-4)
    assert residual.isfinite().all()


def test_a_spent_budget_and_a_value_that_is_not_finite_are_reported(shared, untraced):
    model, program = shared
    x = torch.randn(3, N)
    status = untraced(model.layer.cell, x, forward__max_steps=2, forward__rtol=1e-6)[2]
    assert status.tolist() == [Status.MAX_STEPS] * 3
    x[1] = float("nan")
    assert program.module()(x)[1].tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]


def test_trees_and_one_system(untraced):
    class Pair(Cell):
        def initial_state(self, x):
            return {"b": torch.zeros_like(x), "a": x.new_zeros(x.shape[0], 2, N)}

        def forward(self, z, x):
            return {"b": super().forward(z["b"], x), "a": 0.5 * z["a"] + z["b"][:, None]}

    x = torch.randn(3, N)
    model = Model(Pair(), forward__rtol=1e-5, forward__solver="picard").eval()
    cell = model.layer.cell
    one = untraced(cell, x, cell.initial_state(x), batch=False, forward__rtol=1e-5)
    assert tuple(one[1].shape) == (1,)
    for value in (torch.export.export(model, (x,)).module()(x)[0], one[0]):
        for name, expected in model.layer(x).items():
            assert torch.allclose(value[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.supports("`torch.export` in evaluation mode", backends="torch", strategies="any")
def test_a_saved_program_runs_in_a_process_without_deqcore(shared, tmp_path):
    model, program = shared
    x = torch.randn(2, N)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, model.layer(x).detach()), tmp_path / "data.pt")
    program = (
        "import sys, torch; run = torch.export.load(sys.argv[1] + '/model.pt2').module();"
        "x, z = torch.load(sys.argv[1] + '/data.pt'); assert torch.allclose(run(x)[0], z, atol=1e-4);"
        "assert not any(name.startswith('deqcore') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=200)


@pytest.mark.supports("`torch.export` in training mode", backends="torch", strategies="any", answer="refused")
def test_what_cannot_be_exported_says_so():
    x = torch.randn(2, N)
    with pytest.raises(BackendError, match=r"Call model\.eval"):
        torch.export.export(Model(Cell()).train(), (x,))
    branching = DEQ(lambda z, x: torch.tanh(z) if z.sum() > 0 else 0.5 * z + x).eval()
    with pytest.raises(BackendError, match=r"torch\.where"):
        torch.export.export(branching, (x,))


@pytest.mark.supports("`torch.export` of coupled units", backends="torch", strategies="any", answer="refused")
def test_units_are_refused_with_what_to_set():
    with pytest.raises(BackendError, match=r"forward\.batch must be true or false \(got 2\)"):
        torch.export.export(DEQ(Cell(), forward__batch=2).eval(), (torch.randn(2, 3, N),))


@pytest.mark.supports("ONNX", backends="torch", strategies="any")
def test_onnx_runs_the_loop(shared, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, program = shared
    torch.onnx.export(program, (), str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (3, 5):
        x = torch.randn(batch, N)
        value, status, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.allclose(torch.from_numpy(value), model.layer(x), rtol=1e-3, atol=1e-5)
        assert status.tolist() == [Status.CONVERGED] * batch


@pytest.mark.supports("AOTInductor", backends="torch", strategies="any")
def test_inductor_makes_a_package_that_runs(shared, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model, program = shared
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # the C++ compiler takes most of the time
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
    )
    run = torch._inductor.aoti_load_package(path)
    for batch in (3, 5):
        x = torch.randn(batch, N)
        value, status, *_ = run(x)
        assert torch.allclose(value, model.layer(x), rtol=1e-3, atol=1e-5)
        assert status.tolist() == [Status.CONVERGED] * batch


class Carrying(torch.nn.Module):
    """Returns its parts in another order, and another count, which is ignored."""

    def initial_state(self, x):
        return {"n": torch.arange(x.shape[0]), "z": torch.zeros_like(x)}

    def forward(self, z, x):
        return {"z": 0.5 * torch.tanh(z["z"]) + x * z["n"][:, None], "n": z["n"] + 1}


def exported_layer(cell, x, **settings):
    return torch.export.export(DEQ(cell, forward__solver="picard", **settings).eval(), (x,))


def test_integers_are_carried_and_keys_may_have_another_order():
    layer, x = DEQ(Carrying(), forward__solver="picard", forward__rtol=1e-6).eval(), torch.randn(3, N)
    found = torch.export.export(layer, (x,)).module()(x)
    assert found["n"].tolist() == [0, 1, 2]
    assert torch.allclose(found["z"], layer(x)["z"], atol=1e-5)


RETURNS = {
    "other dtype": (lambda z, x: (0.5 * z + x).half(), "dtype of z"),
    "integers": (lambda z, x: (0.5 * z + x).long(), "dtype of z"),
    "fewer columns": (lambda z, x: (0.5 * z + x)[:, :2], "shape of z"),
    "a tuple": (lambda z, x: (0.5 * z + x,), "tree like z"),
    "nothing": (lambda z, x: None, "tree like z"),
    "in place": (lambda z, x: z.mul_(0.5) + x, "in place"),
}


@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.supports(
    "`torch.export` of a cell whose value is not like z", backends="torch", strategies="any", answer="refused"
)
def test_a_cell_that_returns_something_else_is_refused_at_export(name):
    cell, words = RETURNS[name]
    with pytest.raises(ProblemError, match=words):
        exported_layer(cell, torch.randn(2, N))


def test_states_are_checked_at_export_by_the_rules_of_eager_code():
    half = lambda z, x: 0.5 * z + x
    with pytest.raises(InitialIterateError, match=r"got the shape \(3,\)"):
        exported_layer(half, torch.randn(3))
    with pytest.raises(InitialIterateError, match="floating-point"):
        exported_layer(half, torch.arange(6).reshape(2, 3))


class Around(torch.nn.Module):
    """A function as a module."""

    def __init__(self, fn, layer):
        super().__init__()
        self.fn, self.layer = fn, layer

    def forward(self, x):
        return self.fn(self.layer, x)


def slope(layer, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad((layer(x) + x).sum(), x)[0]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (slope, "holds no derivative"),
        (lambda layer, x: torch.func.grad(lambda x: (layer(x) + x).sum())(x), "holds no derivative|has no derivative"),
        (lambda layer, x: layer(x, mask=torch.ones(2, dtype=torch.bool)), "the initial iterate and the inputs alone"),
    ],
    ids=["autograd", "torch.func", "mask"],
)
@pytest.mark.supports("derivatives inside of an exported program", backends="torch", strategies="any", answer="refused")
def test_derivatives_and_masks_inside_of_a_program_are_refused(fn, words):
    """With a skip connection, the derivative would silently miss the part of the solve."""
    layer = DEQ(lambda z, x: 0.5 * torch.sin(z) + x, forward__solver="picard").eval()
    with pytest.raises(BackendError, match=words):
        torch.export.export(Around(fn, layer), (torch.randn(2, N),))
