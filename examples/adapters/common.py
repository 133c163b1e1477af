"""What the adapters of one framework share: the batch, and derivatives by the framework through the library's solve."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deqcore.abc.external import ExternalResult, ExternalSolver


@dataclass(frozen=True)
class TorchSolver(ExternalSolver):
    """Derivatives by torch.autograd through `solve`."""

    backend = "torch"

    def gradient(self, f: Any, z0: Any, args: Any, g: Any, *, rtol: float, max_steps: int) -> Any:
        return self._gradient(f, z0, self._leaves(args), g, rtol, max_steps, keep=False)

    def second(self, f: Any, z0: Any, args: Any, g: Any, *, rtol: float, max_steps: int) -> Any:
        import torch

        leaves = self._leaves(args)
        first, *_ = self._gradient(f, z0, leaves, g, rtol, max_steps, keep=True)
        return torch.autograd.grad(first.sum(), leaves[0])[0]

    def _leaves(self, args: Any) -> Any:
        return tuple(arg.detach().clone().requires_grad_() for arg in args)

    def _gradient(self, f: Any, z0: Any, leaves: Any, g: Any, rtol: float, max_steps: int, *, keep: bool) -> Any:
        import torch

        z = self.solve(f, z0, leaves, rtol=rtol, max_steps=max_steps).z
        return torch.autograd.grad(z, leaves, g, create_graph=keep)


@dataclass(frozen=True)
class JaxSolver(ExternalSolver):
    """A library that solves one problem at a time, under `jax.vmap`, as its documentation says; derivatives by JAX."""

    backend = "jax"

    @abstractmethod
    def one(self, f: Callable[..., Any], z0: Any, args: Any, rtol: float, max_steps: int) -> tuple[Any, Any, Any]:
        """Return the solution `(n,)` of one problem, whether it has converged, and its evaluations; None if unknown."""

    def solve(self, f: Any, z0: Any, args: Any, *, rtol: float, max_steps: int) -> ExternalResult:
        import jax

        if not args:  # f closes over the data of all rows, so they are one problem
            z, done, count = self.one(f, z0, (), rtol, max_steps)
            rows = z0[:, 0]
            return ExternalResult(z, *(None if x is None else 0 * rows.astype(x.dtype) + x for x in (done, count)))

        def single(z: Any, *own: Any) -> Any:
            row = lambda z, *own: f(z[None], *(x[None] for x in own))[0]  # noqa: E731
            return self.one(row, z, own, rtol, max_steps)

        return ExternalResult(*jax.jit(jax.vmap(single))(z0, *args))

    def gradient(self, f: Any, z0: Any, args: Any, g: Any, *, rtol: float, max_steps: int) -> Any:
        import jax

        return jax.vjp(lambda *args: self.solve(f, z0, args, rtol=rtol, max_steps=max_steps).z, *args)[1](g)

    def second(self, f: Any, z0: Any, args: Any, g: Any, *, rtol: float, max_steps: int) -> Any:
        import jax

        first = lambda arg: self.gradient(f, z0, (arg, *args[1:]), g, rtol=rtol, max_steps=max_steps)[0].sum()  # noqa: E731
        return jax.grad(first)(args[0])
