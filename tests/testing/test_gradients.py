"""The gradient check catches what is wrong, and accepts what is right."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from deqcore import get_backend, plugins
from deqcore.errors import BackendError, MissingFrameworkError, UnknownNameError
from deqcore.testing import golden, worker
from deqcore.testing.gradients import render, sweep
from deqcore.testing.gradients.compare import Comparison, differ, quantities
from deqcore.testing.gradients.sweep import GradientReport, GradientRun, check
from deqcore.testing.jobs import Job
from deqcore.testing.runner import processes
from deqcore.testing.tolerances import Sensitivity, Slope, rounding, tolerance

pytestmark = pytest.mark.usefixtures("no_plugins")


def here(jobs, **_):
    """All jobs in this process: what the workers do, where coverage sees it."""
    runs = []
    for (name, _dtype), mine in jobs.items():
        for job in mine:
            try:
                runs.append(GradientRun(name, job, "", 0.0, worker.run(get_backend(backend=name), job)))
            except RuntimeError as error:
                runs.append(GradientRun(name, job, str(error), 0.0, {}))
    return runs


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(sweep, "execute", lambda jobs, tell: here(jobs))


def test_numpy_and_torch_agree_with_the_truth_and_each_other(inline):
    pytest.importorskip("torch")
    report = check(["numpy", "torch"], ["broyden"], ["exact-ift", "broyden-reuse", "jacobian-free"])
    assert report.ok, [render.describe(each) for each in report.comparisons if not each.ok]
    seen = {(each.backend, each.against, each.dtype, each.strategy) for each in report.comparisons}
    for dtype in ("float64", "float32"):
        assert ("torch", "truth", dtype, "exact-ift") in seen
        assert ("numpy", "truth", dtype, "exact-ift") in seen
        assert ("torch", "numpy", dtype, "exact-ift") in seen
        assert ("torch", "numpy", dtype, "broyden-reuse") in seen
        assert ("torch", "numpy", dtype, "jacobian-free") in seen
    assert {each.problem for each in report.comparisons} == {"affine", "conv", "ring", "mlp", "tree"}
    assert {"z", "cotangent", "inputs", "params['W']"} <= {each.quantity for each in report.comparisons}
    tight = [each.relative for each in report.comparisons if each.against == "truth" and each.dtype == "float64"]
    assert max(tight) < 1e-8
    same = [each.relative for each in report.comparisons if each.against == "numpy" and each.dtype == "float64"]
    assert max(same) < 1e-7
    assert {"broyden broyden-reuse float64", "broyden broyden-reuse float32"} <= set(report.spread)


FAULTY = """
from dataclasses import dataclass
from deqcore.plugins import SolverSpec, StrategySpec, hookimpl
from deqcore.solvers.broyden import Broyden
from deqcore.backward.exact_ift import ExactIFT
from deqcore.linear.lowrank import InverseJacobian

@dataclass(frozen=True)
class Hasty(Broyden):
    '''Claims a tenth of a millionth of its residual.'''
    def residual_norm(self, backend, state):
        return 1e-7 * backend.norm(state.basis.combine(state.newest))

@dataclass(frozen=True)
class Wrong(InverseJacobian):
    inner: InverseJacobian
    backend: object
    def apply(self, v):
        return self.inner.apply(v)
    def apply_transpose(self, v):
        right = self.inner.apply_transpose(v)
        return self.inner.apply(v) if "torch" in type(v).__module__ else right

@dataclass(frozen=True)
class Confused(Broyden):
    '''Its estimate is H where H transposed is asked for, in one framework.'''
    def inverse_jacobian(self, backend, state):
        return Wrong(super().inverse_jacobian(backend, state), backend)
    def secant_estimate(self, backend, state):
        return Wrong(super().secant_estimate(backend, state), backend)

@dataclass(frozen=True)
class Negative(ExactIFT):
    def solve_adjoint(self, backend, vjp, g, estimate):
        u, report = super().solve_adjoint(backend, lambda v: -vjp(v), g, estimate)
        return u, report

@hookimpl
def deqcore_solvers():
    yield SolverSpec("hasty", "deqfile_faults:Hasty")
    yield SolverSpec("confused", "deqfile_faults:Confused")

@hookimpl
def deqcore_strategies():
    yield StrategySpec("negative", "deqfile_faults:Negative")
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    (tmp_path / "deqfile_faults.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    import deqfile_faults

    plugins.register(deqfile_faults)


PLAIN = {"certify": False, "max_relative_error": None, "fallback": "none"}


@pytest.mark.parametrize(
    ("backend", "solver", "strategy", "quantity"),
    [
        ("numpy", "hasty", "exact-ift", "z"),
        ("numpy", "broyden", "negative", "cotangent"),
        ("torch", "confused", "broyden-reuse", "cotangent"),
    ],
)
def test_a_planted_fault_is_caught(inline, faults, monkeypatch, backend, solver, strategy, quantity):
    pytest.importorskip(backend)
    original = sweep.fixed_job
    if strategy == "broyden-reuse":  # the plain product with the estimate: refinement would mend what is wrong
        monkeypatch.setattr(sweep, "fixed_job", lambda *a: replace(original(*a), strategy_options=PLAIN))
    right = {"hasty": "broyden", "confused": "broyden", "broyden": "broyden"}[solver]
    good = check([backend], [right], ["exact-ift" if strategy == "negative" else strategy], ["float64"])
    assert good.ok
    bad = check([backend], [solver], [strategy], ["float64"])
    assert not bad.ok
    assert quantity in {each.quantity for each in bad.comparisons if not each.ok}


def test_processes_report_jobs_and_failures(tmp_path, capsys):
    """One real process: results come back under their jobs, an error stays with its job, a crash is reported."""
    jobs = [
        Job("solve", "affine", "float64", rtol=1e-12, max_steps=100),
        Job("solve", "no-such-problem", "float64"),
        Job("solve", "affine", "float64", rtol=1e-12, max_steps=1),
    ]
    lines = []
    runs = sweep.execute({("numpy", "float64"): jobs}, lines.append)
    assert np.linalg.norm(runs[0].arrays["z"] - golden("affine").truth.z) < 1e-10
    assert runs[0].error == ""
    assert "no-such-problem" in runs[1].error
    assert "ConvergenceError" in runs[2].error
    assert lines[0] == "numpy float64 …"
    crashed = processes.WorkerTask(tmp_path / "crash", "numpy", "float64")
    crashed.folder.mkdir()
    (failure,) = processes.run_all([crashed]).values()
    assert "the worker ended with code 1" in failure
    assert "jobs.json" in failure


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TIMEOUT", 0.0)
    task = processes.WorkerTask(tmp_path, "numpy", "float64")
    worker.write(tmp_path, "numpy", [])
    (failure,) = processes.run_all([task]).values()
    assert failure.startswith("no answer within")


def test_two_heavy_frameworks_never_run_at_once(monkeypatch):
    tasks = {name: processes.WorkerTask(None, name, "float64") for name in ("numpy", "torch", "jax")}  # type: ignore[arg-type]
    running = {tasks["torch"]: None}
    assert processes._fits(tasks["numpy"], running)  # type: ignore[arg-type]
    assert processes._fits(tasks["torch"], running)  # type: ignore[arg-type]
    assert not processes._fits(tasks["jax"], running)  # type: ignore[arg-type]


def test_the_main_of_a_worker(tmp_path):
    job = Job("solve", "ring", "float32", strategy="jacobian-free", max_steps=10)
    worker.write(tmp_path, "numpy", [job, replace(job, problem="nothing")])
    worker.main(tmp_path)
    (error, seconds, arrays), (message, _, nothing) = worker.read(tmp_path)
    assert error == ""
    assert seconds > 0
    assert arrays["params['c']"].dtype == np.float32
    assert "must be path/to/file.py:name (got 'nothing')" in message
    assert nothing == {}


def test_steps_that_solve_are_left_out_where_each_number_costs_a_run():
    job = sweep.fixed_job("newton-krylov", "unrolled", "float64")
    assert job.strategy_options == {"steps": 3}
    with pytest.raises(RuntimeError, match="skipped"):
        worker.run(get_backend(backend="numpy"), job)


def test_bad_names_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'numpy'"):
        check(["nunpy"])
    with pytest.raises(UnknownNameError, match="broyden"):
        check(["numpy"], ["broiden"])
    with pytest.raises(UnknownNameError, match="exact-ift"):
        check(["numpy"], [], ["exact-if"])
    with pytest.raises(BackendError, match="keeps the estimate"):
        check(["numpy"], ["picard"], ["broyden-reuse"])
    plugins.register(plugins.BackendSpec("absent", "a:b", package="no_such_framework", array_modules=("nope",)))
    with pytest.raises(MissingFrameworkError, match="pip install no_such_framework"):
        check(["absent"])


# -- bounds and comparisons ----------------------------------------------------------------------------------


def test_bounds_hold_for_perturbed_equations_and_are_not_idle():
    """Solve affine equations whose residuals are as large as the tolerances allow, many times."""
    rng = np.random.default_rng(0)
    n = 6
    a = np.eye(n) - 0.5 * rng.standard_normal((n, n)) / n**0.5
    b, g = rng.standard_normal((2, n))
    z, u = np.linalg.solve(a, b), np.linalg.solve(a.T, g)
    inverse = np.linalg.norm(np.linalg.inv(a), 2)
    norms = [np.linalg.norm(x) for x in (z, g, u)]
    known = Sensitivity(inverse, np.linalg.norm(np.eye(n) - a, 2), np.linalg.cond(a), *norms, {"b": Slope(1.0, 0.0)})
    bounds = known.bounds(0.0, n, 1e-3, 1e-2)
    worst = {"value": 0.0, "b": 0.0}
    for _ in range(300):
        r, s = rng.standard_normal((2, n))
        near = np.linalg.solve(a, b + 1e-3 * norms[0] * r / np.linalg.norm(r))
        wrong = np.linalg.solve(a.T, g + 1e-2 * norms[1] * s / np.linalg.norm(s))
        worst["value"] = max(worst["value"], np.linalg.norm(near - z))
        worst["b"] = max(worst["b"], np.linalg.norm(wrong - u))
    for name, error in worst.items():
        assert 0.2 * bounds[name] < error <= bounds[name], name


def test_tolerances_follow_the_dtype():
    assert tolerance(2.2e-16, 4) == 1e-12
    assert tolerance(1.2e-7, 4) == pytest.approx(2 * 5 * 2 * 1.2e-7)
    assert rounding(1.0, 0) == 5.0


def test_differences_name_their_place():
    found = {"z['a']": np.array([1.0, 2.0]), "z['b']": np.array([[3.0, 5.0]])}
    expected = {"z['a']": np.array([1.0, 2.0]), "z['b']": np.array([[3.0, 4.0]])}
    error, relative, cosine, place = differ(found, expected, "z")
    assert (error, place) == (1.0, "z['b'][0, 1]: 5 against 4")
    assert relative == pytest.approx(1 / np.sqrt(30))
    assert cosine == pytest.approx((1 + 4 + 9 + 20) / np.sqrt(39 * 30))
    found["z['b']"][0, 1] = np.nan
    assert np.isnan(differ(found, expected, "z")[0])
    assert "z['b'][0, 1]: nan" in differ(found, expected, "z")[3]
    shapes = differ({"z": np.zeros(2)}, {"z": np.zeros(3)}, "z")
    assert shapes[0] == float("inf")
    assert "(2,)" in shapes[3]
    zero = differ({"inputs": np.zeros(2)}, {"inputs": np.zeros(2)}, "inputs")
    assert zero[:3] == (0.0, 0.0, 1.0)
    assert quantities(found, expected, {"z['a']": 1, "params['W']": 2}) == ["z"]


def comparison(**changed):
    values = {"error": 1.0, "relative": 0.1, "cosine": 0.9, "bound": 2.0, **changed}
    names = {"backend": "torch", "against": "truth", "dtype": "float64", "quantity": "z"}
    return Comparison(problem="p", solver="broyden", strategy="exact-ift", place="z[0]", **(names | values))


def test_nan_is_no_agreement_and_zero_is():
    assert comparison().ok
    assert comparison().share == 0.5
    assert not comparison(error=float("nan")).ok
    assert comparison(error=0.0, bound=0.0).ok
    assert comparison(error=0.0, bound=0.0).share == 0.0
    assert comparison(bound=0.0).share == float("inf")


def text(renderable):
    console = render.console()
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_reports_read_well():
    job = Job("solve", "p", "float64")
    runs = [
        GradientRun("torch", job, "", 0.1, {}),
        GradientRun("jax", job, "ValueError: broken (f.py, line 3)", 0.1, {}),
    ]
    runs.append(GradientRun("numpy", replace(job, solver="newton-krylov"), "skipped: too slow", 0.0, {}))
    bad = comparison(error=3.0, quantity="cotangent")
    report = GradientReport(runs, [comparison(), bad], {"broyden broyden-reuse float64": 0.5})
    assert not report.ok
    shown = text(render.matrix(report, 2.0))
    assert "✗ 1e-01" in shown
    assert "error" in shown
    assert "left out" in shown
    assert "broken (f.py, line 3)" in shown
    assert "cotangent differs from truth by 1.0e-01 relative (3.0e+00, bound 2.0e+00); cosine 0.900000; z[0]" in shown
    assert "2 of 3 checks failed" in shown
    assert "moves this gradient by 5e-01" in shown
    own = text(render.leaves(report, 2.0))
    assert "First disagreement of torch float64 (broyden) with truth: cotangent. z[0]." in own
    assert "the two compute different things" in " ".join(own.split())
    data = json.loads(json.dumps(render.as_json(report, 2.0)))
    assert data["ok"] is False
    assert [each["ok"] for each in data["comparisons"]] == [True, False]
    assert data["errors"][0]["message"].startswith("ValueError")
    assert data["skipped"][0]["solver"] == "newton-krylov"
    good = text(render.matrix(GradientReport(runs[:1], [comparison()], {}), 2.0))
    assert "1 comparisons agree, the worst at 50% of its bound" in good
    alone = GradientReport(runs[:1], [], {})
    assert not alone.ok
    assert "Nothing was compared: a problem without a known solution needs two" in text(render.matrix(alone, 2.0))
    many = GradientReport([], [bad] * 15, {})
    assert "… and 3 more" in text(render.matrix(many, 1.0))
