"""`get_deq` and its layer: torchdeq's call `z_out, info = deq(func, z_init)` on deqcore's `fixed_point`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor, nn

from deqcore.api import fixed_point
from deqcore.diagnostics import spectral_radius
from deqcore.errors import ConfigError, listing
from deqcore.solution import Solution
from deqcore.types import AdjointReport, BackwardRecord
from deqcore_torch.cells import begin_solve
from deqcore_torch.compat.torchdeq.config import SolveOptions
from deqcore_torch.compat.torchdeq.dropout import reset_dropout
from deqcore_torch.compat.torchdeq.norm import reset_norm
from deqcore_torch.compat.torchdeq.solver import Info, SolverFunction, get_solver, info_of, own_solver
from deqcore_torch.gradients import straight_through

Writer = Callable[[Info], object]


class DEQBase(nn.Module):
    """The base of layers that `get_deq` makes; a subclass defines `forward` and is registered with `register_deq`.

    Args:
        args: a dictionary or a namespace of torchdeq's options.
        **options: single options, above `args`.

    Attributes:
        options: the options.
        f_solver: the forward solver as a function, see `get_solver`.
        b_solver: the solver of the backward pass as a function.
        f_max_iter: step budget in training.
        eval_f_max_iter: step budget in evaluation mode.
        f_tol: forward tolerance.
        f_stop_mode: "abs" or "rel".

    Raises:
        ConfigError: an option is unknown or has a wrong value.

    Example:
        >>> import torch
        >>> class Plain(DEQBase):
        ...     def forward(self, func, z_init, **kwargs):
        ...         z, _, info = self.f_solver(func, z_init, max_iter=self.f_max_iter, tol=self.f_tol)
        ...         return [func(z)], info
        >>> register_deq("plain", Plain)
        >>> z_out, info = get_deq(core="plain")(torch.cos, torch.ones(2, 1))
        >>> z_out[-1].shape
        torch.Size([2, 1])
    """

    def __init__(self, args: object = None, **options: object) -> None:
        super().__init__()
        self.options = SolveOptions.of(args, options)
        self.f_solver = get_solver(self.options.f_solver)
        self.b_solver = get_solver("fixed_point_iter" if self.options.b_solver == "gmres" else self.options.b_solver)
        self.f_max_iter, self.b_max_iter = self.options.f_max_iter, self.options.b_max_iter
        self.eval_f_max_iter = self.options.budget(training=False)
        self.f_tol, self.b_tol = self.options.f_tol, self.options.b_tol
        self.f_stop_mode, self.b_stop_mode = self.options.f_stop_mode, self.options.b_stop_mode

    def forward(self, func: Callable[..., Any], z_init: Any, **kwargs: Any) -> tuple[list[Any], Info]:
        """Return the states and the figures. A subclass defines it."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(func, z_init, **kwargs).")

    def extra_repr(self) -> str:
        """Return the options that differ from torchdeq's defaults, for the printed form."""
        default = SolveOptions()
        names = [name for name in default.__dataclass_fields__ if getattr(self.options, name) != getattr(default, name)]
        return ", ".join(f"{name}={getattr(self.options, name)!r}" for name in names)


class TorchDEQ(DEQBase):
    """The layer that `get_deq` returns.

    Args:
        args: as for `get_deq`.
        **options: as for `get_deq`.
    """

    core: ClassVar[str] = "sliced"

    def __init__(self, args: object = None, **options: object) -> None:
        super().__init__(args, **{"core": self.core, **options})
        self.options.config({}, implicit=self.options.ift)  # a wrong value raises now

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Tensor | Sequence[Tensor],
        solver_kwargs: Mapping[str, object] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
        writer: Writer | None = None,
        **unknown: object,
    ) -> tuple[list[Any], Info]:
        """Solve z = func(z).

        Args:
            func: takes the state's tensors `(batch, …)` and returns as many.
            z_init: initial iterate, one tensor or several.
            solver_kwargs: for this call: `f_max_iter`, and options of the solver (`tau`, `m`, `LBFGS_thres`).
            sradius_mode: in evaluation mode, measure the spectral radius as `info["sradius"]` `(batch,)`.
            backward_writer: called in each backward pass of the last state with a dictionary of its figures.
            writer: another name of `backward_writer`.
            **unknown: any other option is an error.

        Returns:
            States, the last of them the solution (in evaluation mode only that one), and the solve's figures.

        Raises:
            ConfigError: an option that deqcore has no counterpart for.
        """
        for name in unknown:
            known = ("solver_kwargs", "sradius_mode", "backward_writer", "writer")
            raise ConfigError.unknown_option("deq(...)", name, known)
        kwargs = dict(solver_kwargs or {})
        given = kwargs.pop("f_max_iter", None)
        budget = self.options.budget(self.training) if given is None else int(str(given))
        single = isinstance(z_init, Tensor)
        start = [z_init] if isinstance(z_init, Tensor) else list(z_init)
        shapes = [leaf.shape for leaf in start]

        def narrow(z: list[Tensor]) -> list[Tensor]:
            return [leaf.reshape(shape) for leaf, shape in zip(z, shapes, strict=True)]

        def f(z: list[Tensor]) -> list[Tensor]:
            values = func(*narrow(z))
            return self._wide([values] if single else values)

        f.__wrapped__ = func  # type: ignore[attr-defined] # backward passes are counted for func
        if self.training:
            states, info = self._trained(f, self._wide(start), budget, kwargs, backward_writer or writer)
        else:
            states, info = self._evaluated(f, self._wide(start), budget, kwargs, sradius_mode)
        return [narrow(state)[0] if single else narrow(state) for state in states], info

    def _wide(self, z: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors, those of fewer than two axes as a batch of numbers, as torchdeq takes them."""
        return [leaf if leaf.ndim > 1 or not self.options.batch else leaf.reshape(-1, 1) for leaf in z]

    def _evaluated(
        self, f: Callable[[Any], Any], start: Any, budget: int, kwargs: Mapping[str, object], sradius_mode: bool
    ) -> tuple[list[Any], Info]:
        solution = self._solve(f, start, None, budget, kwargs, self.options.ift, 1)
        info = info_of(solution)
        if sradius_mode:
            spectrum = spectral_radius(f, solution.z, batch=self.options.batch)
            info["sradius"] = torch.as_tensor(spectrum.radius).to(info["abs_lowest"])
        return [solution.value], info

    def _trained(
        self, f: Callable[[Any], Any], start: Any, budget: int, kwargs: Mapping[str, object], writer: Writer | None
    ) -> tuple[list[Any], Info]:
        options, sliced = self.options, self.options.core == "sliced"
        stops = options.stops(budget)
        states: list[Any] = []
        solution: Solution | None = None
        for index, (before, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            implicit = options.ift and index == len(stops) - 1
            steps = 1 if implicit else options.phantom_steps(index)
            if sliced and solution is not None:
                start = optree.tree_map(torch.detach, states[-1])
            state = None if solution is None or sliced else solution.state
            solution = self._solve(f, start, state, stop - before, kwargs, implicit, steps)
            states += self._left(f, solution, implicit, steps)
        assert solution is not None  # the budget is always a stop
        if writer is not None and solution.record is not None:
            _listen(solution.record, writer)
        return states, info_of(solution)

    def _solve(
        self,
        f: Callable[[Any], Any],
        start: Any,
        state: Any,
        budget: int,
        kwargs: Mapping[str, object],
        implicit: bool,
        steps: int,
    ) -> Solution:
        options = self.options
        config = options.config(kwargs, implicit=implicit, steps=steps)
        solver = own_solver(options.f_solver)
        if solver is not None:  # the gradient is attached to what it returns
            start, state, budget = self._by_function(solver, f, start, budget, kwargs), None, 0
        return fixed_point(f, start, config=config, state=state, forward__max_steps=budget)

    def _by_function(
        self,
        solver: SolverFunction,
        f: Callable[[Any], Any],
        start: list[Tensor],
        budget: int,
        kwargs: Mapping[str, object],
    ) -> list[Tensor]:
        """Return what a registered function finds; it sees one tensor `(batch, n)`, or the state's only one."""
        widths = [leaf[0].numel() for leaf in start]

        def split(z: Tensor) -> list[Tensor]:
            if len(start) == 1:
                return [z]
            parts = z.split(widths, 1)
            return [part.reshape(leaf.shape) for part, leaf in zip(parts, start, strict=True)]

        def join(z: list[Tensor]) -> Tensor:
            return z[0] if len(z) == 1 else torch.cat([leaf.flatten(1) for leaf in z], 1)

        options = self.options
        with torch.no_grad():
            outputs = solver(
                lambda z: join(f(split(z))),
                join(start),
                max_iter=budget,
                tol=options.f_tol,
                stop_mode=options.f_stop_mode,
                **kwargs,
            )
        return split(outputs[0])

    def _left(self, f: Callable[[Any], Any], solution: Solution, implicit: bool, steps: int) -> list[Any]:
        """Return torchdeq's values in training: f of the iterate, or the results of phantom steps, with gradients."""
        options = self.options
        if not implicit and (options.sup_gap > 0 or options.sup_loc):
            return self._supervised(f, solution, steps)
        z, fz = solution.z, solution.fz
        damping = 1.0 if implicit else options.tau
        with torch.no_grad():
            for step in range(steps):
                fz = f(z) if step or fz is None else fz
                z = optree.tree_map(lambda a, b: a + damping * (b - a), z, fz) if damping != 1.0 else fz
        return [optree.tree_map(straight_through, z, solution.value)]

    def _supervised(self, f: Callable[[Any], Any], solution: Solution, steps: int) -> list[Any]:
        """Return the phantom steps that `sup_gap` or `sup_loc` names, each with its own gradient."""
        z, states, options = solution.z, [], self.options
        for step in range(1, steps + 1):
            z = optree.tree_map(lambda a, b: b if options.tau == 1.0 else a + options.tau * (b - a), z, f(z))
            named = step % options.sup_gap == 0 if options.sup_gap > 0 else step in options.sup_loc
            if named or (step == steps and options.sup_gap <= 0):
                states.append(z)
        if options.sup_gap <= 0 and steps in options.sup_loc:
            states.append(z)  # as torchdeq does: the last state is always the last of the list
        return states


class DEQIndexing(TorchDEQ):
    """A layer whose states on the way are taken from one solve."""

    core: ClassVar[str] = "indexing"


class DEQSliced(TorchDEQ):
    """A layer whose states on the way begin a new solve each."""


_cores: dict[str, type[nn.Module]] = {"indexing": DEQIndexing, "sliced": DEQSliced}


def register_deq(deq_type: str, core: type[nn.Module]) -> None:
    """Register a layer class for `get_deq(core=...)`.

    Args:
        deq_type: its name.
        core: a class that is called as `core(args)` with the options of `get_deq`, such as a subclass of `DEQBase`.

    Example:
        >>> class Mine(TorchDEQ):
        ...     pass
        >>> register_deq("mine", Mine)
        >>> type(get_deq(core="mine")).__name__
        'Mine'
    """
    _cores[deq_type] = core


def get_deq(args: object = None, **options: Any) -> Any:
    """Return a layer with torchdeq's call signature.

    Args:
        args: a dictionary or an `argparse.Namespace`; of a namespace only torchdeq's options are read.
        **options: single options, above `args`. In addition to torchdeq's own: `b_solver="gmres"`,
            `f_solver="newton-krylov"`, and `batch=False` for a func that couples the rows of the state.

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
    given = dict(args) if isinstance(args, Mapping) else dict(vars(args)) if args is not None else {}
    core = str(options.get("core", given.get("core", "sliced")))
    if core not in _cores:
        raise ConfigError.bad_value("get_deq", "core", core, f"one of {listing(_cores)}, or added by register_deq")
    return _cores[core](args, **options)


def reset_deq(model: nn.Module) -> None:
    """Compute normalized weights again and forget dropout masks, before each training step.

    Args:
        model: the module with such parts.

    Example:
        >>> import torch
        >>> from deqcore_torch.compat.torchdeq import VariationalDropout
        >>> dropout = VariationalDropout(0.5)
        >>> _ = dropout(torch.ones(1, 2))
        >>> reset_deq(dropout)
        >>> dropout.mask is None
        True
    """
    begin_solve(model)
    reset_norm(model)
    reset_dropout(model)


def _listen(record: BackwardRecord, writer: Writer) -> None:
    """Call the writer after each backward pass, and the listener that is there already."""
    before = record.listener

    def listener(record: BackwardRecord) -> None:
        if before is not None:
            before(record)
        if record.report is not None:
            writer(_backward_info(record.report))

    record.listener = listener


def _backward_info(report: AdjointReport) -> Info:
    """Return torchdeq's figures of a backward pass; its residuals are relative to the cotangent."""
    steps = report.vjps.to(report.residual.dtype)
    return {"abs_lowest": report.residual, "rel_lowest": report.residual, "nstep": steps, "status": report.status}
