"""deepinv: `FixedPoint` around an iterator that evaluates f, with or without its Anderson acceleration."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

from common import TorchSolver

from deqcore.abc.external import ExternalResult


@dataclass(frozen=True)
class FixedPoint(TorchSolver):
    """`deepinv.optim.FixedPoint` with the rule of `BaseOptim` to stop: the mean relative change over the batch.

    Gradients belong to the classes around it, and are not judged.
    """

    packages = ("deepinv", "torch")
    claims = frozenset({"status", "batch"})

    def solve(self, f, z0, args, *, rtol, max_steps):
        import torch
        from deepinv.optim import BaseOptim
        from deepinv.optim import FixedPoint as Iteration

        def iterator(state, *_):
            return {"est": (f(state["est"][0], *args),), "cost": None}

        rule = SimpleNamespace(crit_conv="residual", thres_conv=rtol, verbose=False, has_converged=False)
        rule.get_output = lambda state: state["est"][0]
        done = partial(BaseOptim.check_conv_fn, rule)
        start = lambda init, cost_fn=None: {"est": (init,), "cost": None}  # noqa: E731
        module = torch.nn.Module()
        module.forward, module.cost_fn = iterator, None
        run = Iteration(module, init_iterate_fn=start, check_conv_fn=done, max_iter=max_steps, **self.settings())
        with torch.no_grad():
            state, _ = run(init=z0)
        return ExternalResult(state["est"][0], converged=torch.full((len(z0),), rule.has_converged))

    def settings(self):
        return {}


@dataclass(frozen=True)
class Anderson(FixedPoint):
    best = {"history_size": 5, "eps": 1e-10}  # noqa: RUF012

    history_size: int = field(default=5, kw_only=True)
    eps: float = field(default=1e-4, kw_only=True)

    def settings(self):
        from deepinv.optim import AndersonAccelerationConfig

        return {
            "anderson_acceleration_config": AndersonAccelerationConfig(history_size=self.history_size, eps=self.eps)
        }
