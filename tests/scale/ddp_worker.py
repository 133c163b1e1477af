"""Run by `launch.py` on two processes: gradients with DDP and FSDP2 against those of one process on all samples.

    ddp_worker.py JOB ...           some of the jobs below, one after the other
        gradients                   also against the truth in float64; counts collectives
        compiled                    with torch.compile around the wrapped models
        uneven                      one rank has a batch less than the other, or one without samples
        adaptive                    the strategy with state: what is in force on each rank
        looped                      random depths
    ddp_worker.py failing WRAPPER   one rank's solve misses its tolerance, with on_failure = "raise"

Prints one JSON object from rank 0, with the report of each job under its name.
"""

import copy
import json

import torch
import torch.distributed as dist
from deqcore_torch.nn import DEQ, synchronize_strategies
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import deqcore
from deqcore.backward.adaptive import Adaptive

WIDTH = 24
OPTIONS = {"max_relative_error": 0.1, "max_vjps": 4}
STRATEGIES = {
    "exact-ift": {"backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-7}},
    "certified": {
        "backward__strategy": "broyden-reuse",
        "backward__options": {"max_relative_error": 1e-6, "max_refine_vjps": 100},
    },
}


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.normal_(self.w.weight, std=0.5 / WIDTH**0.5)

    def forward(self, z, x):
        return torch.tanh(self.w(z) + x)


class Model(torch.nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.deq = DEQ(Cell(), **{"forward__rtol": 3e-7, "forward__max_steps": 100, **settings})
        self.head = torch.nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.deq(x))


def loss(model, x, y, count):
    return torch.nn.functional.cross_entropy(model(x), y, reduction="sum") / count


def gradients(model):
    return {name.removeprefix("module."): gathered(p.grad) for name, p in model.named_parameters()}


def weights(model):
    return {name.removeprefix("module."): gathered(p) for name, p in model.named_parameters()}


def gathered(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def truth(model, x, y):
    """The gradients of one process in float64, solved to rounding."""
    exact = Model({"forward__rtol": 1e-13, "backward__options": {"rtol": 1e-13}}).double()
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "extra" not in k})
    loss(exact, x.double(), y, len(x)).backward()
    return gradients(exact)


def worst(found, expected):
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)


class Counter:
    """Counts collectives by name where all of them pass: in PyTorch's dispatcher, as the profiler sees it."""

    def __enter__(self):
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.profiler.__enter__()
        return self

    def __exit__(self, *error):
        self.profiler.__exit__(*error)
        found = {
            each.key.removeprefix("c10d::").strip("_"): each.count
            for each in self.profiler.key_averages()
            if each.key.startswith(("c10d::", "_c10d_functional::"))
        }
        self.by_name = found


def plain():
    """The gradients of one process, and the collectives of each pass."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    # Uneven, and rank 1 has a harder sample: the ranks need different numbers of steps.
    x = torch.randn(7, WIDTH)
    x[:3] *= 0.01
    x[3:] *= 3
    y = torch.randint(3, (7,))
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    report = {}
    for name, settings in STRATEGIES.items():
        torch.manual_seed(1)
        whole = Model(settings)
        split, sharded = copy.deepcopy(whole), copy.deepcopy(whole)
        loss(whole, x, y, 7).backward()
        expected = gradients(whole)
        report[f"{name} truth"] = worst(expected, truth(whole, x, y))

        split = DistributedDataParallel(split)
        with Counter() as counter:
            value = split(x[mine])
        report[f"{name} collectives"] = counter.by_name
        # DDP averages over ranks, so a sum over the whole batch takes the number of ranks as a factor.
        with Counter() as counter:
            (torch.nn.functional.cross_entropy(value, y[mine], reduction="sum") * 2 / 7).backward()
        report[f"{name} ddp collectives"] = counter.by_name
        report[f"{name} ddp"] = worst(gradients(split), expected)

        fully_shard(sharded.deq)
        fully_shard(sharded)
        with Counter() as counter:
            (loss(sharded, x[mine], y[mine], 7) * 2).backward()
        report[f"{name} fsdp2 collectives"] = counter.by_name
        report[f"{name} fsdp2"] = worst(gradients(sharded), expected)

    steps = torch.tensor([int(Model({}).deq.solve(x[mine]).steps.max())])
    both = [torch.zeros_like(steps) for _ in range(2)]
    dist.all_gather(both, steps)
    report["steps"] = [int(s) for s in both]
    return report


def compiled():
    """The gradients of one process, with the wrapped models compiled."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    x, y = torch.randn(7, WIDTH), torch.randint(3, (7,))
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    whole = Model(STRATEGIES["exact-ift"])
    split, sharded = DistributedDataParallel(copy.deepcopy(whole)), copy.deepcopy(whole)
    fully_shard(sharded.deq)
    fully_shard(sharded)
    loss(whole, x, y, 7).backward()
    report = {}
    for name, model in {"ddp": split, "fsdp2": sharded}.items():
        run = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            (torch.nn.functional.cross_entropy(run(x[mine]), y[mine], reduction="sum") * 2 / 7).backward()
        report[name] = worst(gradients(model), gradients(whole))
    return report


def uneven():
    """Five samples in batches of two: rank 1 ends a step early (DDP, `join`), or has none in it (both wrappers)."""
    rank, settings = dist.get_rank(), STRATEGIES["exact-ift"]
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, WIDTH, generator=drawn), torch.randint(3, (5,), generator=drawn)
    rows = {0: [slice(0, 2), slice(4, 5)], 1: [slice(2, 4), slice(0, 0)]}[rank]

    def train(model, steps, share):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for mine in steps:
            optimizer.zero_grad()
            (torch.nn.functional.cross_entropy(model(x[mine]), y[mine], reduction="sum") * share).backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(1)
        return Model(settings)

    whole, joined, empty, sharded = fresh(), DistributedDataParallel(fresh()), DistributedDataParallel(fresh()), fresh()
    train(whole, [slice(0, 4), slice(4, 5)], 0.5)
    with joined.join():
        train(joined, rows[: 2 - rank], 1.0)
    train(empty, rows, 1.0)
    fully_shard(sharded.deq)
    fully_shard(sharded)
    train(sharded, rows, 1.0)
    expected = dict(whole.named_parameters())
    start = dict(fresh().named_parameters())
    report = {"moved": worst(expected, start)}
    for name, model in {"join": joined, "empty ddp": empty, "empty fsdp2": sharded}.items():
        report[name] = worst(weights(model), expected)
    return report


def adaptive():
    """Every rank has other data: the number of vjps in force must be the same, with each wrapper."""
    rank, settings = dist.get_rank(), {"backward__strategy": "adaptive", "backward__options": OPTIONS}
    report = {}
    for name in ("ddp", "fsdp2"):
        torch.manual_seed(1)
        model = Model({**settings, "backward__on_failure": "ignore"})
        layer = model.deq
        if name == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model.deq)
            fully_shard(model)
        drawn, chosen, collectives = torch.Generator().manual_seed(rank), [], []
        for _ in range(10):
            x, y = (1 + 2 * rank) * torch.randn(6, WIDTH, generator=drawn), torch.randint(3, (6,), generator=drawn)
            if name == "fsdp2":
                synchronize_strategies(model)
            value = loss(model, x, y, 6)
            state = [torch.zeros_like(layer.strategy_state) for _ in range(2)]
            dist.all_gather(state, layer.strategy_state)
            found = [Adaptive(**OPTIONS).learned(each) for each in state]
            chosen.append([[float(each.chosen), float(each.since), float(each.interval)] for each in found])
            with Counter() as counter:
                value.backward()
            collectives.append(sorted(counter.by_name))
        report[name] = {"chosen": chosen, "collectives": sorted({name for each in collectives for name in each})}
    return report


def looped():
    """Random depths: the depths of both ranks, and the gradients of one process; FSDP2 gathers weights in each step."""
    rank = dist.get_rank()
    options = {"depth": 6, "distribution": "log-normal-poisson", "recorded": 3, "seed": 4}
    torch.manual_seed(0)
    x, y = torch.randn(7, WIDTH), torch.randint(3, (7,))
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    whole = Model({"backward__strategy": "looped", "backward__options": options})
    split, sharded = DistributedDataParallel(copy.deepcopy(whole)), copy.deepcopy(whole)
    fully_shard(sharded.deq)
    fully_shard(sharded)
    report, depths = {"ddp": 0.0, "fsdp2": 0.0}, []
    for step in range(6):
        with deqcore.using(backward__step=step):
            depths.append(int(whole.deq.solve(x).steps[0]))
            whole.zero_grad()
            loss(whole, x, y, 7).backward()
            for name, model in {"ddp": split, "fsdp2": sharded}.items():
                model.zero_grad()
                (torch.nn.functional.cross_entropy(model(x[mine]), y[mine], reduction="sum") * 2 / 7).backward()
                report[name] = max(report[name], worst(gradients(model), gradients(whole)))
    both = [torch.zeros(6, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(both, torch.tensor(depths))
    report["depths"] = [each.tolist() for each in both]
    return report


def failing(wrapper):
    """One rank does not converge and raises; the launcher must end the other one."""
    layer = DEQ(Cell(), forward__on_failure="raise", forward__max_steps=1 if dist.get_rank() else 100)
    model = {"ddp": DistributedDataParallel, "fsdp2": fully_shard}[wrapper](layer)
    model(torch.randn(2, WIDTH)).sum().backward()


JOBS = {"gradients": plain, "compiled": compiled, "uneven": uneven, "adaptive": adaptive, "looped": looped}


def main(*jobs):
    dist.init_process_group("gloo")
    if jobs[0] == "failing":
        failing(jobs[1])
        return
    report = {job: JOBS[job]() for job in jobs}
    if dist.get_rank() == 0:
        print(json.dumps(report), flush=True)
    dist.destroy_process_group()
