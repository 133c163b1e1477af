"""What a history must do, against a dictionary of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from deqcore.solve.loop import iterate
from deqcore.solvers.picard import Picard
from deqcore.testing.suite.base import DTYPES, Conformance, needs, several
from deqcore.testing.suite.fixtures import Kit, close
from deqcore.types import Status, StoppingCriteria


class Model:
    """A history as plain as can be: for each sample the vectors it sees, by slot."""

    def __init__(self, batch: int, history_size: int) -> None:
        self.history_size = history_size
        self.written = 0
        self.seen: list[dict[int, Any]] = [{} for _ in range(batch)]

    def append(self, v: Any, active: Any) -> None:
        for i, rows in enumerate(self.seen):
            if active[i]:
                rows[self.written % self.history_size] = v[i]
        self.written += 1

    def restart(self, rows: Any, active: Any) -> None:
        for i, mine in enumerate(self.seen):
            if rows[i] and active[i]:
                mine.clear()

    def dot(self, v: Any) -> Any:
        result = np.zeros((len(v), self.history_size))
        for i, rows in enumerate(self.seen):
            for slot, q in rows.items():
                result[i, slot] = q @ v[i]
        return result

    def combine(self, c: Any) -> Any:
        zero = np.zeros_like(next((q for rows in self.seen for q in rows.values()), np.zeros(1)))
        return np.stack([sum((c[i, s] * q for s, q in rows.items()), zero) for i, rows in enumerate(self.seen)])


class HistoryTests(Conformance):
    """Append, dot, combine, restart, rings, frozen rows, storage."""

    @several("seed", range(4))
    def test_a_history_does_what_a_dictionary_does(self, kit: Kit, seed: int) -> None:
        rng = np.random.default_rng(seed)
        batch, n, history_size = 3, 5, 3
        history = kit.backend.history(kit.array(np.zeros((batch, n))), history_size)
        model = Model(batch, history_size)
        model.append(first := rng.standard_normal((batch, n)), [True] * batch)
        history = history.append(kit.array(first))
        for _ in range(12):
            active = rng.random(batch) < 0.7
            history = history.masked(kit.array(active, "bool"))
            if rng.random() < 0.25:
                rows = rng.random(batch) < 0.5
                history = history.restart(kit.array(rows, "bool"))
                model.restart(rows, active)
            if model.written >= history_size and rng.random() < 0.5:
                count = int(rng.integers(-2, 3))
                history, model.written = history.rewind(count), model.written + (-count) % history_size
            v = rng.standard_normal((batch, n))
            assert [
                i in rows for i, rows in zip([model.written % history_size] * batch, model.seen, strict=True)
            ] == list(kit.numpy(history.full())), (
                "full: whether the next append overwrites a vector that the sample still sees"
            )
            history = history.append(kit.array(v))
            model.append(v, active)
            self._agree(kit, history, model, rng)

    def _agree(self, kit: Kit, history: Any, model: Model, rng: Any) -> None:
        batch, history_size = len(model.seen), model.history_size
        w, many = rng.standard_normal((batch, 5)), rng.standard_normal((batch, 2, 5))
        c = rng.standard_normal((batch, history_size))
        close(kit.numpy(history.dot(kit.array(w))), model.dot(w), 100 * kit.eps, "dot")
        result = kit.numpy(history.dot(kit.array(many)))
        close(result, np.stack([model.dot(many[:, r]) for r in range(2)], axis=1), 100 * kit.eps, "dot of several")
        unseen = np.array([[slot not in rows for slot in range(history_size)] for rows in model.seen])
        assert not kit.numpy(history.dot(kit.array(w)))[unseen].any(), "dot: a slot that is not seen gives zero"
        close(kit.numpy(history.combine(kit.array(c))), model.combine(c), 100 * kit.eps, "combine")
        total = kit.numpy(history.add_combination(kit.array(w), kit.array(c)))
        close(total, w + model.combine(c), 100 * kit.eps, "add_combination")
        assert [len(rows) for rows in model.seen] == list(kit.numpy(history.count())), "count"
        slot = [s == (model.written - 1) % history_size for s in range(history_size)]
        assert slot == list(kit.numpy(history.slot())), "slot: the one that was written last"
        full = kit.numpy(history.full())[kit.numpy(history.active)]
        assert history.may_be_full() or not full.any(), "may_be_full: False only if known"
        vectors = kit.numpy(history.vectors())
        for i, rows in enumerate(model.seen):
            for s, q in rows.items():
                close(vectors[i, s], q, 10 * kit.eps, "vectors")

    @several("filled", [1, 2, 5])
    def test_some_samples_continue_with_a_later_history(self, kit: Kit, filled: int) -> None:
        """`merge`: vectors keep their slots, and each sample sees its own ones only."""
        rng = np.random.default_rng(filled)
        batch, n, history_size = 3, 5, 3
        for rows in ([True, False, True], [True] * 3, [False] * 3):
            old, new = (kit.backend.history(kit.array(np.zeros((batch, n))), history_size) for _ in range(2))
            model = Model(batch, history_size)
            for _ in range(filled):
                v = rng.standard_normal((batch, n))
                old = old.append(kit.array(v))
                model.append(v, [True] * batch)
            first = rng.standard_normal((batch, n))
            result = old.copy().merge(kit.array(rows, "bool"), new.append(kit.array(first)))
            result = result.masked(kit.array([True] * batch, "bool"))
            for i in range(batch):
                if rows[i]:
                    model.seen[i] = {0: first[i]}
            if all(rows):
                model.written = 1
            self._agree(kit, result, model, rng)
            v = rng.standard_normal((batch, n))
            model.append(v, [True] * batch)
            self._agree(kit, result.append(kit.array(v)), model, rng)

    def test_an_empty_history(self, kit: Kit) -> None:
        history = kit.backend.history(kit.array(np.zeros((2, 3))), 4)
        assert history.history_size == 4, "an empty history must have the size that it was made with."
        assert not kit.numpy(history.dot(kit.array(np.ones((2, 3))))).any(), "products with an empty history must be 0."
        assert not kit.numpy(history.combine(kit.array(np.ones((2, 4))))).any(), (
            "combinations of an empty history must be 0."
        )
        assert not kit.numpy(history.slot()).any(), "the first slot of an empty history must be 0."
        assert list(kit.numpy(history.count())) == [0, 0], "an empty history must count 0 vectors per sample."

    def test_active_rows_restart_together(self, kit: Kit) -> None:
        one, active = kit.array(np.ones((3, 2))), kit.array([True, False, True], "bool")
        history = kit.backend.history(one, 2).append(one).masked(active).restart_active()
        assert list(kit.numpy(history.count())) == [0, 1, 0], "restart_active: the active rows alone"
        history = history.append(one)
        assert not history.all_full(), "all_full: True only if known"
        history = history.append(one)
        assert list(kit.numpy(history.full())[::2]) == [True, True], (
            "the history of a sample with as many vectors as slots must be full."
        )
        assert history.may_be_full(), "may_be_full: False only if known"
        again = history.masked(None)
        assert list(kit.numpy(again.full())) == [True, False, True], (
            "only rows that were active may lose their vectors."
        )
        assert not again.all_full(), "all_full: a row that comes back has missed what the others saw"
        assert list(kit.numpy(again.restart_active().count())) == [0, 0, 0], (
            "restart_active must empty the history of all active rows."
        )

    @several("harm", [np.nan, np.inf])
    def test_what_is_erased_is_zero_and_still_seen(self, kit: Kit, harm: float) -> None:
        rows = np.array([[harm, harm], [3.0, 4.0]])
        erased = kit.array([True, False], "bool")
        v = kit.array(np.ones((2, 2)))
        history = kit.backend.history(v, 2).append(kit.array(rows)).erase(erased)
        dot = kit.numpy(history.dot(v))
        assert np.array_equal(dot[0], [0.0, 0.0]), "erase: products with it are zero"
        close(dot[1], [7.0, 0.0], 10 * kit.eps, "erase: other rows stay")
        result = kit.numpy(history.combine(kit.array(np.ones((2, 2)))))
        close(result, [[0.0, 0.0], [3.0, 4.0]], 10 * kit.eps, "erase: combinations with it are zero")
        assert list(kit.numpy(history.count())) == [1, 1], "erase: the sample is full when its mates are"
        assert list(kit.numpy(history.append(v).full())) == [True, True], (
            "erasing a vector must not free its slot: the count stays."
        )

    @several("n", [12, 65, 520])
    def test_bits_depend_on_no_other_sample(self, kit: Kit, n: int) -> None:
        """Compare bits on the host: they must not depend on the batch, the row, or slots used by other rows."""
        if kit.device != "cpu":
            return
        rng = np.random.default_rng(n)
        batch, history_size, own = 9, 13, 3
        vectors = rng.standard_normal((history_size, batch, n))
        v, c = rng.standard_normal((batch, n)), rng.standard_normal((batch, history_size))
        frozen = np.arange(batch) % 2 == 0

        def run(rows: Any, filled: int) -> tuple[Any, ...]:
            history = kit.backend.history(kit.array(np.zeros((len(rows), n))), history_size)
            for k in range(filled):
                active = kit.array(~frozen[rows] | (k < own), "bool")
                history = history.masked(None if k < own else active).append(kit.array(vectors[k][rows]))
            result = history.masked(None)
            base = kit.array(v[rows])
            products, coefficients = result.dot(base), kit.array(c[rows])
            return tuple(
                map(kit.numpy, (products, result.combine(coefficients), result.add_combination(base, coefficients)))
            )

        whole = run(np.arange(batch), history_size)
        for rows in (np.array([0]), np.array([6, 2]), np.array([8, 4, 2, 0, 6])):
            for name, ours, own_alone in zip(("dot", "combine", "add_combination"), whole, run(rows, own), strict=True):
                assert np.array_equal(ours[rows], own_alone), f"{name}: the bits of a sample depend on its batch"

    def test_a_verdict_is_not_met_by_growth(self, kit: Kit) -> None:
        """Run the solver's loop, with `FusedKernels.update` where the backend has it, on iterates that grow."""
        f = lambda z: z * 8.0 + 1.0  # noqa: E731
        away = iterate(kit.backend, Picard(), f, kit.array(np.zeros((2, 3))), StoppingCriteria(1e-4, max_steps=5))
        assert not (kit.numpy(away.status) == int(Status.CONVERGED)).any(), (
            "a residual that grows with the iterate must not be CONVERGED. Judge by `deqcore.solve.termination.judged`."
        )
        one = kit.array(np.ones((2, 3)))
        jump = lambda z: z + kit.backend.xp.where(kit.backend.xp.abs(z) > 1e5, one, 1e6 * one)  # noqa: E731
        result = iterate(kit.backend, Picard(), jump, kit.array(np.zeros((2, 3))), StoppingCriteria(0.5, max_steps=5))
        assert (kit.numpy(result.status) == int(Status.CONVERGED)).all(), "the residual has fallen a millionfold"
        still = iterate(kit.backend, Picard(), lambda z: z + one, 0 * one, StoppingCriteria(0.05, max_steps=60))
        assert not (kit.numpy(still.status) == int(Status.CONVERGED)).any(), "CONVERGED by growth of the iterate"

    def test_differences(self, kit: Kit) -> None:
        a, b = np.random.default_rng(0).standard_normal((2, 1, 4))
        history = kit.backend.history(kit.array(a), 2).append_difference(kit.array(a), kit.array(b))
        close(kit.numpy(history.dot(kit.array(a)))[:, 0], [(a - b)[0] @ a[0]], 100 * kit.eps, "append_difference")

    def test_continuing_leaves_a_copy_alone(self, kit: Kit) -> None:
        one = kit.array([[1.0, 0.0]])
        first = kit.backend.history(one, 2).append(one)
        kept = first.copy()
        moved = first.append(kit.array([[0.0, 5.0]])).append(kit.array([[7.0, 7.0]]))
        assert kit.numpy(moved.dot(one)).max() == 7.0, (
            "appending to a copy must leave the first history as it is. Copy the storage in `copy`."
        )
        assert sorted(kit.numpy(kept.dot(one))[0]) == [0.0, 1.0], "copy: storage of its own"

    @several("dtype", DTYPES)
    def test_narrow_storage_has_wide_products(self, kit: Kit, dtype: str) -> None:
        like = kit.array(np.ones((1, 3)), dtype)
        history = kit.backend.history(like, 2, "float32").append(like)
        result = history.dot(like)
        wide = kit.backend.dtype_name(kit.backend.to_accum_dtype(like))
        assert kit.backend.dtype_name(result) == wide, "coefficients are in the wide dtype"
        assert kit.backend.dtype_name(history.combine(result)) == dtype, "combine answers in the state's dtype"
        close(kit.numpy(result)[0, 0], 3.0, 1e-6, "dot")

    @needs("bfloat16")
    def test_storage_in_bfloat16(self, kit: Kit) -> None:
        like = kit.array(np.full((1, 512), 1.0), "float32")
        history = kit.backend.history(like, 2, "bfloat16").append(like)
        close(kit.numpy(history.dot(like))[0, 0], 512.0, 1e-6, "dot, accumulated in float32 or better")
        assert kit.backend.dtype_name(history.combine(history.dot(like))) == "float32", (
            "combinations of a history in bfloat16 must have the dtype of the state."
        )

    @several("harm", [np.nan, np.inf])
    def test_what_is_not_finite_stays_in_its_sample(self, kit: Kit, harm: float) -> None:
        clean = np.array([[1.0, 2.0], [3.0, 4.0]])
        bad = clean.copy()
        bad[0] = harm
        result = []
        for rows in (clean, bad):
            with kit.backend.errstate():
                history = kit.backend.history(kit.array(rows), 2).append(kit.array(rows))
                dots, sums = history.dot(kit.array(rows)), history.combine(kit.array(clean))
            result.append((kit.numpy(dots)[1], kit.numpy(sums)[1]))
        assert np.array_equal(result[0][0], result[1][0]), (
            "NaN or inf in one sample must not change products of another. Mask before the product, not after it."
        )
        assert np.array_equal(result[0][1], result[1][1]), (
            "NaN or inf in one sample must not change combinations of another. Mask before the product, not after it."
        )
