"""`deqcore bench`: solve time compared with the time of the evaluations of f."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deqcore.bench.folder import result_folder
from deqcore.bench.machine import describe, limit_threads, usable_cores
from deqcore.cli.output import AsJson, print_error, progress_printer, show
from deqcore.config.project import load_plugins
from deqcore.errors import ProblemError, did_you_mean, listing

if TYPE_CHECKING:
    from deqcore.bench.cases import Case
    from deqcore.bench.harness import Harness
    from deqcore.bench.rows import BenchRow

QUICK_SECONDS: Final = 40.0  # after which --quick begins no further case


def command(
    case: Annotated[
        list[str] | None,
        typer.Option("--case", "-c", help="A case's name, or path/to/file.py:name; may be repeated. Default: all."),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option("--solver", "-s", help="A registered solver; may be repeated. Default: all.")
    ] = None,
    backend: Annotated[str, typer.Option(help="The backend to measure on.")] = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in the batch. Default: the case's own.")] = None,
    size: Annotated[int | None, typer.Option(min=4, help="Numbers per sample. Default: the case's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="Number of threads. Default: all cores.")] = None,
    rtol: Annotated[float, typer.Option(min=0.0, help="Relative residual to reach, per sample.")] = 1e-5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Time limit in seconds for timing one case on a busy machine.")
    ] = 20.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, few rounds, no memory: within a minute.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, a table and a plot.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the solvers: seconds, evaluations of f, residual, overhead, memory.

    overhead = seconds / (evaluations × seconds per stand-alone evaluation). Solvers take turns, so that a machine
    that drifts favours none; rounds in which others used it are left out. The comparison with other libraries is
    `python -m benchmarks` in a checkout of the source.
    """
    start = time.perf_counter()
    if out is not None:
        result_folder(out)
    limit_threads(usable_cores() if threads is None else threads)  # before NumPy or a framework is imported
    load_plugins(print_error)
    from deqcore.bench.compare import compare
    from deqcore.bench.harness import ours

    solvers = _solvers(solver)
    cases = [_case(name, rtol, quick, batch, size) for name in _named(case)]
    harness = _harness(backend)
    say = progress_printer(as_json)
    if quick:
        rounds, budget = min(3, rounds), min(2.0, budget)
    rows: list[BenchRow] = []
    for count, item in enumerate(cases):
        if quick and rows and time.perf_counter() - start > QUICK_SECONDS:
            left = listing([each.name for each in cases[count:]])
            typer.echo(f"--quick: {QUICK_SECONDS:g} s are over. Not measured: {left}. Name them with --case.", err=True)
            break
        contenders = ours(solvers, item, harness.traced)
        say(f"Case {count + 1} of {len(cases)}: {item.name}")
        rows += compare(harness, item, contenders, rounds=rounds, budget=budget, memory=not quick, say=say)
    _answer(rows, out, as_json, harness.package)


def _answer(rows: list[BenchRow], out: Path | None, as_json: bool, package: str | None) -> None:
    from deqcore.bench import plots
    from deqcore.bench.report import COLUMNS, cells, machine_text, markdown

    machine = describe([package] if package else [])
    result = json.dumps({"machine": machine, "rows": [row.as_dict() for row in rows]}, indent=2)
    table = [cells(row) | {"solver": row.contender.removeprefix("deqcore ")} for row in rows]  # no other library here
    if out is not None:
        (out / "results.json").write_text(result + "\n")
        (out / "report.md").write_text(f"{machine_text(machine)}\n\n{markdown(table)}\n")
        if plots.available():
            plots.overheads(rows, out / "overhead.png", f"Solvers on {rows[0].framework}")
    if as_json:
        typer.echo(result)
    else:
        show(table, COLUMNS, as_json=False)


def _harness(name: str) -> Harness:
    from deqcore import plugins
    from deqcore.api import get_backend
    from deqcore.bench.harness import Harness

    result = get_backend(backend=name)
    return Harness.of(result, plugins.backends()[result.name].package)


def _solvers(named: list[str] | None) -> list[str]:
    from deqcore import plugins

    for name in named or ():
        plugins.spec("solver", name)  # unknown: an error with a suggestion
    return list(dict.fromkeys(named or plugins.solvers()))


def _named(named: list[str] | None) -> list[str]:
    from deqcore.bench.cases import CASES

    for name in named or ():
        if name not in CASES and ":" not in name:
            raise ProblemError(
                f"--case {name!r}: no case of that name.{did_you_mean(name, CASES)} There are: {listing(CASES)}; "
                f"or name your own as path/to/file.py:name."
            )
    return list(dict.fromkeys(named or CASES))


def _case(name: str, rtol: float, quick: bool, batch: int | None, size: int | None) -> Case:
    from deqcore.bench.cases import CASES, SMALL, Case
    from deqcore.testing.problem import load_problem

    if name not in CASES:
        return Case(load_problem(name), name, rtol, max_steps=200)
    chosen = {key: value for key, value in (("batch", batch), ("size", size)) if value is not None}
    made = CASES[name](**{**(SMALL if quick else {}), **chosen})
    return replace(made, rtol=rtol)
