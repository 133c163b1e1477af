"""Faults that have been made, here or elsewhere, each with the check that must name it and the words it must use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deqcore.testing.runner.conformance import SubjectKind, SuiteRequest

PLAIN = {"certify": False, "max_relative_error": None, "fallback": "none"}
MEASURED = {"certify": True, "max_relative_error": None, "fallback": "none"}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong.
        where: the module.
        old: text that occurs once in it.
        new: what is planted in its place.
        what: kind and name of what is checked, as in "solver broyden".
        test: that must fail.
        reason: a regular expression that its message must match.
        backend: to run on.
        options: of the solver or strategy.
    """

    name: str
    where: str
    old: str
    new: str
    what: str
    test: str
    reason: str
    backend: str = "numpy"
    options: Any = None

    @property
    def request(self) -> SuiteRequest:
        """The one check that names the fault."""
        kind, _, name = self.what.partition(" ")
        options = None if self.options is None else json.dumps(self.options)
        found: SubjectKind = kind
        return SuiteRequest(found, name, (self.backend,), options=options, select=self.test)

    def planted(self, text: str) -> str:
        """The faulty source."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.old!r} must occur once in {self.where} (got {count} times).")
        return text.replace(self.old, self.new)


REUSE = "deqcore.backward.broyden_reuse"
EXACT = "deqcore.backward.exact_ift"
LOWRANK = "deqcore.linear.lowrank"
GMRES = "deqcore.linear.gmres"
BROYDEN = "deqcore.solvers.broyden"
ANDERSON = "deqcore.solvers.anderson"
NEWTON = "deqcore.solvers.newton_krylov"
PICARD = "deqcore.solvers.picard"
NUMPY = "deqcore_numpy.backend"
NUMPY_AUTODIFF = "deqcore_numpy.autodiff"
HISTORY = "deqcore_numpy.history"
DIFFERENCES = "deqcore_numpy.differences"
TORCH = "deqcore_torch.backend"
TORCH_AUTODIFF = "deqcore_torch.autodiff"
PRODUCTS = "deqcore_torch.jvp"
AUTOGRAD = "deqcore_torch.autograd"
SECOND = "deqcore_torch.second_order"

DEPTH = "deqcore.backward.depth"
REVERSIBLE_TORCH = "deqcore_torch.reversible"
REVERSIBLE_JAX = "deqcore_jax.reversible"

CONTROLLER = "deqcore.backward.controller"
ADAPTIVE = "deqcore.backward.adaptive"

STRATEGIES = [
    Fault(
        "an argument that counts once more through another one",
        REVERSIBLE_TORCH,
        "self.nested = nested(sources)",
        "self.nested = False",
        "strategy reversible",
        "test_an_argument_that_is_computed_from_another_counts_once",
        "backward through the graph a second time",
        backend="torch",
    ),
    Fault(
        "a cotangent that a half step does not damp",
        REVERSIBLE_TORCH,
        "g_moved *= 1.0 - damping",
        "g_moved *= 1.0",
        "strategy reversible",
        "test_its_gradient_is_that_of_its_steps",
        "gradient of the steps",
        backend="torch",
    ),
    Fault(
        "a half step that is undone with the other sign",
        REVERSIBLE_TORCH,
        "1.0 / (1.0 - self.damping)",
        "1.0 / (1.0 + self.damping)",
        "strategy reversible",
        "test_its_gradient_is_that_of_its_steps",
        "did not come back to z0",
        backend="torch",
    ),
    Fault(
        "gradients of the parameters of the last half step only",
        REVERSIBLE_JAX,
        "[a + b for a, b in zip(sums, parts, strict=True)]",
        "[0 * a + b for a, b in zip(sums, parts, strict=True)]",
        "strategy reversible",
        "test_its_gradient_is_that_of_its_steps",
        "gradient of the steps",
        backend="jax",
    ),
    Fault(
        "a depth that does not depend on the training step",
        DEPTH,
        "np.array([int(step) % RANGE], np.uint32)",
        "np.array([0], np.uint32)",
        "strategy looped",
        "test_what_it_draws_follows_from_its_seed_and_the_training_step",
        "the same draw at every step",
        options={"distribution": "log-normal-poisson", "seed": 3},
    ),
    Fault(
        "a depth from a generator of the process",
        DEPTH,
        "np.array([int(step) % RANGE], np.uint32)",
        "np.array([np.random.randint(2**31)], np.uint32)",
        "strategy looped",
        "test_what_it_draws_follows_from_its_seed_and_the_training_step",
        "another draw at the same seed and step",
        options={"distribution": "log-normal-poisson", "seed": 3},
    ),
    Fault(
        "a damping that is not read",
        "deqcore.backward.looped",
        "z = fz if self.damping == 1.0 else z + self.damping * (fz - z)",
        "z = fz",
        "strategy looped",
        "test_every_number_among_its_options_matters",
        "damping = 0.5 gives the same value and gradient",
        backend="torch",
    ),
    Fault(
        "a number of vjps that stays what it was",
        CONTROLLER,
        "        return (s.begun == 0) | (s.since + 1 >= xp.minimum(exact, s.interval)) | (s.jumped > 0)\n",
        "        return s.begun == 0\n",
        "strategy adaptive",
        "test_it_notices_that_the_cell_has_changed",
        "after a change to radius",
    ),
    Fault(
        "an audit that judges coefficients by the data that made them",
        CONTROLLER,
        "judged(xp, xp.where(first, own, before), gram, right)",
        "judged(xp, own, gram, right)",
        "strategy adaptive",
        "test_an_audit_judges_what_was_in_force_before_it",
        "the audit reports",
        options={"max_relative_error": 0.1},
    ),
    Fault(
        "sign of the powers",
        ADAPTIVE,
        "            return w, u + c[0] * w, backend.xp.roll(c, -1)\n",
        "            return w, u - c[0] * w, backend.xp.roll(c, -1)\n",
        "strategy adaptive",
        "test_the_gradient_of_the_batch_is_as_good_as_promised",
        "of the steps have an error above",
        options={"max_relative_error": 0.2},
    ),
    Fault(
        "an audit whose gradient is not used",
        ADAPTIVE,
        "            return q._replace(products=q.products + products, ",
        "            return q._replace(u=self.g, products=q.products + products, ",
        "strategy adaptive",
        "test_an_audit_uses_the_gradient_that_it_found",
        "u of an audit",
    ),
    Fault(
        "ranks that disagree",
        ADAPTIVE,
        "audit = rules.due(xp, s)",
        "audit = rules.due(xp, s) | (now.unconverged > 0)",
        "strategy adaptive",
        "test_ranks_that_share_a_state_take_the_same_vjps",
        "one rank audits, and the other does not",
    ),
    Fault(
        "a state that is kept although it is not finite",
        CONTROLLER,
        "        values = xp.where(xp.all(xp.isfinite(values)), values, xp.zeros_like(values))\n",
        "",
        "strategy adaptive",
        "test_a_state_that_is_not_finite_counts_as_a_new_one",
        "",
    ),
    Fault(
        "a coupled row certified",
        "deqcore.solve.verification",
        "    status = xp.where(wrong, xp.full_like(report.status, int(Status.STALLED)), report.status)\n",
        "    status = report.status\n",
        "strategy exact-ift",
        "test_rows_that_f_couples_are_reported",
        "rows are coupled, and the status is CONVERGED",
    ),
    Fault(
        "a leak between rows overlooked",
        "deqcore.solve.verification",
        "    leaked = outside & (norms > noise)\n",
        "    leaked = ~outside & (norms > 1e30)\n",
        "strategy broyden-reuse",
        "test_rows_that_f_couples_are_reported",
        "f couples rows, but the report does not say so",
    ),
    Fault(
        "sign of the reused estimate",
        REUSE,
        "        u = -estimate.apply_transpose(g)\n",
        "        u = estimate.apply_transpose(g)\n",
        "strategy broyden-reuse",
        "test_a_perfect_estimate_gives_the_perfect_gradient",
        "u = −Hᵀg",
        options=PLAIN,
    ),
    Fault(
        "H instead of its transpose, in the strategy",
        REUSE,
        "        u = -estimate.apply_transpose(g)\n",
        "        u = -estimate.apply(g)\n",
        "strategy broyden-reuse",
        "test_a_perfect_estimate_gives_the_perfect_gradient",
        "u = −Hᵀg",
        options=PLAIN,
    ),
    Fault(
        "a residual that leaves out u",
        REUSE,
        "r = g + vjp(u) - u\n",
        "r = g + vjp(u)\n",
        "strategy broyden-reuse",
        "test_the_report_is_true",
        "residuals .* are reported",
        options=MEASURED,
    ),
    Fault(
        "a certificate that promises too much",
        "deqcore.linear.certified",
        "error = xp.where(judged, error, old.error)",
        "error = xp.where(judged, 1e-3 * error, old.error)",
        "strategy broyden-reuse",
        "test_the_report_is_true",
        "errors .* are estimated",
    ),
    Fault(
        "first-dimension certificate",
        "deqcore.linear.rules",
        "least=3, spread=1.4, youth=4.0,",
        "least=1, spread=1.0, youth=0.0,",
        "strategy broyden-reuse",
        "test_a_mode_that_the_cotangent_hardly_shows_is_met",
        "CONVERGED with a target of 0.1",
    ),
    Fault(
        "a direct solve taken at its word",
        "deqcore.linear.direct",
        "backend.to_accum_dtype(backend.norm(g + vjp(u) - u))",
        "backend.to_accum_dtype(0 * backend.norm(g + vjp(u) - u))",
        "strategy exact-ift",
        "test_coupled_rows_are_not_a_solution",
        "CONVERGED, but",
    ),
    Fault(
        "a worthless estimate trusted blindly",
        REUSE,
        "        if self.max_relative_error is None:\n",
        "        if self.max_relative_error is not None:\n",
        "strategy broyden-reuse",
        "test_converged_means_what_the_options_promise",
        "CONVERGED with a target of 0.1",
    ),
    Fault(
        "a budget that ran out called converged",
        EXACT,
        "int(Status.STALLED), int(Status.MAX_STEPS))",
        "int(Status.STALLED), int(Status.CONVERGED))",
        "strategy exact-ift",
        "test_a_budget_that_is_too_small_is_reported",
        "CONVERGED, but the equation is not solved",
    ),
    Fault(
        "a NaN cotangent called converged",
        EXACT,
        "status = xp.where(xp.isfinite(left), status, int(Status.NONFINITE))",
        "status = xp.where(xp.isfinite(left), status, int(Status.CONVERGED))",
        "strategy exact-ift",
        "test_a_bad_sample_changes_no_bit_of_its_neighbours",
        "has no answer",
    ),
    Fault(
        "Arnoldi without orthogonalisation",
        "deqcore.linear.norms",
        "    w = w - basis.combine(h)\n",
        "    w = w + 0 * basis.combine(h)\n",
        "strategy exact-ift",
        "test_an_exact_strategy_solves_the_adjoint_equation",
        "u = ",
        options={"direct": 0},  # a direct solve would mend it
    ),
    Fault(
        "a least-squares solution with the wrong sign",
        GMRES,
        "target = -k.null_vector[:, 1 : used + 1]",
        "target = k.null_vector[:, 1 : used + 1]",
        "strategy exact-ift",
        "test_an_exact_strategy_solves_the_adjoint_equation",
        "u = ",
    ),
    Fault(
        "an equation without solution called solved",
        "deqcore.backward.exact_ift",
        "converged = residual <= rtol * backend.to_accum_dtype(size)",
        "converged = backend.xp.isfinite(residual)",
        "strategy exact-ift",
        "test_an_equation_without_solution_is_reported",
        "status",
    ),
    Fault(
        "a term too few in the series",
        "deqcore.backward.neumann",
        "vjp(u), g, self.terms)",
        "vjp(u), g, self.terms - 1)",
        "strategy neumann",
        "test_vjps_are_counted",
        "5 vjps are reported, but vjp was called 4 times",
    ),
    Fault(
        "a series that forgets its first term",
        "deqcore.backward.neumann",
        "lambda u: g + vjp(u)",
        "lambda u: vjp(u)",
        "strategy neumann",
        "test_where_f_is_flat_the_cotangent_is_the_answer",
        "u for J = 0",
    ),
    Fault(
        "z detached in every unrolled step",
        "deqcore.backward.unrolled",
        "solver.step(backend, f, at.z, at.fz,",
        "solver.step(backend, f, backend.detach(at.z), backend.detach(at.fz),",
        "strategy unrolled",
        "test_its_gradient_is_that_of_its_steps",
        "gradient of the steps",
        backend="torch",
    ),
]

STRATEGIES += [
    Fault(
        "the norm of the inverse upside down",
        GMRES,
        "1.0 / least, xp.full_like(least",
        "1.0 * least, xp.full_like(least",
        "strategy broyden-reuse",
        "test_converged_means_what_the_options_promise",
        "CONVERGED with a target of 0.1",
    ),
    Fault(
        "a residual by recurrence, believed where rounding is all that is left",
        GMRES,
        "    if space.precondition is not None:\n        return x, k.residual\n",
        "    if space.precondition is None:\n        return x, k.residual\n",
        "strategy exact-ift",
        "test_an_equation_without_solution_is_reported",
        "CONVERGED without a solution",
    ),
    Fault(
        "a budget of vjps spent twice as fast",
        GMRES,
        "dimension=k.dimension + 1,",
        "dimension=k.dimension + 2,",
        "strategy broyden-reuse",
        "test_as_many_vjps_as_dimensions_are_enough",
        "as many vjps as there are dimensions|statuses",
    ),
    Fault(
        "a certificate of NaN",
        "deqcore.abc.backward",
        "a / xp.where(b == 0, xp.ones_like(b), b))",
        "xp.where(xp.isnan(b), 0 * b + 1 > 2, a / xp.where(b == 0, xp.ones_like(b), b)))",
        "strategy broyden-reuse",
        "test_a_bad_sample_changes_no_bit_of_its_neighbours",
        "NONFINITE",
        options=MEASURED,
    ),
]

SOLVERS = [
    Fault(
        "an opening that serves samples which have accelerated",
        "deqcore.solvers.plain_steps",
        "return state.progress.level == PLAIN",
        "return state.progress.level >= PLAIN",
        "solver auto",
        "test_an_opening_takes_the_steps_of_the_solver",
        "of an opening",
    ),
    Fault(
        "a method that forgets the least residual of its opening",
        "deqcore.solvers.plain_steps",
        "begun._replace(memory=",
        "begun._replace(progress=state.progress._replace(best=0 * state.size), memory=",
        "solver auto",
        "test_an_opening_takes_the_steps_of_the_solver",
        "after the step after it of an opening",
    ),
    Fault(
        "H instead of its transpose, in the estimate",
        LOWRANK,
        "s * matvec(self.backend, self.pairs, inner), self.steps",
        "s * vecmat(self.backend, inner, self.pairs), self.steps",
        "solver broyden",
        "test_the_transpose_is_the_transpose",
        "aᵀ",
    ),
    Fault(
        "left and right basis mixed up",
        LOWRANK,
        "self.right.combine(vecmat(self.backend, self.left.dot(v), self.kernel))",
        "self.left.combine(vecmat(self.backend, self.right.dot(v), self.kernel))",
        "solver anderson",
        "test_the_transpose_is_the_transpose",
        "aᵀ",
    ),
    Fault(
        "secant pairs off by one",
        BROYDEN,
        "pairs = pairs.append(xp.concat([c, y], axis=1))",
        "pairs = pairs.append(xp.concat([step, y], axis=1))",
        "solver broyden",
        "test_the_sharp_estimate_keeps_the_latest_pair",
        "H y = s",
    ),
    Fault(
        "the sign of y in the secant pairs",
        BROYDEN,
        "y, missed = newest - e_y,",
        "y, missed = e_y - newest,",
        "solver broyden",
        "test_the_latest_secant_equation_holds",
        "H y = s",
    ),
    Fault(
        "the difference taken from the wrong step",
        ANDERSON,
        "row = (target - state.target) *",
        "row = target *",
        "solver anderson",
        "test_the_latest_secant_equation_holds",
        "H y = s",
    ),
    Fault(
        "pairs overwritten instead of a restart",
        BROYDEN,
        "        if state.basis.may_be_full():\n",
        "        if False:\n",
        "solver broyden",
        "test_golden",
        "healthy samples ended as",
        options={"history_size": 5},
    ),
    Fault(
        "a state that is one step behind",
        ANDERSON,
        "residual=residual, norm=norm), length",
        "residual=state.residual, norm=norm), length",
        "solver anderson",
        "test_the_latest_secant_equation_holds",
        "H y = s",
    ),
    Fault(
        "products of residuals whose squares leave the range",
        BROYDEN,
        "        unit = row_scale(backend, norm, g)\n",
        "        unit = None\n",
        "solver broyden",
        "test_units_of_golden_problems",
        "healthy samples ended as",
    ),
    Fault(
        "an absolute ridge",
        ANDERSON,
        "xp.full_like(row, 1.0 + self.relative_ridge(backend.eps(row)))",
        "1.0 + 1e-4 * scale * scale",
        "solver anderson",
        "test_steps_do_not_depend_on_scale",
        "other units",
    ),
    Fault(
        "a residual that is not the true one",
        ANDERSON,
        "        return state.norm\n",
        "        return 0.5 * state.norm\n",
        "solver anderson",
        "test_the_residual_norm_is_that_of_the_iterate",
        "residual_norm",
    ),
    Fault(
        "float64 leaks into a float32 state",
        PICARD,
        "z = fz if self.damping",
        "z = backend.to_accum_dtype(fz) if self.damping",
        "solver picard",
        "test_steps_keep_structure_shapes_and_dtypes",
        "after step 1",
    ),
    Fault(
        "f(z) of another z",
        PICARD,
        "return z, f(z), state",
        "return z, fz, state",
        "solver picard",
        "test_a_step_returns_f_of_z",
        "that a step returns",
    ),
    Fault(
        "an evaluation that is not counted",
        PICARD,
        "return z, f(z), state",
        "return z, 0 * f(f(z)) + f(z), state",
        "solver picard",
        "test_f_is_evaluated_as_often_as_declared",
        "3 == 1|3",
    ),
    Fault(
        "a criterion met by growth",
        "deqcore.solve.termination",
        "    met = settled | (near & (at_start | absolute | (resolved & (proven | bottom))))\n",
        "    met = settled | (near & (at_start | absolute | (bottom == bottom)))\n",
        "solver broyden",
        "test_growth_of_the_iterate_meets_no_tolerance",
        "CONVERGED by growth",
    ),
    Fault(
        "an iterate so large that f(z) rounds to z",
        "deqcore.solve.termination",
        "    lost, hidden = limits.lost * size, limits.hidden * size\n",
        "    lost, hidden = 0.0 * size, 0.0 * size\n",
        "solver broyden",
        "test_growth_of_the_iterate_meets_no_tolerance",
        "CONVERGED by growth",
    ),
    Fault(
        "a refused step that leaves its difference behind",
        ANDERSON,
        "        informative = before != 0.0\n",
        "        informative = before == before\n",
        "solver anderson",
        "test_a_restarted_sample_begins_where_it_is_put",
        "restarted: step",
    ),
    Fault(
        "a refused step that is not forgotten",
        BROYDEN,
        "getattr(state, name).erase(rows) for name in _HISTORIES",
        "getattr(state, name) for name in _HISTORIES",
        "solver broyden",
        "test_a_restarted_sample_begins_where_it_is_put",
        "restarted",
    ),
    Fault(
        "a restart that takes a slot of a sample beside it",
        BROYDEN,
        "back = 0 if together else 2 * xp.astype(xp.any(crowded), xp.int32)",
        "back = 0",
        "solver broyden",
        "test_a_restarted_sample_begins_where_it_is_put",
        "restarted",
        options={"history_size": 3},
    ),
    Fault(
        "one sample's stop stops the batch",
        "deqcore.solve.host",
        "carry.status, count > self.spare, stopped == 0",
        "carry.status, stopped == 0, stopped == 0",
        "solver picard",
        "test_a_sample_is_solved_in_a_batch_as_alone",
        "alone",
    ),
    Fault(
        "samples that are done continue with the batch",
        "deqcore.solve.host",
        "        running = None if self.everyone else carry.status == int(Status.RUNNING)\n",
        "        running = None if self.everyone else carry.status >= int(Status.RUNNING)\n",
        "solver picard",
        "test_a_sample_is_solved_in_a_batch_as_alone",
        "alone",
    ),
    Fault(
        "a line search that lengthens the step",
        NEWTON,
        "length = 0.5 * t.length",
        "length = 2.0 * t.length",
        "solver newton-krylov",
        "test_golden",
        "off z\\*|healthy samples ended|evaluations",
    ),
    Fault(
        "a step that is refused twice and shortened once",
        BROYDEN,
        "max=1.0), 0.5 * length)",
        "max=1.0), xp.full_like(length, 0.5))",
        "solver broyden",
        "test_a_refused_step_is_tried_shorter",
        "and then tried at",
        options={"max_residual_growth": 2.0},
    ),
    Fault(
        "products that are not counted",
        NEWTON,
        "state.spent + inner.products + end.trials",
        "state.spent + end.trials",
        "solver newton-krylov",
        "test_evaluations_and_products_are_counted",
        "evaluations: reported",
    ),
    Fault(
        "an option that is not read",
        ANDERSON,
        "        if self.mixing != 1.0:\n",
        "        if self.mixing == 1.0:\n",
        "solver anderson",
        "test_every_number_among_its_options_matters",
        "mixing = 1.0 or any other value",
    ),
    Fault(
        "damping in the residual",
        "deqcore.solve.step",
        "        residual, size = residual_norms(backend, result.z, result.fz)\n",
        "        residual, size = 0.1 * backend.norm(result.fz - result.z), None\n",
        "solver picard",
        "test_golden",
        "are reported, but",
    ),
]

BACKENDS = [
    Fault(
        "a coupled row taken for a sample",
        NUMPY_AUTODIFF,
        "        if coupled_rows(self.backend, f, z) is None:\n",
        "        if np.array_equal(f(z)[1:], f(np.concatenate([z[:1] + 1e-3, z[1:]]))[1:]):\n",
        "backend numpy",
        "test_products_of_a_function_that_couples_rows",
        "where f couples rows",
    ),
    Fault(
        "a coupled row that no warning names",
        "deqcore.solve.adjoint_tally",
        "    if coupled:\n        if due(",
        "    if coupled and how == 'raise':\n        if due(",
        "backend numpy",
        "test_a_backward_pass_that_cannot_be_right_reaches_the_user",
        "CoupledRowsWarning is missing",
    ),
    Fault(
        "a failed adjoint solve without a warning",
        "deqcore.solve.adjoint_tally",
        "    elif failed:\n",
        "    elif failed and how == 'raise':\n",
        "backend numpy",
        "test_a_backward_pass_that_cannot_be_right_reaches_the_user",
        "ConvergenceWarning is missing",
    ),
    Fault(
        "a transposed vjp",
        NUMPY_AUTODIFF,
        '"bij,bi->bj", blocks, u',
        '"bij,bj->bi", blocks, u',
        "backend numpy",
        "test_linearize_gives_the_value_and_the_transposed_product",
        "not J u",
    ),
    Fault(
        "mask arithmetic",
        "deqcore.abc.backend",
        "        return self.xp.where(self.xp.reshape(mask, (-1, *[1] * (new.ndim - 1))), new, old)\n",
        "        m = self.xp.reshape(mask, (-1, *[1] * (new.ndim - 1)))\n        return m * new + (1 - m) * old\n",
        "backend numpy",
        "test_rows_are_selected_without_arithmetic",
        "must choose, not multiply",
    ),
    Fault(
        "an absolute step",
        DIFFERENCES,
        "        first = START * self.unit(dx=search.dx)\n",
        "        first = START * self.unit(dx=search.dx) ** 0\n",
        "backend numpy",
        "test_derivatives_in_other_units",
        "a unit s for each sample|not reliable",
    ),
    Fault(
        "the cotangent of the last input dropped",
        NUMPY_AUTODIFF,
        "            if not self.be.is_array(leaf) or not np.issubdtype(leaf.dtype, np.inexact):\n",
        "            if not self.be.is_array(leaf) or leaf.dtype.kind != 'f' or 0 < i == len(leaves) - 1:\n",
        "backend numpy",
        "test_vjp_of_an_argument_that_is_not_used_is_zero",
        "",
    ),
    Fault(
        "norms over the batch",
        NUMPY,
        "guarded_norm(self, v, np.linalg.norm(v.astype(dtype, copy=False), axis=1))\n",
        "guarded_norm(self, v, np.linalg.norm(v.astype(dtype, copy=False), axis=1)) + 0 * v.sum()\n",
        "backend numpy",
        "test_a_bad_sample_changes_no_bit_of_its_neighbours",
        "depends on its neighbour",
    ),
    Fault(
        "unscaled norms in the core",
        "deqcore.abc.scaling",
        "    return be.cond(~safe, again, plain_norm)\n",
        "    return plain_norm\n",
        "backend numpy",
        "test_norms_of_any_scale",
        "norms over true ones",
    ),
    Fault(
        "unscaled norms in a backend",
        TORCH,
        "            return guarded_norm(self, v, norms)\n",
        "            return norms\n",
        "backend torch",
        "test_norms_of_any_scale",
        "norms over true ones",
        backend="torch",
    ),
    Fault(
        "inner products in the state's dtype",
        "deqcore.abc.backend",
        "self.xp.sum(self.to_accum_dtype(a) * self.to_accum_dtype(b), axis=1)",
        "self.xp.sum(a * b, axis=1)",
        "backend numpy",
        "test_inner_products_are_wide",
        "float32",
    ),
    Fault(
        "a singular system solved by zeros",
        NUMPY,
        "return np.full_like(b, np.nan)",
        "return np.zeros_like(b)",
        "backend numpy",
        "test_a_singular_system_spoils_its_own_row_only",
        "must not give finite numbers",
    ),
    Fault(
        "a step above the budget",
        "deqcore.abc.backend",
        "for step in range(int(steps)):",
        "for step in range(int(steps) + 1):",
        "backend numpy",
        "test_a_loop_never_exceeds_its_steps",
        "",
    ),
    Fault(
        "a ring that sticks at its end",
        HISTORY,
        "        slot = self.written % self.history_size\n",
        "        slot = min(self.written, self.history_size - 1)\n",
        "backend numpy",
        "test_a_history_does_what_a_dictionary_does",
        "dot|count",
    ),
    Fault(
        "frozen rows written to",
        HISTORY,
        "            self.storage[self.active, slot] = v[self.active]\n",
        "            self.storage[:, slot] = v\n",
        "backend numpy",
        "test_a_history_does_what_a_dictionary_does",
        "dot|combine",
    ),
    Fault(
        "coefficients of slots that a sample does not see",
        HISTORY,
        "c = np.where(self.seen, coefficients, 0.0)",
        "c = np.where(self.seen | True, coefficients, 0.0)",
        "backend numpy",
        "test_a_history_does_what_a_dictionary_does",
        "combine",
    ),
    Fault(
        "a copy that shares its storage",
        HISTORY,
        "NumpyHistory(self.storage.copy(), self.seen",
        "NumpyHistory(self.storage, self.seen",
        "backend numpy",
        "test_continuing_leaves_a_copy_alone",
        "storage of its own",
    ),
    Fault(
        "a graph that can be used once",
        TORCH_AUTODIFF,
        "retain_graph=True, create_graph=create_graph, allow_unused=True",
        "create_graph=create_graph, allow_unused=True",
        "backend torch",
        "test_linearize_gives_the_value_and_the_transposed_product",
        "second time",
        backend="torch",
    ),
    Fault(
        "norms of a narrow state in its own dtype",
        TORCH,
        "vector_norm(v, dim=1, dtype=torch.float32 if narrow else None)",
        "vector_norm(v, dim=1)",
        "backend torch",
        "test_norms_of_narrow_states_are_wide",
        "bfloat16|norm of",
        backend="torch",
    ),
    Fault(
        "products J v that no gradient passes",
        PRODUCTS,
        "    with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():\n",
        "    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():\n",
        "solver newton-krylov",
        "test_steps_can_be_differentiated_through",
        "gradient through two steps",
        backend="torch",
    ),
    Fault(
        "late f",
        AUTOGRAD,
        "    value: Tensor = _Attach.apply(y, z, forward.z, job, *tensors_outside)\n",
        "    late = torch.enable_grad()(lambda y, z, g: _Job.solve_adjoint(job, f(z, *args), z, g))\n"
        "    job.solve_adjoint = late\n"
        "    value: Tensor = _Attach.apply(y, z, forward.z, job, *tensors_outside)\n",
        "backend torch",
        "test_what_f_reads_is_what_it_was_at_the_call",
        "has changed since the call",
        backend="torch",
    ),
    Fault(
        "a product that does not depend on its vector",
        SECOND,
        "        if not torch.is_grad_enabled():\n",
        "        if True:\n",
        "backend torch",
        "test_hessian_vector_products_by_two_backward_passes",
        "d/dv of",
        backend="torch",
    ),
    Fault(
        "functions count as constants",
        "deqcore.solve.opaque",
        "type(None), type, ModuleType)",
        "type(None), type, ModuleType, FunctionType)",
        "backend numpy",
        "test_arguments_whose_arrays_would_be_lost_are_refused",
        "DID NOT RAISE",
        backend="numpy",
    ),
    Fault(
        "derived attributes are forgotten",
        "deqcore.solve.opaque",
        "        if key not in given and _holds(backend, value):\n",
        "        if False:\n",
        "backend numpy",
        "test_arguments_whose_arrays_would_be_lost_are_refused",
        "DID NOT RAISE",
        backend="numpy",
    ),
    Fault(
        "double path",
        SECOND,
        "    return [gradients.get(edge) for edge in wanted]\n",
        "    return list(torch.autograd.grad(\n"
        "        outputs, sources, cotangents, create_graph=create_graph, retain_graph=True, allow_unused=True\n"
        "    ))\n",
        "backend torch",
        "test_each_path_counts_once_where_arguments_depend_on_each_other",
        "each path counts once",
        backend="torch",
    ),
    Fault(
        "arguments whose gradient is lost",
        "deqcore.solve.call",
        "    trees, closed = opened(plan.backend, args)\n",
        "    trees, closed = args, lambda trees: trees\n",
        "backend numpy",
        "test_arguments_in_a_dataclass_get_their_gradient",
        "NoneType",
        backend="numpy",
    ),
]

POINTS = [
    Fault(
        "value for iterate",
        NUMPY_AUTODIFF,
        "        return forward.z, forward, None",
        "        return forward.fz, forward, None",
        "backend numpy",
        "test_the_value_is_the_iterate_that_is_reported",
        "the residual of the value",
    ),
    Fault(
        "value for iterate, where gradients are recorded",
        "deqcore_torch.autograd",
        "_Attach.apply(y, z, forward.z, job, *tensors_outside)",
        "_Attach.apply(y, z, forward.fz, job, *tensors_outside)",
        "backend torch",
        "test_the_value_is_the_iterate_that_is_reported",
        "the residual of the value",
        backend="torch",
    ),
    Fault(
        "a unit that runs again because a later one does",
        "deqcore.solve.coupled",
        "        resumed = held & (residual > goal(xp, self.limits, size, carry.reference))\n",
        "        resumed = held\n",
        "solver picard",
        "test_a_later_unit_changes_no_earlier_one",
        "the last unit changed",
    ),
    Fault(
        "coefficients of the adjoint solve for each coupled unit alone",
        "deqcore.solve.plan",
        "        units = self.control.units\n",
        "        units = 1\n",
        "strategy exact-ift",
        "test_the_gradient_of_coupled_units",
        "the gradient of coupled units: off by",
    ),
    Fault(
        "stale state",
        "deqcore.solve.loop",
        "    first = written(backend, _begin_at(backend, z, f(z), limits))\n",
        "    first = written(backend, _begin_at(backend, z, old.best_fz, limits))\n",
        "solver picard",
        "test_a_state_of_another_problem_is_a_warm_start",
        "stale state",
    ),
    Fault(
        "a history that continues with the vectors of another problem",
        "deqcore_numpy.history",
        "        self.storage[rows] = other.storage[rows]\n",
        "",
        "backend numpy",
        "test_some_samples_continue_with_a_later_history",
        "dot",
    ),
    Fault(
        "a small row of a cotangent lost beside a large one",
        "deqcore.solve.adjoint",
        "    return xp.sqrt(most) * xp.sqrt(least)\n",
        "    return most\n",
        "strategy phantom",
        "test_a_small_row_of_a_cotangent_counts_beside_a_large_one",
        "gradient of rows in other units",
        backend="torch",
    ),
    Fault(
        "frozen derivative",
        "deqcore.backward.unrolled",
        "    z, fz = backend.select(kept, at.z, chord), backend.select(kept, at.fz, value)\n",
        "    z, fz = at.z, at.fz\n",
        "strategy unrolled",
        "test_a_derivative_is_not_frozen_with_its_value",
        "frozen derivative",
        backend="torch",
    ),
]

FAULTS = [*STRATEGIES, *SOLVERS, *BACKENDS, *POINTS]
