"""`deqcore explain`: every backward strategy on the user's own problem, and the cheapest that is good enough."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from deqcore import plugins
from deqcore.abc.arrays import is_inexact, precision_of
from deqcore.abc.backend import Backend
from deqcore.api import get_backend
from deqcore.bench.harness import Harness
from deqcore.bench.machine import describe
from deqcore.bench.strategy_comparison import candidates, compare_strategies
from deqcore.bench.strategy_rows import (
    ComparisonRow,
    StrategyCandidate,
    StrategyComparison,
    cheapest,
    on_front,
)
from deqcore.cli.output import AsJson, progress_printer, show
from deqcore.config import Config
from deqcore.config import resolve as resolve_settings
from deqcore.diagnostics.layers import BoundLayer
from deqcore.errors import BackendError, ConfigError, ProblemError, did_you_mean, listing
from deqcore.solve.messages import coupling
from deqcore.testing.problem import Problem, load_own, place, rebuild
from deqcore.testing.problems import golden, names
from deqcore.types import Tree

COLUMNS: Final = (
    "strategy",
    "vjps",
    "ms",
    "error",
    "front",
    "residual",
    "estimate",
    "missed",
    "cosine",
    "worst",
    "norm ratio",
    "note",
)
DTYPES: Final = ("float32", "float64")
SLACK: Final = 1e-4  # of an error that a cosine of 1 limits to 0: what float32 rounds


def command(
    problem: Annotated[
        str,
        typer.Option(
            "--problem",
            "-p",
            help=f"{', '.join(names())}; or your own as path/to/file.py:name, which is a deqcore.testing.Problem, a "
            f"tuple (layer or module or function, *inputs), or a function that returns one.",
        ),
    ] = "mlp",
    backend: Annotated[str, typer.Option(help="The backend to run on.")] = "auto",
    solver: Annotated[str, typer.Option(help="The forward solver. Default: as configured.")] = "",
    accuracy: Annotated[
        str,
        typer.Option(
            help="Required accuracy of the gradient: a relative error, error=0.05, or a cosine, such as 0.99. A cosine "
            "also limits the error, to that of a gradient of equal length with this cosine."
        ),
    ] = "error=0.1",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing; 0 measures neither time nor memory.")] = 9,
    as_json: AsJson = False,
) -> None:
    """Compare all backward strategies on a problem and name the cheapest that is accurate enough.

    Forward settings come from deq.toml and the environment. The reference is the exact gradient,
    solved to rounding error. Exits with status 1 if no strategy is accurate enough.
    """
    good, asked = _accuracy(accuracy)
    config = _config(backend, solver)
    task = _problem(problem)
    if isinstance(task, BoundLayer):
        config = _of_layer(config, task, solver)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "backend = 'auto'")  # the backend is named below the table
        result = get_backend(config)
    table = _survey(result, task, config, dtype, rounds, progress_printer(as_json))
    best = cheapest(table.rows, good)
    verdict = _verdict(best, table, asked)
    if as_json:
        typer.echo(json.dumps(_as_json(table, task, result, config, asked, best, verdict), indent=2))
    else:
        best_of = on_front(table.rows)
        show([_cells(row, front=row.label in best_of) for row in table.rows], COLUMNS, as_json=False)
        for line in _notes(table, task, result, config, timed=rounds > 0):
            Console().print(Text(line, style="dim"), soft_wrap=True)
        Console().print(Text(verdict, style="bold" if best else "bold red"), soft_wrap=True)
    if best is None:
        raise typer.Exit(1)


def _accuracy(text: str) -> tuple[Callable[[ComparisonRow], bool], str]:
    """Return the required accuracy as a predicate and as text. A cosine does not show a wrong length.

    Raises:
        ConfigError: it is neither a cosine nor an error.
    """
    kind, separator, number = text.rpartition("=")
    kind = kind.strip() or "cosine"
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind == "cosine" and 0.0 < value <= 1.0 and (separator or text):
        most = math.sqrt(2 - 2 * value) + SLACK  # |a − b| of unit vectors with this cosine
        asked = f"a cosine of at least {value:g} and a relative error of at most {most:.2g}"
        return (lambda row: row.cosine >= value and row.error <= most), asked
    if kind == "error" and 0.0 < value < math.inf:
        return (lambda row: row.error <= value), f"a relative error of at most {value:g}"
    raise ConfigError.bad_value(
        "deqcore explain", "--accuracy", text, "a cosine above 0 and at most 1, such as 0.99, or error=0.05"
    )


def _config(backend: str, solver: str) -> Config:
    """Project and environment, then the command line."""
    overrides: dict[str, object] = {"forward__on_failure": "ignore"}
    if backend != "auto":
        overrides["backend"] = backend
    if solver:
        overrides["forward__solver"] = solver
    return resolve_settings(Config.discover(), overrides)[0]


def _of_layer(config: Config, task: BoundLayer, chosen_solver: str) -> Config:
    """Return the settings of a layer, above those of the project; the command line wins."""
    own: dict[str, object] = {"forward__on_failure": "ignore", "backend": task.backend.name}
    if chosen_solver:
        own["forward__solver"] = chosen_solver
    return resolve_settings(config if task.config is None else task.config, task.settings | own)[0]


def _problem(name: str) -> Problem | BoundLayer:
    if ":" in name:
        loaded = load_own(name)
        return loaded if isinstance(loaded, Problem) else BoundLayer.of(loaded[0], tuple(loaded[1:]))
    if name not in names():
        raise ProblemError(
            f"--problem {name!r}: no problem of that name.{did_you_mean(name, names())} There are: {listing(names())}; "
            f"or name your own as path/to/file.py:name."
        )
    return golden(name).problem


def _survey(
    backend: Backend,
    problem: Problem | BoundLayer,
    config: Config,
    dtype: str,
    rounds: int,
    say: Callable[[str], object],
) -> StrategyComparison:
    """Convert the data and measure; an error in the user's f names the line that raised it."""
    if isinstance(problem, BoundLayer):
        bound = problem
        data = bound.params, bound.inputs, bound.z0, bound.direction()
        return _compared(backend, bound.name, lambda z, p, x: bound.f(z, p, *x), data, config, rounds, say)
    if problem.backends is not None and backend.name not in problem.backends:
        raise ProblemError(
            f"Problem {problem.name!r} is written for {listing(problem.backends)}, but the backend is "
            f"{backend.name!r}: choose one of them with --backend."
        )
    settings = {"forward__batch": problem.batch, "backend": backend.name}
    config = resolve_settings(config, settings)[0]
    data = _data(problem, dtype, backend)
    return _compared(backend, problem.name, problem.bound(backend), data, config, rounds, say)


def _compared(
    backend: Backend,
    name: str,
    f: Callable[..., Tree],
    data: tuple[Tree, Tree, Tree, Tree],
    config: Config,
    rounds: int,
    say: Callable[[str], object],
) -> StrategyComparison:
    harness = Harness.of(backend, plugins.backends()[backend.name].package)
    raised: list[Exception] = []

    def watched(*args: Any) -> Tree:
        try:
            return f(*args)
        except Exception as error:
            raised.append(error)
            raise

    try:
        return compare_strategies(harness, watched, data, config, _choices(config), rounds=rounds, say=say)
    except Exception as error:
        if raised and error is raised[-1]:
            raise ProblemError(f"Problem {name!r}: f raised {place(error)}") from error
        raise


def _choices(config: Config) -> list[StrategyCandidate]:
    """Return all candidates, and the configured one where it is none of them."""
    result = list(candidates())
    own = StrategyCandidate(config.backward.strategy, dict(config.backward.options))
    plugins.make_strategy(own.strategy, own.options)  # a typo is an error of the user, not of the problem
    available = [(item.strategy, dict(item.options)) for item in result]
    return result if (own.strategy, dict(own.options)) in available else [*result, own]


def _data(problem: Problem, dtype: str, backend: Backend) -> tuple[Tree, Tree, Tree, Tree]:
    """Return the parameters, inputs, z0 and cotangent as arrays of the backend."""
    import numpy as np

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} There are: {listing(DTYPES)}.")

    def convert(leaf: Any) -> Any:
        host = np.asarray(leaf)
        if not is_inexact(host.dtype.name):
            return backend.asarray(host)
        wanted = precision_of(host.dtype.name, dtype)
        made = backend.asarray(host.astype(wanted))
        if backend.dtype_name(made) != wanted:
            raise BackendError(
                f"--dtype {dtype}: {backend.name} made {backend.dtype_name(made)} of it. Where double precision is "
                f"behind a switch, set it (JAX_ENABLE_X64=1), or use --dtype float32."
            )
        return made

    trees = (problem.params, problem.inputs, problem.z0, problem.direction())
    params, inputs, z0, g = (rebuild(tree, convert) for tree in trees)
    return params, inputs, z0, g


def _verdict(best: ComparisonRow | None, table: StrategyComparison, asked: str) -> str:
    if best is not None:
        options = ", ".join(f"{name} = {_toml(value)}" for name, value in best.options.items())
        setting = f"backward.strategy = {best.strategy!r}" + (
            f", backward.options = {{ {options} }}" if options else ""
        )
        cost = f"{best.vjps:g} vjps" if math.isnan(best.seconds) else f"{1e3 * best.seconds:.3g} ms a gradient"
        return (
            f"The cheapest with {asked}: {best.label}, {cost}, cosine {best.cosine:.4f}, relative error "
            f"{best.error:.2g}. Set {setting}."
        )
    usable = [row for row in table.rows if not row.failure and not math.isnan(row.error)]
    nearest = min(usable, key=lambda row: row.error, default=None)
    if nearest is None:
        return f"No strategy gave a gradient, so none has {asked}."
    return (
        f"None has {asked}. The nearest is {nearest.label}: cosine {nearest.cosine:.4f}, relative error "
        f"{nearest.error:.2g}. Raise its budget of vjps, or solve to a smaller forward.rtol."
    )


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr("none" if value is None else value)


def _notes(
    table: StrategyComparison, problem: Problem | BoundLayer, backend: Backend, config: Config, *, timed: bool
) -> list[str]:
    lines = [
        f"{problem.name}: {table.samples} samples, backend {backend.name}, solver {config.forward.solver}.",
        "vjps: vector–Jacobian products, median (most) per sample; for phantom and unrolled the steps differentiated.",
        "error: ‖g − g*‖ / ‖g*‖ of all gradients (parameters, inputs), g* exact. front: nothing else is both quicker "
        "and more accurate. Compare strategies at equal error: exact-ift stands here at several tolerances and steps.",
        "residual: measured; estimate: reported; worst sample. missed: samples reported to have missed their target.",
        "cosine, norm ratio: of all gradients (parameters, inputs) against the exact ones; worst: u of the worst one.",
    ]
    if timed:
        lines.append("ms: one gradient with its solve, median (quartiles).")
    if table.failed:
        lines.append(
            f"{table.failed} of {table.samples} samples did not converge in the forward solve: no gradient is right "
            f"there. See forward.max_steps, forward.rtol, forward.solver."
        )
    if table.coupling > 0 or table.pair is not None:
        lines.append(coupling(table.pair))
    if table.trust > 1e-3:
        lines.append(f"The exact gradient itself has an adjoint residual of {table.trust:.1g}: I − J is near singular.")
    return lines


def _cells(row: ComparisonRow, *, front: bool) -> dict[str, object]:
    """Return the text of one line of the table."""

    def number(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    vjps = number(row.vjps, "g")
    if row.most_vjps > row.vjps:
        vjps += f" ({row.most_vjps:g})"
    ms = "" if math.isnan(row.seconds) else f"{1e3 * row.seconds:.3g} ({1e3 * row.low:.3g}–{1e3 * row.high:.3g})"
    return {
        "strategy": row.label,
        "vjps": vjps,
        "ms": ms,
        "error": number(row.error, ".2g"),
        "front": "●" if front else "",
        "residual": number(row.residual, ".1e"),
        "estimate": number(row.estimate, ".1e"),
        "missed": str(row.missed) if row.missed else "",
        "cosine": number(row.cosine, ".4f"),
        "worst": number(row.worst_cosine, ".4f"),
        "norm ratio": number(row.norm_ratio, ".3f"),
        "note": row.failure,
    }


def _as_json(
    table: StrategyComparison,
    problem: Problem | BoundLayer,
    backend: Backend,
    config: Config,
    asked: str,
    best: ComparisonRow | None,
    verdict: str,
) -> dict[str, object]:
    return {
        "problem": problem.name,
        "backend": backend.name,
        "solver": config.forward.solver,
        "samples": table.samples,
        "not_converged": table.failed,
        "reference_residual": table.trust,
        "coupling": table.coupling,
        "coupled_rows": None if table.pair is None else list(table.pair),
        "rows": [row.as_dict() | {"front": row.label in on_front(table.rows)} for row in table.rows],
        "asked": asked,
        "cheapest": best.label if best else None,
        "verdict": verdict,
        "machine": describe(),
    }
