"""Streams: each item gets what it gets alone, whatever its neighbours do, and however the stream ends."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import (
    BackendError,
    ConfigError,
    ConvergenceError,
    ConvergenceWarning,
    InitialIterateError,
    ProblemError,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")
N = 6
RATES = (0.1, 0.95, 0.1, 0.5, 0.05, 0.85, 0.1, 0.2, 0.3, 0.1, 0.9)
SETTINGS = {"forward__rtol": 1e-8, "forward__max_steps": 400, "forward__on_failure": "ignore"}


def problem(be, rates=RATES, scales=None):
    """Items of unequal depth, and an elementwise f, so that a row's bits do not depend on the others."""
    rng = np.random.default_rng(0)
    scales = scales or [1.0] * len(rates)

    def array(values):
        return be.asarray(np.asarray(values), dtype="float64")

    def f(z, rate, x, scale):
        return rate * be.xp.tanh(z / scale[:, None]) * scale[:, None] + x

    spread = np.linspace(-1.0, 1.0, N)
    items = [
        (array(np.zeros(N)), array(rate * spread), array(scale * rng.standard_normal(N)), float(scale))
        for rate, scale in zip(rates, scales, strict=True)
    ]
    return f, items


def alone(be, f, item, **settings):
    """Solve one item by `fixed_point`."""
    z0, *args = item
    batch = [be.asarray(np.asarray(be.to_numpy(a) if be.is_array(a) else a)[None], dtype="float64") for a in args]
    return deqcore.fixed_point(f, z0[None], *batch, **settings)


def assert_as_alone(be, f, items, results, settings, atol=0.0):
    for item, result in zip(items, results, strict=True):
        sol = alone(be, f, item, **settings)
        expected, found = be.to_numpy(sol.value)[0], be.to_numpy(result.value)
        assert found.shape == tuple(item[0].shape)
        assert (result.status, result.steps) == (int(sol.status[0]), int(sol.steps[0])), result
        assert result.evaluations == int(sol.evaluations[0])
        np.testing.assert_allclose(found, expected, rtol=atol, atol=atol * item[-1])


# A history is summed from another slot of its ring, so that accelerated samples agree to rounding.
@pytest.mark.parametrize(("solver", "atol", "slots"), [("picard", 0.0, 4), ("auto", 1e-9, 3)])
def test_items_are_solved_as_alone(every, solver, atol, slots):
    f, items = problem(every)
    settings = SETTINGS | {"forward__solver": solver}
    settings |= {"forward__options": {"escalate": False}} if solver == "auto" else {}  # compiles in a third of the time
    results = list(deqcore.solve_stream(f, iter(items), slots=slots, **settings))
    assert [r.index for r in results] == list(range(len(items)))
    assert_as_alone(every, f, items, results, settings, atol)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton-krylov"])
def test_other_solvers_work_in_slots(be, solver):
    f, items = problem(be)
    settings = SETTINGS | {"forward__solver": solver}
    results = list(deqcore.solve_stream(f, items, slots=3, **settings))
    assert_as_alone(be, f, items, results, settings, 1e-7)
    for (_, rate, x, _), result in zip(items, results, strict=True):  # the closed form: z = rate·tanh(z) + x
        z = be.to_numpy(result.value)
        np.testing.assert_allclose(z, be.to_numpy(rate) * np.tanh(z) + be.to_numpy(x), atol=1e-7)


@pytest.mark.parametrize("check_every", [1, 4])
def test_the_loop_of_a_device_gives_the_same(monkeypatch, check_every):
    pytest.importorskip("torch")
    from deqcore_torch.host import TorchHost

    be = deqcore.get_backend(backend="torch")
    f, items = problem(be, (0.1, 0.95, 1.7e308, 0.5, 0.85, 0.2))
    items[2] = (items[2][0], be.asarray(np.full(N, 1.7e308)), be.asarray(np.full(N, 1.7e308)), 1.0)  # overflows
    settings = SETTINGS | {"forward__solver": "picard", "forward__max_steps": 50, "forward__check_every": check_every}
    expected = list(deqcore.solve_stream(f, items, slots=3, **settings))
    monkeypatch.setattr(TorchHost, "numpy_view", lambda self, x: None)  # as on a device, where reading waits
    for one, other in zip(deqcore.solve_stream(f, items, slots=3, **settings), expected, strict=True):
        assert one.status is other.status
        if one.converged:
            assert one.steps == other.steps
            np.testing.assert_array_equal(be.to_numpy(one.value), be.to_numpy(other.value))
    assert {r.status.name for r in expected} == {"CONVERGED", "MAX_STEPS", "NONFINITE"}


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_slot_keeps_nothing_of_the_scale_of_its_last_item(be, solver):
    scales = [1.0, 1e120, 1e-120, 1.0, 1e150, 1e-150]
    f, items = problem(be, (0.5, 0.9, 0.8, 0.9, 0.6, 0.7), scales)
    settings = SETTINGS | {"forward__solver": solver}
    assert_as_alone(be, f, items, list(deqcore.solve_stream(f, items, slots=2, **settings)), settings, 1e-7)


def test_a_batch_costs_the_mean_depth(be):
    f, items = problem(be, (0.1, 0.97, 0.1, 0.1, 0.1, 0.1) * 8)
    calls = []

    def counted(*args):
        calls.append(len(args[0]))
        return f(*args)

    settings = SETTINGS | {"forward__solver": "picard", "forward__max_steps": 2000}
    results = list(deqcore.solve_stream(counted, items, slots=4, **settings))
    assert set(calls) == {4}
    total, deepest = sum(r.evaluations for r in results), max(r.evaluations for r in results)
    assert total <= 4 * len(calls) <= total + 4 * deepest  # idle slots only where the stream ends


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("shallow", [1, 2])
def test_a_round_ends_when_an_eighth_of_the_slots_is_free_or_after_16_steps(backend, shallow):
    pytest.importorskip(backend)
    be = deqcore.get_backend(backend=backend)
    f, items = problem(be, (0.99,) * (16 - shallow) + (0.1,) * shallow + (0.3, 0.9, 0.2, 0.95) * 5)
    calls = []

    def counted(*args):
        calls.append(len(args[0]))
        return f(*args)

    settings = SETTINGS | {"forward__solver": "picard", "forward__max_steps": 2000}
    results = deqcore.solve_stream(counted, items, slots=16, ordered=False, **settings)
    first = [next(results) for _ in range(shallow)]
    assert [result.index for result in first] == list(range(16 - shallow, 16))
    assert len(calls) == (16 if shallow == 1 else max(result.evaluations for result in first))
    found = sorted([*first, *results], key=lambda result: result.index)
    assert_as_alone(be, f, items, found, settings)


@pytest.mark.parametrize("solver", ["auto", "broyden"])
def test_a_failing_item_leaves_with_its_status_and_harms_no_other(be, solver):
    f, items = problem(be, (0.5, 0.9, 0.3, 0.8, 0.7, 0.9))
    nan, z0 = be.asarray(np.full(N, np.nan)), items[0][0]
    items[1] = (z0, nan, *items[1][2:])  # at the start
    items[3] = (z0, be.asarray(np.full(N, 1.7e308)), be.asarray(np.full(N, 1.7e308)), 1.0)  # overflows
    settings = SETTINGS | {"forward__solver": solver}
    results = list(deqcore.solve_stream(f, items, slots=2, **settings))
    assert results[1].status is deqcore.Status.NONFINITE
    assert results[1].steps == 0
    assert not results[3].converged
    sound = [0, 2, 4, 5]
    assert_as_alone(be, f, [items[i] for i in sound], [results[i] for i in sound], settings, 1e-7)


@pytest.mark.parametrize("check_every", [1, 3, 7])
def test_each_item_has_its_own_budget(be, check_every):
    f, items = problem(be)
    settings = SETTINGS | {"forward__solver": "picard", "forward__max_steps": 9, "forward__check_every": check_every}
    results = list(deqcore.solve_stream(f, items, slots=3, **settings))
    assert_as_alone(be, f, items, results, settings)
    assert {r.status.name for r in results} == {"CONVERGED", "MAX_STEPS"}
    none = SETTINGS | {"forward__max_steps": 0}
    assert [(r.status.name, r.steps) for r in deqcore.solve_stream(f, items[:3], slots=2, **none)] == [
        ("MAX_STEPS", 0)
    ] * 3


def test_results_come_as_they_are_finished_or_in_order(be):
    f, items = problem(be, (0.95, 0.1, 0.1, 0.1, 0.9, 0.1))
    finished = [r.index for r in deqcore.solve_stream(f, items, slots=3, ordered=False, **SETTINGS)]
    assert sorted(finished) == list(range(6))
    assert finished[0] != 0
    assert [r.index for r in deqcore.solve_stream(f, items, slots=3, **SETTINGS)] == list(range(6))


def test_items_are_taken_when_a_slot_is_free_and_none_means_later(be):
    f, items = problem(be)
    taken = []

    def source():
        for item in items:
            taken.append(len(taken))
            yield item
            yield None

    results = deqcore.solve_stream(f, source(), slots=2, ordered=False, **SETTINGS)
    next(results)
    assert len(taken) <= 4
    assert len(list(results)) == len(items) - 1


def test_trees_numbers_and_a_rule_for_z0(be):
    def f(z, x, k, name):
        assert name == "sum"
        return {"a": 0.5 * z["a"] + x, "b": z["b"] / k[:, None]}

    def start(x, k, name):
        return {"a": 0 * x, "b": be.xp.ones_like(x[0])}

    items = [(be.asarray(np.full((2, 3), v)), int(v), "sum") for v in (2.0, 3.0, 4.0)]
    results = list(deqcore.solve_stream(f, items, slots=2, start=start, forward__rtol=1e-10))
    for value, result in zip((2.0, 3.0, 4.0), results, strict=True):
        np.testing.assert_allclose(be.to_numpy(result.value["a"]), np.full((2, 3), 2 * value), rtol=1e-8)
        assert tuple(result.value["b"].shape) == (3,)


def test_streams_end_within_a_batch_or_before_they_begin(be):
    f, items = problem(be)
    assert len(list(deqcore.solve_stream(f, items[:5], slots=8, **SETTINGS))) == 5
    assert list(deqcore.solve_stream(f, [], **SETTINGS)) == []
    assert list(deqcore.solve_stream(f, [None, None], **SETTINGS)) == []


def test_results_before_an_error_of_the_inputs_are_not_lost(be):
    f, items = problem(be)

    def broken():
        yield from items[:5]
        raise OSError("the disk is full")

    results, found = deqcore.solve_stream(f, broken(), slots=2, **SETTINGS), []
    with pytest.raises(OSError, match="disk"):
        for result in results:
            found.append(result.index)
    assert found == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda be, item: (be.asarray(np.zeros(5)), *item[1:]), r"Item 2 .* z0 .* float64 \(6,\) \(got float64 \(5,\)"),
        (lambda be, item: (*item[:2], be.asarray(np.zeros(N, "float32")), item[3]), "Item 2 .* leaf 1 of args"),
        (lambda be, item: item[:3], "Item 2 .* structure"),
        (lambda be, item: item[0], r"Item 2 .* must be a tuple \(z0, \*args\)"),
    ],
)
def test_an_item_unlike_the_first_is_named(be, item, message):
    f, items = problem(be)
    found = []
    with pytest.raises(ProblemError, match=message):
        for result in deqcore.solve_stream(f, [*items[:2], item(be, items[2]), items[3]], slots=2, **SETTINGS):
            found.append(result.index)
    assert found == [0, 1]


def test_what_cannot_be_is_refused(be):
    f, items = problem(be)
    for slots in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="slots must be an integer >= 1"):
            deqcore.solve_stream(f, items, slots=slots)
    with pytest.raises(ConfigError, match=r"forward\.batch must be true"):
        deqcore.solve_stream(f, items, forward__batch=False)
    for z0 in (be.asarray(np.zeros(3, "int64")), be.asarray(1.0), "z"):
        with pytest.raises(InitialIterateError, match=r"Item 0 .* floating-point"):
            list(deqcore.solve_stream(f, [(z0, *items[0][1:])], backend=be.name))


@pytest.mark.parametrize("solver", ["picard", "auto"])
def test_slots_that_no_item_takes_are_given_up_if_the_solve_compacts(be, solver):
    f, items = problem(be)
    seen = []

    def counted(z, *args):
        seen.append(int(z.shape[0]))
        return f(z, *args)

    settings = SETTINGS | {"forward__solver": solver}
    results = list(deqcore.solve_stream(counted, items, slots=5, forward__compact=True, **settings))
    assert list(dict.fromkeys(seen)) == [5, 2, 1]
    assert seen == sorted(seen, reverse=True)
    for one, other in zip(results, deqcore.solve_stream(f, items, slots=5, **settings), strict=True):
        assert (one.status, one.steps, one.evaluations) == (other.status, other.steps, other.evaluations)
        np.testing.assert_array_equal(be.to_numpy(one.value), be.to_numpy(other.value))


def test_an_f_that_needs_all_slots_is_told_that_the_solve_compacts(be):
    shift = be.asarray(np.ones((4, 1)))
    items = [(be.asarray(np.zeros(1)), be.asarray(np.full(1, rate))) for rate in (0.1, 0.2, 0.3, 0.4, 0.9)]
    results = deqcore.solve_stream(lambda z, rate: rate * z + shift, items, slots=4, forward__compact=True)
    with pytest.raises(Exception, match="shape|size") as caught:
        list(results)
    assert "of 4 slots, because forward.compact = true" in caught.value.__notes__[0]


def test_a_traced_stream_cannot_compact():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(ConfigError, match=r"forward\.compact must be false for the backend"):
        next(deqcore.solve_stream(lambda z: z, [(jnp.zeros(2),)], forward__compact=True))


def test_failures_are_reported_as_set(be):
    f, items = problem(be)
    few = {"forward__solver": "picard", "forward__max_steps": 8}
    with pytest.warns(ConvergenceWarning, match="Item 1 of the stream ended as MAX_STEPS after 8 steps"):
        list(deqcore.solve_stream(f, items[:2], slots=2, **few))
    with pytest.raises(ConvergenceError, match="Item 1"):
        list(deqcore.solve_stream(f, items, slots=2, forward__on_failure="raise", **few))


def test_jax_compiles_the_round_once():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    from deqcore_jax import staged

    traced = []
    w = jnp.asarray(0.5)

    def f(z, x):
        traced.append(z.shape)
        return w * jnp.tanh(z) + x

    rng = np.random.default_rng(0)
    items = [(jnp.zeros(4), jnp.asarray(rng.standard_normal(4), "float32")) for _ in range(9)]
    settings = {"forward__solver": "picard", "forward__rtol": 1e-5}
    list(deqcore.solve_stream(f, items[:2], slots=2, **settings))
    programs, calls = staged._run._cache_size(), len(traced)
    results = list(deqcore.solve_stream(f, items, slots=2, **settings))
    assert len(results) == 9
    assert staged._run._cache_size() == programs  # of an earlier stream of the same f
    assert len(traced) == 2 * calls
    with pytest.raises(BackendError, match=r"inside jax\.jit"):
        jax.jit(lambda x: [r.value for r in deqcore.solve_stream(f, [(jnp.zeros(4), x)], slots=1)])(items[0][1])


def test_no_gradient_is_recorded_and_a_compiled_f_works():
    torch = pytest.importorskip("torch")
    w, shapes = torch.nn.Parameter(torch.tensor(0.5)), []

    def compiler(graph, example):
        shapes.append(tuple(example[0].shape))
        return graph.forward

    torch._dynamo.reset()
    f = torch.compile(lambda z, x: w * torch.tanh(z) + x, backend=compiler)
    items = [(torch.zeros(3), torch.full((3,), float(k), requires_grad=True)) for k in range(7)]
    results = list(deqcore.solve_stream(f, items, slots=3, forward__rtol=1e-5))
    assert not any(r.value.requires_grad for r in results)
    assert len(shapes) == 1  # one shape, one program
    for k, result in enumerate(results):
        torch.testing.assert_close(result.value, 0.5 * torch.tanh(result.value) + k, rtol=1e-4, atol=1e-4)


def test_complex_items_beside_real_leaves(be):
    """f need not be holomorphic. The truth is plain iteration in NumPy."""
    rng = np.random.default_rng(3)
    data = [(rate, rng.standard_normal(N) + 1j * rng.standard_normal(N)) for rate in RATES]

    def f(z, rate, x, xp=be.xp):
        w, v = z["w"], z["v"]
        moved = (0.6 * w + 0.3 * xp.conj(w)) / (1.0 + xp.abs(w)) + 0.2 * v
        return {"w": rate[:, None] * moved + x, "v": 0.5 * v + 0.1 * xp.real(w[:, :1])}

    def array(value, dtype="complex128"):
        return be.asarray(np.asarray(value), dtype=dtype)

    z0 = {"w": array(np.zeros(N)), "v": array(np.zeros(1), "float64")}
    items = [(z0, float(rate), array(x)) for rate, x in data]
    for result, (rate, x) in zip(deqcore.solve_stream(f, items, slots=3, **SETTINGS), data, strict=True):
        truth = {"w": np.zeros((1, N), complex), "v": np.zeros((1, 1))}
        for _ in range(200):
            truth = f(truth, np.array([rate]), x, np)
        assert result.converged, result
        assert be.dtype_name(result.value["w"]) == "complex128"
        np.testing.assert_allclose(be.to_numpy(result.value["w"]), truth["w"][0], atol=1e-6)
        np.testing.assert_allclose(be.to_numpy(result.value["v"]), truth["v"][0], atol=1e-6)
    with pytest.raises(InitialIterateError, match="at least one axis"):
        list(deqcore.solve_stream(f, [(array(1.0), 0.5, items[0][2])]))
