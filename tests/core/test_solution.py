"""What a solve returns: statuses as numbers and sentences, the summary, the properties."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.solution import summarize
from deqcore.types import Status


def test_a_status_is_an_integer_and_a_sentence():
    assert [int(status) for status in Status] == [0, 1, 2, 3, 4, 5, 6]
    for status in Status:
        assert status.sentence.endswith(".")
        assert len(status.sentence) > 20


@pytest.mark.parametrize(
    ("status", "cause", "remedies"),
    [
        (Status.CONVERGED, "met the tolerance", []),
        (Status.MAX_STEPS, "step budget was spent", ["forward.max_steps", "forward.rtol", "broyden"]),
        (Status.STALLED, "stopped falling", ["dtype", "forward.rtol", "solver"]),
        (Status.DIVERGED, "grew far above", ["not a contraction", "damp", "newton-krylov"]),
        (Status.NONFINITE, "NaN or inf", ["best finite iterate", "overflow", "dtype"]),
    ],
)
def test_sentences_name_cause_and_remedy(status, cause, remedies):
    assert cause in status.sentence
    for remedy in remedies:
        assert remedy in status.sentence


@pytest.mark.parametrize("solver", ["broyden", "anderson", "newton-krylov"])
@pytest.mark.parametrize("status", [Status.MAX_STEPS, Status.STALLED, Status.DIVERGED])
def test_the_solver_in_use_is_not_recommended(status, solver):
    used = plugins.make_solver(solver, {})
    others = {"broyden", "anderson", "newton-krylov"} - {solver}
    for given in (solver, repr(used)):
        advice = status.advice(given)
        assert solver not in advice
        assert all(other in advice for other in others)
    assert ("max_residual_growth" in Status.DIVERGED.advice(repr(used))) == (solver == "broyden")
    assert "max_residual_growth" not in Status.DIVERGED.advice(
        "Broyden(history_size=39, max_residual_growth=2.0, history_dtype=None)"
    )


def test_the_warning_of_a_solve_does_not_recommend_its_solver():
    with pytest.warns(deqcore.errors.ConvergenceWarning, match="DIVERGED.*Use anderson or newton-krylov, damp"):
        deqcore.fixed_point(lambda z: z + 1.0 + 0.5 * np.tanh(z), np.zeros((2, 3)), forward__solver="broyden")


def test_the_summary_has_one_line_per_status_with_its_numbers():
    status = np.array([1, 2, 2, 5])
    text = summarize(status, np.array([1e-7, 0.25, 0.5, 3.0]), np.array([4, 40, 39, 2]))
    lines = text.split("\n")
    assert len(lines) == 3
    assert lines[0].startswith("1 of 4 samples CONVERGED after at most 4 steps, residual ‖f(z) − z‖ at most 1e-07.")
    assert lines[1].startswith("2 of 4 samples MAX_STEPS after at most 40 steps, residual ‖f(z) − z‖ at most 0.5.")
    assert Status.MAX_STEPS.sentence in lines[1]
    assert lines[2].startswith("1 of 4 samples NONFINITE after at most 2 steps, residual ‖f(z) − z‖ at most 3.")


def test_the_summary_of_nothing():
    nothing = np.zeros(0)
    assert summarize(nothing, nothing, nothing) == "The batch is empty."


def test_a_printed_adjoint_report_is_a_line_per_status(be):
    columns = [[1, 1, 2], [3, 4, 9], [1e-6, 2e-6, 0.5], [float("nan")] * 3, [False, False, True]]
    report = deqcore.AdjointReport(*(be.asarray(np.array(column)) for column in columns))
    assert str(report).split("\n") == [
        "2 of 3 samples CONVERGED after at most 4 vjps, adjoint residual at most 2e-06.",
        "1 of 3 samples MAX_STEPS after at most 9 vjps, adjoint residual at most 0.5; 1 got the fallback.",
    ]
    assert str(report._replace(error=report.residual)).count("estimated error at most 0.5;") == 1
    assert str(deqcore.AdjointReport(*(leaf[:0] for leaf in report[:5]))) == "The batch is empty."


def test_an_adjoint_report_in_traced_code_shows_its_fields():
    jax = pytest.importorskip("jax")
    shown = []
    jax.jit(lambda x: shown.append(repr(deqcore.AdjointReport(x, x, x, x, x))))(np.ones(2))
    assert shown[0].startswith("AdjointReport(status=")
    assert ", fallback=" in shown[0]


def test_a_solution_says_per_sample_what_happened(be):
    rates = be.asarray(np.array([[0.1], [0.99]]))
    sol = deqcore.fixed_point(
        lambda z: rates * z + 1,
        be.asarray(np.zeros((2, 3))),
        forward__solver="picard",
        forward__rtol=1e-6,
        forward__max_steps=20,
        forward__on_failure="ignore",
    )
    assert be.to_numpy(sol.converged).tolist() == [True, False]
    assert be.to_numpy(sol.status).tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    assert be.to_numpy(sol.steps).tolist() == [6, 20]
    assert be.to_numpy(sol.evaluations).tolist() == [7, 21]
    assert be.to_numpy(sol.residual)[1] == pytest.approx(np.sqrt(3) * 0.99**20, rel=1e-9)
    assert str(sol.status.dtype).endswith("int32")
    assert sol.backward is None
    assert "1 of 2 samples CONVERGED" in sol.summary()
    with pytest.raises(dataclasses.FrozenInstanceError):
        sol.value = None
    assert "backend" not in repr(sol)
    assert "Carry" not in repr(sol)


def test_warnings_begin_with_what_failed_and_become_rare():
    def f(z):
        return np.array([[0.1], [0.999]]) * z + 1

    shown = []
    for _ in range(25):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            deqcore.fixed_point(f, np.zeros((2, 1)), forward__solver="picard", forward__max_steps=12)
        shown += caught
    texts = [str(each.message) for each in shown]
    assert len(texts) == 2  # the 1st and the 10th
    assert all(text.startswith("1 of 2 samples MAX_STEPS") for text in texts)
    assert "10th solve" in texts[1]
    assert all(each.filename == __file__ for each in shown)


def test_the_printed_form_of_a_solution_is_its_summary(be):
    sol = deqcore.fixed_point(lambda z: 0.5 * z + 1, be.asarray(np.zeros((2, 3))))
    assert repr(sol) == f"Solution(value of shape (2, 3))\n{sol.summary()}"
