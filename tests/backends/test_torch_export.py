"""An exported solve is plain operators: it gives the fixed points of eager code, in a program without deqcore."""

from __future__ import annotations

import pytest

from deqcore.errors import BackendError
from deqcore.types import Status

torch = pytest.importorskip("torch")
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


def exported(model, x, dynamic=False, strict=False):
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    return torch.export.export(model.eval(), (x,), dynamic_shapes=shapes, strict=strict).module()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("strict", [False, True])
def test_one_program_serves_all_batch_sizes_and_each_sample_stops_by_itself(strict):
    model = Model(Cell(), evaluation={"forward__rtol": 1e-5})
    run = exported(model, torch.randn(3, N), dynamic=True, strict=strict)
    for batch in (1, 3, 8):
        x = torch.randn(batch, N) * torch.logspace(-3, 0, batch)[:, None]
        value, status, steps, residual = run(x)
        expected = model.layer.solve(x)
        assert torch.allclose(value, expected.value, rtol=1e-4, atol=1e-6)
        assert status.tolist() == expected.status.tolist() == [Status.CONVERGED] * batch
        z = torch.tanh(model.layer.cell.linear(value) + x)
        assert torch.allclose(residual, (z - value).norm(dim=1), atol=1e-6)
    assert len(set(steps.tolist())) > 1


@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_mixing_solves_linear_equations_also_where_plain_iteration_diverges(factor):
    cell = Linear(factor)
    x = torch.randn(2, N, dtype=torch.float64)
    run = exported(Model(cell, forward__rtol=1e-10, forward__max_steps=300), x)
    value, status, *_ = run(x)
    truth = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - cell.a, x.T).T
    assert status.tolist() == [Status.CONVERGED] * 2
    assert torch.allclose(value, truth, rtol=1e-7)


def test_a_spent_budget_and_a_value_that_is_not_finite_are_reported():
    x = torch.randn(3, N)
    run = exported(Model(Cell(), forward__max_steps=2, forward__rtol=1e-6), x)
    assert run(x)[1].tolist() == [Status.MAX_STEPS] * 3
    bad = x.clone()
    bad[1] = float("nan")
    run = exported(Model(Cell(), forward__rtol=1e-5), x)
    assert run(bad)[1].tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]


def test_trees_and_one_system():
    class Pair(Cell):
        def initial_state(self, x):
            return {"b": torch.zeros_like(x), "a": x.new_zeros(x.shape[0], 2, N)}

        def forward(self, z, x):
            return {"b": super().forward(z["b"], x), "a": 0.5 * z["a"] + z["b"][:, None]}

    x = torch.randn(3, N)
    for batch in (True, False):
        model = Model(Pair(), forward__rtol=1e-5, forward__batch=batch)
        value, *_ = exported(model, x)(x)
        for name, expected in model.layer(x).items():
            assert torch.allclose(value[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.supports("`torch.export` in evaluation mode", backends="torch", strategies="any")
def test_a_saved_program_runs_in_a_process_without_deqcore(tmp_path):
    import subprocess
    import sys

    model = Model(Cell(), forward__rtol=1e-5).eval()
    x = torch.randn(2, N)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
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
def test_onnx_runs_the_loop(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Model(Cell(), forward__rtol=1e-5).eval()
    x = torch.randn(3, N)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.onnx.export(program, (), str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (3, 5):
        x = torch.randn(batch, N)
        value, status, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.allclose(torch.from_numpy(value), model.layer(x), rtol=1e-3, atol=1e-5)
        assert status.tolist() == [Status.CONVERGED] * batch


@pytest.mark.supports("AOTInductor", backends="torch", strategies="any")
def test_inductor_makes_a_package_that_runs(tmp_path):
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model = Model(Cell(), forward__rtol=1e-5).eval()
    x = torch.randn(3, N)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for batch in (3, 5):
        x = torch.randn(batch, N)
        value, status, *_ = run(x)
        assert torch.allclose(value, model.layer(x), rtol=1e-3, atol=1e-5)
        assert status.tolist() == [Status.CONVERGED] * batch
