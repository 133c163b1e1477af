"""The options of `get_deq` with torchdeq's names and defaults, and what they mean in deqcore."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from deqcore.config import Config
from deqcore.errors import ConfigError
from deqcore_torch.compat.torchdeq.solver import SOLVERS, own_solver, solver_name, solver_options

ELSEWHERE: Final = {
    *("norm_type", "norm_no_scale", "norm_clip", "norm_clip_value", "norm_target_norm", "sn_n_power_iters"),
    *("gamma", "jac_loss_weight", "jac_loss_freq", "jac_incremental", "sradius_mode", "no_stat"),
}  # options of apply_norm, fp_correction, the training loop and the call, which one namespace holds together


@dataclass(frozen=True)
class SolveOptions:
    """Torchdeq's options, with its defaults, and `batch`, deqcore's own."""

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
    core: str = "sliced"
    ift: bool = False
    hook_ift: bool = False
    grad: int | Sequence[int] = 1
    tau: float = 1.0
    sup_gap: int = -1
    sup_loc: Sequence[int] = ()
    n_states: int = 1
    indexing: Sequence[int] = ()
    batch: bool = True

    def __post_init__(self) -> None:
        for name in ("f_stop_mode", "b_stop_mode"):
            if getattr(self, name) not in ("abs", "rel"):
                raise ConfigError.bad_value("get_deq", name, getattr(self, name), "'abs' or 'rel'")
        if self.n_states < 1:
            raise ConfigError.bad_value("get_deq", "n_states", self.n_states, "an integer >= 1")
        if not self.steps or min(self.steps) < 1:
            raise ConfigError.bad_value("get_deq", "grad", self.grad, "a number of steps >= 1, or a list of them")
        if len(self.steps) not in (1, self.states):
            expected = f"one number, or one for each of the {self.states} states of n_states or indexing"
            raise ConfigError.bad_value("get_deq", "grad", self.grad, expected)

    @classmethod
    def of(cls, args: object, given: Mapping[str, Any]) -> SolveOptions:
        """Merge a namespace, a dictionary or None with keywords, which win.

        Raises:
            ConfigError: an option of the dictionary or of the keywords is unknown.
        """
        names = {field.name for field in fields(cls)}
        merged: dict[str, Any] = dict(args) if isinstance(args, Mapping) else {}
        if args is not None and not isinstance(args, Mapping):
            merged = {name: value for name, value in vars(args).items() if name in names}
        merged |= given
        for name in merged:
            if name not in names | ELSEWHERE:
                raise ConfigError.unknown_option("get_deq", name, names)
        if merged.get("hook_ift"):
            merged["ift"] = True  # deqcore has one implementation
        for name in ("indexing", "sup_loc"):
            merged[name] = tuple(merged.get(name) or ())
        return cls(**{name: value for name, value in merged.items() if name in names})

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of phantom steps in `grad`."""
        return (self.grad,) if isinstance(self.grad, int) else tuple(self.grad)

    @property
    def states(self) -> int:
        """The number of states that a training call returns, for one of each."""
        return self.n_states if self.n_states > 1 else len(self.indexing) + 1

    def budget(self, training: bool) -> int:
        """Return the step budget of a call."""
        return self.f_max_iter if training else self.eval_f_max_iter or int(self.f_max_iter * self.eval_factor)

    def phantom_steps(self, index: int) -> int:
        """Return the phantom steps of the state of this index."""
        return self.steps[0] if len(self.steps) == 1 else self.steps[index]

    def config(self, options: Mapping[str, object], *, implicit: bool, steps: int = 1) -> Config:
        """Return the settings of deqcore that mean the same.

        Args:
            options: torchdeq's `solver_kwargs` of the forward solve.
            implicit: exact-ift, otherwise phantom.
            steps: steps of phantom.
        """
        rtol, atol = (self.f_tol, 0.0) if self.f_stop_mode == "rel" else (0.0, self.f_tol)
        name = "picard" if own_solver(self.f_solver) else solver_name(self.f_solver, "f_solver")
        return Config(
            backend="torch",
            forward={
                "solver": name,
                "options": {} if own_solver(self.f_solver) else solver_options(self.f_solver, options),
                "rtol": rtol,
                "atol": atol,
                "max_steps": self.f_max_iter,
                "on_failure": "ignore",
                "batch": self.batch,
            },
            backward=self._implicit() if implicit else self._phantom(steps),
        )

    def _phantom(self, steps: int) -> dict[str, object]:
        return {"strategy": "phantom", "options": {"steps": steps, "damping": self.tau}}

    def _implicit(self) -> dict[str, object]:
        if own_solver(self.b_solver):
            raise ConfigError(
                f"get_deq: b_solver = {self.b_solver!r} is a function of register_solver, which deqcore does not call "
                f"in the backward pass. Use one of {', '.join(sorted([*SOLVERS, 'gmres']))}."
            )
        solver = "gmres" if self.b_solver == "gmres" else solver_name(self.b_solver, "b_solver")
        return {
            "strategy": "exact-ift",
            "options": {"solver": solver, "rtol": self.b_tol, "max_steps": self.b_max_iter},
        }

    def stops(self, budget: int) -> list[int]:
        """Return the step counts after which to return a state; the last is the budget."""
        if self.n_states > 1:
            count = max(min(self.n_states, budget), 1)
            gap = budget // count
            ends = [budget - gap * (count - 1 - i) for i in range(count)]
            return [gap * (i + 1) for i in range(count)] if self.core == "sliced" else ends
        return [*(step for step in self.indexing if step < budget), budget]


def add_deq_args(parser: argparse.ArgumentParser) -> None:
    """Add torchdeq's options to an argument parser, with torchdeq's defaults.

    Args:
        parser: the parser.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> add_deq_args(parser)
        >>> args = parser.parse_args(["--f_solver", "broyden", "--ift"])
        >>> args.f_solver, args.f_max_iter, args.norm_type
        ('broyden', 40, 'weight_norm')
    """
    for name, kind, default, text in ARGUMENTS:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name, item, text in LISTS:
        parser.add_argument(f"--{name}", type=int, nargs="+", default=item, help=text)
    for name, text in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true", help=text)


ARGUMENTS: Final = (
    ("f_solver", str, "fixed_point_iter", f"forward solver: {', '.join(SOLVERS)}"),
    ("b_solver", str, "fixed_point_iter", f"solver of the backward pass: {', '.join(SOLVERS)} or gmres"),
    ("f_max_iter", int, 40, "step budget of the forward solve"),
    ("b_max_iter", int, 40, "step budget of the backward solve"),
    ("f_tol", float, 1e-3, "tolerance of the forward solve"),
    ("b_tol", float, 1e-6, "tolerance of the backward solve, relative to the cotangent"),
    ("f_stop_mode", str, "abs", "whether f_tol is absolute (abs) or relative (rel)"),
    ("b_stop_mode", str, "abs", "accepted; b_tol is always relative"),
    ("eval_factor", float, 1.0, "factor of f_max_iter in evaluation mode"),
    ("eval_f_max_iter", int, 0, "step budget in evaluation mode; 0: f_max_iter * eval_factor"),
    ("norm_type", str, "weight_norm", "normalization of weights: weight_norm, spectral_norm or none"),
    ("norm_clip_value", float, 1.0, "upper bound of the factor of a weight with norm_clip"),
    ("norm_target_norm", float, 1.0, "norm of the weights without a learned scale"),
    ("sn_n_power_iters", int, 1, "power iterations of spectral_norm in each reset"),
    ("core", str, "sliced", "how states on the way are taken: sliced or indexing"),
    ("n_states", int, 1, "number of states for fixed-point correction, spaced evenly"),
    ("gamma", float, 0.8, "weight of earlier states in fp_correction"),
    ("tau", float, 1.0, "damping of phantom steps"),
    ("sup_gap", int, -1, "return every so many phantom steps; -1: the last only"),
    ("jac_loss_weight", float, 0.0, "weight of the Jacobian regularization"),
    ("jac_loss_freq", float, 0.0, "share of training steps with Jacobian regularization"),
    ("jac_incremental", int, 0, "raise jac_loss_weight by 0.1 after this many steps; 0: never"),
)
LISTS: Final[tuple[tuple[str, list[int], str], ...]] = (
    ("indexing", [], "step counts after which a state is returned for fixed-point correction"),
    ("grad", [1], "phantom steps; one number, or one for each state"),
    ("sup_loc", [], "phantom steps to return in addition to the last"),
)
SWITCHES: Final = (
    ("norm_no_scale", "normalize to norm_target_norm without a learned scale"),
    ("norm_clip", "bound the factor of a weight by norm_clip_value"),
    ("ift", "implicit differentiation"),
    ("hook_ift", "the same as ift"),
    ("sradius_mode", "measure the spectral radius in evaluation mode"),
)
