"""Faults of looped models: a penalty, the carry and halting, each with the test that must fail and its words."""

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
RULES = "tests/backends/test_halting.py"
HALTING = "deqcore.halting"

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
    Fault(
        "a threshold of a learnt head that is not read",
        HALTING,
        "return logits >= log(self.threshold / (1.0 - self.threshold))",
        "return logits >= 0.0",
        f"{CARRY}::test_a_learnt_head_halts_each_sample[torch]",
        r"assert \[",
    ),
    Fault(
        "a learnt head that reads the state before the step",
        HALTING,
        "logits = self.head(fz)",
        "logits = self.head(z)",
        f"{CARRY}::test_a_learnt_head_halts_each_sample[torch]",
        r"assert \[",
    ),
    Fault(
        "a last step of the halting distribution that leaves a rest",
        HALTING,
        "return [*result, running]",
        "return [*result, running + _log_sigmoid(xp, logits[-1])]",
        f"{CARRY}::test_the_halting_distribution_and_its_losses[numpy]",
        "Not equal to tolerance",
    ),
    Fault(
        "the size of the state for its residual, in the rule that halts by a norm",
        HALTING,
        "moved = [b - a if _is_float(backend, b)",
        "moved = [b if _is_float(backend, b)",
        "tests/core/test_implicit.py::test_a_norm_of_ones_own_decides",
        "assert .* == 9",
    ),
    Fault(
        "an answer that has settled when one of its numbers has",
        HALTING,
        "(xp.max(change, axis=axes) if axes else change)",
        "(xp.min(change, axis=axes) if axes else change)",
        f"{RULES}::test_an_answer_settles_with_its_slowest_number[torch]",
        "assert .* == 44",
    ),
    Fault(
        "no derivative of a sample that has halted",
        HALTING,
        "held = backend.detach(z) + (fz - backend.detach(fz))",
        "held = backend.detach(z)",
        f"{RULES}::test_the_gradient_is_that_of_f_where_a_sample_halted[torch-exact-ift]",
        "assert",
    ),
]
