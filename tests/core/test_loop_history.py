"""Histories of the eager backends against a model: per sample, a dictionary from slots to vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

BATCH, N = 3, 5

MASKS = st.none() | st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["append", "append", "append", "restart", "copy"]), MASKS),
    min_size=1,
    max_size=14,
)


def rows_of(be, mask):
    return None if mask is None else be.asarray(np.array(mask))


def newest(be, history):
    slot = np.asarray(be.to_numpy(history.slot()))
    return np.broadcast_to(slot, (BATCH, history.history_size))


def check(be, history, model, random):
    v, w = random.standard_normal((2, BATCH, N))
    dots = be.to_numpy(history.dot(be.asarray(v)))
    pair = be.to_numpy(history.dot(be.asarray(np.stack([v, w], axis=1))))
    assert dots.shape == (BATCH, history.history_size)
    assert pair.shape == (BATCH, 2, history.history_size)
    coefficients = random.standard_normal((BATCH, history.history_size))
    combined = np.zeros((BATCH, N))
    for i, slots in enumerate(model):
        for j in range(history.history_size):
            if j in slots:
                assert dots[i, j] == pytest.approx(slots[j] @ v[i], rel=1e-12, abs=1e-12)
                assert pair[i, 1, j] == pytest.approx(slots[j] @ w[i], rel=1e-12, abs=1e-12)
                combined[i] += coefficients[i, j] * slots[j]
            else:
                assert dots[i, j] == 0.0
                assert pair[i, 1, j] == 0.0
                coefficients[i, j] = np.nan  # ignored
    assert be.to_numpy(history.combine(be.asarray(coefficients))) == pytest.approx(combined, rel=1e-12, abs=1e-12)
    assert be.to_numpy(history.count()).tolist() == [len(slots) for slots in model]
    stored = be.to_numpy(history.vectors())
    for i, slots in enumerate(model):
        for j in range(stored.shape[1]):
            assert stored[i, j] == pytest.approx(slots.get(j, np.zeros(N)), rel=1e-12)


@given(operations=OPERATIONS, history_size=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_history_does_what_a_dictionary_does(be, operations, history_size, seed):
    random = np.random.default_rng(seed)
    history = be.history(be.asarray(np.zeros((BATCH, N))), history_size)
    model: list[dict[int, np.ndarray]] = [{} for _ in range(BATCH)]
    check(be, history, model, random)
    assert not newest(be, history).any()
    for name, mask in operations:
        active = np.ones(BATCH, bool) if mask is None else np.array(mask)
        history = history.masked(rows_of(be, mask))
        if name == "append":
            v = random.standard_normal((BATCH, N))
            v[~active] = np.nan  # what inactive rows compute is never written
            full = be.to_numpy(history.full())
            history = history.append(be.asarray(v))
            slots = newest(be, history)
            for i in np.flatnonzero(active):
                (j,) = np.flatnonzero(slots[i])
                assert full[i] == (j in model[i])  # `full` announced that this slot would be overwritten
                model[i][j] = v[i]
        elif name == "restart":
            chosen = random.random(BATCH) < 0.5
            history = history.restart(be.asarray(chosen))
            for i in np.flatnonzero(chosen & active):
                model[i] = {}
        else:
            other = history.copy().masked(None)
            other.append(be.asarray(random.standard_normal((BATCH, N)))).restart(be.asarray(np.ones(BATCH, bool)))
        check(be, history, model, random)


def test_versions_of_a_history_share_storage_and_copies_do_not(be):
    one = be.history(be.asarray(np.zeros((2, 3))), 4).append(be.asarray(np.ones((2, 3))))
    copied = one.copy()
    later = one.append(be.asarray(np.full((2, 3), 2.0)))
    assert be.to_numpy(one.count()).tolist() == [1, 1]  # a version does not see what came after it
    assert be.to_numpy(later.count()).tolist() == [2, 2]
    for _ in range(4):
        later = later.append(be.asarray(np.full((2, 3), 9.0)))
    assert be.to_numpy(copied.vectors())[:, 0] == pytest.approx(np.ones((2, 3)))


def test_a_ring_forgets_the_oldest(be):
    history = be.history(be.asarray(np.zeros((1, 2))), 3)
    for k in range(5):
        history = history.append(be.asarray(np.full((1, 2), float(k))))
    assert sorted(be.to_numpy(history.vectors())[0, :, 0].tolist()) == [2.0, 3.0, 4.0]
    assert be.to_numpy(history.full()).tolist() == [True]


def test_an_empty_history_combines_to_zero(be):
    history = be.history(be.asarray(np.zeros((2, 3))), 4)
    assert be.to_numpy(history.combine(be.asarray(np.ones((2, 4))))).tolist() == [[0.0] * 3] * 2
    assert be.to_numpy(history.vectors()).shape[0] == 2
    assert be.to_numpy(history.count()).tolist() == [0, 0]


def test_a_history_of_no_samples(be):
    history = be.history(be.asarray(np.zeros((0, 3))), 4).append(be.asarray(np.zeros((0, 3))))
    assert be.to_numpy(history.dot(be.asarray(np.zeros((0, 3))))).shape == (0, 4)
    assert be.to_numpy(history.combine(be.asarray(np.zeros((0, 4))))).shape == (0, 3)
    assert be.to_numpy(history.count()).shape == (0,)


@pytest.mark.parametrize("state", ["float16", "float32", "float64"])
def test_storage_may_be_narrower_and_products_stay_wide(be, state):
    random = np.random.default_rng(0)
    q = random.standard_normal((4, 2, 300))
    history = be.history(be.asarray(np.zeros((2, 300)), dtype=state), 4, "float16")
    for row in q:
        history = history.append(be.asarray(row, dtype=state))
    stored = q.astype(np.float16).astype(np.float64)
    assert be.to_numpy(history.vectors()).astype(np.float64) == pytest.approx(stored.swapaxes(0, 1))
    v = random.standard_normal((2, 300)).astype(state)
    dots = history.dot(be.asarray(v))
    assert be.dtype_name(dots) == "float64"
    exact = np.einsum("kbn,bn->bk", stored, v.astype(np.float64))
    assert be.to_numpy(dots) == pytest.approx(exact, abs=2e-4)  # float16 products would miss by 1e-2
    c = random.standard_normal((2, 4))
    combined = history.combine(be.asarray(c))
    assert be.dtype_name(combined) == state
    expected = np.einsum("bk,kbn->bn", c, stored)
    assert be.to_numpy(combined).astype(np.float64) == pytest.approx(expected, abs=5e-3 if state == "float16" else 1e-5)


def test_float16_products_do_not_overflow(be):
    big = be.asarray(np.full((1, 1000), 300.0), dtype="float16")
    history = be.history(big, 2).append(big)
    assert float(be.to_numpy(history.dot(big))[0, 0]) == 9e7


def test_nan_and_inf_of_one_sample_stay_there(be):
    v = np.ones((3, 4))
    v[1] = np.nan
    history = be.history(be.asarray(v), 2).append(be.asarray(v))
    dots = be.to_numpy(history.dot(be.asarray(v)))
    combined = be.to_numpy(history.combine(be.asarray(np.ones((3, 2)))))
    for i in (0, 2):
        assert dots[i].tolist() == [4.0, 0.0]
        assert combined[i].tolist() == [1.0] * 4
    assert np.isnan(dots[1, 0])
    assert dots[1, 1] == 0.0
