"""Judge the solvers of `examples/adapters` and write one table: `python -m benchmarks.field --out docs/field`.

Each solver runs by `deqcore check solver NAME --report` in a process of its own; one that hangs or dies still gets its
rows. Results are saved after each solver, and `--resume` keeps those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final, NamedTuple

from deqcore.testing.runner.render import sentence
from deqcore.testing.suite.external.cases import MEMORY

ROOT: Final = Path(__file__).resolve().parents[1]
ADAPTERS: Final = ROOT / "examples" / "adapters"
LIMIT: Final = 300
CARD: Final = 120
"""Seconds that a whole card should take at most, on a quiet machine."""
MEASURES: Final = "it_solves_what_plain_iteration_solves"
ABSENT: Final = {
    "banax": "it needs Python 3.12 or later",
    "deepinv": "torchvision 0.28.0, which it needs, cannot be imported with torch 2.13.0+cpu (torchvision::nms)",
}
HEADER: Final = """# The field: solvers of other libraries, judged

Written by `make field` ({command}) on {date}, Python {python}, with {versions}.

Each cell counts the checks that fail, with the library's defaults and, where a second figure stands, with its best
settings. **✓**: all hold. *not claimed*: the library does not promise it, so it is not checked. –: does not apply.
*memory*: what one solve holds at once, in states (rtol 1e-6, max_steps 300): by how many bytes it grows for each byte
more in the state, from 256 to 512 numbers. It comes from tracemalloc (NumPy), the live tensors (torch), or the
temporaries and results of the compiled program (JAX), and never from the memory of the process.
[Failures](failures.md) has a script for each failure, and a text for its authors. The adapters are in
`examples/adapters`; [Check a solver of another library](adapters.md) says how to write one. The seconds are those of
the whole card, in brackets those of the processor. {time} The first table sums up the tables of each property below.

"""
GROUPS: Final[Mapping[str, Sequence[str]]] = {
    "solves": ("it_solves_what_plain_iteration_solves", "a_start_at_the_solution_stays", "a_constant_f_is_solved"),
    "reports success": ("success_is_not_claimed_without_a_solution", "success_means_a_small_residual"),
    "samples apart": ("a_sample_does_not_depend_on_its_batch_mates", "nan_in_one_sample_stays_there"),
    "dtype, units": ("the_dtype_is_kept", "units_do_not_matter"),
    "gradients": (
        "the_gradient_is_exact", "nan_in_one_sample_spoils_no_gradient", "a_second_derivative_is_right_or_refused",
    ),
    "counts, budget": ("evaluations_are_those_that_took_place", "a_budget_is_kept"),
    "no side effects": (
        "two_solves_agree_to_the_bit", "its_arguments_are_left_alone", "it_prints_and_plots_nothing",
        "settings_of_the_process_are_left_alone",
    ),
}  # fmt: skip
"""Column of the first table -> checks, without `test_`."""


def names() -> list[str]:
    """Return the registered names of all adapters whose library is installed."""
    sys.path.insert(0, str(ADAPTERS))
    from deqfile import ADAPTERS as registered  # type: ignore[import-not-found]

    return [name for library, solvers in registered.items() if find_spec(library) for name in solvers]


def judge(name: str, cards: Path) -> dict[str, Any]:
    """Return the outcomes of one solver: per property and settings, how many checks ran and failed, and why."""
    start, load = time.perf_counter(), round(os.getloadavg()[0], 1)
    done = _checked(name, "--report", str(cards / f"{name}.html"))
    seconds = round(time.perf_counter() - start)
    if done.code not in (0, 1):
        return {
            "seconds": seconds,
            "load": load,
            "error": (done.errors.strip().splitlines() or ["no message"])[-1],
            "checks": [],
        }
    tests = json.loads(done.output)["tests"]
    return {
        "seconds": seconds,
        "load": load,
        "cpu": round(done.cpu),
        "error": "",
        "memory": noted(tests),
        "checks": list(_checks(tests)),
    }


class Done(NamedTuple):
    """How a command ended: exit code, output, errors, and the seconds of processor time of all its processes."""

    code: int
    output: str
    errors: str
    cpu: float


def _checked(name: str, *more: str) -> Done:
    """Run `deqcore check solver` in the folder of the adapters."""
    command = [sys.executable, "-m", "deqcore", "check", "solver", name, "--json", f"--limit={LIMIT}", *more]
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ADAPTERS, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=errors
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = [(file.seek(0), file.read())[1] for file in (output, errors)]
    return Done(process.returncode, *texts, used.ru_utime + used.ru_stime)


def memory(name: str) -> dict[str, float]:
    """Return the peak memory of a solve in states, by settings, without the rest of the card."""
    done = _checked(name, "-k", f"{MEASURES} and curved")
    return noted(json.loads(done.output)["tests"]) if done.code in (0, 1) else {}


def noted(tests: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the memory that the test of the curved problem has noted, by column."""
    found = [(_column(test), test["notes"].get(MEMORY)) for test in tests]
    return {column: value for column, value in found if isinstance(value, float)}


def _column(test: Mapping[str, Any]) -> str:
    return "best" if test["backend"].endswith("best settings") else "default"


def _checks(tests: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for test in tests:
        grouped.setdefault((test["test"].partition("[")[0], _column(test)), []).append(test)
    for (check, column), same in grouped.items():
        ran = [test for test in same if test["outcome"] != "skipped"]
        bad = [test for test in ran if test["outcome"] == "failed"]
        skipped = "" if ran else str(same[0]["message"]).partition(":")[0]
        failures = [
            {"test": test["test"], "message": test["message"], "code": test["notes"].get("code", "")} for test in bad
        ]
        yield {"check": check, "column": column, "ran": len(ran), "skipped": skipped, "failures": failures}


def cell(result: Mapping[str, Any], check: str) -> str:
    """Return a cell of the table: the default settings, then the best ones if they differ."""
    if result["error"]:
        return "did not run"
    texts = [
        _one(each)
        for column in ("default", "best")
        for each in result["checks"]
        if (each["check"], each["column"]) == (check, column)
    ]
    return " / ".join(dict.fromkeys(texts)) or "–"


def _one(check: Mapping[str, Any]) -> str:
    if check["failures"]:
        return f"✗ {len(check['failures'])} of {check['ran']}"
    if check["ran"]:
        return "✓"
    return "*not claimed*" if check["skipped"] == "not claimed" else "–"


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the Markdown table of all solvers: a row each, a column for each group of properties."""
    heads = ["solver", *GROUPS, "memory", "seconds"]
    rows = [
        [f"`{name}`", *(grouped(result, checks) for checks in GROUPS.values()), states(result), _time(result)]
        for name, result in results.items()
    ]
    return _markdown(heads, rows)


def _time(result: Mapping[str, Any]) -> str:
    return f"{result['seconds']} ({result['cpu']})" if "cpu" in result else str(result["seconds"])


def timing(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how long the cards took, and beside how much other work."""
    seconds = {name: result["seconds"] for name, result in results.items()}
    slowest = max(seconds, key=lambda name: seconds[name])
    within = sum(each <= CARD for each in seconds.values())
    loads = [result["load"] for result in results.values() if "load" in result]
    text = f"{within} of {len(seconds)} took at most {CARD} s, and the slowest, `{slowest}`, took {seconds[slowest]} s."
    if loads:
        text += f" The load average when a card began was {min(loads)} to {max(loads)}."
    if others := len(seconds) - len(loads):
        text += f" {others} were made beside other work, without a record of the load."
    return text


def states(result: Mapping[str, Any]) -> str:
    """Return the memory by default and, if that differs, with the best settings."""
    return " / ".join(dict.fromkeys(map(_short, result.get("memory", {}).values()))) or "not measured"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def grouped(result: Mapping[str, Any], checks: Iterable[str]) -> str:
    """Return how many checks of a group fail, by default and, if that differs, with the best settings."""
    if result["error"]:
        return "did not run"
    texts = []
    for column in ("default", "best"):
        mine = [
            each for each in result["checks"]
            if each["check"].removeprefix("test_") in checks and each["column"] == column
        ]  # fmt: skip
        if ran := sum(each["ran"] for each in mine):
            texts.append(_one({"ran": ran, "failures": [bad for each in mine for bad in each["failures"]]}))
        elif mine:
            texts.append("*not claimed*" if any(each["skipped"] == "not claimed" for each in mine) else "–")
    return " / ".join(dict.fromkeys(texts)) or "–"


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table for each library: a row for each property, a column for each solver."""
    checks = list(dict.fromkeys(each["check"] for result in results.values() for each in result["checks"]))
    checks.remove("test_claims_have_known_names")
    parts = []
    for library in dict.fromkeys(name.partition("-")[0] for name in results):
        mine = {name: result for name, result in results.items() if name.partition("-")[0] == library}
        rows = [[sentence(check), *(cell(result, check) for result in mine.values())] for check in checks]
        parts.append(f"### {library}\n\n" + _markdown(["property", *mine], rows))
    return "\n".join(parts)


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def failures(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a list of all failures."""
    lines = ["\n## What fails\n"]
    for name, result in results.items():
        if result["error"]:
            lines.append(f"- `{name}` did not run: {result['error']}")
        messages: dict[tuple[str, str], list[str]] = {}
        for check in result["checks"]:
            for failure in check["failures"]:
                case = failure["test"].partition("[")[2].removesuffix("]").split(name)[-1].strip("-")
                key = check["check"], case
                messages.setdefault(key, []).append(
                    f"{failure['message'].removeprefix('AssertionError: ')} ({check['column']})"
                )
        for (check, case), texts in messages.items():
            lines.append(f"- `{name}`, {_lower(sentence(check))}{f' [{case}]' if case else ''}: {texts[0]}")
    lines += [
        "\n## Not here\n",
        *(f"- {library}: {why}." for library, why in ABSENT.items()),
    ]
    return "\n".join(lines) + "\n"


def _lower(text: str) -> str:
    return text if text.startswith("NaN") else text[:1].lower() + text[1:]


def page(results: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]) -> str:
    """Return the whole page."""
    dense = f'<div class="dense" markdown>\n\n{overview(results)}\n</div>\n'
    return (
        HEADER.format(**about, time=timing(results))
        + dense
        + failures(results)
        + "\n## Each property\n\n"
        + tables(results)
    )


def versions(results: Mapping[str, Any]) -> str:
    """Return the versions of all libraries that were judged, and of the frameworks."""
    libraries = sorted({name.partition("-")[0] for name in results} | {"torch", "jax", "numpy"})
    return ", ".join(f"{name} {metadata.version(name)}" for name in libraries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "field")
    parser.add_argument("--cards", type=Path, default=ROOT / "build" / "field", help="folder of the HTML cards")
    parser.add_argument("--only", action="append", help="this solver only; may be repeated")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument("--memory", action="store_true", help="keep the results, and measure memory again")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.cards.mkdir(parents=True, exist_ok=True)
    file, listed = asked.out / "results.json", names()
    if unknown := sorted(set(asked.only or ()) - set(listed)):
        parser.error(f"--only: no adapter is named {', '.join(unknown)}. There are {', '.join(listed)}.")
    stored = json.loads(file.read_text())["results"] if file.exists() else {}
    results = stored if asked.resume or asked.only or asked.memory else {}
    todo = asked.only or [name for name in listed if asked.memory or name not in results]

    def run(name: str) -> None:
        results[name] = {**results[name], "memory": memory(name)} if asked.memory else judge(name, asked.cards)
        ordered = {each: results[each] for each in listed if each in results}
        about = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "versions": versions(ordered),
            "command": f"`python -m benchmarks.field`, {asked.jobs} at a time",
        }
        file.write_text(json.dumps({"about": about, "results": ordered}, indent=1, ensure_ascii=False) + "\n")
        (asked.out / "index.md").write_text(page(ordered, about))
        print(f"{name}: {results[name]['seconds']} s", flush=True)

    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(run, todo))


if __name__ == "__main__":
    main()
