"""`deqcore study`: train the same model under several strategies, measure, compare, report."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from deqcore.cli.output import table_console
from deqcore.config import Config
from deqcore.errors import ConfigError, MissingExtraError

NEEDED: Final = ("sklearn", "matplotlib", "jinja2", "safetensors", "filelock")


def command(
    file: Annotated[
        Path | None, typer.Argument(help="A TOML file with a table [study]. Default: digits, five settings.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results. Default: study-NAME.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="torch, jax, or any with a trainer; may be repeated. Default: from the file."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the models: auto, cpu, cuda, … Default: from the file.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language of the report: en or ja.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Your data, module:function; the function returns a Dataset.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Your model, module:Class, a subclass of deqcore.study.models.Model.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan with an estimate of the time.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat trainings that failed.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Number of trainings at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Train nothing: compare the folders of two finished studies, the earlier one first."),
    ] = None,
) -> None:
    """Train, measure, compare, report.

    Without a file: scikit-learn's handwritten digits, a dense equilibrium classifier, the same seed and budget under
    exact-ift at three tolerances, broyden-reuse and jacobian-free. Start it again to continue what was stopped.
    """
    for package in NEEDED:
        if find_spec(package) is None:
            raise MissingExtraError.of("`deqcore study`", package, "study")
    from deqcore.study.main import StudyRequest, study
    from deqcore.study.main import compare as compare_studies

    if compare is not None:
        compare_studies(*compare, out, _language(language), table_console())
        return
    if executor not in ("local", "ray"):
        raise ConfigError.bad_value("The command line", "--executor", executor, "'local' or 'ray'")
    table, origin = _table(file)
    asked = StudyRequest(
        table=table,
        origin=origin,
        changes={"backends": backend, "device": device, "language": language},
        out=out,
        data=data,
        model=model,
        jobs=jobs,
        dry_run=dry_run,
        retry=retry,
        command=shlex.join(_words(file, out, backend, device, language, data, model)),
        executor="ray" if executor == "ray" else "local",
    )
    study(asked, table_console())


def _language(given: str | None) -> str:
    if given not in (None, "en", "ja"):
        raise ConfigError.bad_value("The command line", "--language", given, "'en' or 'ja'")
    return given or "en"


def _table(file: Path | None) -> tuple[dict[str, Any], str]:
    """Return the table `[study]`, and where it was written."""
    config = Config.discover(file)
    table = config.section("study")
    if file is not None and not table:
        raise ConfigError(f"{str(file)!r} has no table [study]: write at least the line [study].")
    if config.backend != "auto":
        table.setdefault("backends", [config.backend])
    return table, str(file) if file is not None else "deq.toml" if table else "default"


def _words(file: Path | None, out: Path | None, backend: list[str] | None, *rest: str | None) -> list[str]:
    words = ["deqcore", "study", *([str(file)] if file else [])]
    words += ["--out", str(out)] if out else []
    for item in backend or []:
        words += ["--backend", item]
    for name, value in zip(("--device", "--language", "--data", "--model"), rest, strict=True):
        words += [name, value] if value else []
    return words
