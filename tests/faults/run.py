"""`make faults`: the full matrix of planted faults, and random mutants, with the survivors listed.

python tests/faults/run.py [--mutants N] [--seed S] [--again FILE] [--matrix] [--only TEXT] [--json FILE] [--resume]

A mutant is caught by our own tests of its module or, where they let it pass, by the public suite. Only tests that reach
its statement run, which a first run on the code as it is records (beside FILE, with the suffix .reach). A check that
fails what is not faulty would call every mutant caught (two of them did for a while): tests that fail there judge
nothing, and each that fails a mutant is run alone against the code as it is, too.
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


checking, planted, mutants, reach = load("checking"), load("planted"), load("mutants"), load("reach")
judging, tables = load("judging"), load("tables")


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

    def beside(self, suffix: str) -> Path | None:
        """Return a file of the same name with another suffix."""
        return None if self.path is None else self.path.with_suffix(suffix)

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
    judge = judging.Judge(checking, reach, Path(deqcore.__file__).parent, results.beside(".reach"))

    def verdict(mutant) -> str:
        ours = [judging.Group(name, "numpy") for name in tables.TESTS[mutant.module]]
        suite = [judging.Group(*check) for check in tables.CHECKS[mutant.module]]
        return judge.verdict(mutant.module, (mutant.line, mutant.column), mutant.source, [*ours, *suite])

    start = time.perf_counter()
    todo = [mutant for mutant in chosen if str(mutant) not in known]
    with ThreadPoolExecutor(workers) as pool:
        for mutant, caught in zip(todo, pool.map(verdict, todo), strict=True):
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
