"""A study from request to report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from deqcore import plugins
from deqcore.bench.machine import describe
from deqcore.errors import BackendError
from deqcore.study.executors import device, ray
from deqcore.study.executors.local import run
from deqcore.study.executors.schedule import schedule, timed
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.progress import ProgressView
from deqcore.study.report import answers, comparison, gates, page, table
from deqcore.study.settings import Study, read
from deqcore.study.store import PACKAGES, Store, StudyError
from deqcore.study.translations import say


@dataclass(frozen=True)
class StudyRequest:
    """What the command line asks for.

    Attributes:
        table: `[study]` as it was written. `origin`: where.
        changes: settings that the command line puts on top, None where it is silent.
        out: directory for results, or None for one named after the study.
        data, model: import strings of the user's own code.
        jobs: trainings at a time. With more than one, steps are timed in a serial pass of their own afterwards.
        executor: "local", or "ray" for the machines of a Ray cluster; steps are timed here afterwards, too.
        dry_run: only show the plan. `retry`: train again what failed.
        command: that reproduces the study.
    """

    table: Mapping[str, Any]
    origin: str
    changes: Mapping[str, Any]
    out: Path | None
    data: str | None
    model: str | None
    jobs: int
    dry_run: bool
    retry: bool
    command: str
    executor: Literal["local", "ray"] = "local"

    def settings(self) -> Study:
        """Return everything put together and checked."""
        asked = dict(self.table) | {name: value for name, value in self.changes.items() if value}
        if self.data is not None:
            asked.setdefault("data", ["own"])
        if self.model is not None:
            asked.setdefault("models", ["own"])
        return read(asked, self.origin)


def study(request: StudyRequest, console: Console) -> None:
    """Train what is unfinished, print the table, write the report.

    Args:
        request: what was asked for.
        console: where to write.
    """
    settings = request.settings()
    grid = plan(settings, UserCode(request.data, request.model))
    if request.executor == "local":
        device.check(settings.device, dict.fromkeys(cell.backend for cell in grid))
    slug = re.sub(r"[^\w.-]+", "-", settings.name) or "results"
    place = Store(request.out if request.out is not None else Path(f"study-{slug}"))
    with place.lock():
        if request.dry_run:
            shown, failed = schedule(place, grid, request.jobs)
            console.print(shown)
            if failed:
                raise StudyError("\n".join(failed))
            return
        done = place.resume(grid, retry=request.retry)
        about = _about(place, request.command, new=done < len(grid))
        place.open({"settings": settings.model_dump(), **about})
        if done:
            console.print(f"{done} of {len(grid)} cells were finished before.", style="dim")
        with ProgressView(console, grid, done) as live:
            spread = request.executor == "ray"
            results = ray.run(place, grid, live) if spread else run(place, grid, live, request.jobs)
        if request.jobs > 1 or spread:
            results = timed(place, grid, results, console)
        result = page.write(place.root, settings, results, about)
    language = settings.language
    console.print(table.terminal(result, console.width, language))
    console.print(answers.terminal(result, settings, console.width))
    if settings.gates:
        console.print(gates.judge(result, settings.gates, language).sentence(language))
    console.print(say(language, "report", path=place.root / "report.html"), soft_wrap=True)


def compare(old: Path, new: Path, out: Path | None, language: str, console: Console) -> None:
    """Print two studies side by side and write a page of it.

    Args:
        old: the folder of the earlier study.
        new: the folder of the later one.
        out: where `compare.html` goes; default: the folder `new`.
        language: of the texts.
        console: where to write.

    Raises:
        StudyError: a folder has no results.
    """
    result = comparison.compare(comparison.StoredStudy.read(old), comparison.StoredStudy.read(new), language)
    path = (out if out is not None else new) / "compare.html"
    comparison.write(path, result, language)
    for warning in result["warnings"]:
        console.print(warning, style="yellow")
    console.print(comparison.terminal(result, console.width))
    console.print(say(language, "report", path=path), soft_wrap=True)


def _about(place: Store, command: str, *, new: bool) -> dict[str, Any]:
    """Return the machine and the command of the study: those of its measurements, not those of a new report.

    Each result names the machine that measured it; the study's machine stands for results that do not.
    """
    stored = place.about()
    kept = {name: stored[name] for name in ("machine", "command") if name in stored}
    return {"machine": describe(PACKAGES), "command": command} | kept | ({"command": command} if new else {})


def plan(settings: Study, own: UserCode) -> list[Cell]:
    """Return the grid; every mistake in names and options is found here, before anything is trained."""
    gates.check(settings.gates, [strategy.label for strategy in settings.strategies])
    return cells(settings, own, tuple(dict.fromkeys(map(backend, settings.backends))))


def backend(name: str) -> str:
    """Return the backend that a name stands for: "auto" is the first installed that has a trainer.

    Raises:
        BackendError: there is none.
    """
    if name != "auto":
        return name
    for spec in plugins.trainers().values():
        package = plugins.backends()[spec.backend].package
        if package is None or plugins.is_installed(package):
            return spec.backend
    raise BackendError('No framework to train with is installed: pip install "deqcore[torch]" or "deqcore[jax]".')
