"""Two ranks under torchrun's agent: the gradients of one, no collective in a solve, no deadlock when one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this build of torch has no distributed package", allow_module_level=True)

WORKER = Path(__file__).with_name("ddp_worker.py")
pytestmark = pytest.mark.slow


def torchrun(*job):
    command = [sys.executable, str(WORKER.with_name("launch.py")), str(WORKER), *job]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def reports():
    """The reports of all jobs that end well, from one launch: each launch costs an import of PyTorch."""
    done = torchrun("gradients", "compiled", "uneven", "adaptive", "looped")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def report(reports):
    return reports["gradients"]


@pytest.mark.parametrize("strategy", ["exact-ift", "certified"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(report, strategy, wrapper):
    assert report[f"{strategy} {wrapper}"] < 1e-6
    assert report[f"{strategy} truth"] < 1e-6  # of one process, against float64


def test_two_processes_with_compiled_models_give_the_gradients_of_one(reports):
    found = reports["compiled"]
    assert set(found) == {"ddp", "fsdp2"}
    assert max(found.values()) < 1e-5


def test_random_depths_are_the_same_on_both_ranks(reports):
    found = reports["looped"]
    assert found["depths"][0] == found["depths"][1]
    assert len(set(found["depths"][0])) > 2
    assert max(found["ddp"], found["fsdp2"]) < 1e-5


def test_a_solve_takes_no_collective_even_where_ranks_need_different_steps(report):
    assert len(set(report["steps"])) == 2
    assert report["exact-ift collectives"] == report["certified collectives"] == {}
    assert report["exact-ift ddp collectives"] == report["certified ddp collectives"] == {"allreduce": 1}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_rank_that_raises_ends_all(wrapper):
    done = torchrun("failing", wrapper)
    assert done.returncode != 0
    assert "ConvergenceError" in done.stderr


def test_ranks_with_fewer_samples_or_steps_train_as_one_process(reports):
    found = dict(reports["uneven"])
    assert found.pop("moved") > 1e-2
    assert set(found) == {"join", "empty ddp", "empty fsdp2"}
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize("strategy", ["exact-ift", "certified"])
def test_a_sharded_layer_gathers_its_parameters_once_each_way(report, strategy):
    # The layer: gathered in the forward and again in the backward pass. The rest of the model: gathered once.
    assert report[f"{strategy} fsdp2 collectives"] == {"allgather_base": 3, "reduce_scatter_base": 2}


@pytest.fixture(scope="module")
def adaptive(reports):
    return reports["adaptive"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_ranks_share_the_state_of_a_strategy(adaptive, wrapper):
    passes = adaptive[wrapper]["chosen"]
    assert all(one == two for one, two in passes), f"ranks disagree: {passes}"
    assert len({one[0] for one, _ in passes}) > 1, "nothing was chosen"


def test_audits_take_no_collective(adaptive):
    assert adaptive["ddp"]["collectives"] == ["allreduce"]
