"""Eight host devices: the gradients of one, no collective per solver step but a predicate, none at all per shard."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("jax")

WORKER = Path(__file__).with_name("jax_worker.py")
SOLVERS = ["anderson", "broyden", "newton-krylov"]
pytestmark = pytest.mark.slow


@cache
def reports():
    """The reports of all jobs, from one process: each imports JAX and compiles the operations of the set-up."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(WORKER), *SOLVERS, "state"],
        capture_output=True,
        text=True,
        timeout=300,  # a deadlock; seconds are what it takes
        check=False,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["jit", "shard_map"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_over_eight_devices_gives_the_gradients_of_one(solver, way):
    found = reports()[solver]
    assert found[way]["apart"] < 1e-6
    assert found[way]["steps"]  # every sample takes as many as on one device
    assert len(set(found["steps"])) > 1  # and the devices need different numbers of them


@pytest.mark.parametrize("solver", SOLVERS)
def test_left_to_the_compiler_a_step_takes_predicates_only(solver):
    found = reports()[solver]["jit"]["collectives"]
    assert "condition pred[]" in found  # is any sample on any device unfinished?
    inside = [each for each in found if each.startswith(("body", "condition"))]
    assert all(each.split()[1].startswith("pred") for each in inside)
    # The loop itself asks whether any sample must restart after a refused step; a step of Broyden whether any is full.
    assert any(each.startswith("body") for each in inside) == (solver == "broyden")
    # Beside loops: the gradient of the weights, and whether any sample needs a fallback.
    assert set(found) - set(inside) - {"outside pred[]"} == {"outside f32[16,16]"}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_per_device_takes_none(solver):
    assert reports()[solver]["shard_map"]["collectives"] == ["outside f32[16,16]"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_gradient_calls_lapack(solver):
    found = reports()[solver]
    assert not found["jit"]["lapack"]
    assert not found["shard_map"]["lapack"]


def test_a_state_that_is_split_gives_the_gradients_of_a_whole_one():
    found = reports()["state"]
    assert found["apart"] < 1e-5
    assert found["value"] < 1e-5
    assert found["steps"] <= 1  # sums over the state are added up in another order
    assert found["devices"] == 8
