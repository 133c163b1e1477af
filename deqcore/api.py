"""`fixed_point` and `vjp`: resolve the settings, pick the backend, solve, attach the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deqcore import config as settings
from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.abc.strategy_state import StrategyState
from deqcore.config import Config
from deqcore.errors import BackendError
from deqcore.solution import Solution, SolveState
from deqcore.solve import call
from deqcore.solve.capture import captured
from deqcore.solve.dispatch import backend_named, plan_call
from deqcore.solve.user_line import warn
from deqcore.types import Tree


def fixed_point(
    f: Callable[..., Tree],
    z0: Tree,
    *args: Any,
    config: Config | None = None,
    state: SolveState | None = None,
    batched_args: tuple[int, ...] = (),
    has_aux: bool = False,
    strategy_state: StrategyState | None = None,
    mask: Any = None,
    **overrides: object,
) -> Solution:
    """Solve z* = f(z*, *args), with the implicit gradient attached.

    Args:
        f: `f(z, *args)` returns a tree like z. It may close over parameters.
        z0: initial iterate, a tree of floating-point or complex arrays; with `batch = true` the first axis of each is
            the batch, with `batch = 2` the first two are units, such as the tokens of each sequence. Python's floats
            become arrays. Leaves of integers and booleans are carried along: f gets them as they are in z0,
            `sol.value` has them unchanged, and what f returns there is ignored.
        *args: further arguments of f, any trees. Their arrays get gradients.
        config: complete settings; default: environment and `deqcore.using`.
        state: `sol.state` of an earlier solve, to continue from. One evaluation of f decides: a sample whose f is the
            same continues with a new step budget; any other begins at its best iterate. z0 is ignored.
        batched_args: positions in `args` of the arguments whose arrays carry the batch axis first. Only
            `forward.compact = true` needs it: f is then evaluated for fewer and fewer samples, and must compute
            each sample from its own rows of z and these arguments alone.
        has_aux: f returns a pair, of which only the first takes part in the solve. The second becomes `sol.aux`: one
            more evaluation of f at `sol.value` gives it, with its gradient.
        strategy_state: holds the state of a strategy that has one (`adaptive`) from one backward pass to the next;
            layers of PyTorch have their own. None: each pass is the first.
        mask: units that take part, an array of bool `(batch,)`, or `(batch, units)` with `batch = 2`; None: all. The
            others, such as padded tokens, stay at z0: they take no step, get no gradient and do not count in reports.
            f still sees them, so that attention needs its own mask.
        **overrides: settings of this call, as in `forward__rtol=1e-6`.

    Returns:
        The solution. `sol.value` has the shapes and dtype of z0. It is the iterate whose residual and status are
        reported, with the implicit gradient.

    Raises:
        ConfigError: a setting is unknown or out of range, or the backend does not support it (compaction).
        BackendMismatchError: the config names another backend than the arrays belong to.
        InitialIterateError: z0 is unfit (no arrays, integers, mixed dtypes or devices, no batch axis).
        ProblemError: f returned another structure, shape, dtype or device.
        StrategyError: the strategy needs an estimate that the solver does not keep, or `strategy_state` is passed in
            JAX.
        ConvergenceError: `on_failure = "raise"` and a sample did not converge.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models".

    Example:
        >>> import numpy as np, deqcore
        >>> x = np.array([[1.0, 2.0]])
        >>> sol = deqcore.fixed_point(lambda z, x: 0.5 * np.tanh(z) + x, np.zeros((1, 2)), x)
        >>> bool(sol.converged.all()), sol.value.shape
        (True, (1, 2))
    """
    plain = config is None and state is None and strategy_state is None and mask is None and not has_aux
    if plain and (solution := captured(f, z0, args, overrides, tuple(batched_args))) is not None:
        return solution
    plan = plan_call(config, overrides, z0, args, strategy_state)
    solve = plan.backend.guards.untraced(call.solve)
    if not has_aux:
        return solve(plan, f, z0, args, state, tuple(batched_args), mask)
    solution = solve(plan, call.without_aux(f), z0, args, state, tuple(batched_args), mask)
    return replace(solution, aux=f(solution.value, *args)[1])


def root(
    g: Callable[..., Tree],
    z0: Tree,
    *args: Any,
    config: Config | None = None,
    state: SolveState | None = None,
    **overrides: object,
) -> Solution:
    """Solve g(z*, *args) = 0, with the implicit gradient attached.

    The solvers, strategies and checks are those of `fixed_point`, applied to z − s g(z). The factor s of each sample
    has the sign and the size of a Newton step along g(z0); it costs one evaluation of g and one product with its
    Jacobian, which `sol.evaluations` does not count, and as much again where the solve has ended. A sample that met the
    tolerance only because g is steeper at z0 continues with a new factor and a new step budget. In a compiled program
    of JAX it ends as STALLED instead: solve again from `sol.value`. The gradient −(∂g/∂z)⁻¹ ∂g/∂θ does not depend on s.

    Args:
        g: `g(z, *args)` returns a tree like z: as many equations as unknowns. It may close over parameters.
        z0: initial iterate, as in `fixed_point`.
        *args: further arguments of g, any trees. Their arrays get gradients.
        config: as in `fixed_point`. A sample has converged when ‖g‖ ≤ atol + rtol·‖z − s g‖/|s|, so where a Newton step
            changes z by rtol. Its slope is that along g(z0), at z0 or, where g is flatter there, at z.
        state: `sol.state` of an earlier solve from the same z0, to continue from.
        **overrides: settings of this call, as in `forward__rtol=1e-6`.

    Returns:
        The solution. `sol.residual` is ‖g(z)‖ per sample `(batch,)`, and `sol.fz` is g(z).

    Raises:
        ProblemError: g returned another number of equations, or another structure, dtype or device than z0.
        ConfigError: `forward.compact = true`, or as `fixed_point`.

    Source: the implicit function theorem; Knoll & Keyes (2004), "Jacobian-free Newton–Krylov methods".

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.root(lambda z, a: z * z - a, np.ones((2, 1)), np.array([[2.0], [1.21]]))
        >>> sol.value.round(6).tolist(), sol.converged.tolist()
        ([[1.414214], [1.1]], [True, True])
    """
    from deqcore.solve import root as roots

    plan = plan_call(config, overrides, z0, args)
    return plan.backend.guards.untraced(roots.solve)(plan, g, z0, args, state)


def vjp(
    f: Callable[..., Tree],
    z0: Tree,
    *args: Any,
    cotangent: Tree,
    config: Config | None = None,
    batched_args: tuple[int, ...] = (),
    strategy_state: StrategyState | None = None,
    mask: Any = None,
    **overrides: object,
) -> tuple[Tree, tuple[Any, ...]]:
    """Solve z* = f(z*, *args) and map a cotangent of z* to gradients of the arguments, on every backend alike.

    Args:
        f: as in `fixed_point`.
        z0: as in `fixed_point`.
        *args: as in `fixed_point`; on a backend without autodiff each number in them costs an evaluation of f.
        cotangent: dL/dz*, a tree like z0; of complex leaves by the framework's own convention.
        config: as in `fixed_point`.
        batched_args: as in `fixed_point`.
        strategy_state: as in `fixed_point`.
        mask: as in `fixed_point`.
        **overrides: as in `fixed_point`.

    Returns:
        z*, and for each argument a tree of gradients like it, with None for leaves that are not floating-point
        or complex arrays. A dataclass is a tree of its fields here, registered or not.

    Raises:
        InitialIterateError: the cotangent does not fit z0.
        ProblemError: an argument has arrays inside that are not leaves of the backend's trees (a module of torch, a
            function or method that reads arrays, a set), or a dataclass derives arrays from its fields. Otherwise as
            `fixed_point`.

    Example:
        >>> import numpy as np, deqcore
        >>> f = lambda z, a, x: a * z + x
        >>> z, (da, dx) = deqcore.vjp(f, np.zeros((1, 1)), np.array(0.5), np.ones((1, 1)), cotangent=np.ones((1, 1)))
        >>> z.round(6).item(), da.round(6).item(), dx.round(6).item()  # x/(1-a), x/(1-a)², 1/(1-a)
        (2.0, 4.0, 2.0)
    """
    plan = plan_call(config, overrides, z0, args, strategy_state)
    return plan.backend.guards.untraced(call.differentiate)(plan, f, z0, args, cotangent, tuple(batched_args), mask)


def get_backend(config: Config | None = None, **overrides: object) -> Backend:
    """Return the backend that the config picks: `auto` takes the first installed of torch, jax, numpy, and warns.

    Args:
        config: complete settings; default: environment and `deqcore.using`.
        **overrides: settings of this call, as in `backend="jax"`.

    Returns:
        The backend: one object per name.

    Raises:
        UnknownNameError: no backend is registered under this name.
        MissingFrameworkError: the backend's framework is not installed; names the extra to install.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.name, be.norm(be.asarray([[3.0, 4.0]])).tolist()
        ('numpy', [5.0])
    """
    resolved, _ = settings.resolve(config, overrides)
    if resolved.backend != "auto":
        return backend_named(resolved.backend)
    for name in ("torch", "jax", "numpy"):
        record = plugins.backends()[name]
        if record.package is None or plugins.is_installed(record.package):
            warn(
                f"backend = 'auto' without an array to decide: deqcore takes {name!r}, the first installed of torch, "
                f"jax and numpy. Name a backend to silence this warning.",
                UserWarning,
            )
            return backend_named(name)
    raise BackendError('No backend is installed. Install one: pip install "deqcore[torch]" or "deqcore[jax]".')
