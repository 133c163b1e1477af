"""The evidence of docs/evidence: `python -m benchmarks.evidence --data FOLDER` (start it again to continue).

Each study is one command, `deqcore study docs/evidence/NAME.toml`, and they run one after the other. This
module runs them, leaves out what is large (the course of every step), and writes tables and verdicts beside the
settings. FOLDER holds `cifar10-jpeg.tar.gz` (or `cifar10/`, unpacked) and `wikitext-2/`; digits and slow need neither.
Studies of a GPU are run only when they are named: `python -m benchmarks.evidence cifar-torch --data FOLDER --jobs 10`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deqcore.bench.machine import describe
from deqcore.errors import DeqcoreError, did_you_mean, listing
from deqcore.study.grid import UserCode
from deqcore.study.main import plan
from deqcore.study.report import table
from deqcore.study.report.retraining import accumulations
from deqcore.study.report.summary import Interval, SummaryRow, rows
from deqcore.study.report.table import significant
from deqcore.study.settings import read
from deqcore.study.store import Store

HOME: Final = Path(__file__).resolve().parents[1] / "docs" / "evidence"
STUDIES: Final = (
    "slow-torch", "text-torch", "images-torch", "digits-torch", "rounds-torch", "digits-jax",
    "adaptive_digits-torch", "adaptive_digits-jax", "adaptive_images-torch",
    "adaptive_text-torch", "adaptive_slow-torch",
)  # fmt: skip
ON_GPU: Final = ("cifar-torch",)
NEEDS: Final = {
    "images": "cifar10", "adaptive_images": "cifar10", "cifar": "cifar10",
    "text": "wikitext-2", "adaptive_text": "wikitext-2",
}  # fmt: skip
ARCHIVE: Final = "cifar10-jpeg.tar.gz"
TARGETS: Final = {
    "digits": -1.0,
    "images": -0.5,
    "cifar": -0.5,
}  # points, lower end of the interval, certified against exact
LIMIT: Final = 1.15  # whole training of certified reuse in units of Jacobian-free
ADAPTIVE_LIMITS: Final = {"adaptive_slow": 1.6}  # that of the adaptive strategy; elsewhere
ADAPTIVE_LIMIT: Final = 1.25
NEAR: Final = 1.0  # points: an interval within them shows that a strategy ends where exact gradients do


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is unfinished, write the tables. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all of {listing(STUDIES)}")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; they are timed one by one afterwards")
    parser.add_argument("--data", type=Path, help="folder with the archive of images and the texts")
    parser.add_argument("--work", type=Path, default=Path("study-evidence"), help="where the studies keep their cells")
    parser.add_argument("--render", action="store_true", help="run nothing: tables from the cells that are finished")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing: tables from the results kept beside this page"
    )
    parser.add_argument("--untimed", action="store_true", help="keep no times: the machine was busy with other work")
    given = parser.parse_args(arguments)
    if given.tables:
        for path in sorted(HOME.glob("*.json")):
            _write(path.stem, json.loads(path.read_text())["cells"], csv=path.with_suffix(".csv").exists())
        (HOME / "tables.md").write_text(page())
        return 0
    try:
        chosen = _chosen(given.studies)
        work = given.work.resolve()
        if not given.render:
            prepare(chosen, given.data, work / "data")
            for name in chosen:
                _run(name, work, given.jobs)
        for name in chosen:
            if (work / name / "study.json").exists():
                _keep(name, work / name, timed=not given.untimed)
        (HOME / "tables.md").write_text(page())
    except DeqcoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _chosen(given: Sequence[str]) -> Sequence[str]:
    for name in given:
        if name not in (available := STUDIES + ON_GPU):
            raise DeqcoreError(f"No study {name!r}.{did_you_mean(name, available)} There are: {listing(available)}.")
    return given or STUDIES


def prepare(studies: Iterable[str], source: Path | None, place: Path) -> None:
    """Make a folder of data to run the studies in: paths in their settings are relative to it.

    Raises:
        DeqcoreError: a study needs data that `source` does not have.
    """
    place.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(NEEDS[study.partition("-")[0]] for study in studies if study.partition("-")[0] in NEEDS):
        if (place / name).exists():
            continue
        if source is not None and (source / name).is_dir():
            (place / name).symlink_to((source / name).resolve())
        elif source is not None and name == NEEDS["images"] and (source / ARCHIVE).is_file():
            with tarfile.open(source / ARCHIVE) as archive:
                archive.extractall(place / f".{name}", filter="data")
            (place / f".{name}").rename(place / name)
        else:
            raise DeqcoreError(f"--data must be a folder with {name!r}, or for images with {ARCHIVE!r} (got {source}).")


def command(name: str) -> list[str]:
    """Return the command that runs one study, in the folder of data."""
    study, _, backend = name.partition("-")
    return ["deqcore", "study", str(HOME / f"{study}.toml"), "--backend", backend]


def _run(name: str, work: Path, jobs: int) -> None:
    words = [
        sys.executable,
        "-m",
        "deqcore.cli.app",
        *command(name)[1:],
        "--out",
        str(work / name),
        "--jobs",
        str(jobs),
    ]
    done = subprocess.run(words, cwd=work / "data", check=False)
    if done.returncode:
        raise DeqcoreError(f"The study {name!r} ended with code {done.returncode}. See its message above.")


def _keep(name: str, folder: Path, *, timed: bool) -> None:
    """Write the results as JSON, CSV and Markdown, without the history of every step."""
    results = _finished(name, folder)
    if not timed:
        results = [_untimed(result) | {"seconds": None} for result in results]
    if not results:
        return
    about = json.loads((folder / "study.json").read_text())
    slim = [{key: value for key, value in result.items() if key != "history"} | _audits(result) for result in results]
    content = {"machine": about.get("machine", describe(["torch"])), "cells": slim}
    (HOME / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    _write(name, slim)


def _write(name: str, cells: Sequence[dict[str, Any]], *, csv: bool = True) -> None:
    """Write the tables of results: all cells as CSV, and rows as Markdown."""
    output = rows(cells)
    if csv:
        (HOME / f"{name}.csv").write_text(table.comma_separated(output))
    (HOME / f"{name}.md").write_text(table.markdown(output))


def _audits(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"history": {"audits": result["history"]["audits"]}} if "history" in result else {}


def _finished(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return the results of the grid's finished cells, in its order; skip the results of other settings."""
    asked = settings(name) | {"backends": [name.partition("-")[2]]}
    place = Store(folder)
    value = [place.result(cell) for cell in plan(read(asked, f"{name}.toml"), UserCode())]
    return _alone([result for result in value if result is not None])


def _alone(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the times of parallel trainings, once the pass that times them one by one has begun."""
    if not any(result.get("serial") for result in results):
        return results
    kept = [result.get("serial") or result["status"] != "ok" for result in results]
    return [result if keep else _untimed(result) for keep, result in zip(kept, results, strict=True)]


def _untimed(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "warm_up": None, "times": dict.fromkeys(result["times"])}


def settings(name: str) -> dict[str, Any]:
    """Return the table `[study]` of a study."""
    results: dict[str, Any] = tomllib.loads((HOME / f"{name.partition('-')[0]}.toml").read_text())["study"]
    return results


def page() -> str:
    """Return the tables and verdicts of every study that has results, as Markdown."""
    parts = [
        "<!-- Made by python -m benchmarks.evidence; do not edit. -->\n# Evidence: tables and verdicts\n",
        "What they mean: [index.md](index.md). Differences and quotients are paired by seed; [95 % interval].\n",
    ]
    return "\n".join(parts + [_section(name) for name in STUDIES + ON_GPU if (HOME / f"{name}.json").exists()])


def _section(name: str) -> str:
    kept = json.loads((HOME / f"{name}.json").read_text())
    result = rows(kept["cells"])
    machine, asked = kept["machine"], len(settings(name)["seeds"])
    seeds = [len(row.results) for row in result]
    devices = sorted({item["device"] for item in kept["cells"] if item.get("device", "cpu") != "cpu"})
    text = ", ".join([*devices, machine["cpu"], f"{machine['usable_cores']} cores"])
    text += f", load {machine['load_before']}, {machine['date']}"
    study, _, backend = name.partition("-")
    lines = [f"## {name}\n", f"`deqcore study {study}.toml --backend {backend}`; {text};"]
    timed = [sum(result["times"].get("training") is not None for result in row.results.values()) for row in result]
    alone = "" if timed == seeds else f", timed alone: {min(timed)} to {max(timed)}"
    lines += [f"seeds finished: {min(seeds)} to {max(seeds)} of {asked}{alone}.\n"]
    return "\n".join([*lines, table.markdown(result), *verdicts(name, result), ""])


def verdicts(name: str, found: Sequence[SummaryRow]) -> list[str]:
    """Return what the rows say about the questions that the evidence is for."""
    by = {row.strategy: row for row in found if not row.explicit}
    exact, free, certified, plain = (
        by.get(item) for item in ("exact-ift", "jacobian-free", "broyden-reuse", "plain reuse")
    )
    if exact is not None and free is not None and "adaptive" in by:
        return _adaptive(name, by, exact, free)
    if exact is None or free is None or certified is None or plain is None:
        return []
    gap = exact.against(free, "test_accuracy")
    lines = [f"- Exact gradients against Jacobian-free: {_points(gap)} points{_separated(gap)}."]
    lines.append(
        f"- Plain reuse against exact: {_points(plain.against(exact, 'test_accuracy'))} points{_cosine(plain)}."
    )
    own = certified.against(exact, "test_accuracy")
    lines.append(f"- Certified reuse against exact: {_points(own)} points{_cosine(certified)}{_target(name, own)}.")
    vjps = [item.metric("vjps") for item in (certified, exact)]
    if vjps[0] is not None and vjps[1] is not None:
        lines.append(f"- vjps of the slowest sample: certified {vjps[0].mean:.1f}, exact {vjps[1].mean:.1f}.")
    return [*lines, *_times(certified, exact, free), *_rounds(found)]


def _adaptive(name: str, by: Mapping[str, SummaryRow], exact: SummaryRow, free: SummaryRow) -> list[str]:
    limit = ADAPTIVE_LIMITS.get(name.partition("-")[0], ADAPTIVE_LIMIT)
    gap = exact.against(free, "test_accuracy")
    lines = [f"- Exact gradients against Jacobian-free: {_points(gap)} points{_separated(gap)}."]
    for label, row in by.items():
        if row in (exact, free):
            continue
        own = row.against(exact, "test_accuracy")
        lines.append(f"- {label} against exact: {_points(own)} points{_within(own)}.")
    ratio = by["adaptive"].ratio(free, "training")
    text = _quick(ratio, "Jacobian-free", f"at most {limit}", limit)
    return [*lines, f"- Whole training of adaptive: {text}."]


def _within(value: Interval | None) -> str:
    if value is None or value.low is None or value.high is None:
        return ""
    return f" (within ±{NEAR:g}: {_met(max(-value.low, value.high) <= NEAR / 100)})"


def _times(certified: SummaryRow, exact: SummaryRow, free: SummaryRow) -> list[str]:
    to_free, to_exact = (certified.ratio(other, "training") for other in (free, exact))
    if to_free is None and to_exact is None:
        return []
    first = _quick(to_free, "Jacobian-free", f"at most {LIMIT}", LIMIT)
    return [f"- Whole training of certified reuse: {first}, {_quick(to_exact, 'exact', 'below 1', 1.0)}."]


def _quick(value: Interval | None, name: str, wanted: str, limit: float) -> str:
    if value is None:
        return f"against {name} not timed ({wanted})"
    text = "one seed cannot decide" if value.count < 2 else _met(value.mean < limit)
    return f"{_ratio(value)} of {name} ({wanted}: {text})"


def _rounds(found: Sequence[SummaryRow]) -> list[str]:
    """Describe the gap to exact gradients over rounds of retraining."""
    return [
        f"- {gap.row.label}, gap to exact gradients in round 1: {_points(gap.gap[0])}, in round {len(gap.gap)}: "
        f"{_points(gap.gap[-1])}; growth {_points(gap.growth)} points: {_growing(gap.builds_up)}."
        for gap in accumulations(found)
        if gap.gap
    ]


def _growing(found: bool | None) -> str:
    return "one seed cannot decide" if found is None else "it builds up" if found else "no build-up is shown"


def _points(value: Interval | None) -> str:
    if value is None:
        return "–"
    ends = "" if value.low is None or value.high is None else f" [{100 * value.low:+.2f}, {100 * value.high:+.2f}]"
    return f"{100 * value.mean:+.2f}{ends}"


def _ratio(value: Interval) -> str:
    ends = "" if value.low is None or value.high is None else f" [{significant(value.low)}, {significant(value.high)}]"
    return f"{significant(value.mean)}{ends}"


def _separated(gap: Interval | None) -> str:
    """Return whether a mean is two standard errors above zero."""
    if gap is None or gap.high is None:
        return ""
    from scipy.stats import t

    error = (gap.high - gap.mean) / float(t.ppf(0.975, gap.count - 1))
    text = "counts" if gap.mean > 2 * error else "does not count"
    return f", {gap.mean / error:.1f} standard errors: the task {text} as evidence on strategies" if error else ""


def _cosine(row: SummaryRow) -> str:
    value = row.metric("cosine")
    return "" if value is None else f", cosine of its gradient {value.mean:.3f}"


def _target(name: str, value: Interval | None) -> str:
    target = TARGETS.get(name.partition("-")[0])
    if target is None or value is None:
        return ""
    text = "one seed cannot decide" if value.low is None else _met(100 * value.low >= target)
    return f"; lower end at least {target}: {text}"


def _met(whether: bool) -> str:
    return "met" if whether else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
