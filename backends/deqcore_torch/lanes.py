"""`torch.func.vmap` around a solve: the mapped axes become rows of one batch.

A loop that ends when its samples have converged needs their values, which batched tensors do not give. So the solver
runs outside of all transformations on plain tensors `(lanes · batch, n)`. Each evaluation of f enters them again: its
rows become batched tensors of the levels that are active, and its value becomes rows. f may close over batched tensors,
and each sample of each lane stops at its own tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)

from deqcore.types import Map, SolveResult


@dataclass(frozen=True)
class Lanes:
    """The mapped axes that are active, the outermost first: their levels and sizes."""

    levels: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def now(cls) -> Lanes:
        """Return those of this point of the program; none outside of vmap."""
        stack = get_interpreter_stack() or []
        mapped = [VmapInterpreter(entry) for entry in stack if entry.key() == TransformType.Vmap]
        return cls(tuple(vmap.level() for vmap in mapped), tuple(vmap.batch_size() for vmap in mapped))

    def __bool__(self) -> bool:
        return bool(self.levels)

    def flat(self, x: Tensor) -> Tensor:
        """Return `x` `(batch, …)` of every lane as the rows of a plain tensor `(lanes · batch, …)`."""
        dims: dict[int, int] = {}
        while is_functorch_wrapped_tensor(x):
            if is_batchedtensor(x):
                dims[maybe_get_level(x)] = maybe_get_bdim(x)
            x = get_unwrapped(x)
        with temporarily_clear_interpreter_stack():
            for front, (level, size) in enumerate(zip(self.levels, self.sizes, strict=True)):
                if level in dims:
                    x = x.movedim(front + dims[level], front)
                else:
                    x = x.unsqueeze(front).expand(*x.shape[:front], size, *x.shape[front:])
            return x.reshape(-1, *x.shape[len(self.sizes) + 1 :])

    def wrapped(self, x: Tensor) -> Tensor:
        """Undo `flat`."""
        with temporarily_clear_interpreter_stack():
            x = x.reshape(*self.sizes, x.shape[0] // math.prod(self.sizes), *x.shape[1:])
        for level in self.levels:
            x = _add_batch_dim(x, 0, level)
        return x

    def outside(self, run: Callable[[Callable[[Map], Map]], Any]) -> Any:
        """Return `run(enter)` outside of all transformations; `enter(f)` is f on rows, which runs inside of them."""
        with temporarily_clear_interpreter_stack() as stack:

            def enter(f: Map) -> Map:
                def on_rows(rows: Tensor) -> Tensor:
                    inside = self.wrapped(rows)
                    with temporarily_restore_interpreter_stack(stack):
                        value = f(inside)
                    return self.flat(value)

                return on_rows

            return run(enter)

    def solve(self, f: Map, z0: Tensor, solve: Callable[[Map, Tensor], SolveResult]) -> SolveResult:
        """Return the result of a solve, whose arrays are batched tensors; its `carry` has the rows of all lanes."""
        start = self.flat(z0).detach().clone()

        def detached(rows: Tensor, on_rows: Map) -> Tensor:
            y = on_rows(rows)
            return y.detach() if y.requires_grad and not torch.is_grad_enabled() else y

        def run(enter: Callable[[Map], Map]) -> SolveResult:
            on_rows = enter(f)
            return solve(lambda rows: detached(rows, on_rows), start)

        result = self.outside(run)
        return SolveResult(*(self.wrapped(part) if isinstance(part, Tensor) else part for part in result))

    def solve_linear(self, product: Map, b: Tensor, solve: Callable[[Map, Tensor], Tensor]) -> Tensor:
        """Return the solution of a linear equation for a batched right-hand side, by `solve(product, b)` on rows."""
        rows = self.flat(b).detach()
        solution: Tensor = self.outside(lambda enter: solve(enter(product), rows))
        return self.wrapped(solution.detach())
