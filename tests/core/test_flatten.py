"""The boundary between trees of arrays and the core's matrix `(batch, n)`."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqcore.errors import InitialIterateError, ProblemError
from deqcore.solve.flatten import RavelSpec

Pair = namedtuple("Pair", "first second")

SHAPES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=4)


@given(shapes=SHAPES, batch=st.integers(0, 3), seed=st.integers(0, 99))
def test_ravel_and_unravel_undo_each_other(be, shapes, batch, seed):
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((batch, *shape)) for shape in shapes]
    tree = {"list": [be.asarray(a) for a in arrays[1:]], "first": (be.asarray(arrays[0]),)}
    space = RavelSpec.of(be, tree, batch=True)
    matrix = be.to_numpy(space.ravel(tree))
    assert matrix.shape == (batch, sum(int(np.prod(shape)) for shape in shapes))
    for i in range(batch):  # a row holds its own sample's numbers and no other's
        assert sorted(matrix[i]) == sorted(np.concatenate([a[i].ravel() for a in arrays]))
    back = space.unravel(be.asarray(matrix))
    assert np.array_equal(be.to_numpy(back["first"][0]), arrays[0])
    for leaf, a in zip(back["list"], arrays[1:], strict=True):
        assert np.array_equal(be.to_numpy(leaf), a)


def test_without_a_batch_the_whole_state_is_one_row(be):
    tree = [be.asarray(np.arange(3.0)), be.asarray(np.ones((2, 2))), be.asarray(np.array(7.0))]
    space = RavelSpec.of(be, tree, batch=False)
    matrix = be.to_numpy(space.ravel(tree))
    assert matrix.tolist() == [[0.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 7.0]]
    back = space.unravel(be.asarray(matrix))
    assert [tuple(leaf.shape) for leaf in back] == [(3,), (2, 2), ()]


def test_named_tuples_keep_their_type(be):
    tree = Pair(be.asarray(np.ones((2, 1))), be.asarray(np.zeros((2, 2))))
    space = RavelSpec.of(be, tree, batch=True)
    assert isinstance(space.unravel(space.ravel(tree)), Pair)


@pytest.mark.parametrize(
    ("tree", "batch", "words"),
    [
        ([], True, ["must hold at least one array", "(got none)"]),
        ([np.zeros((2, 2)), 1.0], True, ["float", "leaves of the initial iterate z0 must be arrays", "asarray"]),
        (np.zeros((2, 2), int), True, ["int64", "floating-point", "Cast z0"]),
        (np.zeros((2, 2), bool), True, ["bool", "floating-point"]),
        ([np.zeros((2, 2)), np.zeros((2, 2), np.float32)], True, ["float32, float64", "one dtype"]),
        ([np.zeros((2, 2)), np.zeros((2, 2), np.complex64)], True, ["complex64, float64", "complex128 with float64"]),
        (np.zeros(3), True, ["(3,)", "batch = true", "Reshape it to (batch, n)", "forward.batch = false"]),
        (np.array(1.0), True, ["()", "forward.batch = false"]),
        ([np.zeros((2, 3)), np.zeros((4, 3))], True, ["[2, 4]", "one batch size", "forward.batch = false"]),
    ],
)
def test_an_unfit_state_is_refused(be, tree, batch, words):
    convert = lambda a: be.asarray(a) if isinstance(a, np.ndarray) else a
    tree = [convert(a) for a in tree] if isinstance(tree, list) else convert(tree)
    with pytest.raises(InitialIterateError) as caught:
        RavelSpec.of(be, tree, batch)
    for word in words:
        assert word in str(caught.value)


def test_a_state_on_two_devices_is_refused():
    torch = pytest.importorskip("torch")
    import deqcore

    be = deqcore.get_backend(backend="torch")
    with pytest.raises(InitialIterateError, match=r"must be on one device \(got cpu, meta\). Move them to one device"):
        RavelSpec.of(be, [torch.zeros(2, 2), torch.zeros(2, 2, device="meta")], batch=True)
    space = RavelSpec.of(be, torch.zeros(2, 2), batch=True)
    with pytest.raises(ProblemError, match=r"on the device of z, cpu \(got meta\). Move z0, or the parameters"):
        space.wrap(lambda z: torch.zeros(2, 2, device="meta"))(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda be, z: (z, z), ["got a tuple of 2", "structure", "must return a tree like z"]),
        (lambda be, z: {"z": z}, ["structure", "must return a tree like z"]),
        (lambda be, z: None, ["got None", "structure", "must return a tree like z"]),
        (lambda be, z: z[:, :1], ["(2, 1)", "(2, 3)", "keep the shape of z"]),
        (lambda be, z: z[:1], ["(1, 3)", "(2, 3)"]),
        (lambda be, z: be.astype(z, "float32"), ["float32", "float64", "Cast z0, or the parameters"]),
        (lambda be, z: 1.0, ["float", "as leaf 0", "must return arrays of "]),
        (lambda be, z: z > 0, ["bool", "float64"]),
    ],
)
def test_what_f_returns_must_fit_the_state(be, f, words):
    z = be.asarray(np.ones((2, 3)))
    with pytest.raises(ProblemError) as caught:
        RavelSpec.of(be, z, batch=True).wrap(lambda z: f(be, z))(z)
    for word in words:
        assert word in str(caught.value)


def test_the_leaf_at_fault_is_named(be):
    tree = [be.asarray(np.ones((2, 3))), be.asarray(np.ones((2, 1)))]
    space = RavelSpec.of(be, tree, batch=True)
    with pytest.raises(ProblemError, match=r"which is \(2, 1\) in leaf 1 \(got \(2, 3\)\)"):
        space.wrap(lambda z: [z[0], z[0]])(space.ravel(tree))


def test_f_gets_its_tree_and_its_arguments(be):
    tree = {"a": be.asarray(np.ones((2, 3))), "b": be.asarray(np.full((2, 1), 2.0))}
    space = RavelSpec.of(be, tree, batch=True)
    seen = []

    def f(z, scale, *, _unused=None):
        seen.append({name: tuple(leaf.shape) for name, leaf in z.items()})
        return {"b": scale * z["b"], "a": z["a"]}

    found = be.to_numpy(space.wrap(f)(space.ravel(tree), 3.0))
    assert seen == [{"a": (2, 3), "b": (2, 1)}]
    assert found.tolist() == [[1.0, 1.0, 1.0, 6.0]] * 2


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        (np.ones((2, 2)), "float64 (2, 2)"),
        (np.ones((2, 3), np.float32), "float32 (2, 3)"),
        ([np.ones((2, 3))], "float64 (2, 3)"),
        ("no array", "str"),
    ],
)
def test_a_tree_that_must_be_like_the_state_is_checked(be, tree, kind):
    space = RavelSpec.of(be, be.asarray(np.ones((2, 3))), batch=True)
    convert = lambda a: be.asarray(a) if isinstance(a, np.ndarray) else a
    tree = [convert(a) for a in tree] if isinstance(tree, list) else convert(tree)
    with pytest.raises(InitialIterateError) as caught:
        space.ravel_like("cotangent", tree)
    assert f"The cotangent must be a tree like z0, with the leaves float64 (2, 3) (got {kind})." in str(caught.value)
    assert space.ravel_like("cotangent", be.asarray(np.ones((2, 3)))).shape == (2, 3)
