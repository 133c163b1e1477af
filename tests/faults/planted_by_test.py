"""Faults of looped models: a penalty and the carry, each with the test that must fail and its words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong.
        where: the module.
        old: text that occurs once in it.
        new: what is planted in its place.
        test: that must fail, from the root of the repository.
        reason: a regular expression that its message must match.
    """

    name: str
    where: str
    old: str
    new: str
    test: str
    reason: str


CARRY = "tests/backends/test_carry.py"

FAULTS = [
    Fault(
        "the real part of a complex pair for its modulus, in the spectral penalty",
        "deqcore.diagnostics.stability",
        "return xp.where(is_pair, modulus, xp.abs(trace) / 2 + root)",
        "return xp.where(is_pair, xp.abs(trace) / 2, xp.abs(trace) / 2 + root)",
        "tests/diagnostics/test_stability.py::test_radius_and_gradient_are_those_of_the_dominant_eigenvalue[pair]",
        "Not equal to tolerance",
    ),
    Fault(
        "a carry that is not detached",
        "deqcore_torch.last_equilibrium",
        "return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf",
        "return leaf.clone() if isinstance(leaf, Tensor) else leaf",
        f"{CARRY}::test_no_gradient_reaches_the_segment_before",
        "the segment before",
    ),
    Fault(
        "a carry that is not carried",
        "deqcore_torch.nn",
        "        if self.reuse is not None:\n            self._last = ",
        "        if self.reuse == 'sequence':\n            self._last = ",
        f"{CARRY}::test_a_carry_continues_where_the_last_step_ended_and_has_no_gradient",
        r"torch\.equal",
    ),
]
