"""Time of the backward pass beside its vjps: `python -m benchmarks.backward --folder FOLDER` (torch on the CPU).

With `--folder` each cell's figures are kept in a file of their own, so that a run that was interrupted continues, and
`docs/benchmarks/backward.md`, its plot and its JSON are written from all of them by `--page`.

Every strategy, a plain GMRES in thirty lines of torch that stops for the whole batch at once, and torchdeq (if it is
installed) solve for the same cotangent at the same fixed point. They take turns in every round; figures are the least
of all rounds. *time / vjps* is the time over that of the vjps of the slowest sample, where the time of one vjp is
measured in the same rounds, and the time of `jacobian-free`, the product with the parameters alone, is taken off. The
true error is that of u against a solve of the same adjoint equation to a residual of 1e-6.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

import deqcore
from benchmarks.backward.cells import CELLS, Cell, cell_of
from benchmarks.backward.contenders import (
    CERTIFIED,
    ONE,
    PLAIN,
    SAME,
    USED,
    Timed,
    adjoint,
    adjoint_of,
    largest,
    layers,
    library,
    now,
    one_backward,
    plain_gmres,
    through_layer,
    through_plain,
)
from benchmarks.backward.report import page, table
from deqcore.linear.gmres import gmres


def measure(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Time all contenders on a cell."""
    z, _ = library("broyden", "jacobian-free", {})(cell.f, cell.z0, cell.x)
    vjp, g = adjoint(cell, z)
    backend = deqcore.get_backend(backend="torch")
    exact = gmres(backend, vjp, g, rtol=1e-6, max_steps=200, restart=100, shifted=True).x
    through = layers()
    contenders = {name: through_plain(vjp, g, *options) for name, options in PLAIN.items()}
    reached = largest(adjoint_of(cell, through[CERTIFIED]), exact)
    enough = (most for most in range(1, 41) if largest(plain_gmres(vjp, g, 0.0, False, most)[0], exact) <= reached)
    contenders[SAME] = through_plain(vjp, g, 0.0, False, next(enough, 40))
    contenders |= {name: through_layer(cell, layer) for name, layer in through.items()}
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
        u = adjoint_of(cell, through[name]) if name in through else each.u
        own = each.least - (free if name in through else 0.0)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backward", description=__doc__)
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
        page(rows, options.threads, Path(__file__).parents[2] / "docs" / "benchmarks")


if __name__ == "__main__":
    main()
