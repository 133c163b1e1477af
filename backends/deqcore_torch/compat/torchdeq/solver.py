"""torchdeq's solver functions `solver(func, x0, max_iter, tol, stop_mode)` on deqcore's solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from deqcore.api import fixed_point
from deqcore.errors import ConfigError
from deqcore.solution import Solution, SolveState

Info: TypeAlias = dict[str, Tensor]
SolverFunction: TypeAlias = Callable[..., tuple[Tensor, list[Tensor], Info]]

SOLVERS: Final = {
    "fixed_point_iter": "picard",
    "simple_fixed_point_iter": "picard",
    "anderson": "anderson",
    "broyden": "broyden",
    "picard": "picard",
    "newton-krylov": "newton-krylov",
}
OPTIONS: Final[dict[str, dict[str, str]]] = {
    "picard": {"tau": "damping"},
    "anderson": {"m": "history_size", "tau": "mixing"},
    "broyden": {"LBFGS_thres": "history_size"},
    "newton-krylov": {},
}
IGNORED: Final = {
    "lam": "deqcore's ridge is relative to the residuals (anderson's ridge, default 1e-10), so lam is not needed",
    "return_final": "deqcore always returns the best iterate, with its residual in info",
    "ls": "deqcore's broyden damps a step that makes the residual grow (max_residual_growth) without a line search",
}
_registered: dict[str, SolverFunction] = {}


def register_solver(solver_type: str, solver: SolverFunction) -> None:
    """Register a function as `f_solver`; the gradient is attached to what it returns.

    A solver that each sample stops on its own, on every framework, is a plugin: see the tutorial "A solver".

    Args:
        solver_type: its name in `f_solver`.
        solver: `solver(func, x0, max_iter, tol, stop_mode, indexing, **kwargs)` returns the state, a list of states and
            a dictionary of figures.

    Example:
        >>> def twice(func, x0, **kwargs):
        ...     return func(func(x0)), [], {}
        >>> register_solver("twice", twice)
        >>> get_solver("twice") is twice
        True
    """
    _registered[solver_type] = solver


def own_solver(key: str) -> SolverFunction | None:
    """Return the function registered under a name, or None."""
    return _registered.get(key)


def get_solver(key: str) -> SolverFunction:
    """Return the solver of a name as a function `solver(func, x0, max_iter, tol, stop_mode, indexing, **kwargs)`.

    Args:
        key: a name of `f_solver`, or one that `register_solver` has added.

    Returns:
        A function of tensors without gradients that returns the best state, the states after the step counts in
        `indexing`, and a dictionary of figures per sample. A tensor of fewer than two axes is a batch of numbers.

    Raises:
        ConfigError: the name is unknown, or (when called) an option is.

    Example:
        >>> import torch
        >>> z, _, info = get_solver("broyden")(torch.cos, torch.ones(2, 1), tol=1e-6)
        >>> z.round(decimals=4).tolist(), sorted(info)[:3]
        ([[0.7390999794006348], [0.7390999794006348]], ['abs_lowest', 'abs_trace', 'nstep'])
    """
    if key in _registered:
        return _registered[key]
    name = solver_name(key, "solver")

    def solver(
        func: Callable[[Tensor], Tensor],
        x0: Tensor,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        **options: object,
    ) -> tuple[Tensor, list[Tensor], Info]:
        start = x0.detach() if x0.ndim > 1 else x0.detach().reshape(-1, 1)
        settings: dict[str, object] = {
            "forward__solver": name,
            "forward__options": solver_options(key, options),
            "forward__rtol": tol if stop_mode == "rel" else 0.0,
            "forward__atol": tol if stop_mode == "abs" else 0.0,
            "forward__on_failure": "ignore",
            "backend": "torch",
        }
        states: list[Tensor] = []
        solution: Solution | None = None
        before = 0
        with torch.no_grad():
            for stop in [*(indexing or ()), max_iter]:
                state: SolveState | None = None if solution is None else solution.state
                budget = {"forward__max_steps": max(int(stop) - before, 0)}
                solution = fixed_point(
                    lambda z: func(z.reshape(x0.shape)).reshape(z.shape), start, state=state, **settings, **budget
                )
                before = int(stop)
                states.append(solution.value.reshape(x0.shape))
        assert solution is not None  # max_iter is always a stop
        return states[-1], states[:-1], info_of(solution)

    return solver


def solver_name(key: str, option: str) -> str:
    """Return deqcore's name of a solver of torchdeq.

    Raises:
        ConfigError: there is none.
    """
    if key not in SOLVERS:
        raise ConfigError.bad_value("get_deq", option, key, ", ".join(sorted(SOLVERS)))
    return SOLVERS[key]


def solver_options(key: str, given: Mapping[str, object]) -> dict[str, object]:
    """Return deqcore's options of a solver from torchdeq's `solver_kwargs`.

    Raises:
        ConfigError: the solver has no such option; the message names the alternative.
    """
    names, options = OPTIONS[SOLVERS[key]], {}
    for name, value in given.items():
        if name in IGNORED and value not in (None, False, 1e-4):
            raise ConfigError(f"solver_kwargs: {name} = {value!r} has no counterpart: {IGNORED[name]}. Remove {name}.")
        if name not in names and name not in IGNORED:
            raise ConfigError.unknown_option("solver_kwargs", name, [*names, *IGNORED, "f_max_iter"])
        if name in names and value is not None:
            # m of torchdeq counts states, history_size the differences between them
            options[names[name]] = max(int(str(value)) - 1, 1) if name == "m" else value
    return options


def info_of(solution: Solution) -> Info:
    """Return torchdeq's figures of a solve per sample `(batch,)`, and `status`."""
    if solution.fz is None:  # a strategy that takes fixed steps measures nothing
        unknown = torch.full_like(solution.steps, -1, dtype=torch.get_default_dtype())
        return _info(unknown, unknown, solution.steps.to(unknown.dtype), solution.status)
    size = _norms(solution.backend.flatten(solution.fz)[0], len(solution.residual))
    return _info(solution.residual, solution.residual / size, solution.steps.to(size.dtype), solution.status)


def solver_stat_from_final_step(z: Any, fz: Any, nstep: float = 0) -> Info:
    """Return torchdeq's figures of a state and f of it.

    Args:
        z: the state, a tensor `(batch, ...)` or several of them.
        fz: f(z), like z.
        nstep: the steps that it took.

    Returns:
        A dictionary of tensors `(batch,)`.

    Example:
        >>> import torch
        >>> info = solver_stat_from_final_step(torch.zeros(2, 3), torch.ones(2, 3), nstep=4)
        >>> info["rel_lowest"].tolist(), info["nstep"].tolist()
        ([1.0, 1.0], [4.0, 4.0])
    """
    before, after = ([item] if isinstance(item, Tensor) else list(item) for item in (z, fz))
    with torch.no_grad():
        residual = _norms([b - a for a, b in zip(before, after, strict=True)])
        size = _norms(after)
        steps = torch.full_like(residual, float(nstep))
        return _info(residual, residual / size, steps, torch.zeros_like(residual, dtype=torch.int32))


def _info(residual: Tensor, relative: Tensor, steps: Tensor, status: Tensor) -> Info:
    return {
        "abs_lowest": residual,
        "rel_lowest": relative,
        "abs_trace": residual.reshape(-1, 1),
        "rel_trace": relative.reshape(-1, 1),
        "nstep": steps,
        "sradius": torch.zeros(1, device=residual.device),
        "status": status,
    }


def _norms(leaves: Sequence[Tensor], rows: int | None = None) -> Tensor:
    """Return the 2-norms `(rows,)` of the rows of all leaves together; by default as many as the first leaf has."""
    with torch.no_grad():
        flat = torch.cat([leaf.detach().reshape(len(leaves[0]) if rows is None else rows, -1) for leaf in leaves], 1)
        norms: Tensor = flat.norm(dim=1)
        return norms
