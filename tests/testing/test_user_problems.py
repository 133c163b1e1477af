"""Users' own functions: read from a file, compared between frameworks, and judged by dtype and condition."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import numpy as np
import pytest

from deqcore import get_backend
from deqcore.errors import ProblemError, UnknownNameError
from deqcore.testing import Problem, weights, worker
from deqcore.testing.dense import dense
from deqcore.testing.gradients import user_problems
from deqcore.testing.gradients.user_problems import check_user_problem
from deqcore.testing.jobs import Job
from deqcore.testing.problem import load_problem, rebuild, walk

pytest_plugins = ["deqcore.testing.pytest_gradients"]

SHARED = """
import numpy as np
from deqcore.testing import Problem

def draw():
    rng = np.random.default_rng(0)
    return {"W": 0.3 * rng.standard_normal((4, 4)), "b": rng.standard_normal(4)}, rng.standard_normal((2, 4))

params, x = draw()

def cell(xp, p, z, x):
    return xp.tanh(xp.matmul(z, p["W"].T) + p["b"][None, :] + x)

once = Problem("once", params, x, np.zeros((2, 4)), cell)

def in_numpy(p, z, x):
    return np.tanh(z @ p["W"].T + p["b"] + x)

def in_torch(p, z, x):
    import torch
    return torch.tanh(torch.nn.functional.linear(z, p["W"], p["b"]) + x)

def torch_without_transpose(p, z, x):
    import torch
    return torch.tanh(z @ p["W"] + p["b"] + x)

def torch_detached(p, z, x):
    import torch
    return torch.tanh(z @ p["W"].T + p["b"].detach() + x)

def in_jax(p, z, x):
    import jax.numpy as jnp
    return jnp.tanh(z @ p["W"].T + p["b"] + x)

def raising(p, z, x):
    raise KeyError("no such weight")

pair = Problem("pair", params, x, np.zeros((2, 4)), {"numpy": in_numpy, "torch": in_torch})
transposed = Problem("pair", params, x, np.zeros((2, 4)), {"numpy": in_numpy, "torch": torch_without_transpose})
detached = Problem("pair", params, x, np.zeros((2, 4)), {"numpy": in_numpy, "torch": torch_detached})
broken = Problem("pair", params, x, np.zeros((2, 4)), {"numpy": in_numpy, "torch": raising})
heavy = Problem("pair", params, x, np.zeros((2, 4)), {"torch": in_torch, "jax": in_jax})
differ = Problem("pair", params, x, np.zeros((2, 4)), {"torch": torch_without_transpose, "jax": in_jax})
elsewhere = Problem("pair", params, x, np.zeros((2, 4)), {"no-such-framework": in_numpy})

def made():
    return once

def fails():
    raise OSError("no data")

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SHARED)
    return path


@pytest.fixture
def inline(monkeypatch):
    """Workers' jobs in this process, where coverage sees them."""

    def here(jobs, tell):
        runs = []
        for (name, _dtype), mine in jobs.items():
            for job in mine:
                try:
                    runs.append(
                        user_problems.GradientRun(name, job, "", 0.0, worker.run(get_backend(backend=name), job))
                    )
                except Exception as error:
                    runs.append(user_problems.GradientRun(name, job, f"{type(error).__name__}: {error}", 0.0, {}))
        return runs

    monkeypatch.setattr(user_problems, "execute", here)


@pytest.mark.parametrize("name", ["once", "pair", "made"])
def test_a_right_function_agrees(file, inline, name):
    pytest.importorskip("torch")
    report = check_user_problem(f"{file}:{name}", ["numpy", "torch"])
    assert report.ok, report
    assert {each.against for each in report.comparisons} == {"dense reference", "numpy"}
    assert {each.quantity for each in report.comparisons} == {
        "f(z0)",
        "z",
        "cotangent",
        "params['W']",
        "params['b']",
        "inputs",
    }
    assert {each.dtype for each in report.comparisons} == {"float64", "float32"}
    bounds = [each.bound / max(each.error, 1e-300) for each in report.comparisons if each.dtype == "float32"]
    assert min(bounds) > 1.0
    assert max(each.relative for each in report.comparisons if each.dtype == "float64") < 1e-10


def firsts(report):
    from deqcore.testing.gradients.render import first_disagreements

    return {each.against: each.quantity for each in first_disagreements(report).values()}


def test_functions_that_differ_are_distinguished_where_they_first_do(file, inline):
    """z0 = 0 hides a missing transpose: the solution is the first place where it shows."""
    pytest.importorskip("torch")
    report = check_user_problem(f"{file}:transposed", ["numpy", "torch"], dtypes=["float64"])
    assert not report.ok
    assert firsts(report) == {"numpy": "z"}
    worst = next(each for each in report.comparisons if each.quantity == "params['W']" and each.against == "numpy")
    assert worst.cosine < 0.999
    assert worst.place.startswith("params['W'][")


def test_a_gradient_that_is_cut_is_found_by_its_parameter(file, inline):
    """One framework forgets b: values and all other gradients agree."""
    pytest.importorskip("torch")
    report = check_user_problem(f"{file}:detached", ["numpy", "torch"], dtypes=["float64"])
    assert {each.quantity for each in report.comparisons if not each.ok} == {"params['b']"}
    assert firsts(report) == {"numpy": "params['b']"}


def test_an_error_of_the_users_function_names_its_line(file, inline):
    pytest.importorskip("torch")
    report = check_user_problem(f"{file}:broken", ["numpy", "torch"], dtypes=["float64"])
    assert not report.ok
    assert all("f raised KeyError: 'no such weight' (mine.py, line " in run.error for run in report.errors)
    assert {run.backend for run in report.errors} == {"torch"}


@pytest.mark.parametrize("name", ["heavy", "differ"])
def test_torch_against_jax_each_in_a_process_of_its_own(file, name, check_gradients):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    if name == "heavy":
        report = check_gradients(f"{file}:heavy", dtypes=["float64"])
        assert {(each.backend, each.against) for each in report.comparisons} >= {("jax", "torch")}
    else:
        with pytest.raises(
            pytest.fail.Exception, match=r"First disagreement of jax float64 \(broyden\) with torch: z\."
        ):
            check_gradients(f"{file}:differ", dtypes=["float64"])


# -- the dense reference ------------------------------------------------------------------------------------


def reference(f, z0, params, inputs, batch=True):
    problem = Problem("p", params, inputs, z0, f, batch=batch)
    be = get_backend(backend="numpy")
    return problem, dense(be, problem, Job("dense", "p", "float64"), problem.bound(be))


def affine_truth(w, g, x):
    z = np.linalg.solve(np.eye(len(w)) - w, x.T).T
    return z, np.linalg.solve(np.eye(len(w)) - w.T, g.T).T


@pytest.mark.parametrize("batch", [True, False])
def test_the_dense_reference_is_the_closed_form(batch):
    rng = np.random.default_rng(1)
    w, x = 0.4 * rng.standard_normal((3, 3)), rng.standard_normal((2, 3))
    problem, found = reference(lambda xp, p, z, x: z @ p.T + x, 0 * x, w, x, batch)
    z, u = affine_truth(w, problem.direction(), x)
    assert np.allclose(found["z"], z, atol=1e-13)
    assert np.allclose(found["cotangent"], u, atol=1e-12)
    assert np.allclose(found["params"], u.T @ z, atol=1e-9)
    assert np.allclose(found["inputs"], u, atol=1e-9)
    inverse, jacobian, condition = found["sensitivity"][:3]
    a = np.eye(3) - w
    assert inverse == pytest.approx(np.linalg.norm(np.linalg.inv(a), 2))
    assert jacobian == pytest.approx(np.linalg.norm(w, 2))
    assert condition == pytest.approx(np.linalg.cond(a))


def test_samples_that_f_couples_are_solved_together():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    problem, found = reference(lambda xp, p, z, x: p * xp.flip(z, axis=0) + x, 0 * x, np.asarray(0.5), x)
    z = (x + 0.5 * x[::-1]) / 0.75
    g = problem.direction()
    u = (g + 0.5 * g[::-1]) / 0.75
    assert np.allclose(found["z"], z)
    assert np.allclose(found["cotangent"], u)
    assert np.allclose(found["params"], np.sum(u * z[::-1]))
    assert found["n"] == 4


def test_a_reference_that_would_be_too_large_says_so():
    with pytest.raises(ProblemError, match="Check a smaller batch"):
        reference(lambda xp, p, z, x: z, np.zeros((1, 2000)), {}, np.zeros(1))


def test_an_empty_batch_has_no_gradient_to_check():
    with pytest.raises(ProblemError, match="Give at least one sample"):
        reference(lambda xp, p, z, x: 0.5 * z + x, np.zeros((0, 3)), {}, np.zeros((0, 3)))


# -- problems and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("{file}", "must be path/to/file.py:name"),
        ("{file}:no name", "must be path/to/file.py:name"),
        ("nothing.py:f", "the file 'nothing.py' does not exist"),
        ("{file}:onse", "Did you mean 'once'.*Problems in it: "),
        ("{file}:number", r"must be a deqcore.testing.Problem, .*\(got a int\)"),
        ("{file}:Problem", r"must be a deqcore.testing.Problem, .*\(got a type\)"),
        ("{file}:fails", "raised OSError: no data. It must be a Problem, or a function without arguments"),
    ],
)
def test_a_problem_that_cannot_be_read_says_why(file, where, words):
    with pytest.raises(ProblemError, match=words):
        load_problem(where.format(file=file))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\n1 / 0\n", r"ZeroDivisionError: division by zero \(bad.py, line 2\)"),
        ("x = (\n", "SyntaxError: .*line 1"),
    ],
)
def test_a_file_that_cannot_be_executed_names_the_line(tmp_path, source, words):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ProblemError, match=words):
        load_problem(f"{tmp_path / 'bad.py'}:x")
    (tmp_path / "bad.txt").write_text("")
    with pytest.raises(ProblemError, match="is not a Python file"):
        load_problem(f"{tmp_path / 'bad.txt'}:x")


def test_a_problem_refuses_what_is_no_data_or_no_function():
    with pytest.raises(ProblemError, match=r"params\['a'\] must be a NumPy array \(got a str\)"):
        Problem("p", {"a": "b"}, None, np.zeros((1, 1)), lambda: 0)
    for f in (3, {}, {"torch": 3}):
        with pytest.raises(ProblemError, match="a function f"):
            Problem("p", {}, None, np.zeros((1, 1)), f)


def test_check_own_refuses_what_it_cannot_judge(file):
    with pytest.raises(ProblemError, match="'jacobian-free' approximates"):
        check_user_problem(f"{file}:once", ["numpy"], strategies=["jacobian-free"])
    with pytest.raises(ProblemError, match="has functions for numpy, torch, but none for jax"):
        check_user_problem(f"{file}:pair", ["jax"])
    with pytest.raises(UnknownNameError, match="No backend is registered as 'no-such-framework'"):
        check_user_problem(f"{file}:elsewhere")


def test_a_large_problem_leaves_out_what_has_no_autodiff(file):
    large = replace(load_problem(f"{file}:once"), params={"W": np.zeros((100, 100)), "b": np.zeros(4)})
    assert "numpy" not in user_problems._backends(large, ())
    assert "numpy" in user_problems._backends(large, ("numpy",))
    assert user_problems._width(large) == 4
    assert user_problems._width(replace(large, batch=False)) == 8


def test_trees_are_walked_and_rebuilt_in_one_order():
    tree = {"b": [np.array(1.0), (np.array(2.0),)], "a": np.array(3.0)}
    assert [(name, float(leaf)) for name, leaf in walk(tree, "p")] == [
        ("p['a']", 3),
        ("p['b'][0]", 1),
        ("p['b'][1][0]", 2),
    ]
    assert rebuild(tree, lambda leaf: 2 * leaf)["b"][1] == (4.0,)


def test_weights_are_read_from_safetensors_and_npz(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save_file
    arrays = {"lin.weight": np.arange(6.0).reshape(2, 3), "lin.bias": np.ones(2, np.float32)}
    save(arrays, tmp_path / "cell.safetensors")
    np.savez(tmp_path / "cell.npz", **arrays)
    for name in ("cell.safetensors", "cell.npz"):
        found = weights(tmp_path / name)
        assert set(found) == set(arrays)
        for key, value in arrays.items():
            assert np.array_equal(found[key], value)
            assert found[key].dtype == value.dtype


def test_bfloat16_weights_become_float32(tmp_path):
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    tensor = torch.tensor([[1.0, -2.5], [3.140625, 1e-3]], dtype=torch.bfloat16)
    save({"other": torch.ones(3), "w": tensor}, tmp_path / "half.safetensors")
    found = weights(tmp_path / "half.safetensors")
    assert np.array_equal(found["w"], tensor.float().numpy())
    assert np.array_equal(found["other"], np.ones(3))


def test_weights_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    with pytest.raises(ProblemError, match="the file does not exist"):
        weights(tmp_path / "nothing.npz")
    for name in ("a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes(b"\x00\x01broken")
        with pytest.raises(ProblemError, match="cannot be read"):
            weights(tmp_path / name)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ProblemError, match=r"ends in .safetensors or .npz"):
        weights(tmp_path / "a.pt")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ProblemError, match=r"deqcore\[study\]"):
        weights(tmp_path / "a.safetensors")


# -- the fixture ----------------------------------------------------------------------------------------------


def mine():
    def f(xp, p, z, x):
        return 0.5 * xp.tanh(z) * p + x

    return Problem("mine", np.asarray(0.5), np.ones((2, 3)), np.zeros((2, 3)), f)


def test_the_fixture_takes_a_function_of_the_test_module(check_gradients):
    report = check_gradients(mine, backends=["numpy"], dtypes=["float64"])
    assert report.ok
    assert {each.quantity for each in report.comparisons} >= {"z", "params", "inputs"}


def test_the_fixture_refuses_what_another_process_cannot_find(tmp_path):
    from deqcore.testing.pytest_gradients import where_of

    assert where_of("a/b.py:c", tmp_path) == f"{tmp_path}/a/b.py:c"
    assert where_of(mine, tmp_path) == f"{__file__}:mine"
    assert where_of("nonsense", tmp_path) == "nonsense"

    def inner():
        return mine()

    for bad in (inner, 3):
        with pytest.raises(ProblemError, match="at the top level of a module"):
            where_of(bad, tmp_path)  # type: ignore[arg-type]


MODULE = """
import numpy as np
from deqcore.testing import Problem, weights

def torch_cell(p, z, x):
    import torch
    cell = torch.nn.Linear(3, 3)
    return torch.tanh(torch.func.functional_call(cell, p, (z,)) + x)

def numpy_cell(p, z, x):
    return np.tanh(z @ p["weight"].T + p["bias"] + x)

functions = {{"torch": torch_cell, "numpy": numpy_cell}}
problem = Problem("cell", weights({path!r}), np.ones((2, 3)), np.zeros((2, 3)), functions)
"""


def test_a_torch_module_and_a_function_share_weights_from_a_file(tmp_path, inline):
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)
    path = str(tmp_path / "cell.safetensors")
    save(torch.nn.Linear(3, 3).state_dict(), path)
    (tmp_path / "module.py").write_text(textwrap.dedent(MODULE).format(path=path))
    report = check_user_problem(f"{tmp_path / 'module.py'}:problem")
    assert report.ok
    assert {each.quantity for each in report.comparisons} >= {"params['weight']", "params['bias']"}
    assert {each.against for each in report.comparisons} == {"dense reference", "numpy"}
