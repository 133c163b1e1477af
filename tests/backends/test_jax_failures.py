"""JAX: samples that fail in traced code, forward and backward: who is warned, what is raised, what is compiled in.

f(z, x) = 0.9 z + x from zero: plain iteration meets no tolerance in three steps. The adjoint equation of z = a z + x
has a closed form, so that what `zero` and `nan` replace is known.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConvergenceError, ConvergenceWarning
from deqcore.solve import ledger
from deqcore.types import Status

jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True)
def first_pass():
    ledger.forget()


SHORT = {"forward__solver": "picard", "forward__max_steps": 3}
X = np.ones((2, 3), np.float32)


def total(x, **settings):
    return deqcore.fixed_point(lambda z, x: 0.9 * z + x, jnp.zeros_like(x), x, **SHORT, **settings).value.sum()


def looped(x, **settings):
    return jax.lax.scan(lambda c, _: (c + total(x, **settings), None), 0.0, length=2)[0]


STAGED = {
    "jit": lambda **s: jax.jit(lambda x: total(x, **s)),
    "jit of grad": lambda **s: jax.jit(jax.grad(lambda x: total(x, **s))),
    "jit of vmap of grad": lambda **s: jax.jit(lambda x: jax.vmap(jax.grad(lambda x: total(x, **s)))(x[:, None])),
    "scan": lambda **s: lambda x: looped(x, **s),
    "grad of checkpoint": lambda **s: jax.grad(jax.checkpoint(lambda x: total(x, **s))),
}
EAGER = {
    "grad": lambda **s: jax.grad(lambda x: total(x, **s)),
    "vmap": lambda **s: lambda x: jax.vmap(lambda x: total(x, **s))(x[:, None]),
    "vmap of grad": lambda **s: lambda x: jax.vmap(jax.grad(lambda x: total(x, **s)))(x[:, None]),
}


def run(fn, *args, times=1):
    """The texts of the convergence warnings that so many runs give, from callbacks too."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(times):
            jax.block_until_ready(fn(*args))
        jax.effects_barrier()
    return [each for each in found if each.category is ConvergenceWarning]


@pytest.mark.parametrize("way", STAGED)
def test_compiled_code_warns_if_asked_to_and_raises(way):
    (found, *_) = run(STAGED[way](forward__on_failure="warn"), X)
    assert "2 of 2 samples MAX_STEPS after at most 3 steps" in str(found.message)
    assert found.filename == __file__
    failing = STAGED[way](forward__on_failure="raise")
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(failing(X))
    message = str(error.value).rpartition("ConvergenceError: ")[2]
    assert message.startswith("2 of 2 samples MAX_STEPS after at most 3 steps")
    assert not run(STAGED[way](forward__on_failure="raise", forward__rtol=1.0), X)


@pytest.mark.parametrize("way", EAGER)
def test_eager_transformations_warn_by_default_and_raise_the_error_itself(way):
    (found,) = run(EAGER[way](), X)
    assert "2 of 2 samples MAX_STEPS" in str(found.message)
    with pytest.raises(ConvergenceError, match="^2 of 2 samples MAX_STEPS"):
        EAGER[way](forward__on_failure="raise")(X)
    assert not run(EAGER[way](forward__on_failure="ignore"), X)


def test_a_program_warns_at_its_1st_10th_and_100th_failing_run():
    fn = STAGED["jit"](forward__on_failure="warn")
    texts = [str(each.message) for each in run(fn, X, times=101)]
    assert len(texts) == 3
    assert "10th run" in texts[1]
    assert "100th run" in texts[2]


@pytest.mark.parametrize("settings", [{}, {"forward__on_failure": "ignore"}], ids=["default", "ignore"])
def test_no_callback_is_compiled_in_that_nobody_asked_for(settings):
    """A program with a callback is not cached on disk, and `jax.export` does not serialise it."""
    from jax import export

    fn = STAGED["jit of grad"](**settings)
    module = export.export(fn)(X).mlir_module()
    assert not [line for line in module.splitlines() if "custom_call" in line and "callback" in line]
    assert not run(fn, X)


def test_figures_of_all_lanes_and_samples_leave_by_one_callback():
    """The callback takes a count, steps and a residual for each status, whatever the batch and the lanes."""
    fn = jax.jit(jax.vmap(lambda x: total(x, forward__on_failure="warn")))
    lowered = fn.lower(np.ones((5, 7, 3), np.float32)).as_text()
    calls = [line for line in lowered.splitlines() if "custom_call" in line and "callback" in line]
    assert len(calls) == 1
    assert calls[0].count(f"tensor<{len(Status)}x") == 3
    (found,) = run(fn, np.ones((5, 7, 3), np.float32))
    assert "35 of 35 samples" in str(found.message)


def test_an_argument_that_is_donated_and_an_empty_batch():
    fn = jax.jit(lambda x: (total(x, forward__on_failure="warn"), 2 * x), donate_argnums=0)
    assert len(run(fn, jnp.asarray(X))) == 1
    assert not run(STAGED["jit"](forward__on_failure="raise"), X[:0])


# -- backward -----------------------------------------------------------------------------------------------------

A = np.float32([[0.5], [0.999]])  # plain iteration of the adjoint: the first sample is done in 30 steps
ADJOINT = {"solver": "picard", "rtol": 1e-6, "max_steps": 30}


def gradient(**settings):
    """dL/dx of z = a z + x is 1 / (1 − a) per sample; the forward solve begins at the solution."""

    def loss(x):
        start = jax.lax.stop_gradient(x / (1 - A))
        settled = {
            "forward__solver": "picard",
            "forward__on_failure": "ignore",
            "backward__options": ADJOINT,
            **settings,
        }
        return deqcore.fixed_point(lambda z, x: A * z + x, start, x, **settled).value.sum()

    return jax.grad(loss)


X1 = np.ones((2, 1), np.float32)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_a_failed_adjoint_warns_and_raises(wrap):
    (found,) = run(wrap(gradient(backward__on_failure="warn")), X1)
    assert found.filename == __file__
    text = str(found.message)
    assert text.startswith("The adjoint solve did not converge for 1 of 2 samples (1 MAX_STEPS after at most 31 ")
    assert "raise max_steps = 30 in backward.options" in text
    assert "backward.on_failure = 'warn'" in text
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(wrap(gradient(backward__on_failure="raise"))(X1))
    message = str(error.value).rpartition("ConvergenceError: ")[2]
    assert message.startswith("The adjoint solve did not converge for 1 of 2 samples")


def test_the_default_warns_in_eager_code_only():
    assert len(run(gradient(), X1)) == 1
    fn = jax.jit(gradient())
    assert not run(fn, X1)
    assert "callback" not in fn.lower(X1).as_text()
    assert not run(gradient(backward__on_failure="ignore"), X1)


@pytest.mark.parametrize("wrap", [jax.jit, lambda fn: jax.jit(jax.vmap(fn))], ids=["jit", "vmap"])
@pytest.mark.parametrize(("action", "left"), [("zero", 0.0), ("nan", np.nan)])
def test_only_the_samples_that_fail_lose_their_gradient(wrap, action, left):
    fn = gradient(backward__on_failure=action)
    found = np.asarray(jax.jit(fn)(X1))
    assert found[0, 0] == pytest.approx(2.0, rel=1e-5)
    assert np.array_equal(found[1, 0], left, equal_nan=True)
    assert "callback" not in jax.jit(fn).lower(X1).as_text()


def test_a_strategy_without_a_solve_and_forward_mode_report_too():
    neumann = {"backward__strategy": "neumann", "backward__options": {"terms": 3}, "backward__on_failure": "raise"}
    assert not run(jax.jit(gradient(**neumann)), X1)  # it promises no accuracy
    fn = lambda x: (
        deqcore.fixed_point(
            lambda z, x: A * z + x, x / (1 - A), x, backward__options=ADJOINT, backward__on_failure="warn"
        ).value
    )
    (found, *_) = run(jax.jit(lambda x: jax.jvp(fn, (x,), (x,))[1]), X1)
    assert "1 of 2 samples (1 MAX_STEPS" in str(found.message)


# -- several devices ----------------------------------------------------------------------------------------------

DEVICES = """
import warnings, numpy as np, jax, jax.numpy as jnp, deqcore
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
def total(x):
    f = lambda z, x: 0.9 * z + x
    settings = dict(forward__solver="picard", forward__max_steps=3, forward__on_failure="warn")
    return deqcore.fixed_point(f, jnp.zeros_like(x), x, backward__on_failure="warn", **settings).value.sum(1)
mesh = Mesh(np.array(jax.devices()), "d")
loss = lambda x: total(x).sum()
x = jnp.ones((4, 3))
ways = {
    "sharded": (jax.jit(jax.grad(loss)), jax.device_put(x, NamedSharding(mesh, P("d")))),
    "shard_map": (jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=P("d"), out_specs=P("d"))), x),
    "pmap": (jax.pmap(jax.grad(loss)), x.reshape(2, 2, 3)),
}
for name, (fn, data) in ways.items():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        gradient = np.asarray(jax.block_until_ready(fn(data)))
        jax.effects_barrier()
    print(name, len(found) > 0 and "samples MAX_STEPS" in str(found[0].message), gradient.shape == data.shape)
"""


def test_warnings_come_from_several_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split("\n")[:-1] == [f"{name} True True" for name in ("sharded", "shard_map", "pmap")], done
