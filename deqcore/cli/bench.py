"""`deqcore bench`: what each solver costs beside the evaluations of f."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from deqcore import plugins
from deqcore.bench.cases import CASES, Case
from deqcore.bench.compare import Row, compare
from deqcore.bench.harness import Contender, Deqcore, Harness
from deqcore.bench.machine import describe
from deqcore.bench.report import COLUMNS, cells
from deqcore.cli.output import AsJson, show
from deqcore.equilibrium import get_backend
from deqcore.errors import ProblemError, did_you_mean, listing
from deqcore.testing.problem import load_problem

QUICK = {"batch": 16, "size": 32}


def command(
    problem: Annotated[
        list[str] | None,
        typer.Option("--problem", "-p", help="A problem's name, or path/to/file.py:name. Default: all names."),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option("--solver", "-s", help="A registered solver. Default: all.")
    ] = None,
    backend: Annotated[str, typer.Option(help="The backend to measure on.")] = "auto",
    rtol: Annotated[float, typer.Option(min=0.0, help="Relative residual to reach, per sample.")] = 1e-5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Small problems: a check, not a measurement.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time the solvers: seconds, evaluations of f, residual, overhead, memory.

    overhead = seconds / (evaluations × seconds per stand-alone evaluation). Solvers take turns, so that a machine
    that drifts favours none; rounds in which others used it are left out. The comparison with other libraries is
    `python -m benchmarks` in a checkout of the source.
    """
    harness = _harness(backend)
    contenders: Sequence[Contender] = [Deqcore(name) for name in solver or plugins.solvers()]
    console = Console(stderr=True)
    rows: list[Row] = []
    for name in problem or CASES:
        case = _case(name, rtol, quick)
        if case.problem.backends is None or harness.name in case.problem.backends:
            rows += compare(harness, case, contenders, rounds=rounds, say=lambda text: console.print(text, style="dim"))
    if as_json:
        typer.echo(json.dumps({"machine": describe(), "rows": [row.as_dict() for row in rows]}, indent=2))
        return
    show([cells(row) for row in rows], COLUMNS, as_json=False)


def _harness(name: str) -> Harness:
    found = get_backend(backend=name)
    spec = plugins.backends()[found.name]
    return Harness.of(found, spec.package)


def _case(name: str, rtol: float, quick: bool) -> Case:
    if name in CASES:
        made = CASES[name](**QUICK) if quick else CASES[name]()
        return Case(made.problem, made.note, rtol, made.max_steps)
    if ":" not in name:
        raise ProblemError(
            f"--problem {name!r}: no problem of that name.{did_you_mean(name, CASES)} There are: {listing(CASES)}; "
            f"or name your own as path/to/file.py:name."
        )
    return Case(load_problem(name), name, rtol, max_steps=200)
