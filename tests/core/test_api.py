"""`fixed_point`, `vjp` and `get_backend` as a user calls them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import deqcore
from deqcore.errors import (
    BackendMismatchError,
    ConfigError,
    ConvergenceError,
    ConvergenceWarning,
    DtypeToleranceWarning,
    InitialIterateError,
    ProblemError,
    StrategyError,
    UnknownNameError,
)
from deqcore.linear.norms import default_rtol
from deqcore.types import Status

SLOW = {"forward__solver": "picard", "forward__max_steps": 3, "forward__rtol": 1e-6}


def zeros(be, *shape, dtype="float64"):
    return be.asarray(np.zeros(shape), dtype=dtype)


def half(z):
    return 0.5 * z + 1.0


# -- values -----------------------------------------------------------------------------------------------------


def test_the_value_is_f_at_the_best_iterate_with_the_shape_of_z0(be):
    z0 = zeros(be, 2, 3, 4)
    sol = deqcore.fixed_point(half, z0, forward__rtol=1e-10)
    assert tuple(sol.value.shape) == (2, 3, 4)
    assert be.to_numpy(sol.value) == pytest.approx(np.full((2, 3, 4), 2.0), rel=1e-9)
    assert be.dtype_name(sol.value) == "float64"


@pytest.mark.parametrize("batch", [True, False])
def test_trees_are_solved_as_one_vector(be, batch):
    z0 = {"a": zeros(be, 2, 3), "b": [zeros(be, 2, 1), zeros(be, 2, 2, 2)]}

    def f(z, scale):
        mean = be.xp.sum(z["a"], axis=1, keepdims=True) / 3
        return {"a": 0.5 * z["a"] + z["b"][0] * scale, "b": [0.25 * mean + 1.0, 0.1 * z["b"][1] - 1.0]}

    sol = deqcore.fixed_point(f, z0, 0.5, forward__rtol=1e-11, forward__batch=batch)
    # a = b₀ (a = a/2 + b₀/2), b₀ = a/4 + 1 = 4/3, b₁ = −1/0.9
    assert be.to_numpy(sol.value["a"]) == pytest.approx(np.full((2, 3), 4 / 3), rel=1e-9)
    assert be.to_numpy(sol.value["b"][0]) == pytest.approx(np.full((2, 1), 4 / 3), rel=1e-9)
    assert be.to_numpy(sol.value["b"][1]) == pytest.approx(np.full((2, 2, 2), -1 / 0.9), rel=1e-9)
    assert tuple(sol.status.shape) == ((2,) if batch else (1,))


def test_without_a_batch_a_vector_and_a_scalar_are_states(be):
    sol = deqcore.fixed_point(half, zeros(be, 3), forward__batch=False)
    assert tuple(sol.value.shape) == (3,)
    assert tuple(sol.residual.shape) == (1,)
    sol = deqcore.fixed_point(half, be.asarray(np.array(0.0)), forward__batch=False)
    assert tuple(sol.value.shape) == ()
    assert float(sol.value) == pytest.approx(2.0, rel=1e-6)


def test_one_system_couples_all_rows(be, truth):
    """With batch = false one residual counts: a converged row continues with the others."""
    rates = be.asarray(np.array([[0.0], [0.9]]))
    f = lambda z: rates * z + 1.0
    apart = deqcore.fixed_point(f, zeros(be, 2, 1), forward__solver="picard", forward__rtol=1e-3, forward__max_steps=99)
    whole = deqcore.fixed_point(
        f, zeros(be, 2, 1), forward__solver="picard", forward__rtol=1e-3, forward__max_steps=99, forward__batch=False
    )
    assert be.to_numpy(apart.steps).tolist()[0] == 1
    trace = truth.picard(lambda z: np.array([0.0, 0.9]) * z + 1.0, np.zeros(2), 1e-3)
    assert be.to_numpy(whole.steps).tolist() == [len(trace) - 1]


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 3)])
def test_batches_of_none_and_one(be, solver, shape):
    sol = deqcore.fixed_point(half, zeros(be, *shape), forward__solver=solver)
    assert tuple(sol.value.shape) == shape
    assert be.to_numpy(sol.value) == pytest.approx(np.full(shape, 2.0), rel=1e-4)
    assert sol.summary() == "The batch is empty." or "1 of 1 samples CONVERGED" in sol.summary()


def test_the_state_given_is_not_changed(be):
    z0 = zeros(be, 2, 3)
    deqcore.fixed_point(half, z0)
    assert not be.to_numpy(z0).any()


def test_tolerances_are_what_the_dtype_can_reach(be):
    for dtype, expected in (("float64", 1.5e-8), ("float32", 1e-4), ("float16", 2e-3)):
        assert default_rtol(be, zeros(be, 1, 1, dtype=dtype)) == pytest.approx(expected, rel=0.03)
        sol = deqcore.fixed_point(half, zeros(be, 1, 4, dtype=dtype))
        assert be.to_numpy(sol.converged).all()
        residual, value = float(be.to_numpy(sol.residual)[0]), be.to_numpy(sol.value).astype(float)
        assert residual <= expected * 1.03 * np.linalg.norm(value)


# -- failure ----------------------------------------------------------------------------------------------------


def test_failure_warns_with_numbers_and_the_settings_to_change(be):
    with pytest.warns(ConvergenceWarning) as caught:
        deqcore.fixed_point(lambda z: 0.9 * z + 1, zeros(be, 2, 3), **SLOW)
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename == __file__  # it points at the user's line
    assert text.startswith(
        "2 of 2 samples MAX_STEPS after at most 3 steps, residual ‖f(z) − z‖ at most 1.26."
    )  # √3·0.9³
    for word in ("forward.max_steps = 3", "solver 'picard'", "forward.rtol = 1e-06", "forward.on_failure = 'warn'"):
        assert word in text


def test_failure_raises_if_asked_to(be):
    rates = be.asarray(np.array([[0.0], [0.9]]))
    with pytest.raises(ConvergenceError, match=r"1 of 2 samples MAX_STEPS .*forward\.max_steps"):
        deqcore.fixed_point(lambda z: rates * z + 1, zeros(be, 2, 3), forward__on_failure="raise", **SLOW)


def test_failure_is_ignored_if_asked_to_and_success_is_silent(be):
    deqcore.fixed_point(lambda z: 0.9 * z + 1, zeros(be, 2, 3), forward__on_failure="ignore", **SLOW)
    deqcore.fixed_point(half, zeros(be, 2, 3), forward__on_failure="raise")


def test_every_failing_status_is_in_the_message(be):
    def f(z):
        return be.xp.concat([3 * z[:1] + 1, z[1:2] * float("nan"), half(z[2:])], axis=0)

    with pytest.warns(ConvergenceWarning) as caught:
        deqcore.fixed_point(f, be.asarray(np.ones((3, 2))), forward__solver="picard")
    text = str(caught[0].message)
    for status in (Status.DIVERGED, Status.NONFINITE, Status.CONVERGED):
        assert f"1 of 3 samples {status.name}" in text
        assert status.sentence in text


def test_vjp_reports_a_failed_forward_solve(be):
    z0 = zeros(be, 1, 2)
    f = lambda z, x: 0.9 * z + x
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        deqcore.vjp(f, z0, z0 + 1.0, cotangent=z0 + 1.0, **SLOW)
    with pytest.raises(ConvergenceError):
        deqcore.vjp(f, z0, z0 + 1.0, cotangent=z0 + 1.0, forward__on_failure="raise", **SLOW)


@pytest.mark.parametrize("harm", ["nan", "inf"])
@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "jacobian-free", "neumann"])
def test_a_bad_sample_warns_of_itself_and_of_nothing_else(be, strategy, harm):
    """NaN in sample 1 leaves sample 0 and the shared parameter with finite gradients, and no stray warnings."""
    calls = []

    def f(z, a):
        calls.append(1)
        out = a * be.xp.tanh(z) + be.asarray(np.array([[1.0], [2.0]]))
        if 3 <= len(calls) <= 30 and len(calls) != 7:
            return out + be.asarray(np.array([[0.0], [float(harm)]]))
        return out

    z0 = zeros(be, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        deqcore.vjp(f, z0, be.asarray(np.array(0.5)), cotangent=z0 + 1.0, backward__strategy=strategy)


# -- going on ---------------------------------------------------------------------------------------------------


def test_a_state_continues_a_solve(be):
    rates = be.asarray(np.array([[0.8], [0.5]]))
    f = lambda z: rates * z + be.asarray(np.arange(4.0))
    settings = {"forward__rtol": 1e-10, "forward__solver": "picard", "forward__on_failure": "ignore"}
    z0 = zeros(be, 2, 4)
    first = deqcore.fixed_point(f, z0, forward__max_steps=20, **settings)
    assert be.to_numpy(first.status).tolist() == [Status.MAX_STEPS] * 2
    rest = deqcore.fixed_point(f, z0, state=first.state, forward__max_steps=100, **settings)
    whole = deqcore.fixed_point(f, z0, forward__max_steps=120, **settings)
    assert be.to_numpy(rest.converged).all()
    assert np.array_equal(be.to_numpy(rest.steps), be.to_numpy(whole.steps))
    assert np.array_equal(be.to_numpy(rest.value), be.to_numpy(whole.value))
    again = deqcore.fixed_point(f, z0, state=rest.state, forward__max_steps=100, **settings)
    assert np.array_equal(be.to_numpy(again.steps), be.to_numpy(rest.steps))  # nothing was left to do


def test_a_tighter_tolerance_goes_on_from_where_it_stood(be):
    z0 = zeros(be, 1, 4)
    first = deqcore.fixed_point(half, z0, forward__rtol=1e-2, forward__solver="picard")
    rest = deqcore.fixed_point(half, z0, state=first.state, forward__rtol=1e-9, forward__solver="picard")
    direct = deqcore.fixed_point(half, z0, forward__rtol=1e-9, forward__solver="picard")
    assert int(first.steps[0]) < int(rest.steps[0]) == int(direct.steps[0])
    assert np.array_equal(be.to_numpy(rest.value), be.to_numpy(direct.value))


def test_a_state_must_fit(be):
    z0 = zeros(be, 2, 3)
    sol = deqcore.fixed_point(half, z0, forward__solver="anderson")
    with pytest.raises(InitialIterateError, match=r"solver of this call, Picard\(.*\(got Anderson\(.*z0 = sol.value"):
        deqcore.fixed_point(half, z0, state=sol.state, forward__solver="picard")
    options = {"history_size": 3}
    with pytest.raises(
        InitialIterateError, match=r"solver of this call, Anderson\(history_size=3.*got Anderson\(history_size=6"
    ):
        deqcore.fixed_point(half, z0, state=sol.state, forward__solver="anderson", forward__options=options)
    with pytest.raises(InitialIterateError, match=r"raveled shape \(4, 3\) of z0 \(got \(2, 3\)\)"):
        deqcore.fixed_point(half, zeros(be, 4, 3), state=sol.state, forward__solver="anderson")
    with pytest.raises(InitialIterateError, match="solve of float32 arrays of .* .got .*float64"):
        deqcore.fixed_point(half, zeros(be, 2, 3, dtype="float32"), state=sol.state, forward__solver="anderson")


def test_a_state_of_another_framework_is_refused():
    pytest.importorskip("torch")
    numpy, torch = (deqcore.get_backend(backend=name) for name in ("numpy", "torch"))
    sol = deqcore.fixed_point(half, zeros(numpy, 2, 3))
    with pytest.raises(
        InitialIterateError, match=r"a solve of float64 arrays of torch, like z0 .got numpy.ndarray of float64"
    ):
        deqcore.fixed_point(half, zeros(torch, 2, 3), state=sol.state)


# -- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (
            {"forward__solver": "broydn"},
            UnknownNameError,
            ["No solver", "'broydn'", "Did you mean 'broyden'?", "picard"],
        ),
        ({"backward__strategy": "exact_ift"}, UnknownNameError, ["No strategy", "Did you mean 'exact-ift'?"]),
        ({"backend": "pytorch"}, UnknownNameError, ["No backend", "Did you mean 'torch'?"]),
        (
            {"forward__options": {"history_sise": 3}},
            ConfigError,
            ["no option 'history_sise'", "Did you mean 'history_size'?"],
        ),
        ({"backward__options": {"rtoll": 3.0}}, ConfigError, ["no option 'rtoll'", "Did you mean 'rtol'?"]),
        (
            {"forward__solver": "broyden", "forward__options": {"memory": 3}},
            ConfigError,
            ["no option 'memory'", "Did you mean 'history_size'?"],
        ),
        (
            {"forward__solver": "broyden", "forward__options": {"growth": 3}},
            ConfigError,
            ["no option 'growth'", "Did you mean 'max_residual_growth'?"],
        ),
        (
            {
                "forward__solver": "broyden",
                "backward__strategy": "broyden-reuse",
                "backward__options": {"target": 0.1},
            },
            ConfigError,
            ["no option 'target'", "Did you mean 'max_relative_error'?"],
        ),
        ({"forward__rtoll": 1e-3}, ConfigError, ["rtoll", "Did you mean 'forward__rtol'?"]),
        ({"backward__solver": "picard"}, ConfigError, ["backward__solver", "Did you mean 'forward__solver'?"]),
        ({"forward__strategy": "phantom"}, ConfigError, ["forward__strategy", "Did you mean 'backward__strategy'?"]),
        ({"forward__rtol": -1e-3}, ConfigError, ["rtol must be", "(got -0.001)", "finite number >= 0"]),
        ({"forward__rtol": float("nan")}, ConfigError, ["rtol must be", "(got nan)", "finite number >= 0"]),
        ({"forward__atol": -1.0}, ConfigError, ["atol must be", "(got -1.0)"]),
        ({"forward__max_steps": -1}, ConfigError, ["max_steps must be", "(got -1)", "integer >= 0"]),
        ({"forward__check_every": 0}, ConfigError, ["check_every must be", "(got 0)", "integer >= 1"]),
        ({"forward__on_failure": "shout"}, ConfigError, ["'shout'", "'raise', 'warn' or 'ignore'"]),
        ({"backward__options": {"rtol": 1.0}}, ConfigError, ["rtol must be", "below 1 (got 1.0)"]),
        ({"backward__options": {"max_steps": -1}}, ConfigError, ["max_steps must be", "(got -1)"]),
        ({"backward__options": {"start": "warm"}}, ConfigError, ["'warm'", "cotangent"]),
        ({"backward__options": {"options": {"history_size": 3}}}, ConfigError, ["history_size", "reorthogonalize"]),
        (
            {"backward__options": {"solver": "gmress"}},
            UnknownNameError,
            ["No solver", "'gmress'"],
        ),
    ],
)
def test_bad_settings_are_refused_before_f_is_called(be, overrides, error, words):
    calls = []
    with pytest.raises(error) as caught:
        deqcore.fixed_point(lambda z: calls.append(1), zeros(be, 1, 2), **overrides)
    assert not calls
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("strategy", ["broyden-reuse", "exact-ift"])
def test_reuse_needs_a_solver_that_leaves_an_estimate(be, strategy):
    options = {"start": "reuse"} if strategy == "exact-ift" else {}
    with pytest.raises(StrategyError) as caught:
        deqcore.fixed_point(
            half, zeros(be, 1, 2), forward__solver="picard", backward__strategy=strategy, backward__options=options
        )
    for word in (repr(strategy), "'picard'", "anderson, auto, broyden"):
        assert word in str(caught.value)


def test_a_config_that_names_another_backend_says_who_asked(be, monkeypatch):
    other = {"numpy": "torch", "torch": "numpy"}[be.name]
    with pytest.raises(BackendMismatchError) as caught:
        deqcore.fixed_point(half, zeros(be, 1, 2), backend=other)
    assert f"backend = '{other}' (set by the call)" in str(caught.value)
    assert f"belong to '{be.name}'" in str(caught.value)
    monkeypatch.setenv("DEQCORE_BACKEND", other)
    with pytest.raises(BackendMismatchError, match="set by environment variable DEQCORE_BACKEND"):
        deqcore.fixed_point(half, zeros(be, 1, 2))
    config = deqcore.Config(backend=other)
    with pytest.raises(BackendMismatchError, match=r"set by Config\(...\)"):
        deqcore.fixed_point(half, zeros(be, 1, 2), config=config)


def test_arrays_of_two_frameworks_are_refused():
    torch = pytest.importorskip("torch")
    f = lambda z, x: z
    with pytest.raises(BackendMismatchError, match=r"'numpy' .*the arrays belong to 'torch'"):
        deqcore.fixed_point(f, np.zeros((1, 2)), torch.zeros(1, 2))
    with pytest.raises(InitialIterateError, match="must be arrays of torch .got a ndarray"):
        deqcore.fixed_point(f, [torch.zeros(1, 2), np.zeros((1, 2))], 0)


def test_a_state_without_arrays_is_refused():
    for z0 in ([0.0, 1.0], 3.0, {}, None, "zeros"):
        with pytest.raises(InitialIterateError, match=r"must hold (arrays|at least one array)|must be arrays of"):
            deqcore.fixed_point(half, z0)
    with pytest.raises(InitialIterateError, match="must be arrays of .* .got a float"):
        deqcore.fixed_point(half, [1.0, 2.0], backend="numpy")


def test_an_unfit_state_or_f_is_refused(be):
    with pytest.raises(InitialIterateError, match=r"one system|int64"):
        deqcore.fixed_point(half, be.asarray(np.zeros((2, 2), int)))
    with pytest.raises(InitialIterateError, match=r"Reshape it to \(batch, n\), or set forward.batch = false"):
        deqcore.fixed_point(half, zeros(be, 4))
    with pytest.raises(ProblemError, match="keep the shape of z"):
        deqcore.fixed_point(lambda z: z[:, :1], zeros(be, 2, 2))
    with pytest.raises(ProblemError, match=r"dtype of z, (float64 \(got float32\)|float32 \(got float64\))"):
        deqcore.fixed_point(lambda z: be.astype(z, "float32"), zeros(be, 2, 2))
    wide = be.asarray(np.ones((2, 2)))
    with pytest.raises(ProblemError, match="dtype of z, float32 .got float64"):
        deqcore.fixed_point(lambda z: 0.5 * z + wide, zeros(be, 2, 2, dtype="float32"))


@pytest.mark.parametrize(("dtype", "rtol", "warns"), [("float32", 1e-8, True), ("float32", 1e-6, False)])
def test_a_tolerance_below_the_dtype_is_announced(be, dtype, rtol, warns):
    settings = {"forward__rtol": rtol, "forward__on_failure": "ignore"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deqcore.fixed_point(half, zeros(be, 1, 3, dtype=dtype), **settings)
    found = [w for w in caught if issubclass(w.category, DtypeToleranceWarning)]
    assert bool(found) is warns
    if warns:
        assert found[0].filename == __file__
        for word in ("forward.rtol = 1e-08", "float32", "1e-07", "wider dtype"):
            assert word in str(found[0].message)


def test_steps_without_a_tolerance_are_not_announced(be):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = deqcore.fixed_point(
            lambda z: 0.9 * z + 1,
            zeros(be, 1, 3),
            forward__solver="picard",
            forward__rtol=0.0,
            forward__max_steps=5,
            forward__on_failure="ignore",
        )
    assert be.to_numpy(sol.steps).tolist() == [5]


def test_framework_scalars_are_settings_and_are_range_checked(be):
    z0 = zeros(be, 1, 3)
    sol = deqcore.fixed_point(
        lambda z: 0.5 * z + 1.0,
        z0,
        forward__rtol=be.asarray(np.array(1e-3)),
        forward__max_steps=be.asarray(np.array(50)),
        forward__solver="picard",
    )
    same = deqcore.fixed_point(half, z0, forward__rtol=1e-3, forward__max_steps=50, forward__solver="picard")
    assert be.to_numpy(sol.steps).tolist() == be.to_numpy(same.steps).tolist()
    for name, bad in (("forward__rtol", -1.0), ("forward__atol", float("inf")), ("forward__max_steps", -2)):
        with pytest.raises(ConfigError, match=f"{name.partition('__')[2]} must be "):
            deqcore.fixed_point(half, z0, **{name: be.asarray(np.array(bad))})


def test_using_and_overrides_reach_the_solve(be):
    z0 = zeros(be, 1, 2)
    with deqcore.using(forward__solver="picard", forward__max_steps=2, forward__on_failure="ignore"):
        assert be.to_numpy(deqcore.fixed_point(lambda z: 0.9 * z + 1, z0).steps).tolist() == [2]
        assert be.to_numpy(deqcore.fixed_point(lambda z: 0.9 * z + 1, z0, forward__max_steps=3).steps).tolist() == [3]
        alone = deqcore.fixed_point(half, z0, config=deqcore.Config())  # a config is complete
    assert be.to_numpy(alone.converged).all()


def test_check_every_reaches_the_solve(be):
    calls = []

    def f(z):
        calls.append(1)
        return half(z)

    deqcore.fixed_point(f, zeros(be, 1, 2), forward__solver="picard", forward__rtol=1e-2, forward__check_every=16)
    assert len(calls) >= 17


# -- vjp --------------------------------------------------------------------------------------------------------


def test_vjp_of_an_affine_map_has_its_closed_form(be):
    f = lambda z, a, x: a * z + x
    arguments = be.asarray(np.array(0.5)), be.asarray(np.ones((1, 1)))
    z, (da, dx) = deqcore.vjp(
        f, zeros(be, 1, 1), *arguments, cotangent=be.asarray(np.ones((1, 1))), forward__rtol=1e-12
    )
    assert float(z[0, 0]) == pytest.approx(2.0, rel=1e-10)  # x / (1 − a)
    assert float(da) == pytest.approx(4.0, rel=1e-7)  # x / (1 − a)²
    assert float(dx[0, 0]) == pytest.approx(2.0, rel=1e-7)  # 1 / (1 − a)


def test_vjp_gives_trees_like_the_arguments_and_none_where_there_is_no_derivative(be):
    def f(z, table, power, name):
        assert name == "cosine"
        return be.xp.cos(z) ** power * table["w"][0] + table["w"][1]

    table = {
        "w": [be.asarray(np.full((1, 2), 0.3)), be.asarray(np.full((1, 2), 0.2))],
        "count": be.asarray(np.arange(3)),
    }
    z0 = zeros(be, 1, 2)
    _, grads = deqcore.vjp(f, z0, table, 1, "cosine", cotangent=z0 + 1.0)
    assert len(grads) == 3
    assert grads[1] is None
    assert grads[2] is None
    assert grads[0]["count"] is None
    assert [tuple(g.shape) for g in grads[0]["w"]] == [(1, 2), (1, 2)]


def test_vjp_of_an_unused_argument_is_zero(be):
    z0 = zeros(be, 1, 2)
    _, (dx, dy) = deqcore.vjp(lambda z, x, y: 0.5 * z + x, z0, z0 + 1.0, z0 + 3.0, cotangent=z0 + 1.0)
    assert be.to_numpy(dx) == pytest.approx(np.full((1, 2), 2.0), rel=1e-6)
    assert not be.to_numpy(dy).any()


def test_vjp_refuses_a_cotangent_that_does_not_fit(be):
    z0, f = zeros(be, 2, 3), lambda z, x: 0.5 * z + x
    for wrong in (zeros(be, 2, 2), zeros(be, 2, 3, dtype="float32"), [z0], 1.0):
        with pytest.raises(
            InitialIterateError, match=r"The cotangent must be a tree like z0, with the leaves .*\(got "
        ):
            deqcore.vjp(f, z0, z0 + 1.0, cotangent=wrong)


def test_vjp_of_trees(be):
    z0 = {"a": zeros(be, 2, 2), "b": zeros(be, 2, 1)}

    def f(z, x):
        return {"a": 0.5 * z["a"] + z["b"], "b": 0.25 * z["b"] + x}

    cotangent = {"a": z0["a"] + 1.0, "b": z0["b"]}
    _, (dx,) = deqcore.vjp(f, z0, z0["b"] + 1.0, cotangent=cotangent, forward__rtol=1e-12)
    # a = 2 b per column, b = x / 0.75: d(Σ a)/dx = 2 columns · 2 / 0.75
    assert be.to_numpy(dx) == pytest.approx(np.full((2, 1), 4 / 0.75), rel=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vjp_keeps_narrow_dtypes(be, dtype):
    f = lambda z, w, x: w * be.xp.tanh(z) + x
    w, x = be.asarray(np.full((1, 3), 0.5), dtype=dtype), be.asarray(np.array([[0.1, 0.2, 0.3]]), dtype=dtype)
    z0 = be.asarray(np.zeros((1, 3)), dtype=dtype)
    z, (dw, dx) = deqcore.vjp(f, z0, w, x, cotangent=z0 + 1.0)
    assert be.dtype_name(z) == be.dtype_name(dw) == be.dtype_name(dx) == dtype
    root = be.to_numpy(z).astype(float)
    slope = 0.5 * (1 - np.tanh(root) ** 2)
    tolerance = 1e-3 if dtype == "float32" else 2e-2
    assert be.to_numpy(dx).astype(float) == pytest.approx(1 / (1 - slope), rel=tolerance)
    assert be.to_numpy(dw).astype(float) == pytest.approx(np.tanh(root) / (1 - slope), rel=tolerance)


@pytest.mark.parametrize(("batch", "n"), [(0, 3), (4, 0)])
def test_vjp_of_a_state_without_numbers(every, batch, n):
    z0 = zeros(every, batch, n)
    _, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, z0, every.asarray(np.ones((1, n))), cotangent=z0)
    assert every.to_numpy(dx).tolist() == [[0.0] * n]


# -- get_backend ------------------------------------------------------------------------------------------------


def test_get_backend_takes_what_the_config_names(be):
    assert deqcore.get_backend(backend=be.name) is be
    assert deqcore.get_backend(deqcore.Config(backend=be.name)) is be
    with deqcore.using(backend=be.name):
        assert deqcore.get_backend() is be


def test_get_backend_says_what_auto_took():
    with pytest.warns(
        UserWarning, match="'auto' without an array to decide: deqcore takes '(torch|jax|numpy)'"
    ) as caught:
        deqcore.get_backend()
    assert caught[0].filename == __file__
