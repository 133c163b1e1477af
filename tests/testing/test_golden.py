"""The stored truths: made again from scratch, consistent with each other, and reached by closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import ProblemError
from deqcore.testing import golden
from deqcore.testing.golden_values import make
from deqcore.testing.problem import rebuild, walk
from deqcore.testing.problems import FOLDER, FUNCTIONS, names, raveled, unraveled

QUICK = [name for name in FUNCTIONS if name not in ("slow-modes", "conv")]  # those take seconds


def matrix(tree):
    return raveled(tree, len(next(walk(tree, ""))[1]))


@pytest.mark.parametrize("name", QUICK)
def test_the_script_makes_the_same_numbers_again(name):
    """Bit by bit on the machine that stored them; other BLAS libraries sum in another order."""
    made = make.compute(name)
    with np.load(FOLDER / f"{name}.npz") as stored:
        assert set(made) == set(stored.files)
        for key, value in made.items():
            loose = key.startswith(("hessian:", "slope:"))  # differences of what was computed
            tolerance = (1e-6 if loose else 1e-11) * max(1.0, float(made["sensitivity"][2]))
            norm = max(np.linalg.norm(np.nan_to_num(stored[key])), 1e-300)
            assert np.array_equal(np.isnan(value), np.isnan(stored[key])), key
            assert np.linalg.norm(np.nan_to_num(1.0 * value - stored[key])) <= tolerance * norm, key


def test_main_writes_what_it_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["make", "affine"])
    make.main()
    assert [path.name for path in tmp_path.iterdir()] == ["affine.npz"]
    assert "affine" in capsys.readouterr().out


@pytest.mark.parametrize("name", names())
def test_the_solution_is_a_fixed_point_and_the_data_are_exact_in_float32(name):
    problem, truth = golden(name).problem, golden(name).truth
    for _, leaf in problem.leaves():
        assert np.array_equal(leaf, leaf.astype(np.float32))
    with np.errstate(all="ignore"):
        found = matrix(problem.f(np, problem.params, truth.z, problem.inputs))
    z = matrix(truth.z)[truth.healthy]
    assert np.linalg.norm(found[truth.healthy] - z) <= 4e-15 * (1 + np.linalg.norm(z)) * truth.sensitivity.condition
    assert np.isnan(matrix(truth.z)[~truth.healthy]).all()


@pytest.mark.parametrize("name", names())
def test_the_inverse_jacobian_inverts_the_jacobian(name):
    truth = golden(name).truth
    v, h, transposed = (each[truth.healthy] for each in truth.inverse)
    assert truth.jacobian.shape == (len(v), v.shape[1], v.shape[1])
    error = 1e-13 * truth.sensitivity.condition
    for j, each, forth, back in zip(truth.jacobian, v, h, transposed, strict=True):
        a = j - np.eye(len(j))
        assert np.linalg.norm(a @ forth - each) <= error * np.linalg.norm(each)
        assert np.linalg.norm(a.T @ back - each) <= error * np.linalg.norm(each)
    assert np.abs(np.linalg.eigvals(truth.jacobian)).max() == pytest.approx(truth.radius, rel=1e-10)


@pytest.mark.parametrize("name", ["affine", "slow-modes", "ill-conditioned"])
def test_affine_hessian_products_have_a_closed_form(name):
    """With A = I − W:  du = A^-T Ẇᵀ u,  dz = A^-1 (Ẇ z + U̇ x + U ẋ + ḃ),  d(u zᵀ) = du zᵀ + u dzᵀ."""
    problem, truth = golden(name).problem, golden(name).truth
    p, x, z, u = problem.params, problem.inputs, truth.z, truth.gradients["cotangent"]
    w, b = truth.bend["params['W']"], truth.bend["params['b']"]
    a = np.eye(len(w)) - p["W"]
    du = np.linalg.solve(a.T, w.T @ u.T).T
    drive = z @ w.T + x @ truth.bend["params['U']"].T + truth.bend["inputs"] @ p["U"].T + b
    dz = np.linalg.solve(a, drive.T).T
    tolerance = 1e-10 * truth.sensitivity.condition
    for key, expected in {
        "cotangent": du,
        "params['W']": du.T @ z + u.T @ dz,
        "params['b']": du.sum(0),
        "inputs": du @ p["U"] + u @ truth.bend["params['U']"],
    }.items():
        assert np.linalg.norm(truth.hessian[key] - expected) <= tolerance * np.linalg.norm(expected), key


def as_tree(problem, named):
    leaves = iter([named[name] for name, _ in problem.leaves()])
    return tuple(rebuild(tree, lambda _: next(leaves)) for tree in (problem.params, problem.inputs))


TIGHT = {"forward__rtol": 1e-12, "forward__max_steps": 200, "backward__options": {"rtol": 1e-12, "max_steps": 60}}


def second(name, backend):
    """Gradients' change along the stored direction, by the framework's own second derivative of exact-ift."""
    problem, truth = golden(name).problem, golden(name).truth
    be = deqcore.get_backend(backend=backend)
    f = problem.bound(be)
    arrays = [be.asarray(leaf) for _, leaf in problem.leaves()]
    bend = [be.asarray(truth.bend[name]) for name, _ in problem.leaves()]
    z0, g = (rebuild(tree, be.asarray) for tree in (problem.z0, problem.direction()))

    def loss(*leaves):
        params, inputs = as_tree(problem, dict(zip([n for n, _ in problem.leaves()], leaves, strict=True)))
        value = deqcore.fixed_point(f, z0, params, inputs, **TIGHT).value
        pairs = zip(walk(g, ""), walk(value, ""), strict=True)
        return sum((be.xp.sum(a * b) for (_, a), (_, b) in pairs), start=be.xp.sum(0 * leaves[0]))

    if backend == "torch":
        import torch

        arrays = [leaf.requires_grad_() for leaf in arrays]
        first = torch.autograd.grad(loss(*arrays), arrays, create_graph=True)
        slope = sum(torch.sum(a * v) for a, v in zip(first, bend, strict=True))
        found = torch.autograd.grad(slope, arrays)
    else:
        import jax

        gradient = jax.grad(loss, argnums=tuple(range(len(arrays))))
        _, found = jax.jit(lambda at, along: jax.jvp(gradient, at, along))(tuple(arrays), tuple(bend))
    return {key: np.asarray(be.to_numpy(value)) for (key, _), value in zip(problem.leaves(), found, strict=True)}


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_second_derivatives_of_exact_ift_are_the_golden_ones(backend):
    name = "mlp"
    pytest.importorskip(backend)
    if backend == "jax":
        import jax

        with jax.enable_x64(True):
            found = second(name, backend)
    else:
        found = second(name, backend)
    expected = golden(name).truth.hessian
    for key, value in found.items():
        assert np.linalg.norm(value - expected[key]) <= 1e-8 * np.linalg.norm(expected[key]), key


def test_an_unknown_golden_problem_gets_a_suggestion():
    with pytest.raises(ProblemError, match="Did you mean 'affine'"):
        golden("afine")


def test_the_script_does_not_take_the_functions_name():
    from deqcore.testing import golden as again

    assert again("affine").problem.name == "affine"


def test_raveled_and_unraveled_undo_each_other():
    tree = golden("tree").problem.z0
    flat = np.arange(24.0).reshape(2, 12)
    assert np.array_equal(raveled(unraveled(flat, tree), 2), flat)
