"""A training step of a small multiscale model (MDEQ) beside torchdeq's: `python -m benchmarks.mdeq`, one thread.

One cell for all, from Bai, Koltun & Kolter (2020): a residual block per resolution, then each resolution reads from
all. Each contender gets the loosest tolerance forward with which the state of *every* sample reaches a residual of
1e-3 (in float64, one norm for all), then the loosest backward with which the parameters' gradient is within 15 % of the
exact one (such a residual alone leaves about 10 %); of its options, those with the fewest evaluations and products.
Gradients that promise no accuracy have rows of their own, and each row is measured with the same cell rewritten, too.
All take turns in every round, and ratios are taken within a round. Writes mdeq.md and mdeq.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from deqcore_torch.nn import DEQ
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, relu
from torchdeq import get_deq
from torchdeq.solver import get_solver, register_solver

from deqcore.bench.machine import describe
from deqcore.bench.report import machine_text, markdown, spread
from deqcore.bench.timing import Spread, interleave

CHANNELS, BATCH, SIZE = (16, 32, 64), 16, 16
INJECTION = 1.5  # weight of the norm after the injection: a solve then takes about as many steps as a trained MDEQ's
RESIDUAL, ERROR, TARGET, STEPS = 1e-3, 0.15, 2.0, 60
FORWARD: Final = tuple(10 ** (-k / 16) for k in range(40, 65))  # 3e-3 to 1e-4
BACKWARD: Final = tuple(10 ** (-k / 16) for k in range(4, 49))  # 0.6 to 1e-3
COLUMNS: Final = (
    "contender",
    "cell",
    "options",
    "forward tolerance",
    "residual",
    "backward tolerance",
    "gradient's error",
    "f, vjps",
    "step, ms",
    "best peer / own",
    "with one cell",
)
States = tuple[Tensor, ...]
Solve = Callable[..., States]
Make = Callable[["Cell", float, float | None], Solve]


class Block(nn.Module):
    """norm(relu(z + norm(conv(relu(norm(conv(z)))) + x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        nn.init.constant_(self.norms[1].weight, INJECTION)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = relu(self.norms[0](self.first(z)))
        return self.norms[2](relu(z + self.norms[1](self.second(inner) + x)))


class Cell(nn.Module):
    """A block per resolution, then sums over all resolutions, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, CHANNELS))
        self.links = nn.ModuleList(
            nn.ModuleList(self._link(i, j) for j in range(len(CHANNELS))) for i in range(len(CHANNELS))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in CHANNELS)

    @staticmethod
    def _link(to: int, source: int) -> nn.Module:
        """Strided convolutions downwards, one of 1×1 upwards."""
        if source == to:
            return nn.Identity()
        if source > to:
            return nn.Conv2d(CHANNELS[source], CHANNELS[to], 1, bias=False)
        widths = CHANNELS[source : to + 1]
        return nn.Sequential(*(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairwise(widths)))

    def forward(self, z: States, x: States) -> States:
        own = [block(*pair) for block, pair in zip(self.blocks, zip(z, x, strict=True), strict=True)]
        result = []
        for i, (links, norm) in enumerate(zip(self.links, self.norms, strict=True)):
            heard = [link(state) for link, state in zip(links, own, strict=True)]
            result.append(norm(relu(sum(interpolate(a, scale_factor=own[i].shape[-1] / a.shape[-1]) for a in heard))))
        return tuple(result)


class Rewritten(Cell):
    """The same function with less to do.

    Strided convolutions of one state are one convolution with all their weights, what comes from below is added up on
    its way up, and nothing is interpolated to the size that it has.
    """

    def forward(self, z: States, x: States) -> States:
        own = [block(*pair) for block, pair in zip(self.blocks, zip(z, x, strict=True), strict=True)]
        result, last = list(own), len(own) - 1
        for source in range(last):
            chains = [self.links[to][source] for to in range(source + 1, last + 1)]
            weights = torch.cat([chain[0].weight for chain in chains])
            parts = conv2d(own[source], weights, stride=2, padding=1).chunk(len(chains), 1)
            for to, (chain, part) in enumerate(zip(chains, parts, strict=True), source + 1):
                result[to] = result[to] + chain[1:](part)
        for to in range(last):
            heard = self.links[to][last](own[last])
            for source in range(last - 1, to, -1):
                heard = self.links[to][source](own[source]) + interpolate(heard, scale_factor=2.0)
            result[to] = result[to] + interpolate(heard, scale_factor=2.0)
        return tuple(norm(relu(state)) for norm, state in zip(self.norms, result, strict=True))


def with_deqcore(solver: str, strategy: str, memory: int | None = None, **backward: object) -> Make:
    """Return a layer of ours. The tolerance is the strategy's own: an adjoint residual, or an estimated error."""
    own = {"exact-ift": "rtol", "broyden-reuse": "target"}.get(strategy)

    def make(cell: Cell, rtol: float, tolerance: float | None) -> Solve:
        layer = DEQ(
            lambda z, *x: cell(z, x),
            forward__solver=solver,
            forward__rtol=rtol,
            forward__max_steps=STEPS,
            forward__on_failure="ignore",
            forward__options={} if memory is None else {"history_size": memory},
            backward__strategy=strategy,
            backward__options=backward | ({} if tolerance is None or own is None else {own: tolerance}),
        )
        return lambda *x: layer(*x, z0=tuple(map(torch.zeros_like, x)))

    return make


def with_torchdeq(solver: str, gradient: Mapping[str, object], **options: object) -> Make:
    """torchdeq, the same solver with the same options both ways."""
    name = "_".join([solver, *(f"{key}{value}" for key, value in options.items())])
    register_solver(name, partial(get_solver(solver), **options))

    def make(cell: Cell, rtol: float, tolerance: float | None) -> Solve:
        names = {"f_solver": name, "b_solver": name, "f_stop_mode": "rel", "b_stop_mode": "rel"}
        accuracy = {} if tolerance is None else {"b_tol": tolerance}
        layer = get_deq(f_tol=rtol, f_max_iter=STEPS, b_max_iter=STEPS, **names, **accuracy, **gradient)
        return lambda *x: tuple(layer(lambda *z: cell(z, x), [*map(torch.zeros_like, x)])[0][-1])

    return make


IFT, HOOK = {"ift": True}, {"hook_ift": True}
MEMORIES: Final = (6, 4, 10)  # the default of both libraries first
EXACT: Final[Mapping[str, Mapping[str, Make]]] = {
    "deqcore anderson, exact-ift": {
        **{f"memory {m}": with_deqcore("anderson", "exact-ift", m) for m in MEMORIES},
        "from the reused gradient": with_deqcore("anderson", "exact-ift", start="reuse"),
    },
    "deqcore broyden, exact-ift": {
        "": with_deqcore("broyden", "exact-ift"),
        "from the reused gradient": with_deqcore("broyden", "exact-ift", start="reuse"),
    },
    "deqcore broyden, broyden-reuse": {"": with_deqcore("broyden", "broyden-reuse")},
    "torchdeq fixed_point_iter, IFT": {
        "": with_torchdeq("fixed_point_iter", IFT),
        "by hook": with_torchdeq("fixed_point_iter", HOOK),
    },
    "torchdeq anderson, IFT": {
        "": with_torchdeq("anderson", IFT),
        **{
            f"m {m}, lam {lam:g}, by hook": with_torchdeq("anderson", HOOK, m=m, lam=lam)
            for m in MEMORIES
            for lam in (1e-4, 1e-6)
        },
    },
    "torchdeq broyden, IFT": {
        "": with_torchdeq("broyden", IFT),
        "by hook": with_torchdeq("broyden", HOOK),
    },
}
"""By what they do, then by their options: gradients solved for to a tolerance."""
CHEAP: Final[Mapping[str, Make]] = {
    "deqcore anderson, jacobian-free": with_deqcore("anderson", "jacobian-free"),
    "deqcore broyden, plain reuse": with_deqcore(
        "broyden", "broyden-reuse", certify=False, max_relative_error=None, fallback="none"
    ),
    "deqcore anderson, phantom": with_deqcore("anderson", "phantom"),
    "torchdeq anderson, one step": with_torchdeq("anderson", {"grad": 1}),
    "torchdeq anderson, phantom": with_torchdeq("anderson", {"grad": 5, "tau": 0.5}),
}
"""Gradients that promise no accuracy."""


class Problem:
    """Cell, features, cotangents, and the exact gradient in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.cell = Cell()
        sizes = [SIZE >> k for k in range(len(CHANNELS))]
        self.x, self.g = (
            tuple(torch.randn(BATCH, width, size, size) for width, size in zip(CHANNELS, sizes, strict=True))
            for _ in range(2)
        )
        self.rewritten = Rewritten()
        self.rewritten.load_state_dict(self.cell.state_dict())
        self.exact = copy.deepcopy(self.cell).double()
        solve = with_deqcore("broyden", "exact-ift")(self.exact, 1e-9, 1e-8)
        self.truth = self.gradient(self.exact, solve, torch.float64)

    def step(self, cell: Cell, solve: Solve, dtype: torch.dtype = torch.float32) -> States:
        """Forward and backward pass."""
        cell.zero_grad()
        z = solve(*(part.to(dtype) for part in self.x))
        torch.autograd.backward(z, [part.to(dtype) for part in self.g])
        return z

    def bare(self, cell: Cell, evaluations: int, vjps: int) -> None:
        """Run as many evaluations and products as a step has, and nothing else: plain iteration both ways."""
        cell.zero_grad()
        z, u = tuple(map(torch.zeros_like, self.x)), self.g
        with torch.no_grad():
            for _ in range(evaluations - 1):
                z = cell(z, self.x)
        z = tuple(part.requires_grad_() for part in z)
        y = cell(z, self.x)
        for _ in range(vjps - 1):
            u = torch.autograd.grad(y, z, u, retain_graph=True)
        torch.autograd.backward(y, u, inputs=list(cell.parameters()))

    def gradient(self, cell: Cell, solve: Solve, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return all parameters' gradients, end to end."""
        self.step(cell, solve, dtype)
        return torch.cat([p.grad.flatten() for p in cell.parameters()]).double()

    def residual(self, z: States) -> float:
        """‖f(z) − z‖ / ‖f(z)‖ of the worst sample."""
        with torch.no_grad():
            wide = tuple(part.detach().double() for part in z)
            image = self.exact(wide, tuple(part.double() for part in self.x))
            moved = tuple(a - b for a, b in zip(image, wide, strict=True))
            left, size = (torch.cat([a.flatten(1) for a in parts], 1).norm(dim=1) for parts in (moved, image))
        return float((left / size).max())

    def error(self, solve: Solve) -> float:
        """Return the relative error of the gradient."""
        return float((self.gradient(self.cell, solve) - self.truth).norm() / self.truth.norm())

    def evaluations(self, solve: Solve) -> tuple[int, int]:
        """Count the cell's evaluations, forward and backward, and its products, by hooks."""
        calls: list[int] = []
        handle = self.cell.register_forward_hook(lambda *_: calls.append(1))
        vjps: list[int] = []
        other = self.cell.norms[0].register_full_backward_hook(lambda *_: vjps.append(1))
        self.step(self.cell, solve)
        handle.remove()
        other.remove()
        return len(calls), len(vjps)


def loosest(grid: Sequence[float], good: Callable[[float], bool]) -> float | None:
    """Return the first number of a grid, from loose to tight, that is good, by bisection; None if the last is not."""
    low, high = 0, len(grid) - 1
    if not good(grid[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(grid[middle]) else (middle + 1, high)
    return grid[high]


def fitted(problem: Problem, make: Make, exact: bool) -> dict[str, Any]:
    """Return the loosest tolerances that do, and what they give; no evaluations where none does."""

    def left(rtol: float) -> float:
        return problem.residual(make(problem.cell, rtol, None)(*problem.x))

    rtol = loosest(FORWARD, lambda rtol: left(rtol) <= RESIDUAL)
    if rtol is None:
        return {"rtol": FORWARD[-1], "residual": left(FORWARD[-1])}

    def error(tolerance: float | None) -> float:
        return problem.error(make(problem.cell, rtol, tolerance))

    tolerance = loosest(BACKWARD, lambda tolerance: error(tolerance) <= ERROR) if exact else None
    missed = exact and tolerance is None
    result = {"rtol": rtol, "residual": left(rtol), "tolerance": tolerance}
    result["error"] = error(BACKWARD[-1] if missed else tolerance)
    if missed:
        return result
    evaluations, vjps = problem.evaluations(make(problem.cell, rtol, tolerance))
    return result | {"evaluations": evaluations, "vjps": vjps}


def best_of(problem: Problem, variants: Mapping[str, Make], exact: bool) -> tuple[dict[str, Any], Make]:
    """Find the options with the fewest evaluations and products; the first of equal ones."""
    rows = {name: fitted(problem, make, exact) for name, make in variants.items()}
    name = min(rows, key=lambda name: rows[name].get("evaluations", 999) + rows[name].get("vjps", 999))
    return rows[name] | {"options": name, "exact": exact}, variants[name]


def main() -> int:
    """Measure, write the page; exit 1 if the target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mdeq", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for the rounds")
    parser.add_argument("--busy", action="store_true", help="count processor time: for a machine that never is quiet")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = Problem()
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Callable[[], object]] = {}
    for name, variants in [*EXACT.items(), *((name, {"": make}) for name, make in CHEAP.items())]:
        row, make = best_of(problem, variants, name in EXACT)
        print(name, row, flush=True)
        rows[name] = row | {"contender": name, "cell": "given"}
        if "evaluations" not in row:
            continue
        for key, cell in ((name, problem.cell), (f"{name}, rewritten", problem.rewritten)):
            solve = make(cell, row["rtol"], row["tolerance"])
            rows[key] = rows[name] | {"cell": "given" if cell is problem.cell else "rewritten"}
            tasks[key] = lambda cell=cell, solve=solve: problem.step(cell, solve)
    exact = [row for name, row in rows.items() if name.startswith("deqcore") and row["exact"] and "vjps" in row]
    counts = min(((row["evaluations"], row["vjps"]) for row in exact), key=sum)
    for cell, module in (("given", problem.cell), ("rewritten", problem.rewritten)):
        tasks[f"bare {cell}"] = lambda module=module: problem.bare(module, *counts)
    clock = time.process_time if asked.busy else time.perf_counter
    timed = interleave(tasks, rounds=asked.rounds, budget=asked.budget, clock=clock)
    for name in rows.keys() & timed.seconds.keys():
        rows[name]["seconds"] = timed.seconds[name]
    result = {
        "machine": describe(["torch"]),
        "clock": clock.__name__,
        "parameters": sum(p.numel() for p in problem.cell.parameters()),
        "rows": rows,
        "bare": {"counts": counts, **{cell: timed.seconds[f"bare {cell}"] for cell in ("given", "rewritten")}},
        "disturbance": timed.disturbance,
    }
    (asked.out / "mdeq.json").write_text(json.dumps(result, indent=1) + "\n")
    text, met = page(result)
    (asked.out / "mdeq.md").write_text(text)
    print(text)
    return 0 if met else 1


def fastest(rows: Mapping[str, dict[str, Any]], library: str, cell: str, exact: bool) -> str:
    """Return the contender of a library with the least median time, with that cell."""
    named = [
        name
        for name, row in rows.items()
        if "seconds" in row and name.startswith(library) and row["cell"] == cell and (row["exact"] or not exact)
    ]
    return min(named, key=lambda name: Spread.of(rows[name]["seconds"]).median)


def page(found: dict[str, Any]) -> tuple[str, bool]:
    """Return the page, and whether the target is met."""
    rows = found["rows"]
    peers = {cell: fastest(rows, "torchdeq", cell, True) for cell in ("given", "rewritten")}

    def ratio(name: str, peer: str) -> Spread:
        return Spread.of_ratios(rows[peer]["seconds"], rows[name]["seconds"])

    shown = []
    for name, row in rows.items():
        cells = {
            "contender": row["contender"],
            "cell": row["cell"],
            "options": row["options"],
            "forward tolerance": f"{row['rtol']:.1e}",
            "residual": f"{row['residual']:.1e}",
        }
        if "seconds" in row:
            cells |= {
                "backward tolerance": f"{row['tolerance']:.1e}" if row["exact"] else "",
                "gradient's error": f"{row['error']:.3f}",
                "f, vjps": f"{row['evaluations']}, {row['vjps']}",
                "step, ms": spread(Spread.of([1e3 * item for item in row["seconds"]])),
                "best peer / own": spread(ratio(name, peers["given"])),
                "with one cell": spread(ratio(name, peers[row["cell"]])),
            }
        else:
            error = f"gradient's error {row['error']:.2f}" if "error" in row else "residual"
            cells["step, ms"] = f"not reached: {error}"
        shown.append(dict.fromkeys(COLUMNS, "") | cells)

    readings = []
    for exact, held in ((True, "at equal residual and gradient error"), (False, "at equal residual alone")):
        for cell, other in (("given", "given"), ("rewritten", "given"), ("rewritten", "rewritten")):
            ours, peer = fastest(rows, "deqcore", cell, exact), peers[other]
            readings.append((held, cell, other, rows[ours], ratio(ours, peer).median))
    met = readings[0][-1] >= TARGET
    table = markdown(
        [
            {
                "what is equal": held,
                "our cell": cell,
                "the peer's": other,
                "our fastest": ours["contender"],
                "its gradient's error": f"{ours['error']:.2f}",
                "peer / own": f"{value:.2f}",
                f"{TARGET:g} times": "met" if value >= TARGET else "missed",
            }
            for held, cell, other, ours, value in readings
        ],
        (
            "what is equal",
            "our cell",
            "the peer's",
            "our fastest",
            "its gradient's error",
            "peer / own",
            f"{TARGET:g} times",
        ),
    )
    counts = found["bare"]["counts"]
    bare = {cell: Spread.of_ratios(rows[peers["given"]]["seconds"], found["bare"][cell]).median for cell in peers}
    alone = {cell: 1e3 * Spread.of(found["bare"][cell]).median for cell in peers}
    busy = sorted(found["disturbance"])[len(found["disturbance"]) // 2]
    clock = "processor time (`--busy`)" if found["clock"] == "process_time" else "wall-clock time"
    return (
        f"# A multiscale model compared with torchdeq\n\n"
        f"By `python -m benchmarks.mdeq`: forward and backward pass of an MDEQ cell ({found['parameters']} weights, "
        f"resolutions {', '.join(str(SIZE >> k) for k in range(len(CHANNELS)))} with {CHANNELS} channels, batch "
        f"{BATCH}, float32), one thread. Every sample reaches a residual of {RESIDUAL:g}; the gradient of the "
        f"parameters is within {ERROR:.0%} of the exact one, except for the rows without a backward tolerance, whose "
        f"gradients promise nothing. Each has the loosest tolerances of a grid of sixteen to the decade that do it, "
        f"{STEPS} steps at most either way, and of its library's options those with the fewest evaluations and "
        f"products. Weights are random, the norm after the injection weighted "
        f"{INJECTION:g} so that a solve takes about as many steps as a trained model's. Contenders take "
        f"turns in each round, ratios are taken "
        f"within a round: medians of {clock}, quartiles in brackets; others used {busy:.0%} of the machine in the "
        f"median round (load then: {found['machine']['load_before'][0]:.1f}). {machine_text(found['machine'])}\n\n"
        f"{markdown(shown, COLUMNS)}\n\n"
        f"*vjps* are products with Jᵀ, the one that gives the parameters' gradient included. *Rewritten* is the same "
        f"function to rounding with the sums over resolutions done in fewer operations. The best peer is "
        f"{rows[peers['given']]['contender']} with the cell as given, {rows[peers['rewritten']]['contender']} with "
        f"the rewritten one.\n\n"
        f"## The target\n\n"
        f"{TARGET:g} times the speed of torchdeq's MDEQ cell with its implicit gradient, at equal residual. These "
        f"words can be read in several ways, as they name neither the gradient's error nor what may be done to the "
        f"cell; the peer is always torchdeq's implicit gradient within {ERROR:.0%}.\n\n"
        f"{table}\n\n"
        f"{counts[0]} evaluations and {counts[1]} products by themselves, without a solver, take {alone['given']:.0f} "
        f"ms with the cell as given and {alone['rewritten']:.0f} ms with the rewritten one: the best peer's time with "
        f"the cell as given is {bare['given']:.2f} and {bare['rewritten']:.2f} times that, and no solver that needs as "
        f"many can gain more.\n\n"
        f"The first line is the one that compares libraries by themselves, and it decides: the target is "
        f"{'met' if met else 'missed'}. A rewritten cell is open to users of either library, and a gradient with the "
        f"error of the cheap rows is another gradient than the one that the peer pays for.\n"
    ), met


if __name__ == "__main__":
    raise SystemExit(main())
