"""Two processes of one JAX program (`jax.distributed`, a global mesh), with collectives of gloo on CPUs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

WORKER = Path(__file__).with_name("jax_hosts_worker.py")
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def reports():
    port = str(free_port())
    given = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), port, str(i)], env=os.environ | given, **pipes) for i in range(2)
    ]
    try:
        done = [worker.communicate(timeout=200) for worker in workers]  # a deadlock; seconds are what it takes
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], done[0][1][-2000:] + done[1][1][-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


@pytest.mark.supports("several hosts (`jax.distributed`, a global mesh)", backends="jax", strategies="exact-ift")
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_two_processes_give_the_gradient_of_the_closed_form(reports, way):
    for report in reports:
        assert (report["processes"], report["devices"]) == (2, 2)
        assert report[way]["apart"] < 1e-3
        assert report[way]["donated"]
    fast, slow = (report[way]["steps"] for report in reports)
    assert max(fast) < 10
    assert min(slow) > 50
