"""Differentiation without a tape.

Jacobians are dense (complex step or central differences, see `derivative.py`), so `deqcore.vjp` works for any NumPy
function and costs one evaluation of f per element of the state and arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.backend import Backend
from deqcore.solve.verification import coupled_rows
from deqcore.types import BackwardRecord, Map, SolveResult, Tree
from deqcore_numpy.complex_pairs import from_pairs, pairs
from deqcore_numpy.derivative import batched_jacobian, jacobian, product, vjp_back


class NumpyAutodiff(Autodiff):
    """Dense Jacobians; no gradient is recorded."""

    def __init__(self, be: Backend) -> None:
        super().__init__(be)
        self.backend = be

    def linearize(self, f: Map, z: NDArray[Any]) -> tuple[Any, Map]:
        if coupled_rows(self.backend, f, z) is None:
            blocks = batched_jacobian(f, z)

            def vjp(u: NDArray[Any]) -> NDArray[Any]:
                product: NDArray[Any] = np.einsum("bij,bi->bj", blocks, u).astype(u.dtype, copy=False)
                return product
        else:
            dense = jacobian(f, z, state=True)

            def vjp(u: NDArray[Any]) -> NDArray[Any]:
                product: NDArray[Any] = (np.ravel(u) @ dense).reshape(u.shape)
                return product.astype(u.dtype, copy=False)

        return f(z), vjp

    def jvp(self, f: Map, z: NDArray[Any]) -> Map:
        multiply = product(f, z, lambda: coupled_rows(self.backend, f, z) is None)
        return lambda v: multiply(v).astype(v.dtype, copy=False)

    def forward_only(
        self,
        f: Callable[..., NDArray[Any]],
        z0: NDArray[Any],
        args: tuple[Tree, ...],
        solve: Callable[[Map, NDArray[Any]], SolveResult],
    ) -> SolveResult:
        with self.be.errstate():
            return solve(lambda z: f(z, *args), z0)

    def implicit(
        self,
        f: Callable[..., NDArray[Any]],
        z0: NDArray[Any],
        args: tuple[Tree, ...],
        solve: Callable[[Map, NDArray[Any]], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[NDArray[Any], SolveResult, BackwardRecord | None]:
        forward = self.forward_only(f, z0, args, solve)
        return forward.z, forward, None

    def grad_enabled(self) -> bool:
        return False

    def vjp(
        self, value: Callable[..., tuple[NDArray[Any], Tree]], args: tuple[Tree, ...], cotangent: NDArray[Any]
    ) -> tuple[NDArray[Any], Tree, tuple[Tree, ...]]:
        leaves, structure = self.be.flatten(args)
        with self.be.errstate():
            primal, aux = value(*args)
        gradients: list[NDArray[Any] | None] = []
        for i, leaf in enumerate(leaves):
            if not self.be.is_array(leaf) or not np.issubdtype(leaf.dtype, np.inexact):
                gradients.append(None)
                continue
            split = np.iscomplexobj(leaf)

            def moved(x: NDArray[Any], i: int = i, split: bool = split) -> NDArray[Any]:
                changed = [*leaves[:i], from_pairs(x) if split else x, *leaves[i + 1 :]]
                primal: NDArray[Any] = value(*self.be.unflatten(structure, changed))[0]
                return primal

            numbers = pairs(leaf) if split else leaf
            with self.be.errstate():
                gradient = vjp_back(jacobian(moved, numbers), cotangent, primal, numbers)
                gradients.append((from_pairs(gradient) if split else gradient).astype(leaf.dtype))
        return primal, aux, self.be.unflatten(structure, gradients)
