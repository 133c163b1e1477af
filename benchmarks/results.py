"""Lookups in the results of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.steps import Step
from deqcore.bench.rows import BenchRow
from deqcore.bench.timing import Spread


class Results:
    """Lookups in what was measured; all answer None for what was not."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.sections: Mapping[str, Any] = results["sections"]
        self.rows = [
            BenchRow.of(row) for name in ("cases-torch", "cases-jax") for row in self.section(name).get("rows", ())
        ]
        self.steps = {
            (step["case"], step["layer"]): Step.of(step) for step in self.section("training-torch").get("steps", ())
        }

    def section(self, name: str) -> Mapping[str, Any]:
        """Return one section, empty if it is missing."""
        return self.sections.get(name, {})

    def row(self, framework: str, case: str, contender: str) -> BenchRow | None:
        """Return a contender that was timed."""
        for row in self.rows:
            if (row.framework, row.case, row.contender) == (framework, case, contender):
                return row if row.seconds else None
        return None

    def problems(self) -> list[tuple[str, str]]:
        """Return framework and case of all rows, in their order."""
        return list(dict.fromkeys((row.framework, row.case) for row in self.rows))

    def fastest(self, framework: str, case: str, fits: Callable[[BenchRow], bool]) -> BenchRow | None:
        """Return the contender with the least median time among those that fit and reached the residual."""
        timed = [row for row in self.rows if (row.framework, row.case) == (framework, case) and row.seconds]
        return min(filter(fits, timed), key=lambda row: Spread.of(row.seconds).median, default=None)

    def listed(self, framework: str, case: str, contender: str) -> BenchRow | None:
        """Return a contender, timed or not."""
        result = [r for r in self.rows if (r.framework, r.case, r.contender) == (framework, case, contender)]
        return result[0] if result else None

    def fact(self, name: str, *keys: str) -> Any:
        """Return a single figure."""
        result: Any = self.section("facts-torch").get(name)
        for key in keys:
            result = None if result is None else result.get(key)
        return result
