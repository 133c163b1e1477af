"""Run by `launch.py` on two processes: train a sharded model, lose a rank, start again from the last checkpoint.

    restart_worker.py killed FOLDER    rank 1 is killed after its third step
    restart_worker.py resumed FOLDER   continues, and trains once more without interruption to compare

The batches are uneven: the ranks have different numbers of samples, and in the last step rank 1 has none.
"""

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deqcore_torch.nn import DEQ
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

WIDTH, STEPS, LAST = 12, 5, 2
ROWS = [(3, 2), (3, 2), (1, 4), (2, 2), (2, 0)]  # of ranks 0 and 1 in each step


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.normal_(self.w.weight, std=0.5 / WIDTH**0.5)

    def forward(self, z, x):
        return torch.tanh(self.w(z) + x)


def fresh():
    torch.manual_seed(0)
    model = torch.nn.Sequential(DEQ(Cell(), forward__rtol=1e-5, forward__max_steps=100), torch.nn.Linear(WIDTH, 2))
    fully_shard(model[0])
    fully_shard(model)
    return model, torch.optim.Adam(model.parameters(), 1e-2)


def train(model, optimizer, steps, after=lambda step: None):
    losses = []
    for step in steps:
        rows = ROWS[step]
        drawn = torch.Generator().manual_seed(step)
        x = torch.randn(sum(rows), WIDTH, generator=drawn).split(rows)[dist.get_rank()]
        # FSDP averages over ranks, so a mean over the whole batch takes the number of ranks as a factor.
        loss = model(x).square().sum() * 2 / sum(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        after(step)
    return losses


def whole(model):
    return {name: p.full_tensor().tolist() for name, p in model.named_parameters()}


def main(job, folder):
    folder = Path(folder)
    dist.init_process_group("gloo")
    model, optimizer = fresh()

    def save(step):
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder / f"step-{step}")

    def lose(step):
        save(step)
        if step == LAST and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if job == "killed":
        train(model, optimizer, range(STEPS), lose)
        return
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": -1}
    dcp.load(state, checkpoint_id=folder / f"step-{LAST}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = train(model, optimizer, range(state["step"] + 1, STEPS))
    other, fresh_optimizer = fresh()
    expected = train(other, fresh_optimizer, range(STEPS))
    report = {
        "step": state["step"],
        "losses": losses == expected[LAST + 1 :],
        "weights": whole(model) == whole(other),
        "moved": whole(model) != whole(fresh()[0]),
        "settings": "0._extra_state" in state["model"],
    }
    if dist.get_rank() == 0:
        print(json.dumps(report), flush=True)
    dist.destroy_process_group()
