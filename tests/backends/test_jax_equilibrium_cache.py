"""Equilibria by sample id as a value, inside jit."""

from types import SimpleNamespace

import numpy as np
import pytest

import deqcore
from deqcore import equilibrium_cache
from deqcore.errors import BackendError, ConfigError, InitialIterateError

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
caches = pytest.importorskip("deqcore_jax.equilibrium_cache")

SETTINGS = {"forward__solver": "picard", "forward__rtol": 1e-5, "forward__max_steps": 60,
            "forward__on_failure": "ignore"}  # fmt: skip
Z0 = jnp.zeros((3, 2))


TRACES = []


@jax.jit
def step(x, ids, cache):
    TRACES.append((x.shape, ids.dtype, cache.capacity))
    start = cache.start(ids, jnp.zeros_like(x))
    solution = deqcore.fixed_point(lambda z, x: 0.5 * z + x, start, x, **SETTINGS)
    return start, cache.store(ids, solution)


def solved(value, converged, mask=None):
    """Return the fields of a solution that a cache reads."""
    return SimpleNamespace(value=value, converged=jnp.asarray(converged), mask=mask)


def test_random_batches_follow_a_dictionary_and_compile_once():
    """The least recently used states leave; within one batch their order is not specified."""
    rng, before = np.random.default_rng(0), 0
    cache, last, counts = caches.EquilibriumCache.empty(Z0, 6), {}, dict.fromkeys(caches.COUNTS, 0)
    for time in range(40):
        ids = rng.integers(-1, 12, 3)
        x = (1.0 + ids[:, None] * np.ones((1, 2))).astype(np.float32)
        x[rng.random(3) < 0.2] = np.nan
        start, cache = step(jnp.asarray(x), jnp.asarray(ids), cache)
        before = len(TRACES) if time == 1 else before  # the first solve of a process changes the context of tracing
        warm = [number in last for number in ids]
        expected = np.where(warm, 2.0 + 2.0 * ids, 0.0)
        assert np.asarray(start)[:, 0] == pytest.approx(expected, rel=1e-4)
        known, failed = ids >= 0, np.isnan(x[:, 0])
        counts["hits"] += sum(warm)
        counts["misses"] += int((known & ~np.array(warm)).sum())
        counts["rejected"] += int((known & failed).sum())
        last |= {number: time for number, hit in zip(ids, warm, strict=True) if hit}
        last |= dict.fromkeys(ids[known & ~failed], time)
        stored = {int(number) for number in np.asarray(cache.ids) if number >= 0}
        gone = set(last) - stored
        assert (stored <= set(last), len(last) - len(gone)) == (True, min(6, len(last)))
        assert all(last[old] <= last[kept] for old in gone for kept in stored)
        counts["evictions"] += len(gone)
        last = {number: when for number, when in last.items() if number in stored}
    assert len(TRACES) == before
    assert counts | {"entries": 6} == {name: int(count) for name, count in cache.statistics().items()}
    assert min(counts.values()) > 5


def test_the_order_of_use_decides_and_survives_a_change_of_capacity():
    cache = caches.EquilibriumCache.empty(Z0, 4, dtype="bfloat16")
    for ids in ([0, 1, 2], [3, 0, -1], [4, -1, -1]):
        _, cache = step(jnp.ones((3, 2)), jnp.array(ids), cache)
    assert set(np.asarray(cache.ids)) >= {0, 3, 4}
    small, large = cache.resized(3), cache.resized(7)
    assert set(np.asarray(small.ids)) == {0, 3, 4}
    assert small.capacity == 3
    assert np.asarray(large.start([0, 3, 9], Z0))[:, 0] == pytest.approx([2.0, 2.0, 0.0], rel=1e-2)
    assert large.values[0].shape == (7, 2)
    assert large.values[0].dtype == jnp.bfloat16
    assert np.asarray(cache.forget([0, 3]).start([0, 3, 4], Z0))[:, 0].round(1).tolist() == [0.0, 0.0, 2.0]
    assert int(cache.forget().statistics()["entries"]) == 0


def test_gradients_do_not_reach_stored_states_and_the_cache_comes_out_of_a_gradient():
    def loss(a, x, cache):
        solution = deqcore.fixed_point(lambda z, x: a * z + x, cache.start([0, 1, 2], 0 * x), x, **SETTINGS)
        return solution.value.sum(), cache.store([0, 1, 2], solution)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    cache, x = caches.EquilibriumCache.empty(Z0, 3), jnp.ones((3, 2))
    for _ in range(2):
        found, cache = gradient(0.5, x, cache)
        assert float(found) == pytest.approx(6 / 0.25, rel=1e-3)
    assert int(cache.statistics()["hits"]) == 3


def test_trees_units_and_changed_parts():
    z0 = {"a": jnp.zeros((2, 3, 1)), "n": jnp.arange(2)}
    mask = jnp.array([[True] * 3, [True, True, False]])
    solution = solved({"a": 2.0 * mask[..., None], "n": z0["n"]}, [[True] * 3, [True, True, False]], mask)
    cache = caches.EquilibriumCache.empty(z0, 5).store([7, 8], solution)
    start = cache.start([8, 7], z0, changed=jnp.array([[False] * 3, [True, False, False]]))
    assert np.asarray(start["a"])[..., 0].tolist() == [[2.0, 2.0, 0.0], [0.0, 2.0, 2.0]]
    assert start["n"].tolist() == [0, 1]
    assert int(cache.forget().store([7, 8], solved(z0, [[True] * 3, [True, False, True]])).statistics()["entries"]) == 1


@pytest.mark.parametrize("module", ["flax.nnx", "equinox"])
def test_layers_start_from_it_inside_jit(module):
    framework = pytest.importorskip(module)
    DEQ = pytest.importorskip(f"deqcore_jax.{module.partition('.')[2] or module}").DEQ
    layer = DEQ(lambda z, x: 0.5 * jnp.tanh(z) + x, forward__rtol=1e-5)
    jit = framework.jit if module == "flax.nnx" else framework.filter_jit

    @jit
    def apply(layer, x, ids, cache):
        solution = layer.solve(x, z0=cache.start(ids, layer.initial_state(x)))
        return solution.steps, cache.store(ids, solution)

    cache, x = caches.EquilibriumCache.empty(Z0, 10), jnp.ones((3, 2))
    first, cache = apply(layer, x, jnp.array([3, 1, 2]), cache)
    again, cache = apply(layer, x, jnp.array([2, 3, 1]), cache)
    assert int(first.min()) > 0 == int(again.max())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda cache: cache.start([0.0, 1.0, 2.0], Z0), ConfigError, "ids must be integers"),
        (lambda cache: cache.start(jnp.zeros((3, 1), int), Z0), ConfigError, "ids must be integers"),
        (lambda cache: cache.start([0, 1], Z0), ConfigError, "one id for each sample"),
        (lambda cache: cache.start([0, 1, 2**31], Z0), ConfigError, "at most 2147483647"),
        (lambda cache: cache.start(range(9), jnp.zeros((9, 2))), ConfigError, "at least the batch of 9"),
        (lambda cache: cache.start([0], jnp.zeros((1, 5))), InitialIterateError, "one cache for each shape"),
        (lambda cache: cache.resized(0), ConfigError, "capacity must be an integer >= 1"),
        (lambda cache: cache.empty(Z0, 0), ConfigError, "capacity must be an integer >= 1"),
        (lambda cache: cache.empty(Z0, 3, dtype="int8"), ConfigError, "dtype must be None"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(caches.EquilibriumCache.empty(Z0, 4))


def test_an_empty_batch_changes_nothing():
    cache = caches.EquilibriumCache.empty(Z0, 4)
    empty = jnp.zeros((0, 2))
    assert cache.start([], empty).shape == (0, 2)
    assert int(cache.store([], solved(empty, np.zeros(0, bool))).statistics()["entries"]) == 0


def test_the_cache_that_changes_itself_points_to_this_one():
    with pytest.raises(BackendError, match=r"deqcore_jax\.equilibrium_cache"):
        equilibrium_cache.EquilibriumCache(2).start([0], jnp.zeros((1, 2)))
