"""The leaves of a state: which of them a solver moves, which are complex, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, Final

from deqcore.abc.backend import Backend
from deqcore.errors import DeqcoreError, InitialIterateError, ProblemError
from deqcore.types import Tree

EPS64: Final = 2.0**-52
REAL: Final = {"complex64": "float32", "complex128": "float64"}
"""The dtype of the real and imaginary part, for each dtype of complex numbers that a state may have."""

Carried = tuple[tuple[int, Any], ...]
"""Leaves that f gets unchanged, by position."""


def is_carried(backend: Backend, leaf: Any) -> bool:
    """Return whether a leaf of z0 is carried along: integers, booleans, or no numbers at all."""
    if isinstance(leaf, bool | int | str | None):
        return True
    if not backend.is_array(leaf) or backend.guards.unfit(leaf) is not None:
        return False
    name = backend.dtype_name(leaf)
    return "int" in name or "bool" in name


def moved(leaves: list[Any], carried: Carried) -> list[Any]:
    """Return the leaves that a solver moves."""
    if not carried:
        return leaves
    kept = {position for position, _ in carried}
    return [leaf for position, leaf in enumerate(leaves) if position not in kept]


def floating(backend: Backend, leaves: list[Any], carried: Carried) -> list[Any]:
    """Return the other leaves, with Python's numbers as arrays of the dtype of the first array."""
    leaves = moved(leaves, carried)
    if any(type(leaf) is float for leaf in leaves):
        like = next((leaf for leaf in leaves if backend.is_array(leaf)), None)
        if like is not None and backend.dtype_name(like) in REAL:
            like = backend.xp.real(like)
        leaves = [backend.asarray(leaf, like=like) if type(leaf) is float else leaf for leaf in leaves]
    return leaves


def check_leaf(backend: Backend, leaf: Any, axes: int) -> None:
    """Raise `InitialIterateError` for a leaf that is not a part of a state whose rows are numbered by `axes` axes."""
    if not backend.is_array(leaf):
        remedy = "Convert it with deqcore.get_backend(...).asarray."
        if is_dataclass(leaf):
            remedy = f"Register the class as a pytree ({backend.registration})."
        raise InitialIterateError(
            f"The leaves of the initial iterate z0 must be arrays of {backend.name} (got a {type(leaf).__name__}). "
            f"{remedy}"
        )
    if (reason := backend.guards.unfit(leaf)) is not None:
        raise InitialIterateError(f"The initial iterate z0 holds {reason}.")
    name = backend.dtype_name(leaf)
    is_complex = backend.capabilities.complex and name in REAL
    if "float" in name and backend.eps(leaf) < EPS64:
        raise InitialIterateError(
            f"The initial iterate z0 is {name}, but norms and histories have at most the precision of float64. Cast z0 "
            f"and the arrays of f to float64."
        )
    if "float" not in name and not is_complex:
        hint = "Split it into its real and imaginary part." if "complex" in name else "Cast z0 first."
        kinds = "float32 or complex128" if backend.capabilities.complex else "float32 or float64"
        raise InitialIterateError(
            f"The initial iterate z0 must have a floating-point dtype, such as {kinds} (got {name}). {hint}"
        )
    if axes == 2 and leaf.ndim < 3:
        raise InitialIterateError(
            f"With forward.batch = 2 every leaf of the state must have two axes of units and at least one more (got "
            f"the shape {tuple(leaf.shape)}). Reshape it to (batch, units, n), or set forward.batch = true if each row "
            f"is one unit."
        )
    if axes and leaf.ndim < 2:
        raise InitialIterateError(
            f"With forward.batch = true every leaf of the state must have a batch axis and at least one more (got the "
            f"shape {tuple(leaf.shape)}). Reshape it to (batch, n), or set forward.batch = false to solve the whole "
            f"state as one system."
        )


def check_rows(shapes: tuple[tuple[int, ...], ...], axes: int) -> None:
    """Raise `InitialIterateError` if the leaves do not have the same leading axes."""
    rows = {shape[:axes] for shape in shapes}
    if len(rows) < 2:
        return
    if axes == 1:
        raise InitialIterateError(
            f"With forward.batch = true the first axis of every leaf is the batch, so the leaves must have the "
            f"same number of rows (got {sorted(row[0] for row in rows)}, shapes {list(shapes)}). Give them one batch "
            f"size, or set forward.batch = false to solve the whole state as one system."
        )
    raise InitialIterateError(
        f"With forward.batch = 2 the first two axes of every leaf are units, so they must be the same in every leaf "
        f"(got {sorted(rows)}, shapes {list(shapes)}). Give the leaves one batch size and one number of units, or set "
        f"forward.batch = true, for which the first axis alone must agree."
    )


def check_sizes(shapes: tuple[tuple[Any, ...], ...], axes: int) -> None:
    """Raise `InitialIterateError` if a size that solvers plan with is symbolic; that of the batch may be."""
    fixed = [size for shape in shapes for size in shape[min(axes, 1) :]]
    # Sizes that are tensors belong to torch.jit.trace, which the backend refuses.
    symbolic = [str(size) for size in fixed if not isinstance(size, int) and not hasattr(size, "dtype")]
    if symbolic:
        alone = " of forward.batch = true" if axes == 0 else ""
        raise InitialIterateError(
            f"Only the batch{alone} may have a symbolic size, because solvers plan with the other sizes of z0 (got "
            f"{', '.join(dict.fromkeys(symbolic))} in the shapes {list(shapes)}). Give numbers for the others."
        )


def dtype_of(kinds: set[str]) -> str:
    """Return the dtype of the matrix for leaves of these dtypes: complex numbers are pairs of real ones.

    Raises:
        InitialIterateError: they differ in precision.
    """
    real = {REAL.get(kind, kind) for kind in kinds}
    if len(real) > 1:
        given = ", ".join(sorted(kinds))
        mixed = " (complex64 goes with float32, complex128 with float64)" if kinds & set(REAL) else ""
        raise InitialIterateError(
            f"The leaves of the state must have one dtype{mixed} (got {given}). Cast the leaves to the widest of these."
        )
    return real.pop()


def complex_call(f: Callable[..., Tree], z: Tree, args: tuple[Any, ...], kinds: str) -> Tree:
    """Return f(z, *args) for a z with complex leaves.

    Raises:
        ProblemError: f has an operation that does not take complex numbers.
    """
    try:
        return f(z, *args)
    except DeqcoreError:
        raise
    except (TypeError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if not any(word in reason.lower() for word in ("complex", "dtype", "input types")):
            raise
        raise ProblemError(
            f"f must take complex numbers, because z0 is {kinds} (got {type(error).__name__}: {reason}). Make the "
            f"parameters of f complex and use operations that exist for complex numbers, or give f the real and the "
            f"imaginary part as two real leaves of the state."
        ) from error
