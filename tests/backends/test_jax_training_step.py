"""A training step around a solve: donated buffers, checkpoint policies, and a program for another process."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import deqcore
from deqcore.errors import InitialIterateError, ProblemError

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from deqcore_jax.implicit import EQUILIBRIUM  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")
N = 3
X = np.linspace(-1.0, 1.0, 2 * N, dtype=np.float32).reshape(2, N)
W = 0.3 * np.linspace(-1.0, 1.0, N * N, dtype=np.float32).reshape(N, N)


POLICIES = jax.checkpoint_policies
NAMED = POLICIES.save_only_these_names(EQUILIBRIUM)


def solved(w, x, **overrides):
    f = lambda z, w, x: jnp.tanh(z @ w.T + x)
    settings = {"forward__rtol": 1e-6, "forward__solver": "anderson", **overrides}
    return deqcore.fixed_point(f, jnp.zeros_like(x), w, x, **settings).value


def loss(w, x):
    return jnp.sum(solved(w, x) ** 2)


@pytest.fixture(scope="module")
def expected():
    return np.asarray(jax.jit(jax.grad(loss))(W, X))


@pytest.mark.supports("`jit` with donated buffers", backends="jax", strategies="exact-ift")
def test_a_step_with_donated_parameters_gives_the_numbers_of_one_without(expected):
    def step(w, x):
        return w - 0.1 * jax.grad(loss)(w, x)

    donated = jax.jit(step, donate_argnums=0)
    w = jnp.asarray(W)
    new = donated(w, X)
    assert w.is_deleted()
    assert np.allclose(new, W - 0.1 * expected, atol=1e-6)
    assert np.isfinite(np.asarray(donated(new, X))).all()


def test_a_donated_initial_iterate_becomes_the_value_of_the_next_step():
    f = lambda z, w, x: jnp.tanh(z @ w.T + x)
    step = jax.jit(lambda z, w, x: deqcore.fixed_point(f, z, w, x, forward__solver="picard").value, donate_argnums=0)
    first = jnp.zeros_like(X)
    second = step(first, W, X)
    assert first.is_deleted()
    assert np.allclose(second, f(second, W, X), atol=1e-3)
    x = jnp.asarray(X)
    for z0, given in ((first, X), (x, x)):  # one that is gone, and one that the same call needs as an input
        with pytest.raises((RuntimeError, ValueError), match="donate"):
            step(z0, W, given)


@pytest.mark.supports("`jax.checkpoint` policies around a solve", backends="jax", strategies="exact-ift")
@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable", "by name"])
def test_policies_of_checkpoints_change_no_gradient(expected, policy):
    layer = jax.checkpoint(solved, policy=NAMED if policy == "by name" else getattr(POLICIES, policy))
    found = jax.jit(jax.grad(lambda w, x: jnp.sum(layer(w, x) ** 2)))(W, X)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.supports("`jax.checkpoint` that solves once", backends="jax", strategies="exact-ift, broyden-reuse")
@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse"])
def test_a_policy_that_saves_the_equilibrium_by_name_solves_once(strategy):
    value = partial(solved, forward__solver="broyden", backward__strategy=strategy)

    def loops(layer):
        gradient = jax.grad(lambda w, x: jnp.sum(layer(w, x) ** 2))
        return jax.jit(gradient).lower(W, X).as_text().count("stablehlo.while")

    once = loops(value)
    assert loops(jax.checkpoint(value, policy=NAMED)) == once
    assert loops(jax.checkpoint(value, policy=POLICIES.nothing_saveable)) == once + 2  # the steps, and their stretches


@pytest.mark.supports("`jax.export`", backends="jax", strategies="exact-ift")
def test_a_serialised_program_runs_in_a_fresh_process_without_deqcore(tmp_path):
    pytest.importorskip("flatbuffers")
    from jax import export

    (rows,) = export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((N, N), "float32"), jax.ShapeDtypeStruct((rows, N), "float32")
    program = export.export(jax.jit(solved))(*shapes)
    (tmp_path / "program").write_bytes(program.serialize())
    np.savez(tmp_path / "given.npz", w=W, x=X)
    code = (
        "import sys; sys.modules['deqcore'] = sys.modules['deqcore_jax'] = None\n"
        "import numpy as np\nfrom jax import export\n"
        "given = np.load(sys.argv[2])\nrun = export.deserialize(open(sys.argv[1], 'rb').read())\n"
        "np.savez(sys.argv[3], value=run.call(given['w'], given['x']))\n"
    )
    files = [str(tmp_path / name) for name in ("program", "given.npz", "found.npz")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True, timeout=300)
    found = np.load(tmp_path / "found.npz")
    assert np.allclose(found["value"], jax.jit(solved)(W, X), atol=1e-6)


@pytest.mark.supports("`jax.export` of a gradient, any batch size", backends="jax", strategies="exact-ift, unrolled")
@pytest.mark.parametrize("strategy", ["exact-ift", "unrolled"])
def test_the_program_of_a_gradient_serves_other_batch_sizes(strategy):
    pytest.importorskip("flatbuffers")
    from jax import export

    settings = {"forward__solver": "picard", "backward__strategy": strategy}
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(solved(w, x, **settings) ** 2)))
    (rows,) = export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((N, N), "float32"), jax.ShapeDtypeStruct((rows, N), "float32")
    program = export.deserialize(export.export(gradient)(*shapes).serialize())
    assert np.allclose(program.call(W, X), gradient(W, X), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "batch", "named"),
    [("rows, n", True, "got n in"), ("rows, 3", False, "got rows in"), ("rows, units, 3", 2, "got units in")],
)
@pytest.mark.supports(
    "`jax.export` with symbolic sizes other than the batch", backends="jax", strategies="any", answer="refused"
)
def test_only_the_batch_may_be_symbolic(sizes, batch, named):
    from jax import export

    run = lambda x: deqcore.fixed_point(lambda z, x: 0.5 * z + x, jnp.zeros_like(x), x, forward__batch=batch).value
    shape = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), "float32")
    with pytest.raises(InitialIterateError, match=named):
        export.export(jax.jit(run))(shape)


NEEDING_VALUES = {
    "branch": lambda z, x: 0.5 * z + x if z.sum() > 0 else x,
    "number": lambda z, x: 0.5 * z + x * float(z.max()),
    "bound of a loop": lambda z, x: sum(range(z.argmax())) + x,
    "mask": lambda z, x: 0.5 * z[z[:, 0] > 0] + x,
    "array of NumPy": lambda z, x: x + np.asarray(z),
}


@pytest.mark.parametrize("name", NEEDING_VALUES)
@pytest.mark.supports("a cell that branches on values", backends="jax", strategies="any", answer="refused")
def test_an_f_that_needs_values_is_refused_with_what_to_write(name):
    with pytest.raises(ProblemError, match=r"jnp\.where.*jax\.disable_jit"):
        deqcore.fixed_point(NEEDING_VALUES[name], jnp.zeros_like(X), jnp.asarray(X))
