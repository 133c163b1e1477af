"""torchdeq: `get_deq` with implicit differentiation; the batch is the first axis."""

from dataclasses import dataclass, field

from common import TorchSolver

from deqcore.abc.external import ExternalResult


@dataclass(frozen=True)
class TorchDEQ(TorchSolver):
    """`get_deq(ift=True)`.

    Attributes:
        method: "fixed_point_iter", "anderson" or "broyden".
        stop_mode: "abs" (torchdeq's default) or "rel".
        backward_tol: tolerance of the adjoint solve; 0 means that of the forward solve.
    """

    packages = ("torchdeq", "torch")
    claims = frozenset({"status", "batch", "gradient"})
    best = {"stop_mode": "rel", "backward_tol": 1e-10}  # noqa: RUF012

    method: str = field(default="fixed_point_iter", kw_only=True)
    stop_mode: str = field(default="abs", kw_only=True)
    backward_tol: float = field(default=0.0, kw_only=True)

    def solve(self, f, z0, args, *, rtol, max_steps):
        from torchdeq import get_deq

        deq = get_deq(
            f_solver=self.method, b_solver=self.method, f_max_iter=max_steps, b_max_iter=max_steps, ift=True,
            f_tol=rtol, b_tol=self.backward_tol or rtol, f_stop_mode=self.stop_mode, b_stop_mode=self.stop_mode,
        )  # fmt: skip
        states, info = deq.train()(lambda z: f(z, *args), z0)
        return ExternalResult(states[-1], converged=info[f"{self.stop_mode}_lowest"] <= rtol)


@dataclass(frozen=True)
class Anderson(TorchDEQ):
    method: str = field(default="anderson", kw_only=True)


@dataclass(frozen=True)
class Broyden(TorchDEQ):
    method: str = field(default="broyden", kw_only=True)
