"""Time of the backward pass beside its vjps: `python -m benchmarks.backward --folder FOLDER` (torch on the CPU).

With `--folder` each cell's figures are kept in a file of their own, so that a run that was interrupted continues, and
`docs/benchmarks/backward.md`, its plot and its JSON are written from all of them by `--page`.

Every strategy, and a plain GMRES in thirty lines of torch that stops for the whole batch at once, solves for the same
cotangent at the same fixed point. They take turns in every round; figures are the least of all rounds. *time / vjps* is
the time over that of the vjps of the slowest sample, where the time of one vjp is measured in the same rounds, and the
time of `jacobian-free`, the product with the parameters alone, is taken off. The true error is that of u against a
solve of the same adjoint equation to a residual of 1e-6.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from deqcore_torch.study import TorchOps
from torch import Tensor

import deqcore
from benchmarks.cells import attention, conv
from deqcore.bench.report import markdown
from deqcore.linear.gmres import gmres
from deqcore.study.models.base import Shape
from deqcore.study.models.conv import Conv

FORWARD: Final[Mapping[str, Any]] = {"forward__rtol": 1e-4, "forward__max_steps": 100}
SIZES: Final = {"dense": (256, 512), "dense 128": (256, 128), "dense, small": (64, 64), "slow modes": (64, 256)}
QUICK: Final = {"dense": (16, 64), "dense 128": (8, 32), "dense, small": (4, 16), "slow modes": (4, 32)}
BLOCKS: Final = ("convolution", "attention")
SCALES: Final = "two scales"
CELLS: Final = (*SIZES, *BLOCKS, SCALES)
SAME: Final = "plain GMRES, as good as certified"
CERTIFIED: Final = "broyden-reuse, error 0.1"
ONE: Final = "one backward of f"

STRATEGIES: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "jacobian-free": ("broyden", "jacobian-free", {}),
    "reuse, not certified": (
        "broyden", "broyden-reuse", {"certify": False, "max_relative_error": None, "fallback": "none"},
    ),
    "exact-ift, residual 1e-4": ("broyden", "exact-ift", {"rtol": 1e-4}),
    "exact-ift, residual 0.1": ("broyden", "exact-ift", {"rtol": 0.1}),
    "exact-ift behind picard, error 0.1": ("picard", "exact-ift", {"max_relative_error": 0.1}),
    "exact-ift, error 0.01": ("broyden", "exact-ift", {"max_relative_error": 0.01}),
    "broyden-reuse, error 0.1": ("broyden", "broyden-reuse", {"max_relative_error": 0.1}),
    "broyden-reuse, error 0.01": ("broyden", "broyden-reuse", {"max_relative_error": 0.01}),
    "broyden-reuse, error 0.1, preconditioned": (
        "broyden", "broyden-reuse", {"max_relative_error": 0.1, "reuse": "precondition"},
    ),
}  # fmt: skip
"""Forward solver, strategy and its options."""

CLOCKS: Final = {"wall": time.perf_counter, "thread": time.thread_time}
"""Other processes disturb the time of the thread less."""

USED: Final = {"clock": "wall"}

PLAIN: Final = {"plain GMRES, residual 1e-4": (1e-4, False), "plain GMRES, estimated error 0.1": (0.1, True)}
"""Target, and whether it is one for the estimated error."""


def now() -> float:
    """Return seconds by the chosen clock."""
    return CLOCKS[USED["clock"]]()


@dataclass(frozen=True)
class Cell:
    """f(z, x) with recorded parameters.

    Attributes:
        name: for the table.
        f: `(z, x)` to f(z).
        x: input.
        z0: initial iterate.
        g: cotangent.
    """

    name: str
    f: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    z0: Tensor
    g: Tensor


def dense(name: str, batch: int, width: int) -> Cell:
    """tanh(W z + x) with random weights of spectral radius 0.9."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.9 * torch.randn(width, width, generator=generator) / width**0.5)
    x, g = torch.randn(2, batch, width, generator=generator).unbind(0)
    return Cell(f"{name} {batch}×{width}", lambda z, x: torch.tanh(z @ weight.T + x), x, torch.zeros_like(x), g)


def slow_modes(name: str, batch: int, width: int, slow: int = 10) -> Cell:
    """W z + x with ten eigenvalues from .9 to .99 and the others from −.5 to .5."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    values = torch.cat([torch.linspace(0.9, 0.99, slow), torch.linspace(-0.5, 0.5, width - slow)])
    weight = torch.nn.Parameter(q * values @ q.T)
    x, g = torch.randn(2, batch, width, generator=generator).unbind(0)
    return Cell(f"{name} {batch}×{width}", lambda z, x: z @ weight.T + x, x, torch.zeros_like(x), g)


def cell_of(name: str, quick: bool) -> Cell:
    """Return the cell of this name."""
    if name in BLOCKS:
        return block(name, quick)
    if name == SCALES:
        return two_scales(*((4, 8) if quick else (64, 16)))
    batch, width = (QUICK if quick else SIZES)[name]
    return (slow_modes if name == "slow modes" else dense)(name, batch, width)


def block(name: str, quick: bool) -> Cell:
    """Return the convolutional or the attention block of the other benchmarks."""
    make: Any = conv if name == "convolution" else attention
    problem = (make(4, 16) if quick else make()).problem
    params = {key: torch.nn.Parameter(torch.tensor(np.asarray(p))) for key, p in problem.params.items()}
    x = torch.tensor(np.asarray(problem.inputs))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    f = problem.f["torch"]
    return Cell(f"{name} {'×'.join(map(str, x.shape))}", lambda z, x: f(params, z, x), x, torch.zeros_like(x), g)


def two_scales(batch: int, side: int, gain: float = 2.0) -> Cell:
    """The study's convolutions on two scales, 8 and 16 channels wide, as one tensor.

    The kernels of the cell are `gain` times the initial ones: then an exact solve takes about as many vjps as in the
    study's training on images.
    """
    model = Conv(Shape("image", (3, side, side), 10), width=8)
    weights = model.initial(np.random.default_rng(0))
    scaled = {key: gain * value if key.startswith("K") else value for key, value in weights.items()}
    params = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in scaled.items()}
    ops, generator = TorchOps(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        first, second = model.inject(ops, params, torch.randn(batch, 3, side, side, generator=generator))
    x, low = torch.cat([first.flatten(1), second.flatten(1)], 1), first[0].numel()
    g = torch.randn(x.shape, generator=generator)

    def f(z: Tensor, x: Tensor) -> Tensor:
        states, inputs = [
            (part[:, :low].reshape(first.shape), part[:, low:].reshape(second.shape)) for part in (z, x)
        ]
        return torch.cat([part.flatten(1) for part in model.cell(ops, params, states, inputs)], 1)

    return Cell(f"{SCALES} {batch}×{side}×{side}", f, x, torch.zeros_like(x), g)


def plain_gmres(
    vjp: Callable[[Tensor], Tensor], g: Tensor, target: float, estimated: bool, most: int = 40
) -> tuple[Tensor, int]:
    """Solve u = g + Jᵀu from zero with one projection a step, until all samples are there: the plain alternative."""
    batch, width = g.shape
    basis, norm = g.new_empty(batch, most + 1, width), g.norm(dim=1)
    hessenberg, null = g.new_zeros(batch, most + 1, most), g.new_zeros(batch, most + 1)
    basis[:, 0], null[:, 0], square = g / norm[:, None], 1.0, torch.ones_like(norm)
    for k in range(most):
        used, w = basis[:, : k + 1], basis[:, k] - vjp(basis[:, k])
        h = torch.bmm(used, w[:, :, None])
        w = torch.baddbmm(w[:, None], h.transpose(1, 2), used, alpha=-1)[:, 0]
        height = w.norm(dim=1)
        hessenberg[:, : k + 1, k], hessenberg[:, k + 1, k] = h[:, :, 0], height
        torch.div(w, height[:, None], out=basis[:, k + 1])
        null[:, k + 1] = -(null[:, : k + 1] * h[:, :, 0]).sum(1) / height
        square = square + null[:, k + 1] ** 2
        if not (square.rsqrt() <= target).all() and k + 1 < most:
            continue
        side = -null[:, 1 : k + 2] * (null[:, 0] / square)[:, None]
        y = torch.linalg.solve_triangular(hessenberg[:, 1 : k + 2, : k + 1], side[:, :, None], upper=True)
        least = torch.linalg.svdvals(hessenberg[:, : k + 2, : k + 1])[:, -1] if estimated else square
        if not estimated or (1.2 * square.rsqrt() / least / y.norm(dim=(1, 2)) <= target).all():
            break
    return torch.bmm(y.transpose(1, 2) * norm[:, None, None], basis[:, : k + 1])[:, 0], k + 1


@dataclass
class Timed:
    """One contender: `run` returns seconds; u and the vjps of the slowest sample are known after it."""

    run: Callable[[], float]
    vjps: int = 0
    mean: float = 0.0
    u: Tensor | None = None
    least: float = float("inf")


def through_library(cell: Cell, solver: str, strategy: str, options: Mapping[str, Any]) -> Timed:
    """Time `backward` of a value, without the forward solve."""

    def run() -> float:
        settings: dict[str, Any] = dict(FORWARD) | {
            "backward__strategy": strategy,
            "backward__options": options,
            "forward__solver": solver,
        }
        solution = deqcore.fixed_point(cell.f, cell.z0, cell.x, **settings)
        begin = now()
        solution.value.backward(cell.g)
        seconds = now() - begin
        found: Any = solution.backward
        timed.vjps, timed.mean = int(found.vjps.max()), float(found.vjps.float().mean())
        return seconds

    timed = Timed(run)
    return timed


def through_plain(vjp: Callable[[Tensor], Tensor], g: Tensor, target: float, estimated: bool, most: int = 40) -> Timed:
    """Time plain GMRES alone."""

    def run() -> float:
        begin = now()
        timed.u, timed.vjps = plain_gmres(vjp, g, target, estimated, most)
        timed.mean = timed.vjps
        return now() - begin

    timed = Timed(run)
    return timed


def adjoint(cell: Cell, z: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`u ↦ Jᵀu` on `(batch, n)` at z, and the cotangent."""
    at = z.detach().requires_grad_()
    value = cell.f(at, cell.x)

    def vjp(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(value, at, u.reshape(value.shape), retain_graph=True)
        return product.reshape(u.shape)

    return vjp, cell.g.reshape(cell.g.shape[0], -1)


def library_u(cell: Cell, solver: str, strategy: str, options: Mapping[str, Any]) -> Tensor:
    """Return the u of the library, from the gradient of a shift that f is added to: ∂L/∂shift = u."""
    shift = torch.zeros_like(cell.x, requires_grad=True)
    settings: dict[str, Any] = dict(FORWARD) | {
        "backward__strategy": strategy,
        "backward__options": options,
        "forward__solver": solver,
    }
    solution = deqcore.fixed_point(lambda z, x, s: cell.f(z, x) + s, cell.z0, cell.x, shift, **settings)
    (u,) = torch.autograd.grad(solution.value, shift, cell.g)
    return u.reshape(u.shape[0], -1)


def one_backward(cell: Cell, z: Tensor) -> Timed:
    """Time the gradients of f's parameters from a recorded evaluation at z: what no strategy can do without."""

    def run() -> float:
        at = z.detach().requires_grad_()
        value = cell.f(at, cell.x)
        begin = now()
        value.backward(cell.g, inputs=leaves(value, at))
        return now() - begin

    return Timed(run)


def leaves(value: Tensor, at: Tensor) -> list[Tensor]:
    """Return the parameters that a value depends on, without `at`."""
    found: dict[int, Tensor] = {}
    stack, seen = [value.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", at)
        if variable is not at:
            found[id(variable)] = variable
        stack += [following for following, _ in node.next_functions]
    return list(found.values())


def largest(u: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of a sample."""
    return float(((u - exact).norm(dim=1) / exact.norm(dim=1)).max())


def measure(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Time all contenders on a cell."""
    settings: dict[str, Any] = dict(FORWARD) | {"backward__strategy": "jacobian-free", "forward__solver": "broyden"}
    z = deqcore.fixed_point(cell.f, cell.z0, cell.x, **settings).value
    vjp, g = adjoint(cell, z)
    backend = deqcore.get_backend(backend="torch")
    exact = gmres(backend, vjp, g, rtol=1e-6, max_steps=200, restart=100, shifted=True).x
    contenders = {name: through_plain(vjp, g, *options) for name, options in PLAIN.items()}
    reached = largest(library_u(cell, *STRATEGIES[CERTIFIED]), exact)
    enough = (most for most in range(1, 41) if largest(plain_gmres(vjp, g, 0.0, False, most)[0], exact) <= reached)
    contenders[SAME] = through_plain(vjp, g, 0.0, False, next(enough, 40))
    contenders |= {name: through_library(cell, *options) for name, options in STRATEGIES.items()}
    contenders[ONE] = one_backward(cell, z)

    def one_vjp() -> float:
        begin = now()
        vjp(g)
        return now() - begin

    contenders["one vjp"] = Timed(one_vjp, 1, 1.0)
    for _ in range(rounds):
        for each in contenders.values():
            each.least = min(each.least, each.run())
    unit, free = contenders.pop("one vjp").least, contenders["jacobian-free"].least
    single = contenders.pop(ONE).least
    rows = []
    for name, each in contenders.items():
        u = library_u(cell, *STRATEGIES[name]) if name in STRATEGIES else each.u
        own = each.least - (free if name in STRATEGIES else 0.0)
        rows.append(
            {
                "cell": cell.name,
                "strategy": name,
                "ms": 1e3 * each.least,
                "vjps": each.vjps,
                "mean vjps": each.mean,
                "overhead": own / (each.vjps * unit) if each.vjps else each.least / single,
                "error": largest(u, exact),
                "one vjp": 1e3 * unit,
                "parameters": 1e3 * single,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    columns = ("cell", "strategy", "ms", "vjps, slowest sample (mean)", "time / vjps", "largest true error")
    values = [
        (
            f"{row['cell']}, one vjp {row['one vjp']:.2f} ms, parameters {row['parameters']:.2f} ms",
            row["strategy"],
            f"{row['ms']:.1f}",
            f"{row['vjps']} ({row['mean vjps']:.1f})",
            f"{row['overhead']:.2f}",
            f"{row['error']:.1e}",
        )
        for row in rows
    ]
    return markdown([dict(zip(columns, each, strict=True)) for each in values], columns)


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw the error that each strategy reached against its time, one panel for each cell; nothing beats a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cells, names = list(dict.fromkeys(row["cell"] for row in rows)), list(dict.fromkeys(r["strategy"] for r in rows))
    figure, axes = plt.subplots(2, -(-len(cells) // 2), figsize=(4.2 * -(-len(cells) // 2), 7.5), squeeze=False)
    for axis, cell in zip(axes.flat, cells, strict=False):
        own = [row for row in rows if row["cell"] == cell]
        for row in own:
            marker = "s" if row["strategy"].startswith("plain") else "o"
            axis.loglog(row["ms"], row["error"], marker, color=f"C{names.index(row['strategy']) % 10}")
        best: list[dict[str, Any]] = []
        for row in sorted(own, key=lambda row: row["ms"]):
            if not best or row["error"] < best[-1]["error"]:
                best.append(row)
        axis.step([row["ms"] for row in best], [row["error"] for row in best], where="post", color="0.7", zorder=0)
        axis.set_title(cell, fontsize=9)
        axis.set_xlabel("backward pass, ms")
        axis.set_ylabel("largest relative error")
    for axis in list(axes.flat)[len(cells) :]:
        axis.axis("off")
    handles = [
        plt.Line2D(
            [], [], marker="s" if name.startswith("plain") else "o", color=f"C{i % 10}", linestyle="", label=name
        )
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=2, fontsize=7)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)


HEAD: Final = """# The backward pass in time

What a backward pass takes beside its vjps, and the error that it reaches.
`python -m benchmarks.backward --folder FOLDER --page` measures, with {threads} threads of torch, and writes this page.

*Plain GMRES* has thirty lines: one projection a step, one stopping test for the whole batch, and no report. Its time
is that of u alone. That of the strategies contains the product with the parameters, which `jacobian-free` shows;
*time / vjps* is without it. *Plain GMRES, as good as certified* takes the fewest vjps with which its largest true error
is at most that of `broyden-reuse` with the target 0.1; only an oracle knows that number. For strategies without a vjp,
*time / vjps* is the time over that of the gradients of the parameters alone. The decisions behind these figures:
[notes](../notes/backward.md).

![Error reached against time](backward-pareto.png)

"""


def page(rows: list[dict[str, Any]], threads: int, folder: Path) -> None:
    """Write the page, its plot and its figures."""
    (folder / "backward.md").write_text(HEAD.format(threads=threads) + table(rows) + "\n")
    (folder / "backward.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, folder / "backward-pareto.png")


def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of a cell: those kept in the folder, or new ones."""
    kept = None if options.folder is None else options.folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    if kept is not None and kept.exists():
        found: list[dict[str, Any]] = json.loads(kept.read_text())
        return found
    rows = measure(cell_of(name, options.quick), 2 if options.quick else options.rounds)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cells and few rounds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", action="append", choices=CELLS, help="all by default")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help="keep the figures of each cell here, and measure what is missing")
    parser.add_argument("--page", action="store_true", help="also write docs/benchmarks/backward.md")
    parser.add_argument("--cpu-time", action="store_true", help="time of the thread: for a busy machine")
    options = parser.parse_args()
    USED["clock"] = "thread" if options.cpu_time else "wall"
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = [row for name in options.cell or CELLS for row in measured(name, options)]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.page:
        page(rows, options.threads, Path(__file__).parents[1] / "docs" / "benchmarks")


if __name__ == "__main__":
    main()
