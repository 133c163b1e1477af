"""`make faults`: the full matrix of planted faults, and random mutants, with the survivors listed.

python tests/faults/run.py [--mutants N] [--seed S] [--again FILE] [--matrix] [--json FILE]

A check that fails what is not faulty would call every mutant caught (two of them did for a while): each is first run
against the code as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deqcore
from deqcore.testing.runner import Request

HERE = Path(__file__).parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"faults_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


checking, planted, mutants = load("checking"), load("planted"), load("mutants")

PLAIN, MEASURED = (json.dumps(options) for options in (planted.PLAIN, planted.MEASURED))
FALLBACK = json.dumps({"target": 0.001, "refine_steps": 2, "fallback": "exact-ift"})
NONE = json.dumps({"target": 0.001, "refine_steps": 2, "fallback": "none"})
SPENT = json.dumps({"target": 0.001, "refine_steps": 2})


def solver(name: str, *options: str | None, backend: str = "numpy") -> list[tuple[Request, str]]:
    return [(Request("solver", name, options=each, first=True), backend) for each in options or (None,)]


def strategy(name: str, *options: str | None, backend: str = "numpy") -> list[tuple[Request, str]]:
    return [(Request("strategy", name, options=each, first=True), backend) for each in options or (None,)]


CHECKS = {
    "deqcore.solvers.picard": solver("picard", None, '{"damping": 0.5}'),
    "deqcore.solvers.anderson": solver("anderson", None, '{"memory": 3}', '{"mixing": 0.5}', '{"growth": 1.5}'),
    "deqcore.solvers.broyden": solver("broyden", None, '{"memory": 5}', '{"memory": 2}', '{"growth": 2.0}'),
    "deqcore.solvers.newton_krylov": [*solver("newton-krylov"), *solver("newton-krylov", backend="torch")],
    "deqcore.strategies.exact_ift": strategy(
        "exact-ift",
        None,
        '{"start": "reuse"}',
        '{"solver": "anderson", "max_steps": 300}',
        '{"start": "cotangent"}',
        '{"rtol": 0.01}',
    ),
    "deqcore.strategies.broyden_reuse": strategy("broyden-reuse", None, PLAIN, MEASURED, FALLBACK, SPENT, NONE),
    "deqcore.strategies.jacobian_free": strategy("jacobian-free"),
    "deqcore.strategies.neumann": strategy("neumann", None, '{"terms": 1}', '{"terms": 0}'),
    "deqcore.strategies.phantom": strategy("phantom", None, '{"damping": 1.0}', backend="torch"),
    "deqcore.strategies.unrolled": strategy("unrolled", None, '{"checkpoint": true}', backend="torch"),
    "deqcore.linear.gmres": [
        *strategy("exact-ift"),
        *solver("newton-krylov"),
        *strategy("exact-ift", '{"start": "cotangent"}'),
        *strategy("broyden-reuse"),
    ],
    "deqcore.linear.lowrank": [*solver("broyden", None, '{"memory": 5}'), *solver("anderson")],
    "deqcore.linear.certified": strategy("broyden-reuse", None, SPENT, FALLBACK, NONE),
    "deqcore.linear.transposed": [
        *strategy("exact-ift", '{"start": "reuse"}', backend="torch"),
        (Request("backend", "torch", first=True), "torch"),
    ],
}


def judge(mutant) -> str:
    """What caught it, or nothing."""
    return judged(mutant.module, mutant.source)


def judged(module: str, source: str) -> str:
    """The first check that fails when `module` has this text, or nothing."""
    for request, backend in CHECKS[module]:
        for each in checking.check(module, source, request, backend):
            if each.outcome == "failed":
                return f"{each.test}: {each.message[:120]}"
    return ""


def run_mutants(count: int, seed: int, again: Path | None, workers: int) -> dict[str, object]:
    everything = mutants.mutants(mutants.modules(Path(deqcore.__file__).parent))
    chosen = mutants.random.Random(seed).sample(everything, min(count, len(everything)))
    drawn = len(chosen)
    if again is not None:  # what was caught once is taken for caught: checks are only ever added
        left = json.loads(again.read_text())["survivors"]
        chosen = [mutant for mutant in chosen if str(mutant) in left]
    survivors, start = [], time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        modules = sorted({mutant.module for mutant in chosen})
        for module, failed in zip(modules, pool.map(judged, modules, map(checking.source_of, modules)), strict=True):
            if failed:
                raise SystemExit(f"A check fails {module} as it is, and so would any mutant of it: {failed}")
        for number, (mutant, caught) in enumerate(zip(chosen, pool.map(judge, chosen), strict=True), 1):
            print(f"{number:3d} {'caught  ' if caught else 'SURVIVED'} {mutant}   {caught}", flush=True)
            if not caught:
                survivors.append(str(mutant))
    share = 1 - len(survivors) / drawn
    seconds = time.perf_counter() - start
    print(f"\n{drawn} of {len(everything)} mutants, seed {seed}: {share:.0%} caught ({seconds:.0f} s). Left:")
    print("\n".join(survivors) or "none")
    return {"mutants": drawn, "seed": seed, "caught": share, "survivors": survivors}


def run_matrix() -> dict[str, object]:
    """Every fault against every check of its subject: how many of them notice, and whether one does."""
    missed: list[str] = []
    for fault in planted.FAULTS:
        text = fault.planted(checking.source_of(fault.where))
        request = Request(fault.request.kind, fault.request.name, options=fault.request.options)
        outcomes = checking.check(fault.where, text, request, fault.backend)
        failed = list(dict.fromkeys(each.check for each in outcomes if each.outcome == "failed"))
        print(f"{len(failed):3d} checks fail: {fault.name} ({', '.join(failed[:4])})", flush=True)
        if fault.test not in failed:
            missed.append(fault.name)
    print(f"\n{len(planted.FAULTS) - len(missed)} of {len(planted.FAULTS)} planted faults caught.")
    return {"faults": len(planted.FAULTS), "missed": missed}


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=Path, help="only the survivors that this file of an earlier run lists")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--matrix", action="store_true", help="the planted faults against the whole suite, too")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = run_mutants(given.mutants, given.seed, given.again, given.workers) if given.mutants else {"caught": 1.0}
    if given.matrix:
        found |= run_matrix()
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))
    return int(float(str(found["caught"])) < 0.85 or bool(found.get("missed")))


if __name__ == "__main__":
    sys.exit(main())
