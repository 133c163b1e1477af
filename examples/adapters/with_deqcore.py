"""deqcore's own solvers, judged as the others are: one call, its statuses, its counts and its gradients."""

from dataclasses import dataclass, field

from common import TorchSolver

from deqcore.abc.external import ExternalResult


@dataclass(frozen=True)
class Deqcore(TorchSolver):
    """`deqcore.fixed_point`, which evaluates f once more than it counts where autograd records: for the gradient."""

    packages = ("deqcore", "torch")
    claims = frozenset({"status", "evaluations", "batch", "gradient", "second", "units"})

    method: str = field(default="picard", kw_only=True)

    def solve(self, f, z0, args, *, rtol, max_steps):
        import torch

        import deqcore

        sol = deqcore.fixed_point(
            f, z0, *args, forward__solver=self.method, forward__rtol=rtol, forward__max_steps=max_steps,
            forward__on_failure="ignore", backward__strategy="exact-ift", backward__on_failure="ignore",
        )  # fmt: skip
        return ExternalResult(sol.value, sol.converged, sol.evaluations + int(torch.is_grad_enabled()))


@dataclass(frozen=True)
class Auto(Deqcore):
    """The default."""

    method: str = field(default="auto", kw_only=True)


@dataclass(frozen=True)
class Anderson(Deqcore):
    method: str = field(default="anderson", kw_only=True)


@dataclass(frozen=True)
class Broyden(Deqcore):
    method: str = field(default="broyden", kw_only=True)


@dataclass(frozen=True)
class NewtonKrylov(Deqcore):
    method: str = field(default="newton-krylov", kw_only=True)
