"""A rank is killed; the run continues from its checkpoint with the same numbers. One process is a world of its own."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this build of torch has no distributed package", allow_module_level=True)
from deqcore_torch.nn import DEQ  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

WORKER = Path(__file__).with_name("restart_worker.py")
pytestmark = pytest.mark.slow


def torchrun(job, folder):
    return subprocess.run(
        [sys.executable, str(WORKER.with_name("launch.py")), str(WORKER), job, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_killed_rank_costs_no_step(tmp_path):
    lost = torchrun("killed", tmp_path)
    assert lost.returncode != 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-0", "step-1", "step-2"]
    done = torchrun("resumed", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found == {"step": 2, "losses": True, "weights": True, "moved": True, "settings": True}


@pytest.mark.parametrize("wrapper", [DistributedDataParallel, fully_shard])
def test_a_world_of_one_is_as_none(wrapper):
    torch.manual_seed(0)
    plain = DEQ(torch.nn.Bilinear(4, 4, 4), forward__rtol=1e-5)
    with torch.no_grad():
        plain.cell.weight.mul_(0.1)
    x = torch.randn(3, 4)
    plain(x).square().sum().backward()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        split = wrapper(copy.deepcopy(plain))
        split.zero_grad()
        split(x).square().sum().backward()
        found = next(p.grad for name, p in split.named_parameters() if name.endswith("cell.weight"))
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert torch.equal(found, plain.cell.weight.grad)
    finally:
        torch.distributed.destroy_process_group()
    assert float(plain.cell.weight.grad.norm()) > 0
