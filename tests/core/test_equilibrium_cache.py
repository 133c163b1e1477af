"""Equilibria by sample id, masked warm starts, and the better of two starts."""

import copy

import numpy as np
import pytest

import deqcore
from deqcore.equilibrium_cache import EquilibriumCache
from deqcore.errors import BackendError, ConfigError, InitialIterateError
from deqcore.warm_start import closer_start, restart_changed

RATES = np.array([0.9, 0.5, -0.7, 0.2, 0.8, 0.1])
QUIET = {"forward__on_failure": "ignore"}


@pytest.fixture(params=["numpy", "torch"])
def be(request):
    pytest.importorskip(request.param)
    return deqcore.get_backend(backend=request.param)


def solve(be, ids, cache, changed=None, **settings):
    """z = rate z + 1 for the samples of these ids, whose fixed point is 1/(1 − rate)."""
    rate = be.asarray(RATES[np.asarray(ids)][:, None] * np.ones((1, 2)))
    z0 = cache.start(ids, be.xp.zeros_like(rate), changed)
    own = {"forward__solver": "picard", "forward__rtol": 1e-10, "forward__max_steps": 500}
    return z0, deqcore.fixed_point(lambda z, a: a * z + 1.0, z0, rate, **own | QUIET | settings)


def test_a_sample_starts_at_its_own_equilibrium_in_whatever_batch(be):
    cache = EquilibriumCache(10)
    for ids in ([0, 1], [2, 3]):
        z0, solution = solve(be, ids, cache)
        assert not be.to_numpy(z0).any()
        cache.store(ids, solution)
    z0, solution = solve(be, [3, 0, 5, 1], cache)
    assert be.to_numpy(z0)[:, 0] == pytest.approx([1.25, 10.0, 0.0, 2.0], rel=1e-8)
    assert be.to_numpy(solution.steps)[[0, 1, 3]].max() == 0 < be.to_numpy(solution.steps)[2]
    assert cache.statistics[:3] == (3, 5, 0)
    assert cache.statistics.hit_rate == 3 / 8


def test_a_start_changes_steps_and_not_the_solution(be):
    cache = EquilibriumCache(10)
    _, first = solve(be, range(6), cache)
    cache.store(range(6), first)
    _, again = solve(be, range(6), cache)
    assert be.to_numpy(again.value)[:, 0] == pytest.approx(1 / (1 - RATES), rel=1e-8)


def test_the_least_recently_used_state_makes_room(be):
    cache = EquilibriumCache(3)
    for ids in ([0, 1], [2], [0], [3]):
        cache.store(ids, solve(be, ids, cache)[1])
    found = be.to_numpy(cache.start(range(3), be.asarray(np.zeros((3, 2)))))[:, 0] != 0
    assert found.tolist() == [True, False, True]
    assert (len(cache), cache.statistics.evictions) == (3, 1)


def test_a_bound_of_bytes_holds_for_samples_of_several_sizes():
    cache = EquilibriumCache(max_bytes=100)
    for number, size in enumerate((4, 2, 8)):  # 32, 16 and 64 bytes
        cache.store([number], deqcore.fixed_point(np.cos, np.zeros((1, size))))
    assert (len(cache), cache.statistics.bytes, cache.statistics.evictions) == (2, 80, 1)
    with pytest.raises(ConfigError, match="max_bytes must be at least the 160 bytes of one state"):
        cache.store([7], deqcore.fixed_point(np.cos, np.zeros((1, 20))))


def test_a_sample_of_another_shape_starts_at_z0_and_is_counted(be):
    cache = EquilibriumCache(4)
    plain = {"forward__solver": "picard", "forward__max_steps": 100}
    cache.store([0, 1], deqcore.fixed_point(be.xp.cos, be.asarray(np.zeros((2, 3))), **plain))
    z0 = be.asarray(np.full((2, 5), 0.5))
    assert be.to_numpy(cache.start([0, 2], z0)).tolist() == np.full((2, 5), 0.5).tolist()
    assert cache.statistics[:3] == (0, 3 - 2, 1)
    cache.store([0, 2], deqcore.fixed_point(be.xp.cos, z0, **plain))
    assert be.to_numpy(cache.start([0, 2], z0)) == pytest.approx(0.739085, abs=1e-2)


def test_failed_samples_are_not_stored_unless_asked_for(be):
    for unconverged, entries in ((False, 0), (True, 1)):
        cache = EquilibriumCache(4, unconverged=unconverged)
        cache.store([0], solve(be, [0], cache, forward__max_steps=3)[1])
        assert (len(cache), cache.statistics.rejected) == (entries, 1 - entries)


@pytest.mark.parametrize("unconverged", [False, True])
def test_numbers_that_are_not_finite_are_never_stored(be, unconverged):
    cache = EquilibriumCache(4, unconverged=unconverged, dtype="float16")
    x = be.asarray(np.array([[np.nan], [1e6], [1.0]]))  # 2e6 is inf in float16
    settings = {"forward__solver": "picard", "forward__max_steps": 60}
    cache.store([0, 1, 2], deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x, **settings, **QUIET))
    assert (len(cache), cache.statistics.rejected) == (1, 2)
    assert be.to_numpy(cache.start([2], x[:1])).item() == pytest.approx(2.0, rel=1e-3)


def test_a_unit_that_failed_keeps_its_sample_out_and_a_masked_one_does_not():
    rates = np.array([[[0.5], [2.0]], [[0.5], [0.1]], [[0.5], [2.0]]])
    mask = np.array([[True, True], [True, True], [True, False]])
    cache = EquilibriumCache(4)
    solution = deqcore.fixed_point(lambda z, a: a * z + 1.0, 0 * rates, rates, mask=mask, forward__batch=2,
                                   forward__solver="picard", forward__max_steps=50, **QUIET)  # fmt: skip
    cache.store([0, 1, 2], solution)
    start = cache.start([0, 1, 2], np.full_like(rates, 7.0))
    assert start[:, 0, 0].round(2).tolist() == [7.0, 2.0, 2.0]
    assert start[2, 1].item() == 0.0


def test_trees_with_complex_and_carried_leaves(be):
    cache = EquilibriumCache(4, dtype="float32")
    z0 = {"a": be.asarray(np.zeros((2, 3))), "b": be.asarray(np.zeros((2, 2), complex)), "n": be.asarray(np.arange(2))}
    f = lambda z: {"a": 0.5 * z["a"] + 1.0, "b": 0.5j * z["b"] + 1.0, "n": z["n"]}
    cache.store([5, 6], deqcore.fixed_point(f, z0, forward__solver="picard", forward__rtol=1e-8))
    start = cache.start([6, 5], z0)
    assert [be.dtype_name(start[name]) for name in "abn"] == ["float64", "complex128", "int64"]
    assert be.to_numpy(start["a"]) == pytest.approx(2.0, abs=1e-5)
    assert be.to_numpy(start["b"]) == pytest.approx(1 / (1 - 0.5j), abs=1e-5)
    assert be.to_numpy(start["n"]).tolist() == [0, 1]


def test_ids_that_repeat_are_negative_or_none_at_all(be):
    cache = EquilibriumCache(2)
    ids = [4, -1, 4, -1]
    _, solution = solve(be, np.array([0, 1, 2, 3]), EquilibriumCache(9))
    cache.store(ids, solution)
    assert (len(cache), cache.statistics.misses) == (1, 0)
    start = be.to_numpy(cache.start([4, -1, 4], be.asarray(np.zeros((3, 2)))))[:, 0]
    assert start == pytest.approx([1 / 1.7, 0.0, 1 / 1.7], rel=1e-6)  # that of the last row with the id
    empty = be.asarray(np.zeros((0, 2)))
    assert cache.start([], empty).shape == (0, 2)
    cache.store([], deqcore.fixed_point(be.xp.cos, empty, forward__solver="picard"))
    assert len(cache) == 1


def test_a_checkpoint_keeps_states_and_their_order():
    cache = EquilibriumCache(5)
    for ids in ([0, 1, 2], [3], [0]):
        cache.store(ids, deqcore.fixed_point(np.cos, cache.start(ids, np.zeros((len(ids), 2)))))
    cache.store([9], deqcore.fixed_point(np.cos, np.zeros((1, 4))))
    state = cache.state_dict()
    assert {name: array.shape for name, array in state.items()} == {
        "0.ids": (4, 2), "0.0": (4, 2), "1.ids": (1, 2), "1.0": (1, 4),
    }  # fmt: skip
    small = EquilibriumCache(3, dtype="float32")
    small.load_state_dict(state)
    assert [number for number in range(10) if number in small._entries] == [0, 3, 9]
    assert small.start([0], np.zeros((1, 2))) == pytest.approx(0.739, abs=1e-2)
    small.load_state_dict({})
    assert len(small) == 0


@pytest.mark.parametrize(
    "state",
    [
        {"0.ids": np.zeros((2, 2), int)},
        {"0.0": np.zeros((2, 2))},
        {"0.ids": np.zeros((3, 2), int), "0.0": np.zeros((2, 2))},
        {"weight": np.zeros((2, 2))},
    ],
)
def test_what_is_no_checkpoint_of_a_cache_is_refused_and_changes_nothing(state):
    cache = EquilibriumCache(5)
    cache.store([1], deqcore.fixed_point(np.cos, np.zeros((1, 2))))
    with pytest.raises(ConfigError, match="state must be what EquilibriumCache.state_dict returns"):
        cache.load_state_dict(state)
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([0.0, 1.0], "ids must be integers of the shape"),
        ([True, False], "ids must be integers of the shape"),
        ([[0, 1]], "ids must be integers of the shape"),
        (3, "ids must be integers of the shape"),
        ([0, 1, 2], "one id for each sample"),
        ([0], "one id for each sample"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, text):
    cache, z0 = EquilibriumCache(5), np.zeros((2, 2))
    with pytest.raises(ConfigError, match=text):
        cache.start(ids, z0)
    with pytest.raises(ConfigError, match=text):
        cache.store(ids, deqcore.fixed_point(np.cos, z0))


def test_a_state_that_is_one_system_has_no_ids():
    solution = deqcore.fixed_point(np.cos, np.zeros(3), forward__batch=False)
    with pytest.raises(ConfigError, match=r"forward\.batch = false"):
        EquilibriumCache(5).store([0, 1, 2], solution)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "capacity or max_bytes must be given"),
        ({"capacity": 0}, "capacity must be an integer >= 1"),
        ({"capacity": True}, "capacity must be an integer >= 1"),
        ({"max_bytes": -5}, "max_bytes must be an integer >= 1"),
        ({"capacity": 1, "dtype": "int8"}, "dtype must be None or one of"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        EquilibriumCache(**options)


def test_a_batch_larger_than_the_cache_and_a_dtype_of_another_framework_are_refused():
    with pytest.raises(ConfigError, match="capacity must be at least the batch of 3 samples"):
        EquilibriumCache(2).start([0, 1, 2], np.zeros((3, 2)))
    with pytest.raises(ConfigError, match="float16, float32 or float64 with numpy"):
        EquilibriumCache(2, dtype="bfloat16").store([0], deqcore.fixed_point(np.cos, np.zeros((1, 2))))
    with pytest.raises(BackendError, match="device must be 'cpu'"):
        EquilibriumCache(2, device="cuda").store([0], deqcore.fixed_point(np.cos, np.zeros((1, 2))))


def test_forgetting_and_copying():
    cache = EquilibriumCache(5)
    cache.store([1, 2, 3], deqcore.fixed_point(np.cos, np.zeros((3, 2))))
    other = copy.deepcopy(cache)
    cache.forget([2, 8])
    assert (len(cache), cache.statistics.bytes, len(other)) == (2, 32, 3)
    cache.forget()
    assert cache.statistics[-2:] == (0, 0)


def test_changed_parts_restart_and_the_rest_continues(be):
    old, z0 = be.asarray(np.ones((2, 3, 2))), be.asarray(np.zeros((2, 3, 2)))
    units = np.array([[True, False, False], [False, False, True]])
    assert be.to_numpy(restart_changed(old, z0, units))[..., 0].tolist() == (~units).astype(float).tolist()
    assert be.to_numpy(restart_changed(old, z0, be.asarray(np.array([True, False]))))[:, 0, 0].tolist() == [0, 1]
    trees = restart_changed({"a": old, "b": old[:, 0]}, {"a": z0, "b": z0[:, 0]}, {"a": units, "b": units[:, 0]})
    assert be.to_numpy(trees["b"])[:, 0].tolist() == [0.0, 1.0]
    cache = EquilibriumCache(9)
    cache.store([0, 1], solve(be, [0, 1], cache)[1])
    start, _ = solve(be, [1, 0], cache, changed=np.array([[True, False], [False, False]]))
    assert be.to_numpy(start) == pytest.approx(np.array([[0.0, 2.0], [10.0, 10.0]]), rel=1e-6)


def test_a_masked_start_takes_fewer_steps_than_a_cold_one_and_agrees():
    rng = np.random.default_rng(0)
    a, x = 0.9 * np.linalg.qr(rng.standard_normal((6, 6)))[0], rng.standard_normal((1, 6))
    solve = lambda x, z0: deqcore.fixed_point(lambda z: 0.1 * np.tanh(z @ a) + 0.85 * z + x, z0,
                                              forward__solver="picard", forward__rtol=1e-8,
                                              forward__max_steps=500)  # fmt: skip
    before = solve(x, 0 * x).value
    changed = np.array([[True, False, False, False, False, False]])
    moved = x + 0.01 * changed
    warm, cold = solve(moved, restart_changed(before, 0 * x, changed)), solve(moved, 0 * x)
    assert warm.steps.item() <= cold.steps.item()
    assert warm.value == pytest.approx(cold.value, rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (np.zeros(2), "changed must be bools"),
        (np.zeros(3, bool), "changed must be bools"),
        (np.array(True), "changed must be bools"),
        (np.zeros((2, 2), bool), "changed must be bools"),
    ],
)
def test_masks_that_do_not_fit_are_refused(changed, text):
    state = np.zeros((2, 3))
    with pytest.raises(ConfigError, match=text):
        restart_changed(state, state, changed)
    with pytest.raises(ConfigError, match=text):
        EquilibriumCache(5).start([0, 1], state, changed)


def test_an_earlier_state_of_another_kind_is_refused():
    with pytest.raises(InitialIterateError, match="of the structure"):
        restart_changed({"a": np.zeros((2, 3))}, np.zeros((2, 3)), np.ones(2, bool))
    with pytest.raises(InitialIterateError, match=r"must have the shape \(2, 3\)"):
        restart_changed(np.zeros((2, 4)), np.zeros((2, 3)), np.ones(2, bool))


def test_the_closer_start_wins_per_sample(be):
    z0, stored = be.asarray(np.zeros((4, 1))), be.asarray(np.array([[1.9], [50.0], [np.nan], [0.0]]))
    start = be.to_numpy(closer_start(lambda z, x: 0.5 * z + x, z0, stored, be.asarray(np.ones((4, 1)))))
    assert start.tolist() == [[1.9], [0.0], [0.0], [0.0]]
    with pytest.raises(InitialIterateError, match="stored start must be a tree like z0"):
        closer_start(lambda z: z, z0, stored[:2])
