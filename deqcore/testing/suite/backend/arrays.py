"""What a backend must do with arrays, trees, rows and loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from deqcore.abc.scaling import divide_rows, multiply_rows, row_scale
from deqcore.linear.norms import default_rtol
from deqcore.testing.suite.base import DTYPES, Conformance, needs, several
from deqcore.testing.suite.fixtures import Kit, close
from deqcore.testing.suite.scales import EXPONENTS, scales


class Counter(NamedTuple):
    """What the loop tests carry."""

    count: Any
    total: Any


class ArrayTests(Conformance):
    """Arrays, trees, rows, small systems and loops."""

    # -- arrays and trees ---------------------------------------------------------------------------------------

    @several("dtype", [*DTYPES, "int32", "bool"])
    def test_arrays_come_back_as_they_went(self, kit: Kit, dtype: str) -> None:
        a = (np.arange(6).reshape(2, 3) - 2).astype(dtype)
        x = kit.array(a, dtype)
        assert kit.backend.dtype_name(x) == dtype, (
            "asarray must keep the dtype of floating data. Pass the dtype on to the framework."
        )
        assert tuple(x.shape) == (2, 3), "asarray must keep the shape of its data."
        assert kit.numpy(x).dtype == dtype, "to_numpy must keep the dtype of the array."
        assert np.array_equal(kit.numpy(x), a), "to_numpy(asarray(a)) must give the numbers of a."

    def test_asarray_takes_numbers_lists_and_follows_like(self, kit: Kit) -> None:
        like = kit.array([[1.0, 2.0]], "float32")
        for given in (3.0, [1.0, 2.0], np.array([1.0, 2.0])):
            x = kit.backend.asarray(given, like=like)
            assert kit.backend.dtype_name(x) == "float32", "asarray(..., like=x) must give the dtype of x."
            assert kit.backend.device_of(x) == kit.backend.device_of(like), (
                "asarray(..., like=x) must place the array on the device of x."
            )
            assert np.array_equal(kit.numpy(x), np.asarray(given, np.float32)), (
                "asarray must take numbers, lists and arrays."
            )

    def test_writing_to_what_came_back_changes_nothing(self, kit: Kit) -> None:
        x = kit.array([[1.0, 2.0]])
        result = np.array(kit.numpy(x))
        result[...] = 7.0
        assert np.array_equal(kit.numpy(x), [[1.0, 2.0]]), (
            "to_numpy must return a copy, so that writing to it changes no array of the framework. Copy in to_numpy."
        )

    def test_knows_its_own_arrays(self, kit: Kit) -> None:
        assert kit.backend.is_array(kit.array([1.0])), "is_array must be true for what asarray returns."
        for other in (1.0, [1.0], "text", None):
            assert not kit.backend.is_array(other), (
                "is_array must be false for what is not an array of this framework, such as Python's numbers and "
                "NumPy arrays."
            )

    def test_trees_are_taken_apart_and_put_together(self, kit: Kit) -> None:
        x, y = kit.array([1.0]), kit.array([2.0, 3.0])
        trees: list[Any] = [x, {"b": [x, (y,)], "a": y}, (x, {"c": y}), []]
        for tree in trees:
            leaves, structure = kit.backend.flatten(tree)
            assert all(kit.backend.is_array(leaf) for leaf in leaves), (
                "flatten must return the arrays of a tree as leaves."
            )
            rebuilt = kit.backend.unflatten(structure, leaves)
            assert type(rebuilt) is type(tree), "unflatten must give back the container's own type."
            assert kit.backend.flatten(rebuilt)[1] == structure, (
                "flatten must return the same structure for a tree that unflatten has built."
            )
        assert kit.backend.flatten((x, y))[1] == kit.backend.flatten((y, x))[1], (
            "structures of trees of the same layout must compare as equal."
        )
        assert kit.backend.flatten((x, y))[1] != kit.backend.flatten([x, y])[1], (
            "structures of a tuple and of a list must compare as unequal."
        )

    def test_casts(self, kit: Kit) -> None:
        x = kit.array([1.5, -2.0])
        assert kit.backend.dtype_name(kit.backend.astype(x, "float32")) == "float32", (
            "astype must give the dtype that it is called with."
        )
        narrow = kit.array([0.0], "float32")
        assert kit.backend.dtype_name(kit.backend.cast(x, narrow)) == "float32", (
            "cast(x, like) must give the dtype of `like`."
        )
        assert np.array_equal(kit.numpy(kit.backend.cast(x, narrow)), [1.5, -2.0]), (
            "cast must keep numbers that both dtypes hold."
        )

    @several("dtype", DTYPES)
    def test_epsilon_and_default_tolerance(self, kit: Kit, dtype: str) -> None:
        x = kit.array([1.0], dtype)
        assert kit.backend.eps(x) == np.finfo(dtype).eps, "eps must be the machine epsilon of the array's dtype."
        assert default_rtol(kit.backend, x) == pytest.approx({"float64": 1.49e-8, "float32": 1e-4}[dtype], rel=1e-2), (
            "eps must give the default tolerance of the dtype, 1e-4 in float32 and 1.5e-8 in float64."
        )

    def test_identity_matrices(self, kit: Kit) -> None:
        like = kit.array([[1.0]], "float32")
        result = kit.backend.linalg.eye(like, 2, 3)
        assert kit.backend.dtype_name(result) == "float32", "eye must take the dtype of `like`."
        assert np.array_equal(kit.numpy(result), np.eye(2, 3)), (
            "eye(n, m) must be the identity matrix, cut to m columns."
        )

    @needs("accelerator")
    def test_arrays_stay_on_their_device(self, kit: Kit) -> None:
        x = kit.array([[1.0, 2.0]])
        at = kit.backend.device_of(x)
        made = (
            kit.backend.linalg.eye(x, 2),
            kit.backend.to_accum_dtype(x),
            kit.backend.norm(x),
            kit.backend.history(x, 2).dot(x),
        )
        assert [kit.backend.device_of(a) for a in made] == [at] * len(made), (
            "results must stay on the device of their inputs. Create arrays with `like=`."
        )

    # -- rows ---------------------------------------------------------------------------------------------------

    @several("dtype", DTYPES)
    def test_norms(self, kit: Kit, dtype: str) -> None:
        a = np.random.default_rng(0).standard_normal((3, 50)).astype(dtype)
        a[1] = 0.0
        result = kit.backend.norm(kit.array(a, dtype))
        close(kit.numpy(result), np.linalg.norm(a.astype(float), axis=1), 20 * float(np.finfo(dtype).eps), "norm")
        assert kit.backend.dtype_name(result) in DTYPES, "norms must be float32 or float64, also of narrower states."

    @several("dtype", [*DTYPES, "bfloat16"])
    def test_norms_of_any_scale(self, kit: Kit, dtype: str) -> None:
        """Check rows near the ends of the range, whose squares leave it, beside a row of zeros and an ordinary one."""
        plain = np.random.default_rng(0).integers(-9, 10, (4, 50)).astype(float)
        plain[3] *= 2.0**-20
        plain[3, 7] = 2.0 ** (EXPONENTS[dtype] // 2)  # beside which all others vanish
        tiny, huge = scales(2, dtype)
        factors = np.array([tiny, huge, 1.0, tiny])
        rows = np.concatenate([plain * factors[:, None], np.zeros((1, 50))])
        x = kit.backend.astype(kit.array(rows, "float64" if dtype == "float64" else "float32"), dtype)
        with kit.backend.errstate():
            result = kit.numpy(kit.backend.norm(x)).astype(float)
        assert result[4] == 0.0, "the norm of a row of zeros must be 0. Guard the division of the scaled norm."
        share = result[:4] / factors / np.linalg.norm(plain, axis=1)
        close(share, np.ones(4), 1e-5, "norms over true ones")

    @several("dtype", DTYPES)
    def test_scales_of_rows(self, kit: Kit, dtype: str) -> None:
        """Require powers of two, which change no digit, and 1 for rows that are zero, not finite or need no scale."""
        rows = np.array([[3.0, 4.0]]) * np.array([*scales(2, dtype), 1.0, 0.0, np.nan])[:, None]
        v = kit.array(rows, dtype)
        with kit.backend.errstate():
            unit = row_scale(kit.backend, kit.backend.norm(v), v)
        if unit is None:  # squares of such rows are in the range of a wider dtype
            with kit.backend.errstate():
                squares = kit.numpy(kit.backend.inner(v, v))[:2].astype(float)
            assert ((squares > 0) & np.isfinite(squares)).all(), "None says that no row needs a scale"
            return
        result = kit.numpy(unit).astype(float)
        assert list(result[2:]) == [1.0, 1.0, 1.0], "rows of zeros, NaN and inf must have the scale 1."
        size = 5.0 * scales(2, dtype) / result[:2]
        assert ((size >= 0.5) & (size <= 2.0)).all(), f"the norm of scaled rows must be about 1 (got {size})"
        moved = divide_rows(kit.backend, v, unit)
        assert np.array_equal(kit.numpy(multiply_rows(kit.backend, moved, unit)), kit.numpy(v), equal_nan=True), (
            "multiplying rows by their scale and back must change no bit: scales must be powers of two."
        )

    @needs("bfloat16")
    def test_norms_of_narrow_states_are_wide(self, kit: Kit) -> None:
        x = kit.backend.astype(kit.array(np.full((1, 4096), 300.0), "float32"), "bfloat16")
        result = kit.backend.norm(x)
        assert kit.backend.dtype_name(result) in DTYPES, (
            "norms of narrow states must be float32 or float64. Accumulate in the wider dtype."
        )
        close(kit.numpy(result), [300.0 * 64], 1e-2, "norm of 4096 numbers")

    def test_inner_products_are_wide(self, kit: Kit) -> None:
        a = np.array([[1.0, 1e-8], [3.0, 4.0]], np.float32)
        result = kit.backend.inner(kit.array(a, "float32"), kit.array(a, "float32"))
        wide = kit.backend.dtype_name(kit.backend.to_accum_dtype(kit.array([1.0], "float32")))
        assert kit.backend.dtype_name(result) == wide, (
            "inner products of narrow states must have the accumulating dtype."
        )
        close(kit.numpy(result), np.sum(a.astype(float) ** 2, axis=1), 2 * float(np.finfo(wide).eps), "inner product")

    @several("axes", [1, 2, 3])
    def test_rows_are_selected_without_arithmetic(self, kit: Kit, axes: int) -> None:
        shape = (2, 3, 4)[:axes]
        mask = kit.array([True, False], "bool")
        new, old = np.ones(shape), np.full(shape, 2.0)
        new[1], old[0] = np.nan, np.inf
        result = kit.numpy(kit.backend.select(mask, kit.array(new), kit.array(old)))
        expected = np.full(shape, 2.0)
        expected[0] = 1.0
        assert np.array_equal(result, expected), "0·NaN is NaN: masks must choose, not multiply"

    def test_all_known_never_guesses(self, kit: Kit) -> None:
        assert not kit.backend.known_all(kit.array([True, False], "bool")), (
            "known_all must be false if one of the values is false or unknown."
        )

    @several("dtype", DTYPES)
    @several("columns", [0, 2])
    def test_small_systems(self, kit: Kit, dtype: str, columns: int) -> None:
        rng = np.random.default_rng(1)
        a = (rng.standard_normal((3, 4, 4)) + 3 * np.eye(4)[:, ::-1]).astype(dtype)
        b = rng.standard_normal((3, 4, columns) if columns else (3, 4)).astype(dtype)
        expected = np.linalg.solve(a.astype(float), b.astype(float) if columns else b[..., None].astype(float))
        result = kit.backend.linalg.solve(kit.array(a, dtype), kit.array(b, dtype))
        close(kit.numpy(result), expected.reshape(b.shape), 1e3 * float(np.finfo(dtype).eps), "solution")

    @several("dtype", DTYPES)
    @several("size", [4, 23])
    def test_small_systems_of_a_known_kind(self, kit: Kit, dtype: str, size: int) -> None:
        rng = np.random.default_rng(2)
        a = rng.standard_normal((3, size, size)) + size * np.eye(size)
        for solve, system in (
            (kit.backend.linalg.solve_upper, np.triu(a)),
            (kit.backend.linalg.solve_positive, a @ np.swapaxes(a, 1, 2)),
        ):
            for b in (rng.standard_normal((3, size)), rng.standard_normal((3, size, 2))):
                expected = np.linalg.solve(system, b if b.ndim == 3 else b[..., None]).reshape(b.shape)
                result = kit.numpy(solve(kit.array(system.astype(dtype), dtype), kit.array(b.astype(dtype), dtype)))
                close(result, expected, 1e4 * float(np.finfo(dtype).eps), solve.__name__)

    def test_least_singular_values(self, kit: Kit) -> None:
        a = np.random.default_rng(3).standard_normal((4, 6, 5))
        result = kit.numpy(kit.backend.linalg.least_singular_value(kit.array(a), a.shape[2]))
        close(result, np.linalg.svd(a, compute_uv=False)[:, -1], 5e-3, "least singular value")

    def test_a_singular_system_spoils_its_own_row_only(self, kit: Kit) -> None:
        a = np.stack([2 * np.eye(2), np.zeros((2, 2)), 4 * np.eye(2)])
        result = kit.numpy(kit.backend.linalg.solve(kit.array(a), kit.array(np.ones((3, 2)))))
        assert not np.isfinite(result[1]).any(), "a singular system must not give finite numbers"
        assert np.array_equal(result[[0, 2]], [[0.5, 0.5], [0.25, 0.25]]), (
            "a singular system must leave the solutions of the other rows as they are. Solve each row on its own."
        )

    # -- loops --------------------------------------------------------------------------------------------------

    @several("every", [1, 3, "auto"])
    def test_a_loop_ends_when_its_condition_does(self, kit: Kit, every: int | str) -> None:
        end = self._count(kit, limit=6, steps=20, every=every)
        assert 6 <= end.count <= 6 + (every if isinstance(every, int) else 8), (
            "the loop must end with its condition, at the next check at the latest."
        )
        assert end.total == pytest.approx(0.5 * end.count), "each pass of the loop must apply the body exactly once."

    @several("every", [1, 3, 7])
    @several("steps", [0, 1, 5])
    def test_a_loop_never_exceeds_its_steps(self, kit: Kit, every: int, steps: int) -> None:
        assert self._count(kit, limit=100, steps=steps, every=every).count == steps, (
            "the loop must end after its budget of steps, whatever the condition says."
        )

    def test_a_loop_whose_condition_is_false_at_once(self, kit: Kit) -> None:
        assert self._count(kit, limit=0, steps=5, every=1).count == 0, (
            "a loop whose condition is false at the start must not call its body."
        )

    def test_a_choice_takes_one_branch(self, kit: Kit) -> None:
        """Choose between branches that return another structure than that of the carry."""
        start = kit.array(np.asarray([1.0, 2.0]))
        for wanted, expected in (([False, True], [2.0, 4.0]), ([False, False], [-1.0, -2.0])):
            doubled, carried = kit.backend.choose(
                kit.array(np.asarray(wanted)), lambda x: (2.0 * x, x), lambda x: (-x, x), start
            )
            assert kit.numpy(doubled).tolist() == expected, (
                "a choice must return the first branch if any row is wanted, and the second one if none is."
            )
            assert kit.numpy(carried).tolist() == [1.0, 2.0], "a choice must pass on what its branch returns."

    def _count(self, kit: Kit, limit: int, steps: int, every: int | str) -> Counter:
        start = Counter(kit.array(0, "int32"), kit.array(0.0, "float32"))

        def running(c: Counter) -> Any:
            return c.count < limit

        def body(c: Counter) -> Counter:
            return Counter(c.count + 1, c.total + 0.5)

        end = kit.backend.loop(running, body, start, kit.backend.numbers.as_scalar(steps, start.total), every)
        assert isinstance(end, Counter), "the loop must return a carry of the type that it began with."
        return Counter(int(kit.numpy(end.count)), float(kit.numpy(end.total)))
