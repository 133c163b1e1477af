"""`deqcore backends`: the frameworks and whether they are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from deqcore import plugins
from deqcore.cli.output import AsJson, print_error, show
from deqcore.config.project import load_plugins
from deqcore.errors import DeqcoreError, installing
from deqcore.plugins import BackendSpec

COLUMNS = ("name", "summary", "installed", "version", "device", "remedy")


def command(
    devices: Annotated[
        bool,
        typer.Option("--devices", help="Show the default device; this imports the frameworks."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the backends, with the installed versions of their frameworks."""
    load_plugins(print_error)
    rows = [_row(spec, devices) for spec in plugins.backends().values()]
    show(rows, COLUMNS, as_json=as_json)


def _row(spec: BackendSpec, devices: bool) -> dict[str, object]:
    package = spec.package or next(iter(spec.array_modules), "")
    installed = not spec.package or plugins.is_installed(spec.package)
    row: dict[str, object] = {
        "name": spec.name,
        "summary": spec.summary,
        "installed": installed,
        "version": _version(package) if installed else "",
        "remedy": "" if installed else installing(package, spec.extra),
    }
    return row | {"device": _device(spec.name)} if devices and installed else row


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _device(name: str) -> str:
    try:
        made = plugins.make_backend(name)
        return str(made.device_of(made.asarray([0.0])))
    except DeqcoreError as error:
        return str(error)
