"""Faults that no check of the conformance suite can see, each with the test that must fail and its words."""

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


BACKENDS = "tests/backends"
CARRY = f"{BACKENDS}/test_carry.py"
RULES = f"{BACKENDS}/test_halting.py"
HALTING = "deqcore.halting"

LOOPED = [
    Fault(
        "an argument that counts once more through another one",
        "deqcore_torch.reversible",
        "self.whole = all(t.is_leaf for t in self.sources)",
        "self.whole = True",
        f"{BACKENDS}/test_reversible.py::test_an_argument_that_is_computed_from_another_counts_once[closure, too]",
        "backward through the graph a second time|not close",
    ),
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

SILENT = [
    Fault(
        "compiled code that never reports",
        "deqcore_jax.failures",
        "    if not compiled and is_staged():\n",
        "    if is_staged():\n",
        f"{BACKENDS}/test_jax_failures.py::test_compiled_code_warns_if_asked_to_and_raises[jit]",
        "not enough values to unpack",
    ),
    Fault(
        "a jax.custom_vjp function taken for one with both modes",
        "deqcore_jax.closure",
        'return self.calls("custom_vjp_call")',
        'return self.calls("custom_vjp_function")',
        f"{BACKENDS}/test_jax_functions.py::test_a_transformation_agrees_with_differences[reverse-grad]",
        "custom_lin",
    ),
    Fault(
        "hooks of modules in every product of the adjoint solve",
        "deqcore_torch.module_hooks",
        "return lambda *gradients: None if self._depth else hook(*gradients)",
        "return hook",
        f"{BACKENDS}/test_torch_hooks.py::test_backward_hooks_run_once_and_forward_hooks_with_each_evaluation"
        "[exact-ift-False]",
        "'before'",
    ),
    Fault(
        "a vjp in the pass that carries u to the parameters",
        "deqcore_torch.autograd",
        "hooks_made() == hooks and",
        "hooks_made() != hooks and",
        f"{BACKENDS}/test_torch_last_pass.py::test_a_backward_pass_takes_the_reported_vjps_and_one_pass_for_the_parameters"
        "[neumann-False]",
        "'z'",
    ),
    Fault(
        "hooks of parameters that get a part of the gradient",
        "deqcore_torch.module_hooks",
        "hooked = [hooks for tensor in ends if (hooks := tensor._backward_hooks)]",
        "hooked: list[Any] = []",
        f"{BACKENDS}/test_torch_last_pass.py::test_hooks_of_a_leaf_run_once_with_the_gradient_of_all_its_uses"
        "[False-neumann]",
        "assert",
    ),
    Fault(
        "a gradient that passes a parameter twice",
        "deqcore_torch.graph",
        "            if node in leaves:\n                return True\n",
        "            if node in leaves:\n                continue\n",
        f"{BACKENDS}/test_torch_last_pass.py::test_gradients_of_arguments_that_depend_on_each_other"
        "[leaf and what is made of it-neumann]",
        "assert",
    ),
    Fault(
        "a checkpoint that is computed again for each product",
        "deqcore_torch.saved_tensors",
        "return [slot for ref in self._slots if (slot := ref()) is not None]",
        "return []",
        f"{BACKENDS}/test_torch_autograd.py::test_a_checkpoint_around_layers_solves_once_more_and_not_for_each_vjp"
        "[1-exact-ift]",
        "assert False",
    ),
    Fault(
        "a flag of the user's own array",
        "deqcore_numpy.guards",
        "        seen = z.view()\n",
        "        seen = z\n",
        f"{BACKENDS}/test_numpy_derivative.py::test_flags_of_the_users_array_stay[torch-z01]",
        "assert {False} == {True}",
    ),
    Fault(
        "an interrupt that loses a plugin",
        "deqcore.plugins.manager",
        "self._load(points[0], disabled)\n                del points[0]\n",
        "self._load(points.pop(0), disabled)\n",
        "tests/core/test_plugins.py::test_an_interrupt_of_the_discovery_loses_no_plugin[module-KeyboardInterrupt]",
        "",
    ),
    Fault(
        "a byte-order mark read as a key",
        "deqcore.config.sources",
        'encoding="utf-8-sig"',
        'encoding="utf-8"',
        "tests/core/test_config.py::test_a_file_may_begin_with_a_byte_order_mark[pyproject.toml]",
        "ConfigError",
    ),
    Fault(
        "a graph that holds f",
        "deqcore_torch.autograd",
        "    exact = adjoint.exact\n    z = forward.z",
        "    exact, job.f = adjoint.exact, f\n    z = forward.z",
        f"{BACKENDS}/test_torch_autograd.py::test_an_object_that_keeps_its_own_equilibrium_is_freed[1-exact-ift]",
        "assert",
    ),
    Fault(
        "second derivatives refused as third ones",
        "deqcore_torch.functorch",
        "        if equation.order > MOST:\n            raise StrategyError(ORDER)\n        try:\n",
        "        if equation.order >= MOST:\n            raise StrategyError(ORDER)\n        try:\n",
        f"{BACKENDS}/test_torch_transforms.py::test_derivatives_of_transformations[solved-vjp_of_grad]",
        "StrategyError",
    ),
]

ENDS = [
    Fault(
        "a mean of choices taken for a choice",
        "deqcore.backward.controller",
        "MIXED * (1.0 + s.square))",
        "1e9 * (1.0 + s.square))",
        "tests/core/test_controller.py::test_states_that_were_added_or_averaged_change_no_gradient[2]",
        "assert",
    ),
    Fault(
        "fixed steps that end in NaN without a warning",
        "deqcore.solve.report",
        'if action == "ignore" or (forward.carry is None and action == "warn" and _would_wait(plan, forward)):',
        'if action == "ignore" or forward.carry is None:',
        f"{BACKENDS}/test_unrolled.py::test_a_sample_that_is_not_finite_fails[numpy-looped]",
        "DID NOT WARN",
    ),
    Fault(
        "a root judged by the slope at its start alone",
        "deqcore.solve.root",
        "(residual > FLATTER * tolerance)",
        "(residual > 1e30 * tolerance)",
        "tests/core/test_root.py::test_a_slope_that_falls_on_the_way_does_not_loosen_the_tolerance[numpy-broyden]",
        "assert",
    ),
    Fault(
        "an exported criterion met by growth",
        "deqcore_torch.exported",
        "    fallen = (growth <= given.slack) & (residual < way.best)\n",
        "    fallen = residual < way.best\n",
        f"{BACKENDS}/test_torch_export.py::test_growth_of_the_iterate_meets_no_tolerance[dtype1-auto]",
        "assert",
    ),
    Fault(
        "a row that stopped too early, without a warning",
        "deqcore.solve.report",
        "            if not _frozen_rows_are_due(plan, f, forward):\n",
        "            if _frozen_rows_are_due(plan, f, forward) or True:\n",
        f"{BACKENDS}/test_coupled_rows.py::test_a_row_that_stopped_too_early_is_named_without_a_gradient[torch]",
        "DID NOT WARN",
    ),
    Fault(
        "a vjp that only watches the cell, and counts",
        "deqcore.backward.adaptive",
        "float(c[j + 1] if j < rules.candidates - 1 else 0.0)",
        "float(c[(j + 1) % rules.candidates])",
        "tests/core/test_adaptive_model.py::"
        "test_a_pass_is_what_dense_algebra_makes_of_its_state[options3-False-6-5-matrix]",
        "Not equal to tolerance",
    ),
    Fault(
        "a number of vjps that no audit has measured",
        "deqcore.backward.controller",
        "xp.where(s.deviation < 0, none, xp.exp(s.level + SPREAD * s.deviation))",
        "xp.exp(s.level + SPREAD * s.deviation)",
        "tests/core/test_controller.py::test_every_pass_is_decided_as_the_rules_say[0.5-50-5-True]",
        "AssertionError",
    ),
    Fault(
        "a stopped sample whose figures are those of its next step",
        "deqcore.solve.host",
        "since, mark = np.where(running, since, carry.since), np.where(running, mark, carry.mark)",
        "since, mark = np.where(running, since, since), np.where(running, mark, mark)",
        "tests/core/test_loop.py::"
        "test_the_figures_of_a_sample_stop_with_it_and_a_second_solve_is_that_alone[numpy-host]",
        "mark",
    ),
    Fault(
        "an opening that takes steps that are not better",
        "deqcore.solve.device",
        "taken = xp.any(active) & ~xp.any(active & ~better)",
        "taken = xp.any(active)",
        "tests/core/test_auto.py::test_traced_code_takes_the_steps_of_the_host_where_plain_steps_get_worse[1]",
        "assert",
    ),
    Fault(
        "samples that wait, and lose their budget to the others",
        "deqcore.solve.device",
        "carry.steps - before < steps",
        "self.backend.xp.max(carry.steps - before) < steps",
        "tests/core/test_auto.py::test_a_sample_that_waits_in_traced_code_keeps_its_budget_and_its_bits[picard]",
        "assert",
    ),
    Fault(
        "a step of an opening that is not taken, and counts",
        "deqcore.solve.device",
        "result = result._replace(state=state)",
        "result = result._replace(size=result.size)",
        "tests/core/test_auto.py::test_a_sample_that_waits_in_traced_code_keeps_its_budget_and_its_bits[auto]",
        "assert",
    ),
    Fault(
        "GMRES after plain steps that begins with the residual of zero",
        "deqcore.linear.opening",
        "xp.zeros_like(b), plain.r)",
        "xp.zeros_like(b), b)",
        "tests/core/test_opening.py::test_samples_of_all_rates_are_solved_and_their_residual_is_the_true_one[numpy]",
        "assert",
    ),
    Fault(
        "a sample that joins a Krylov space and loses its plain steps",
        "deqcore.linear.plain_steps",
        "select(given(self.joined), self.x + x, self.x)",
        "select(given(self.joined), x, self.x)",
        "tests/core/test_plain_steps.py::test_a_sample_that_returns_joins_the_space_of_the_others",
        "assert",
    ),
    Fault(
        "products that differentiate a vjp which a Function or a hook changes",
        "deqcore_torch.jvp",
        "return y.requires_grad and self.hooks == hooks_made() and not has_functions(y, self.begun)",
        "return y.requires_grad",
        "tests/backends/test_torch_products.py::test_products_do_not_rely_on_a_vjp_that_the_user_changes[detached]",
        "assert",
    ),
    Fault(
        "threads of the parent in a child of a fork",
        "deqcore_torch.native.openmp",
        "return 0 if _Forked.here else _found()",
        "return _found()",
        f"{BACKENDS}/test_torch_native_threads.py::test_a_child_of_a_process_that_used_threads_does_not_wait_for_them",
        "the child waits for threads that do not exist",
    ),
    Fault(
        "the threads of a library that was loaded in advance",
        "deqcore_torch.native.openmp",
        "own and first in (0, own) and",
        "own and",
        f"{BACKENDS}/test_torch_native_threads.py::test_threads_are_left_alone_if_another_library_was_loaded_in_advance",
        "assert",
    ),
    Fault(
        "an error in a thread that is lost",
        "deqcore_torch.native.pool",
        "        other.result()",
        "        other.exception()",
        f"{BACKENDS}/test_torch_native_threads.py::test_an_error_in_a_piece_is_raised[own threads-wrong1]",
        "DID NOT RAISE",
    ),
]

FAULTS = [*LOOPED, *SILENT, *ENDS]
