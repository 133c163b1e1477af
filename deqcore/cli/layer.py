"""`deqcore check layer`: judge a trained layer with a fixed point inside, of any library or written by hand."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from deqcore import __version__, plugins
from deqcore.cli.output import AsJson, progress_printer, show
from deqcore.config import Config
from deqcore.errors import ConfigError, MissingExtraError, described
from deqcore.pages.template import render
from deqcore.testing.problem import UserFile

if TYPE_CHECKING:
    from deqcore.diagnostics import Claims, LayerReport, LayerUnderTest

COLUMNS = ("check", "status", "expected", "found", "what to do")
ARGUMENT = "LAYER"  # in messages


def layer(
    where: Annotated[
        str,
        typer.Argument(
            metavar=ARGUMENT,
            help="path/to/file.py:name: a deqcore.diagnostics.LayerUnderTest, a module, a tuple (module, *inputs), or "
            "a class or function without arguments that gives one of these. With --inputs also a function of them.",
        ),
    ],
    cell: Annotated[
        str | None,
        typer.Option(
            help="Name below the layer of f in z = f(z, *inputs), such as deq.cell; or of a function in the same file: "
            "f(layer, z, *inputs), or f(z, *inputs) if the layer is a function."
        ),
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="Where z is in what the layer returns, such as 0 or z. Default: the whole.")
    ] = None,
    inner: Annotated[
        str | None,
        typer.Option(help="Name of the part that solves, in a whole model. Other names are then below this part."),
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="Name in the same file of the inputs: an array, a tuple, or a function of none.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Argument of the layer that takes an initial state.")] = None,
    causal: Annotated[int | None, typer.Option(help="Axis of positions, if the layer must be causal.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Promised ‖f(z) − z‖ / ‖f(z)‖. Default: 1e-3.")] = None,
    gradient: Annotated[str | None, typer.Option(help="Promised gradient: exact, approximate or none.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="A further dtype in which the layer must work; may be repeated.")
    ] = None,
    batch: Annotated[
        bool | None, typer.Option("--batch/--no-batch", help="Whether the state's first axis is the batch.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page of HTML to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a trained layer: equilibrium, gradient, independence of batch mates, start and dtype, causality.

    The layer is used as it stands; nothing of deqcore needs to be in it. Exits with status 1 if a property fails.
    """
    Config.discover()
    _check_path(report)
    begin = time.perf_counter()
    with _quiet(as_json):
        subject = _subject(where, cell, inputs)
        given = {"state": state, "inner": inner, "start": start, "batch": batch}
        promised = {
            "causal": causal,
            "rtol": rtol,
            "gradient": gradient,
            "dtypes": tuple(dtype) if dtype else None,
        }
        subject = replace(subject, claims=_replaced(subject.claims, promised), **_known(given))
    from deqcore.diagnostics import check_layer

    result = check_layer(subject, say=progress_printer(as_json))
    if report is not None:
        report.write_text(_page(result, where), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result.as_dict() | {"seconds": round(time.perf_counter() - begin, 2)}, indent=2))
    else:
        rows = [finding.as_dict() | {"what to do": finding.remedy} for finding in result.findings]
        show(rows, COLUMNS, as_json=False)
        Console().print(Text(result.summary(), style="bold" if result.ok else "bold red"), soft_wrap=True)
    if not result.ok:
        raise typer.Exit(1)


def _check_path(report: Path | None) -> None:
    """Raise a ConfigError unless `report` can be written."""
    if report is not None and (not report.parent.is_dir() or report.is_dir()):
        raise ConfigError(f"--report must be a file in an existing folder (got {str(report)!r}).")


def _page(result: LayerReport, where: str) -> str:
    """Return the report as one page of HTML that needs no network.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    if not plugins.is_installed("jinja2"):
        raise MissingExtraError.of("deqcore check layer --report", "jinja2", "monitor")
    about = f"{where}, on {datetime.now(UTC):%Y-%m-%d}, with deqcore {__version__}."
    title = f"Report card of the layer {result.name}"
    return render("deqcore.cli", "layer.html.j2", title=title, report=result, about=about)


def _quiet(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep what the user's file prints while it is executed out of the JSON."""
    return contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext()


def _subject(where: str, cell: str | None, inputs: str | None) -> LayerUnderTest:
    """Return the record that the file gives, or one made of its module and the options.

    Raises:
        ConfigError: the inputs or the cell are not known.
    """
    from deqcore.diagnostics import LayerUnderTest
    from deqcore.diagnostics.check.naming import is_function

    file, name = UserFile.named(where, ARGUMENT)
    given = None if inputs is None else _inputs(file, inputs)
    loaded = _loaded(file, name, given is not None)
    if isinstance(loaded, LayerUnderTest):
        chosen_cell = None if cell is None else _cell(file, loaded.layer, cell)
        return replace(loaded, **_known({"cell": chosen_cell, "inputs": given}))
    module, own = (loaded[0], loaded[1:]) if isinstance(loaded, tuple) and loaded else (loaded, ())
    given = own if given is None else given
    if not callable(module):
        raise ConfigError.bad_value("deqcore check layer", ARGUMENT, described(loaded), "a LayerUnderTest or a module")
    if not given:
        raise ConfigError(
            f"{where} gives a {type(module).__name__} without inputs. Name them with --inputs NAME, which is in the "
            f"same file, or let {name} be a function that returns (module, *inputs)."
        )
    if cell is None and not hasattr(module if not is_function(module) else file.module, "cell"):
        raise ConfigError(
            f"The cell of {type(module).__name__} must be named, because it has no part `cell`. Give --cell NAME, or "
            f"let {name} return a deqcore.diagnostics.LayerUnderTest."
        )
    return LayerUnderTest(module, _cell(file, module, cell or "cell"), given)


def _loaded(file: UserFile, name: str, with_inputs: bool) -> Any:
    """Return what the name stands for: a layer, a record, or what its class or function without arguments makes."""
    loaded = file.get(name, ARGUMENT)
    if inspect.isclass(loaded):
        return _made(loaded, f"{file.path}:{name}")
    is_layer = with_inputs and inspect.isfunction(loaded) and _needs_arguments(loaded)
    return loaded if is_layer else file.made(name, ARGUMENT)


def _needs_arguments(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
    return any(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in needed)


def _cell(file: UserFile, layer: Any, name: str) -> Any:
    """Return the name of a part of the layer, or the function that has this name in the layer's file."""
    from deqcore.diagnostics.check.naming import is_function

    part = name.partition(".")[0]
    if not is_function(layer) and hasattr(layer, part):
        return name
    function = getattr(file.module, name, None)
    return function if inspect.isfunction(function) or is_function(function) else name


def _made(kind: Any, where: str) -> Any:
    try:
        return kind()
    except Exception as error:
        raise ConfigError(
            f"{where} must be a class that is made without arguments ({type(error).__name__}: {error}). Write a "
            f"function that makes the module and returns it."
        ) from error


def _inputs(file: UserFile, name: str) -> tuple[Any, ...]:
    inputs = file.made(name, "--inputs")
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _replaced(claims: Claims, promised: dict[str, Any]) -> Claims:
    return replace(claims, **_known(promised))


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
