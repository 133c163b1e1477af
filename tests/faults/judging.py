"""Judge a mutant by the tests that reach its statement, the cheapest first, until one fails."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from deqcore.testing.runner.conformance import SuiteRequest, arguments

TESTS = Path(__file__).parents[1]
SOUND = "deqcore.solvers.picard"  # replaced by its own text where the code as it is shall be checked
START = 30  # seconds of processor time for imports and collection, beside three times what the tests take


@dataclass(frozen=True)
class Group:
    """What one run of pytest collects: a file of our tests, or the public suite for a request."""

    what: str | SuiteRequest
    backend: str

    @property
    def name(self) -> str:
        if isinstance(self.what, str):
            return f"tests/{self.what}"
        return f"{self.what.kind} {self.what.name} {self.what.options or ''} on {self.backend}"

    def arguments(self, folder: Path) -> list[str]:
        """Of pytest. Our own tests leave out JAX, and those of the core PyTorch."""
        if isinstance(self.what, SuiteRequest):
            return arguments(self.what, self.backend, folder / "results.jsonl")
        left_out = "not jax and not torch and not compiled" if self.what.startswith("core/") else "not jax"
        return ["-q", "-p", "no:cacheprovider", "-k", left_out, str(TESTS / self.what)]


class Judge:
    """Records which tests reach which lines, once, in a file; judges mutants by them."""

    def __init__(self, checking: ModuleType, reach: ModuleType, package: Path, path: Path | None) -> None:
        self.checking, self.reach, self.package, self.path = checking, reach, package, path
        sources = sorted(each for folder in (package, TESTS) for each in folder.rglob("*.py"))
        self.digest = hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest()[:16]
        self.locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self.sound: set[str] = set()

    @cached_property
    def records(self) -> dict[str, dict[str, dict[str, object]]]:
        """Of this state of the code."""
        known = json.loads(self.path.read_text()) if self.path is not None and self.path.exists() else {}
        return known.get("records", {}) if known.get("of") == self.digest else {}

    def record(self, group: Group) -> dict[str, dict[str, object]]:
        """Return what each test of the group reaches, its cost, and whether it passes."""
        with self.locks[group.name]:
            if group.name not in self.records:
                self.records[group.name] = self._recorded(group)
                if self.path is not None:
                    with self.locks[""]:
                        self.path.write_text(json.dumps({"of": self.digest, "records": self.records}))
            return self.records[group.name]

    def _recorded(self, group: Group) -> dict[str, dict[str, object]]:
        with tempfile.TemporaryDirectory(prefix="deqcore-reach-") as folder:
            result = Path(folder) / "reach.json"
            given = [each for each in group.arguments(Path(folder)) if each != "-x"]
            _, said = self._run(SOUND, None, given, group, 3600, record=[str(result), str(self.package)])
            if not result.exists():
                raise SystemExit(f"{group.name} could not be recorded: {said[-500:]}")
            found = json.loads(result.read_text())
        failed = [test for test, each in found.items() if not each["passed"]]
        seconds = sum(float(each["seconds"]) for each in found.values())
        print(f"recorded {len(found)} tests of {group.name}, {seconds:.0f} s", flush=True)
        if failed:
            print(f"  these fail on the code as it is and judge nothing: {failed}", flush=True)
        return found

    def verdict(self, module: str, place: tuple[int, int], source: str, groups: Sequence[Group]) -> str:
        """Return the first test of these groups that fails when `module` has this text, or nothing."""
        tree = ast.parse(self.checking.source_of(module))
        lines, cached = self.reach.statement(tree, *place)
        file = f"{module.partition('.')[2].replace('.', '/')}.py"
        for group in groups:
            record = self.record(group)
            chosen = self.reach.reaching(record, file, None if cached else lines)
            if not chosen:
                continue
            seconds = START + int(3 * sum(float(record[test]["seconds"]) for test in chosen))
            if failed := self._failed(module, source, group, chosen, seconds):
                self._check_sound(group, failed)
                return f"{group.name}: {failed}"
        return ""

    def _failed(self, module: str, source: str, group: Group, chosen: list[str], seconds: int) -> str:
        """Return the first failure, with its message, or nothing."""
        with tempfile.TemporaryDirectory(prefix="deqcore-fault-") as folder:
            given = ["-x", *group.arguments(Path(folder))]
            code, said = self._run(module, source, given, group, seconds, chosen=chosen)
        if code == 0:
            return ""
        failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].rpartition("/")[2][:200] if failed else f"ended with code {code} within {seconds} s"

    def _check_sound(self, group: Group, failed: str) -> None:
        """Raise SystemExit if the test that failed does so, run alone, on the code as it is."""
        tests = [test for test in self.record(group) if test in failed]
        if not tests or (test := max(tests, key=len)) in self.sound:
            return
        if now := self._failed(SOUND, self.checking.source_of(SOUND), group, [test], START + 60):
            raise SystemExit(f"A test fails the code as it is, and so would it any mutant: {now} of {group.name}")
        self.sound.add(test)

    def _run(
        self, module: str, source: str | None, given: list[str], group: Group, seconds: int, **more: object
    ) -> tuple[int, str]:
        text = self.checking.source_of(module) if source is None else source
        backend = "torch" if isinstance(group.what, str) else group.backend
        return self.checking.pytest_with(module, text, given, backend, seconds, **more)
