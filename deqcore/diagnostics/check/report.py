"""What a check of a layer found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

OK: Final = "ok"
FAILED: Final = "failed"
NOTE: Final = "note"
SKIPPED: Final = "skipped"


@dataclass(frozen=True)
class Finding:
    """One property of a layer.

    Attributes:
        check: name of the property.
        status: "ok", "failed", "note" (what a user should know, and no failure) or "skipped".
        expected: what must hold.
        found: what was measured, or why the property was not measured.
        remedy: what to do; empty if nothing.
        figures: the measured numbers by name.

    Example:
        >>> from deqcore.diagnostics.check.report import Finding
        >>> Finding("finite", "ok", "finite numbers", "all 12 are").as_dict()["status"]
        'ok'
    """

    check: str
    status: str
    expected: str
    found: str
    remedy: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return plain values; a figure that is not finite is None."""
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        return {
            "check": self.check,
            "status": self.status,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
            "figures": figures,
        }


@dataclass(frozen=True)
class LayerReport:
    """All findings on a layer.

    Attributes:
        name: of the layer.
        backend: of its arrays.
        samples: in the batch.
        size: numbers in a sample's state.
        dtype: of the state.
        findings: one for each property.

    Example:
        >>> from deqcore.diagnostics.check.report import Finding, LayerReport
        >>> report = LayerReport("cell", "numpy", 1, 2, "float64", [Finding("finite", "failed", "finite", "NaN")])
        >>> report.ok, [finding.check for finding in report.failures()]
        (False, ['finite'])
    """

    name: str
    backend: str
    samples: int
    size: int
    dtype: str
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Whether no property failed."""
        return not self.failures()

    def failures(self) -> list[Finding]:
        """Return the properties that failed."""
        return [finding for finding in self.findings if finding.status == FAILED]

    def finding(self, check: str) -> Finding:
        """Return the finding on a property.

        Raises:
            KeyError: the report has no property of this name.
        """
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    def summary(self) -> str:
        """Return a summary in one line."""
        counts = {status: sum(f.status == status for f in self.findings) for status in (OK, FAILED, NOTE, SKIPPED)}
        shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        shape = f"{self.samples} sample(s) of {self.size} numbers, {self.dtype}"
        return f"{self.name} ({self.backend}, {shape}): {shown}."

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "layer": self.name,
            "backend": self.backend,
            "samples": self.samples,
            "size": self.size,
            "dtype": self.dtype,
            "ok": self.ok,
            "findings": [finding.as_dict() for finding in self.findings],
        }
