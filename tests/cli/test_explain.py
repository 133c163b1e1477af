"""`deqcore explain` as a user calls it; its figures against dense linear algebra."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deqcore import plugins
from deqcore.bench import strategy_comparison
from deqcore.cli import explain as explaining
from deqcore.cli.app import main
from deqcore.plugins import StrategySpec

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("small_heap")

PROBLEM = """
import numpy as np
from deqcore.testing import Problem

rng = np.random.default_rng(0)
A = 0.8 * rng.standard_normal((4, 4)) / 2
x = rng.standard_normal((3, 4))

def affine(xp, p, z, x):
    return z @ p["A"].T + x

def broken(xp, p, z, x):
    raise RuntimeError("no such layer")

mine = Problem("mine", {"A": A}, x, 0 * x, affine)
small = Problem("small", {"A": A[:2, :2]}, x[:2, :2], 0 * x[:2, :2], affine)
torch_only = Problem("torch only", {"A": A}, x, 0 * x, {"torch": lambda p, z, x: z @ p["A"].T + x})
raises = Problem("raises", {"A": A}, x, 0 * x, broken)
def cycle(xp, p, z, x):
    return p["r"] * xp.roll(z, 1, axis=1) + x

y = rng.standard_normal((2, 600))
hard = Problem("hard", {"r": np.array(0.999)}, y, 0 * y, cycle)
none = Problem("none", {"A": A[:2, :2]}, x[:, :2], 0 * x[:, :2], lambda xp, p, z, x: xp.tanh(z @ p["A"].T) * np.nan + x)

def mixed(xp, p, z, x):
    return xp.tanh(xp.roll(z, -1, axis=0) @ p["A"]) + x

mixing = Problem("mixing", {"A": 0.3 * A[:2, :2]}, x[:, :2], 0 * x[:, :2], mixed)

def single(p, z, x):
    if z.grad_fn is not None:
        raise RuntimeError("f is differentiated once only")
    return z @ p["A"].T + x

once = Problem("once", {"A": A}, x, 0 * x, {"torch": single})
flat = Problem("flat", {"A": A}, x[:0], 0 * x[:0], affine)
"""

BROKEN = """
from dataclasses import dataclass
from deqcore.abc.backward import Strategy

@dataclass(frozen=True)
class Raises(Strategy):
    needs = "vjp"

    def solve_adjoint(self, backend, vjp, g, estimate):
        raise ValueError("no reverse mode here\\nand a second line")

@dataclass(frozen=True)
class Silent(Raises):
    def solve_adjoint(self, backend, vjp, g, estimate):
        raise NotImplementedError

@dataclass(frozen=True)
class Demands(Raises):
    depth: int
"""


@pytest.fixture(autouse=True)
def _fresh(project):
    (project / "p.py").write_text(PROBLEM)


def explain(capture, *args):
    with pytest.raises(SystemExit) as ended:
        main(["explain", *args])
    out, err = capture.readouterr()
    return int(ended.value.code or 0), out, err


def figures(capture, *args):
    code, out, err = explain(capture, "--json", "--rounds", "0", *args)
    assert code in (0, 1), err
    found = json.loads(out)
    return code, found, {row["label"]: row for row in found["rows"]}


_answers: list[tuple] = []


def of_numpy(capture):
    """The answer for `mine` on NumPy with a required error, which several tests look at."""
    if not _answers:
        options = ["--problem", "p.py:mine", "--backend", "numpy", "--accuracy", "error=0.03"]
        _answers.append(figures(capture, *options))
    return _answers[0]


def truth():
    """u and the gradients of A and x as one vector, exact and with u = g."""
    space = {}
    exec(PROBLEM, space)
    a, x = space["A"], space["x"]
    g = np.random.default_rng(20).standard_normal(x.shape)
    z = np.linalg.solve(np.eye(4) - a, x.T).T
    u = np.linalg.solve(np.eye(4) - a.T, g.T).T
    return u, g, [np.concatenate([(v.T @ z).ravel(), v.ravel()]) for v in (u, g)]


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_it_says_what_it_took_and_explains_only_the_columns_that_it_shows(capsys, recwarn):
    _, out, err = explain(capsys, "--rounds", "0", "--problem", "p.py:mine")
    assert "3 samples, backend torch, solver auto." in out
    assert "ms: one gradient" not in out
    assert not err
    assert not [each for each in recwarn if "auto" in str(each.message)]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_figures_are_those_of_dense_linear_algebra(capsys, backend):
    options = ["--problem", "p.py:mine", "--backend", backend, "--dtype", "float64"]
    code, found, rows = figures(capsys, *options)
    u, g, (exact, free) = truth()
    assert code == 0
    assert found["samples"] == 3
    assert found["not_converged"] == 0
    row = rows["jacobian-free"]
    assert row["cosine"] == pytest.approx(cosine(free, exact), abs=1e-4)
    assert row["norm_ratio"] == pytest.approx(np.linalg.norm(free) / np.linalg.norm(exact), rel=1e-3)
    assert row["error"] == pytest.approx(np.linalg.norm(free - exact) / np.linalg.norm(exact), rel=1e-3)
    assert row["worst_cosine"] == pytest.approx(min(cosine(a, b) for a, b in zip(g, u, strict=True)), abs=1e-4)
    assert (row["vjps"], row["estimate"]) == (0, None)
    space = {}
    exec(PROBLEM, space)
    left = np.linalg.norm(g @ space["A"], axis=1) / np.linalg.norm(g, axis=1)
    assert row["residual"] == pytest.approx(left.max(), rel=1e-6), "measured, though the strategy reports none"
    assert (found["coupling"], found["coupled_rows"]) == (0.0, None)
    assert rows["exact-ift"]["error"] < 1e-6
    assert rows["exact-ift"]["most_vjps"] <= 6
    assert rows["broyden-reuse (max_relative_error=0.01)"]["estimate"] <= 0.01
    assert rows["broyden-reuse (max_relative_error=0.01)"]["error"] <= 0.02
    assert rows["phantom"]["vjps"] == 5
    assert set(plugins.strategies()) <= {row["strategy"] for row in rows.values()}


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_coupled_samples_are_named(capsys, backend):
    _, out, _ = explain(capsys, "--rounds", "0", "--problem", "p.py:mixing", "--backend", backend)
    assert "row 0 of f(z) changes when row 1 of z does" in out
    assert "forward.batch = false" in out


@pytest.mark.slow
def test_every_strategy_runs_on_jax(capsys, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setattr(strategy_comparison, "VARIANTS", {})
    Path("deq.toml").write_text("[forward]\nmax_steps = 12\n")
    code, _, rows = figures(capsys, "--problem", "p.py:mine", "--backend", "jax", "--solver", "anderson")
    _, _, (exact, free) = truth()
    assert code == 0
    assert rows.keys() == plugins.strategies().keys()
    failures = {name: row["failure"] for name, row in rows.items() if row["failure"]}
    assert failures.keys() == {"reversible"}  # its defaults need float64, which JAX offers on request
    assert "cannot undo 16 steps" in failures["reversible"]
    assert rows["jacobian-free"]["cosine"] == pytest.approx(cosine(free, exact), abs=1e-3)
    assert rows["unrolled"]["error"] < 1e-2
    assert rows["exact-ift"]["error"] < 1e-3


@pytest.mark.slow
def test_steps_are_timed_on_jax(capsys, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setattr(strategy_comparison, "SECONDS", 0.0)
    unrolled = strategy_comparison.StrategyCandidate("unrolled", {"steps": 2, "checkpoint": True})
    monkeypatch.setattr(explaining, "_choices", lambda _: [unrolled])
    options = ["--problem", "p.py:mine", "--backend", "jax", "--solver", "picard"]
    code, out, err = explain(capsys, "--json", "--rounds", "1", *options)
    (row,) = json.loads(out)["rows"]
    assert code in (0, 1), err
    assert row["failure"] == ""
    assert row["seconds"] > 0


@pytest.mark.parametrize("rounds", ["0", "1"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_strategy_that_cannot_run_is_a_row_with_the_reason(capsys, monkeypatch, backend, rounds):
    """One from a package fails in its own ways; all others have their figures."""
    monkeypatch.setattr(strategy_comparison, "SECONDS", 0.0)
    Path("broken.py").write_text(BROKEN)
    for name in ("Raises", "Demands", "Silent"):
        plugins.register(StrategySpec(name.lower(), f"broken:{name}"))
    options = ["--problem", "p.py:small", "--backend", backend, "--rounds", rounds]
    code, out, err = explain(capsys, "--json", *options)
    rows = {row["strategy"]: row for row in json.loads(out)["rows"]}
    assert code == 0, err
    assert rows["raises"]["failure"] == "ValueError: no reverse mode here"
    assert "depth" in rows["demands"]["failure"]
    assert rows["silent"]["failure"] == "NotImplementedError"
    assert rows["raises"]["cosine"] is None
    failures = {name: row["failure"] for name, row in rows.items() if name not in ("raises", "demands", "silent")}
    assert not any(failures.values()), failures


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_the_reason_is_in_the_table(capsys, backend):
    Path("broken.py").write_text(BROKEN)
    plugins.register(StrategySpec("raises", "broken:Raises"))
    code, out, _ = explain(capsys, "--backend", backend, "--rounds", "0", "--problem", "p.py:small")
    assert code == 0
    assert "no reverse mode here" in " ".join(out.split())


def test_an_f_that_only_some_strategies_can_use(capsys):
    """The strategies that evaluate f on its own output cannot run, the others can."""
    _, _, rows = figures(capsys, "--problem", "p.py:once", "--backend", "torch")
    assert rows["exact-ift"]["failure"] == ""
    assert rows["phantom"]["failure"] == rows["unrolled"]["failure"] == "RuntimeError: f is differentiated once only"


def test_the_cheapest_by_vjps_where_nothing_is_timed(capsys):
    code, found, rows = of_numpy(capsys)
    good = [row for row in rows.values() if row["error"] is not None and row["error"] <= 0.03]
    assert code == 0
    assert rows[found["cheapest"]]["vjps"] == min(row["vjps"] for row in good)
    assert "a relative error of at most 0.03" in found["verdict"]
    assert repr(rows[found["cheapest"]]["strategy"]) in found["verdict"]


@pytest.mark.parametrize("asked", ["0.99", "cosine=0.99"])
def test_a_cosine_does_not_hide_an_error(capsys, monkeypatch, asked):
    """A gradient that points the right way and has 1.35 times the length is 35 % wrong."""
    monkeypatch.setattr(plugins, "strategies", lambda: {"neumann": None})
    monkeypatch.setattr(
        strategy_comparison, "compare", lambda a, b: (np.array([0.9901]), np.array([1.35]), np.array([0.36]))
    )
    code, found, rows = figures(capsys, "--problem", "p.py:mine", "--backend", "numpy", "--accuracy", asked)
    assert rows["neumann"]["cosine"] == 0.9901
    assert (code, found["cheapest"]) == (1, None)
    assert "a cosine of at least 0.99 and a relative error of at most 0.14" in found["verdict"]


def test_truncated_gradients_stand_beside_the_others_and_the_front_is_marked(capsys):
    _, _, rows = of_numpy(capsys)
    exact = {label: row for label, row in rows.items() if row["strategy"] == "exact-ift"}
    assert {tuple(row["options"].items()) for row in exact.values()} >= {
        (("rtol", 0.01),),
        (("rtol", 0.1),),
        (("max_steps", 2),),
        (("max_steps", 10),),
    }
    assert exact["exact-ift (rtol=0.1)"]["vjps"] < exact["exact-ift"]["vjps"]
    assert exact["exact-ift (rtol=0.1)"]["error"] > exact["exact-ift"]["error"]
    points = {label: (row["vjps"], row["error"]) for label, row in rows.items() if not row["failure"]}
    for label, (vjps, error) in points.items():
        beaten = any(v <= vjps and e <= error and (v, e) != (vjps, error) for v, e in points.values())
        assert rows[label]["front"] == (not beaten), label


def test_a_table_with_times(capsys, monkeypatch):
    monkeypatch.setattr(strategy_comparison, "SECONDS", 0.0)
    code, out, _ = explain(capsys, "--backend", "torch", "--rounds", "1")
    assert code == 0
    for part in (
        "exact-ift",
        "broyden-reuse (plain)",
        "unrolled",
        "mlp: 3 samples",
        "The cheapest with a relative error of at most 0.1",
        "●",
    ):
        assert part in out


def test_nothing_is_accurate_enough(capsys):
    """A cyclic shift: GMRES needs as many vjps as there are numbers, 600, and they are too many for a direct solve."""
    Path("deq.toml").write_text("[forward]\nmax_steps = 1\n")
    code, found, _ = figures(capsys, "--problem", "p.py:hard", "--backend", "torch", "--accuracy", "error=0.05")
    assert code == 1
    assert found["cheapest"] is None
    assert found["verdict"].startswith("None has a relative error of at most 0.05. The nearest is ")
    assert found["not_converged"] == 2  # the project's settings apply


def test_an_f_that_gives_nan_has_no_good_gradient(capsys):
    code, found, rows = figures(capsys, "--problem", "p.py:none", "--backend", "numpy")
    assert (code, found["cheapest"], found["not_converged"]) == (1, None, 3)
    assert found["verdict"].startswith("No strategy gave a gradient, so none has ")
    assert all(row["cosine"] is None for row in rows.values())


def test_a_solver_without_an_estimate(capsys):
    _, found, rows = figures(capsys, "--problem", "p.py:mine", "--backend", "numpy", "--solver", "picard")
    assert found["solver"] == "picard"
    assert "estimate" in rows["broyden-reuse"]["failure"]
    assert rows["jacobian-free"]["failure"] == ""


def test_the_configured_options_are_among_the_rows(capsys, monkeypatch):
    monkeypatch.setattr(plugins, "strategies", lambda: {"neumann": None})
    Path("deq.toml").write_text('[backward]\nstrategy = "neumann"\noptions = { terms = 2 }\n')
    _, _, rows = figures(capsys, "--problem", "p.py:mine", "--backend", "numpy")
    assert rows["neumann (terms=2)"]["vjps"] == 2
    assert rows["neumann"]["vjps"] > 2


def test_a_misspelt_option_of_the_configured_strategy(capsys):
    Path("deq.toml").write_text('[backward]\nstrategy = "neumann"\noptions = { termz = 2 }\n')
    code, out, err = explain(capsys, "--problem", "p.py:mine", "--backend", "numpy", "--rounds", "0")
    assert (code, out) == (2, "")
    assert "Did you mean 'terms'?" in " ".join(err.split())


def test_an_empty_batch(capsys):
    code, found, _ = figures(capsys, "--problem", "p.py:flat", "--backend", "numpy")
    assert (code, found["samples"]) == (0, 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--problem", "mlq"], "Did you mean 'mlp'?"),
        (["--problem", "missing.py:mine"], "the file 'missing.py' does not exist"),
        (["--problem", "p.py:mime"], "Did you mean 'mine'?"),
        (["--problem", "p.py:raises"], "f raised RuntimeError: no such layer (p.py, line 13)"),
        (["--problem", "p.py:torch_only"], "written for torch"),
        (["--accuracy", "1.5"], "a cosine above 0 and at most 1"),
        (["--accuracy", "nan"], "'nan'"),
        (["--accuracy", "error=-1"], "'error=-1'"),
        (["--accuracy", "angle=3"], "'angle=3'"),
        (["--dtype", "float46"], "Did you mean 'float64'?"),
        (["--solver", "broiden"], "Did you mean 'broyden'?"),
        (["--backend", "numpyy"], "Did you mean 'numpy'?"),
    ],
)
def test_bad_input(capsys, args, message):
    code, out, err = explain(capsys, *([] if "--backend" in args else ["--backend", "numpy"]), *args)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())


LAYERS = """
import torch
from deqcore_torch.nn import DEQ

torch.manual_seed(0)
cell = torch.nn.Linear(4, 4)

class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        torch.nn.init.normal_(self.inner.weight, std=0.2)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)

def layer():
    return DEQ(Cell(), forward__solver="anderson", forward__rtol=1e-5), torch.ones(2, 4)

module = Cell(), torch.ones(2, 4)
function = (lambda z, x: 0.5 * torch.tanh(z) + x), torch.ones(2, 4)
alone = Cell()
"""


@pytest.mark.parametrize("name", ["layer", "module", "function"])
def test_a_layer_a_module_or_a_function_with_data(capsys, project, name):
    (project / "layers.py").write_text(LAYERS)
    _, found, rows = figures(capsys, "--problem", "layers.py:" + name)
    assert rows["exact-ift"]["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert rows["jacobian-free"]["error"] > 0.01
    assert found["backend"] == "torch"
    assert found["solver"] == ("anderson" if name == "layer" else "auto")


def test_a_layer_without_data_is_an_error_that_asks_for_it(capsys, project):
    (project / "layers.py").write_text(LAYERS)
    code, _, err = explain(capsys, "--problem", "layers.py:alone")
    assert code == 2
    assert "a tuple (layer, *inputs)" in err


def test_help_names_the_problems(capsys):
    _, out, _ = explain(capsys, "--help")
    assert "ill-conditioned" in out
