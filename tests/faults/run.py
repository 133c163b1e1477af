"""`make faults`: the full matrix of planted faults, and random mutants, with the survivors listed.

python tests/faults/run.py [--mutants N] [--seed S] [--again FILE] [--matrix] [--only TEXT] [--json FILE] [--resume]

A mutant is caught by our own tests of its module or, where they let it pass, by the public suite. A check that fails
what is not faulty would call every mutant caught (two of them did for a while): each that fails a mutant is run against
the code as it is, too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import deqcore
from deqcore.testing.runner.conformance import SuiteRequest

HERE = Path(__file__).parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"faults_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


checking, planted, mutants = load("checking"), load("planted"), load("mutants")

SOUND = "deqcore.solvers.picard"  # replaced by its own text where the code as it is shall be checked
Options = dict[str, object]


def checks(kind: str, name: str, *variants: tuple[Options, Options], backend: str = "numpy"):
    """Return a check per set of options with its cost bounds; without any, the defaults and theirs."""
    return [
        (SuiteRequest(kind, name, options=text(options), cost_bounds=text(cost_bounds), first=True), backend)
        for options, cost_bounds in variants or [({}, {})]
    ]


def text(given: Options) -> str | None:
    return json.dumps(given) if given else None


PLAIN, MEASURED, DEFAULT = (planted.PLAIN, {}), (planted.MEASURED, {}), ({}, {})
SPENT = {"max_relative_error": 0.001, "max_refine_vjps": 2}  # a target that this budget misses

ANDERSON = checks(
    "solver",
    "anderson",
    DEFAULT,
    ({"history_size": 3}, {"affine": 28, "expansive": 42, "monotone": 67, "tree": 41}),
    ({"mixing": 0.5}, {"affine": 10, "expansive": 12, "monotone": 15, "tree": 33}),
    ({"max_residual_growth": 1.5, "history_size": 3}, {"affine": 28, "expansive": 28, "overshoot": 19, "tree": 41}),
)
ANDERSON += checks("solver", "anderson", backend="strict")  # where samples that are done stay in the batch
BROYDEN = checks(
    "solver",
    "broyden",
    DEFAULT,
    ({"history_size": 5}, {"affine": 29, "expansive": 37, "slow-modes": 175, "tree": 34}),
    ({"history_size": 2}, {"affine": 34, "mlp": 25, "overshoot": 21, "tree": 43}),
    (
        {"max_residual_growth": 2.0},
        {"affine": 14, "expansive": 21, "monotone": 19, "overshoot": 15, "slow-modes": 43, "walled": 31},
    ),
    (
        {"max_residual_growth": 2.0, "history_size": 5},
        {"affine": 29, "expansive": 41, "overshoot": 18, "slow-modes": 160},
    ),
)
BROYDEN += checks("solver", "broyden", backend="strict")
EXACT = checks(
    "strategy",
    "exact-ift",
    DEFAULT,
    ({"start": "cotangent"}, {"affine": 7, "slow-modes": 22, "tree": 12}),
    ({"start": "reuse"}, {"affine": 7, "slow-modes": 22, "tree": 12}),
    ({"solver": "anderson", "max_steps": 300}, {"affine": 8, "slow-modes": 130, "tree": 15}),
    ({"solver": "anderson", "max_steps": 300, "start": "zero"}, {"affine": 8, "tree": 15}),
    ({"rtol": 0.01}, {"affine": 5, "slow-modes": 16, "tree": 5}),
)
REUSE = checks(
    "strategy",
    "broyden-reuse",
    DEFAULT,
    ({"max_relative_error": 1e-3}, {"affine": 6, "conv": 7, "slow-modes": 18, "tree": 8}),
    ({"max_relative_error": 1e-6}, {"conv": 12, "ring": 13, "slow-modes": 21, "tree": 10}),
    (SPENT, {}),
    ({**SPENT, "fallback": "exact-ift"}, {}),
    ({**SPENT, "fallback": "none"}, {}),
)
AUTO = [
    *checks("solver", "auto"),
    *checks("solver", "auto", ({"escalate": False}, {})),
    *checks("solver", "auto", backend="strict"),
]
ADAPTIVE = checks("strategy", "adaptive", DEFAULT, ({"max_relative_error": 0.2, "fallback": "none"}, {}))
LOOPED = checks(
    "strategy",
    "looped",
    DEFAULT,
    ({"distribution": "log-normal-poisson", "seed": 3}, {}),
    ({"distribution": "uniform", "seed": 1, "damping": 0.5, "max_depth": 6, "measure": True}, {}),
    ({"distribution": "poisson", "seed": 2, "noise": 0.1, "start_noise": 0.1}, {}),
)
ESTIMATED = checks(
    "strategy",
    "exact-ift",
    ({"max_relative_error": 0.01}, {}),
    ({"max_relative_error": 0.01, "reuse": "witness"}, {}),
    ({"max_relative_error": 0.01, "reuse": "precondition"}, {}),
)
GMRES = [EXACT[0], REUSE[0], EXACT[1], REUSE[1], *checks("solver", "newton-krylov")]

CHECKS = {
    "deqcore.solvers.picard": checks("solver", "picard", DEFAULT, ({"damping": 0.9}, {"affine": 80, "expansive": 96})),
    "deqcore.solvers.anderson": ANDERSON,
    "deqcore.solvers.broyden": BROYDEN,
    "deqcore.solvers.newton_krylov": [
        *checks("solver", "newton-krylov"),
        *checks("solver", "newton-krylov", backend="torch"),
    ],
    "deqcore.backward.exact_ift": EXACT,
    "deqcore.backward.broyden_reuse": [*REUSE, *checks("strategy", "broyden-reuse", PLAIN, MEASURED)],
    "deqcore.backward.jacobian_free": checks("strategy", "jacobian-free"),
    "deqcore.backward.neumann": checks("strategy", "neumann", DEFAULT, ({"terms": 1}, {}), ({"terms": 0}, {})),
    "deqcore.backward.phantom": checks("strategy", "phantom", DEFAULT, ({"damping": 1.0}, {}), backend="torch"),
    "deqcore.backward.unrolled": checks("strategy", "unrolled", DEFAULT, ({"checkpoint": True}, {}), backend="torch"),
    "deqcore.linear.gmres": GMRES,
    "deqcore.linear.lowrank": [*BROYDEN[:2], ANDERSON[0], REUSE[0]],
    "deqcore.linear.certified": REUSE,
    "deqcore.solvers.auto": AUTO,
    "deqcore.solvers.levels": AUTO,
    "deqcore.backward.adaptive": ADAPTIVE,
    "deqcore.backward.controller": ADAPTIVE,
    "deqcore.backward.depth": LOOPED,
    "deqcore.backward.looped": LOOPED,
    "deqcore.backward.reversible": checks("strategy", "reversible", DEFAULT, backend="torch"),
    "deqcore.backward.to_error": [*REUSE, *ESTIMATED],
    "deqcore.linear.direct": [EXACT[0], *checks("strategy", "exact-ift", ({"max_steps": 9}, {}))],
    "deqcore.linear.figures": [REUSE[0], ESTIMATED[0]],
    "deqcore.linear.grouped": [EXACT[0], REUSE[0], ADAPTIVE[0]],
    "deqcore.linear.norms": [EXACT[0], ANDERSON[0]],
    "deqcore.linear.powers": ADAPTIVE,
    "deqcore.linear.rules": [*REUSE, *ESTIMATED],
    "deqcore.linear.transposed": [
        *checks("strategy", "exact-ift", ({"start": "reuse"}, {}), backend="torch"),
        (SuiteRequest("backend", "torch", first=True), "torch"),
    ],
}


SOLVES = ["core/test_counts.py", "core/test_safeguard.py", "core/test_solvers.py"]
ROUTES = ["core/test_counts.py", "core/test_strategies.py"]
CERTIFIES = ["core/test_counts.py", "core/test_certified_counts.py", "core/test_certified.py"]

TESTS = {
    "deqcore.solvers.picard": SOLVES,
    "deqcore.solvers.anderson": SOLVES,
    "deqcore.solvers.broyden": [*SOLVES, "core/test_costs.py"],
    "deqcore.solvers.newton_krylov": SOLVES,
    "deqcore.solvers.auto": ["core/test_auto.py", "core/test_counts.py"],
    "deqcore.solvers.levels": ["core/test_levels.py"],
    "deqcore.backward.adaptive": ["core/test_adaptive_model.py", "backends/test_adaptive.py"],
    "deqcore.backward.controller": ["core/test_controller.py"],
    "deqcore.backward.depth": ["core/test_depth.py"],
    "deqcore.backward.looped": ["core/test_depth.py", "backends/test_looped.py"],
    "deqcore.backward.reversible": ["backends/test_reversible.py"],
    "deqcore.backward.exact_ift": [*ROUTES, "core/test_direct.py"],
    "deqcore.backward.broyden_reuse": [*ROUTES, "backends/test_no_pairs.py"],
    "deqcore.backward.jacobian_free": ROUTES,
    "deqcore.backward.neumann": ROUTES,
    "deqcore.backward.phantom": ["backends/test_truncated.py"],
    "deqcore.backward.unrolled": ["backends/test_unrolled.py"],
    "deqcore.backward.to_error": CERTIFIES,
    "deqcore.linear.gmres": ["core/test_gmres.py", "core/test_counts.py"],
    "deqcore.linear.lowrank": [*ROUTES, "core/test_solvers.py"],
    "deqcore.linear.certified": CERTIFIES,
    "deqcore.linear.direct": ["core/test_direct.py"],
    "deqcore.linear.figures": CERTIFIES,
    "deqcore.linear.grouped": ["backends/test_units.py"],
    "deqcore.linear.norms": ["core/test_gmres.py", "core/test_counts.py"],
    "deqcore.linear.powers": ["core/test_adaptive_model.py", "backends/test_adaptive.py"],
    "deqcore.linear.rules": CERTIFIES,
    "deqcore.linear.transposed": ROUTES,
}
"""Our own tests of a module, the quick ones first; those of JAX and, in the folder core, of torch are left out."""


def tested(module: str, source: str) -> str:
    """Our own test that fails when `module` has this text, or nothing."""
    failed = checking.run_tests(module, source, [HERE.parent / name for name in TESTS[module]])
    if failed:
        tests_hold(tuple(TESTS[module]))
    return f"tests/{failed.rpartition('tests/')[2]}" if failed else ""


def judged(module: str, source: str) -> str:
    """The first check of the public suite that fails when `module` has this text, or nothing."""
    for request, backend in CHECKS[module]:
        for each in checking.check(module, source, request, backend):
            if each.outcome == "failed":
                suite_holds(request, backend)
                return f"{each.test}: {each.message[:120]}"
    return ""


@cache
def tests_hold(names: tuple[str, ...]) -> None:
    """Raise SystemExit if our own tests fail the code as it is."""
    failed = checking.run_tests(SOUND, checking.source_of(SOUND), [HERE.parent / name for name in names])
    if failed:
        raise SystemExit(f"A test fails the code as it is, and so would it any mutant: {failed}")


@cache
def suite_holds(request: SuiteRequest, backend: str) -> None:
    """Raise SystemExit if a check fails the code as it is."""
    outcomes = checking.check(SOUND, checking.source_of(SOUND), request, backend)
    if failed := [each.test for each in outcomes if each.outcome == "failed"]:
        raise SystemExit(f"A check fails the code as it is, and so would it any mutant: {failed} of {request}")


class Results:
    """What was found so far, kept in a file after each step, so that a run of an hour can be gone on with."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path = path
        sources = sorted(Path(deqcore.__file__).parent.rglob("*.py"))
        digest = hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest()[:16]
        self.found: dict[str, dict[str, object]] = {"of": {"deqcore": digest}, "mutants": {}, "matrix": {}}
        if resume and path is not None and path.exists():
            before = json.loads(path.read_text())
            if before.get("of") == self.found["of"]:
                self.found = before
            else:
                print(f"{path} was written for another state of deqcore: begun again.")

    def keep(self, part: str, name: str, value: object) -> None:
        self.found[part][name] = value
        if self.path is not None:
            self.path.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")


def run_mutants(count: int, seed: int, again: Path | None, workers: int, results: Results) -> float:
    """The share of a sample that is caught; mutants of an earlier sample in `again` only if they survived there."""
    chosen, total = mutants.sample(mutants.modules(Path(deqcore.__file__).parent), count, seed)
    drawn = len(chosen)
    if again is not None:  # what was caught once is taken for caught: checks are only ever added
        left = {name for name, caught in json.loads(again.read_text())["mutants"].items() if not caught}
        chosen = [mutant for mutant in chosen if str(mutant) in left]
    known = results.found["mutants"]
    start = time.perf_counter()
    todo = [mutant for mutant in chosen if str(mutant) not in known]
    with ThreadPoolExecutor(workers) as pool:
        left = []
        for mutant, caught in zip(todo, pool.map(lambda each: tested(each.module, each.source), todo), strict=True):
            print(f"{'caught' if caught else 'passed'} {mutant}   {caught}", flush=True)
            if caught:
                results.keep("mutants", str(mutant), caught)
            else:
                left.append(mutant)
        for mutant, caught in zip(left, pool.map(lambda each: judged(each.module, each.source), left), strict=True):
            print(f"{'caught' if caught else 'SURVIVED'} {mutant}   {caught}", flush=True)
            results.keep("mutants", str(mutant), caught)
    survivors = [str(mutant) for mutant in chosen if not known[str(mutant)]]
    share = 1 - len(survivors) / drawn
    seconds = time.perf_counter() - start
    own = sum(str(known[str(mutant)]).startswith("tests/") for mutant in chosen)
    print(f"\n{drawn} of {total} mutants, seed {seed}: {share:.0%} caught, {own} of them by our own tests")
    print(f"({seconds:.0f} s). Left:")
    print("\n".join(survivors) or "none")
    return share


def failing(fault) -> list[str]:
    """The checks that a planted fault fails, of the whole suite of its subject."""
    source = fault.planted(checking.source_of(fault.where))
    request = SuiteRequest(fault.request.kind, fault.request.name, options=fault.request.options)
    outcomes = checking.check(fault.where, source, request, fault.backend)
    return list(dict.fromkeys(each.check for each in outcomes if each.outcome == "failed"))


def run_matrix(only: str, workers: int, results: Results) -> list[str]:
    """Every fault against every check of its subject: how many of them notice. Those that none notices."""
    faults = [fault for fault in planted.FAULTS if only in fault.name]
    if not faults:
        raise SystemExit(f"--only {only!r}: no planted fault is called so.")
    known = results.found["matrix"]
    todo = [fault for fault in faults if fault.name not in known]
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for fault, failed in zip(todo, pool.map(failing, todo), strict=True):
            print(f"{len(failed):3d} checks fail: {fault.name} ({', '.join(failed[:4])})", flush=True)
            results.keep("matrix", fault.name, failed)
    print(f"{len(todo)} faults in {time.perf_counter() - start:.0f} s")
    missed = [fault.name for fault in faults if fault.test not in known[fault.name]]
    print(f"\n{len(faults) - len(missed)} of {len(faults)} planted faults caught. Missed: {missed or 'none'}")
    return missed


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--again", type=Path, help="only the survivors that this file of an earlier run lists")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--matrix", action="store_true", help="the planted faults against the whole suite, too")
    parser.add_argument("--only", default="", help="of the matrix: faults whose name has this text")
    parser.add_argument("--json", type=Path, help="keep what was found in this file, after each step")
    parser.add_argument("--resume", action="store_true", help="continue with what --json has")
    given = parser.parse_args(arguments)
    results = Results(given.json, given.resume)
    missed = run_matrix(given.only, given.workers, results) if given.matrix else []
    share = run_mutants(given.mutants, given.seed, given.again, given.workers, results) if given.mutants else 1.0
    return int(share < 0.85 or bool(missed))


if __name__ == "__main__":
    sys.exit(main())
