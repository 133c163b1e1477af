"""torchdeq's call signature on deqcore: `deq = get_deq(...)`, then `z_out, info = deq(func, z_init)`.

The same as in torchdeq: `func` takes the tensors of the state as positional arguments; `z_out` is a list of states
whose last one is the best; options have torchdeq's names. Training returns f of the iterate that `info` describes
(with the phantom gradient: the result of its steps), evaluation the iterate itself. Different, on purpose:

- Residuals are 2-norms of f(z) − z over a sample's whole state, for every solver, and each sample stops separately.
- `f_max_iter` counts solver steps; the first evaluation of f comes on top.
- `b_tol` is relative to the cotangent in both stop modes: an absolute tolerance on a gradient has no scale.
- The gradient without `ift` is `phantom`, as in torchdeq; with `ift` it is `exact-ift`, and `b_solver` may be "gmres".
- All states on the way (`n_states`, `indexing`) carry the gradient of the strategy.
- `info` has `abs_lowest`, `rel_lowest`, `nstep`; traces are not kept, so memory does not grow with the steps.
- Unknown options are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import optree
import torch
from torch import Tensor, nn

from deqcore.api import fixed_point
from deqcore.config import Config
from deqcore.errors import ConfigError
from deqcore.solution import Solution
from deqcore_torch.cells import begin_solve as reset_deq
from deqcore_torch.gradients import straight_through

__all__ = ["TorchDEQ", "get_deq", "reset_deq"]

SOLVERS: Final = {
    "fixed_point_iter": "picard",
    "simple_fixed_point_iter": "picard",
    "anderson": "anderson",
    "broyden": "broyden",
}
FORWARD_ONLY: Final = {"core", "no_stat", "hook_ift"}  # accepted with values that need no missing feature
LOST: Final = {
    "sup_gap": "ask for states on the way with n_states or indexing",
    "sup_loc": "ask for states on the way with n_states or indexing",
}


@dataclass(frozen=True)
class Options:
    """Torchdeq's options, with its defaults."""

    f_solver: str = "fixed_point_iter"
    b_solver: str = "fixed_point_iter"
    f_max_iter: int = 40
    b_max_iter: int = 40
    f_tol: float = 1e-3
    b_tol: float = 1e-6
    f_stop_mode: str = "abs"
    b_stop_mode: str = "abs"
    eval_factor: float = 1.0
    eval_f_max_iter: int = 0
    ift: bool = False
    grad: int = 1
    tau: float = 1.0
    n_states: int = 1
    indexing: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("f_stop_mode", "b_stop_mode"):
            if getattr(self, name) not in ("abs", "rel"):
                raise ConfigError.bad_value("get_deq", name, getattr(self, name), "'abs' or 'rel'")
        if not isinstance(self.grad, int):
            raise ConfigError.bad_value("get_deq", "grad", self.grad, "one number of steps")
        if self.n_states < 1:
            raise ConfigError.bad_value("get_deq", "n_states", self.n_states, "an integer >= 1")

    def config(self, training: bool, f_max_iter: int | None = None) -> Config:
        """Return the settings of deqcore that mean the same."""
        rtol, atol = (self.f_tol, 0.0) if self.f_stop_mode == "rel" else (0.0, self.f_tol)
        budget = self.f_max_iter if training else self.eval_f_max_iter or int(self.f_max_iter * self.eval_factor)
        return Config(
            backend="torch",
            forward={
                "solver": _solver(self.f_solver),
                "rtol": rtol,
                "atol": atol,
                "max_steps": budget if f_max_iter is None else f_max_iter,
                "on_failure": "ignore",
            },
            backward=self._backward(),
        )

    def _backward(self) -> dict[str, object]:
        if not self.ift:
            return {"strategy": "phantom", "options": {"steps": self.grad, "damping": self.tau}}
        solver = "gmres" if self.b_solver == "gmres" else _solver(self.b_solver)
        return {
            "strategy": "exact-ift",
            "options": {"solver": solver, "rtol": self.b_tol, "max_steps": self.b_max_iter},
        }

    def left(self, f: Callable[[Any], Any], solution: Solution) -> Any:
        """Return torchdeq's value in training: f of the iterate, or the result of phantom steps, with our gradient."""
        z, fz = solution.z, solution.fz
        steps, damping = (1, 1.0) if self.ift else (self.grad, self.tau)
        with torch.no_grad():
            for step in range(steps):
                fz = f(z) if step else fz
                z = optree.tree_map(lambda a, b: a + damping * (b - a), z, fz) if damping != 1.0 else fz
        return optree.tree_map(straight_through, z, solution.value)

    def stops(self, budget: int) -> list[int]:
        """Return the step counts after which to return a state; the last is the budget."""
        if self.n_states > 1:
            count = min(self.n_states, budget)
            gap = budget // count
            return [budget - gap * (count - 1 - i) for i in range(count)]
        return [*self.indexing, budget]


class TorchDEQ(nn.Module):
    """The layer that `get_deq` returns.

    Args:
        options: torchdeq's options.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Tensor | Sequence[Tensor],
        solver_kwargs: Mapping[str, object] | None = None,
        **unknown: object,
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Solve z = func(z).

        Args:
            func: takes the state's tensors `(batch, …)` and returns as many.
            z_init: initial state, one tensor or several.
            solver_kwargs: `f_max_iter` for this call.
            **unknown: any other option is an error.

        Returns:
            States, the last of them the solution (in evaluation mode only that one), and the solve's figures.

        Raises:
            ConfigError: an option that deqcore has no counterpart for.
        """
        for name in unknown:
            raise ConfigError.unknown_option("deq(...)", name, ("solver_kwargs",))
        given = dict(solver_kwargs or {})
        budget = given.pop("f_max_iter", None)
        for name in given:
            raise ConfigError.unknown_option("solver_kwargs", name, ("f_max_iter",))
        config = self.options.config(self.training, None if budget is None else int(str(budget)))
        single = isinstance(z_init, Tensor)
        start = z_init if single else list(z_init)

        def f(z: Any) -> Any:
            return func(z) if single else list(func(*z))

        f.__wrapped__ = func  # type: ignore[attr-defined] # backward passes are counted for func
        stops = self.options.stops(config.forward.max_steps) if self.training else [config.forward.max_steps]
        states: list[Any] = []
        solution: Solution | None = None
        for before, stop in zip([0, *stops], stops, strict=False):
            state = None if solution is None else solution.state
            solution = fixed_point(f, start, config=config, state=state, forward__max_steps=stop - before)
            states.append(self.options.left(f, solution) if self.training else solution.value)
        assert solution is not None  # the budget is always a stop
        return states, _info(solution)


def get_deq(args: object = None, **options: object) -> TorchDEQ:
    """Return a layer with torchdeq's call signature.

    Args:
        args: a dictionary or an `argparse.Namespace`; of a namespace only torchdeq's options are read.
        **options: single options, above `args`.

    Returns:
        A module: `deq(f, z0)` gives the list of outputs and a dictionary of figures per sample `(batch,)`.

    Raises:
        ConfigError: an option is unknown, or has no counterpart here (the message names the alternative).

    Example:
        >>> import torch
        >>> from deqcore_torch.compat.torchdeq import get_deq
        >>> deq = get_deq(f_solver="broyden", ift=True, b_solver="gmres")
        >>> x = torch.ones(2, 3)
        >>> z_out, info = deq(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros(2, 3))
        >>> z_out[-1].shape, bool((info["abs_lowest"] < 1e-3).all())
        (torch.Size([2, 3]), True)
    """
    names = {field.name for field in fields(Options)}
    merged: dict[str, Any] = dict(args) if isinstance(args, Mapping) else {}
    if args is not None and not isinstance(args, Mapping):
        merged = {name: value for name, value in vars(args).items() if name in names | FORWARD_ONLY | LOST.keys()}
    merged |= options
    if merged.pop("hook_ift", False):
        merged["ift"] = True
    for name in list(merged):
        if name in LOST:
            if merged[name] not in (None, -1, [], ()):
                raise ConfigError(f"get_deq: {name} = {merged[name]!r} has no counterpart: {LOST[name]}.")
            del merged[name]
        elif name in FORWARD_ONLY:
            del merged[name]
        elif name not in names:
            raise ConfigError.unknown_option("get_deq", name, names)
    grad = merged.get("grad")
    if isinstance(grad, (list, tuple)) and len(grad) == 1:
        merged["grad"] = grad[0]
    made = TorchDEQ(Options(**merged))
    made.options.config(training=True)  # a wrong value raises now
    return made


def _solver(name: str) -> str:
    if name not in SOLVERS:
        raise ConfigError.bad_value("get_deq", "f_solver or b_solver", name, ", ".join(sorted(SOLVERS)))
    return SOLVERS[name]


def _info(solution: Solution) -> dict[str, Tensor]:
    leaves = solution.backend.flatten(solution.fz)[0]
    with torch.no_grad():
        flat = torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)
        relative = solution.residual / solution.backend.norm(flat)
    return {"abs_lowest": solution.residual, "rel_lowest": relative, "nstep": solution.steps}
