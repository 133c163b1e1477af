"""`DEQ`: a cell and its equilibrium as an `nn.Module`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import deqcore  # its names are imported when they are used: what solves, in the first solve of a program
from deqcore.errors import ConfigError
from deqcore.layer import (
    LayerSettings,
    check_cell,
    check_reuse,
    compare_settings,
    explain_arguments,
    initial_state,
    stages,
)
from deqcore_torch import cached_starts, last_equilibrium, problems
from deqcore_torch.cell_checks import CellWatch
from deqcore_torch.cells import begin_solve
from deqcore_torch.disable_dynamo import untraced
from deqcore_torch.layer_problem import LayerProblem
from deqcore_torch.strategy_buffer import BufferState

if TYPE_CHECKING:
    from deqcore.solution import SolveState

FORMAT = 1  # version of the settings in a checkpoint


def synchronize_strategies(module: nn.Module, group: Any = None, source: int = 0) -> None:
    """Give the layers of all ranks the strategy state of one rank, so that they take the same number of vjps.

    Call it once before each forward pass where modules exchange data inside the cell (FSDP): another number of vjps
    on one rank would wait for ever. DistributedDataParallel does it by itself (`broadcast_buffers`). One broadcast of
    a few hundred bytes a layer; without `torch.distributed` it does nothing.

    Args:
        module: the model.
        group: the process group, default all.
        source: the global rank whose state all get.

    Example:
        >>> import torch
        >>> from deqcore_torch.nn import DEQ, synchronize_strategies
        >>> layer = DEQ(lambda z, x: 0.5 * z + x, backward__strategy="adaptive")
        >>> synchronize_strategies(layer)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for part in module.modules():
        if isinstance(part, DEQ) and part.strategy_state is not None:
            torch.distributed.broadcast(part.strategy_state, source, group=group)


class DEQ(nn.Module):
    """The equilibrium z* = cell(z*, *inputs) as a layer.

    Shapes, dtype and device follow the state: every leaf of z has the batch as its first axis (unless
    `forward.batch = false`, or 2 for the first two), and the cell returns a tree like it.

    Args:
        cell: module (or function) `cell(z, *inputs)`. Its optional method `initial_state(*inputs)` gives z0; without
            one z0 is zeros like the first input.
            Forward hooks of its modules run with every evaluation, full backward hooks once in a backward pass (with
            a strategy that differentiates through steps, once a step).
        config: complete settings; default: environment and `deqcore.using` at each call.
        evaluation: overrides that apply in evaluation mode (`layer.eval()`), such as
            `{"forward__max_steps": 100, "forward__rtol": 1e-6}`.
        reuse: start warm, from the previous call. "sequence": each sample from its own equilibrium, for video,
            molecular dynamics, streaming, where row i of one call follows row i of the last (another batch size
            starts cold). "batch": every sample from the mean equilibrium of the last batch. "carry": as "sequence", for
            a state that training carries from one supervision step to the next, and part of `state_dict`. None: cold.
            The stored equilibrium carries no gradient; `reset()` forgets it, for all samples or for some.
        warm_start: equilibria by sample id, for data that is seen again in each epoch: a call with `ids=` starts each
            sample from its own last equilibrium, in whatever batch it was. Without `reuse`.
        checkpoint: recompute the cell's activations in the backward pass instead of keeping them until then, by one
            evaluation of the cell. They are held while the adjoint solve runs. A `torch.utils.checkpoint` that the
            cell calls itself evaluates its part again for each vjp; one around the whole layer solves once more.
        batched_inputs: positions of the inputs that carry the batch axis, for `forward.compact = true`; None: all.
        **overrides: single settings, such as `forward__rtol=1e-5, backward__strategy="broyden-reuse"`.

    Attributes:
        cell: the cell.
        strategy_state: the state of a strategy that has one, such as `adaptive`; a buffer `(m,)` of float32, or None.
            Only training mode uses and changes it. It is part of `state_dict`, and weights without it load.
            DistributedDataParallel broadcasts it with the other buffers; see `synchronize_strategies` for others.

    Raises:
        ConfigError: a setting is unknown or out of range.
        UnknownNameError: a solver or a strategy is not registered.
        ProblemError: (when called) the cell returned something that is not like z, or takes other arguments.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models".

    Example:
        >>> import torch
        >>> from deqcore_torch.nn import DEQ
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(width, width)
        ...         torch.nn.init.normal_(self.linear.weight, std=0.3 / width**0.5)
        ...     def forward(self, z, x):
        ...         return torch.tanh(self.linear(z) + x)
        >>> layer = DEQ(Cell(16), forward__rtol=1e-5)
        >>> z = layer(torch.randn(8, 16))
        >>> z.sum().backward()
        >>> z.shape, layer.cell.linear.weight.grad.shape
        (torch.Size([8, 16]), torch.Size([16, 16]))
    """

    def __init__(
        self,
        cell: Any,
        config: deqcore.Config | None = None,
        *,
        evaluation: Mapping[str, object] | None = None,
        reuse: str | None = None,
        warm_start: deqcore.equilibrium_cache.EquilibriumCache | None = None,
        checkpoint: bool = False,
        batched_inputs: tuple[int, ...] | None = None,
        **overrides: object,
    ) -> None:
        super().__init__()
        check_cell(cell)
        check_reuse(reuse)
        cached_starts.check(warm_start, reuse)
        self.cell = cell
        self.settings = LayerSettings.of(config, overrides, evaluation)
        self.reuse = reuse
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.batched_inputs = batched_inputs
        self._last: list[Any] | None = None  # leaves of the last equilibrium, or of the carry of a checkpoint
        self._fresh: Tensor | None = None  # samples that start cold nevertheless
        self._watch = CellWatch()
        begin = self.settings.strategy_state()
        self.strategy_state: Tensor | None
        self.register_buffer("strategy_state", None if begin is None else torch.tensor(begin, dtype=torch.float32))
        self.number = problems.register(LayerProblem(self), self)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.number = problems.register(LayerProblem(self), self)  # a copy is a layer of its own for compiled code

    def forward(
        self,
        *inputs: Any,
        z0: Any = None,
        until: deqcore.halting.Rule | None = None,
        mask: Tensor | None = None,
        ids: Any = None,
        changed: Any = None,
    ) -> Any:
        """Return the equilibrium z*, a tree like the state.

        Args:
            *inputs: what the cell takes in addition to z; gradients reach them.
            z0: initial iterate; default: see the class. With `ids` or `changed`, that of what starts cold.
            until: when a sample halts before it has converged, such as `deqcore.halting.Settled(read)`.
            mask: samples or units that take part, see `deqcore.fixed_point`.
            ids: sample ids `(batch,)`, integers, best on the host: start from the equilibria in `warm_start`, and store
                the new ones there. None: the cache is not used.
            changed: parts of the state that start cold although an equilibrium is stored, of bool, see
                `deqcore.warm_start.restart_changed`; with `ids`, or `reuse` by sample.
        """
        return self.solve(*inputs, z0=z0, until=until, mask=mask, ids=ids, changed=changed).value

    def solve(
        self,
        *inputs: Any,
        z0: Any = None,
        until: deqcore.halting.Rule | None = None,
        mask: Tensor | None = None,
        ids: Any = None,
        changed: Any = None,
        **overrides: object,
    ) -> deqcore.Solution:
        """Return the solution: the equilibrium and the report of its solve.

        Inside `torch.compile` the solve is one operator of the graph. Its solution then has no `state`, `record` and
        `fz`; with `until`, `mask`, `ids`, `changed` or settings of the call the compiler breaks the graph instead.

        Args:
            *inputs: as in `forward`.
            z0: as in `forward`.
            until: as in `forward`.
            mask: as in `forward`.
            ids: as in `forward`.
            changed: as in `forward`.
            **overrides: settings of this call.
        """
        plain = until is None and mask is None and ids is None and changed is None
        if torch.compiler.is_compiling() and plain and not overrides:
            from deqcore_torch import captured  # with the operator, which nothing else needs

            solution = captured.solve_layer(self, inputs, z0)
            if solution is not None:
                return solution
        return self.solve_eagerly(*inputs, z0=z0, until=until, mask=mask, ids=ids, changed=changed, **overrides)

    @untraced
    def solve_eagerly(
        self,
        *inputs: Any,
        z0: Any = None,
        until: deqcore.halting.Rule | None = None,
        mask: Tensor | None = None,
        ids: Any = None,
        changed: Any = None,
        **overrides: object,
    ) -> deqcore.Solution:
        """Do the same, run by Python: `torch.compile` breaks its graph here."""
        start = self.initial_state(*inputs) if z0 is None else z0
        begin_solve(self.cell)
        if ids is not None or changed is not None:
            start = self._recalled(start, inputs, z0, ids, changed)
        config, own = self.settings.call(self.training)
        with self._watch.over(self.cell, self.training):
            solution = self._solve(start, inputs, config, own | overrides, rule=until, mask=mask)
        if self.reuse is not None:
            self._last = last_equilibrium.copies(solution.value)
            self._fresh = None
        if ids is not None and self.warm_start is not None:
            self.warm_start.store(ids, solution)
        return solution

    @untraced
    def trajectory(self, *inputs: Any, steps: Sequence[int], z0: Any = None) -> list[Any]:
        """Return states on the way, for losses that correct the path (fixed-point correction).

        Each is the best iterate so far and carries its own implicit gradient. The last one is the solution with the
        step budget of the layer.

        Args:
            *inputs: as in `forward`.
            steps: step counts, increasing and positive, after which a state is wanted.
            z0: as in `forward`.

        Raises:
            ConfigError: the step counts do not increase.

        Source: Bai, Geng, Savani & Kolter (2022), "Deep equilibrium optical flow estimation", eq. (6).
        """
        overrides = stages(steps)
        begin_solve(self.cell)
        config, own = self.settings.call(self.training)
        start = self.initial_state(*inputs) if z0 is None else z0
        states: list[Any] = []
        state = None
        for stage in overrides:
            solution = self._solve(start, inputs, config, own | stage, state)
            state = solution.state
            states.append(solution.value)
        return states

    def _solve(
        self,
        start: Any,
        inputs: tuple[Any, ...],
        config: deqcore.Config | None,
        overrides: Mapping[str, Any],
        state: SolveState | None = None,
        rule: deqcore.halting.Rule | None = None,
        mask: Tensor | None = None,
    ) -> deqcore.Solution:
        f = self._map()
        if rule is not None:
            from deqcore.halting import until

            f = until(f, rule)
        batched = tuple(range(len(inputs))) if self.batched_inputs is None else self.batched_inputs
        call = self.cell.forward if isinstance(self.cell, nn.Module) else self.cell
        with explain_arguments(call, inputs, type(self.cell).__name__):
            return deqcore.fixed_point(
                f, start, *inputs, config=config, state=state, batched_args=batched,
                strategy_state=BufferState(self) if self.training else None, mask=mask, **overrides,
            )  # fmt: skip

    def initial_state(self, *inputs: Any) -> Any:
        """Return the initial iterate of a solve without z0: a warm one if `reuse` is set and the shapes allow it."""
        return self.start(self._cold(inputs))

    def _cold(self, inputs: tuple[Any, ...]) -> Any:
        return initial_state(self.cell, inputs, last_equilibrium.zeros_like)

    def _recalled(self, start: Any, inputs: tuple[Any, ...], z0: Any, ids: Any, changed: Any) -> Any:
        if ids is not None:
            return cached_starts.from_cache(self.warm_start, self.cell, start, inputs, ids, changed)
        cold = self._cold(inputs) if z0 is None else z0
        return cached_starts.from_previous(self.start(cold), cold, changed, self.reuse)

    def start(self, cold: Any) -> Any:
        """Return the last equilibrium instead of `cold` if `reuse` is set and the shapes allow it."""
        if self._last is None:
            return cold
        return last_equilibrium.warm(cold, self._last, self._fresh, mean=self.reuse == "batch")

    def reset(self, samples: Tensor | None = None) -> None:
        """Forget the equilibrium from which the next solve would start; without `samples`, also those by sample id.

        Args:
            samples: which samples start cold, `(batch,)` of bool: those that have halted and make room for new ones.
                None: all.

        Raises:
            ConfigError: `samples` is not a mask of bools, or of another batch than the stored equilibrium.
        """
        if samples is None:
            self._last = self._fresh = None
            if self.warm_start is not None:
                self.warm_start.forget()
            return
        rows = None if self._last is None else tuple(self._last[0].shape[:1])
        if samples.dtype is not torch.bool or samples.dim() != 1 or (rows is not None and tuple(samples.shape) != rows):
            given = f"{samples.dtype} {tuple(samples.shape)}"
            raise ConfigError.bad_value("DEQ.reset", "samples", given, f"bools of the shape {rows or '(batch,)'}")
        if self.reuse == "batch":
            raise ConfigError.bad_value("DEQ.reset", "samples", "a mask", "None with reuse = 'batch'")
        self._fresh = samples if self._fresh is None else samples | self._fresh

    def _map(self) -> Any:
        if not self.checkpoint:
            return self.cell
        from deqcore_torch import functorch, saved_tensors

        def checkpointed(z: Any, *inputs: Any) -> Any:
            if not torch.is_grad_enabled() or functorch.active():
                return self.cell(z, *inputs)
            return saved_tensors.checkpoint(self.cell, z, *inputs)

        checkpointed.__wrapped__ = self.cell  # type: ignore[attr-defined] # this layer's, where passes are counted
        return checkpointed

    def get_extra_state(self) -> Tensor:
        """Return the settings as bytes of JSON in a tensor, so that safetensors stores them, too."""
        text = json.dumps(self._stored(), sort_keys=True)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Warn if the settings of a checkpoint differ from the layer's own, which stay unchanged."""
        compare_settings(json.loads(bytes(state.cpu().numpy()).decode()), self._stored())

    def _stored(self) -> dict[str, Any]:
        return {"format": FORMAT, "reuse": self.reuse, **self.settings.as_dict()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.reuse == "carry" and self._last is not None:
            destination.update({f"{prefix}carry.{i}": leaf for i, leaf in enumerate(self._last)})
            if self._fresh is not None:
                destination[f"{prefix}carry.fresh"] = self._fresh
        cached_starts.save(self.warm_start, destination, prefix)

    def _load_carry(self, state_dict: Any, prefix: str) -> None:
        """Take the carry out of a checkpoint. As a buffer, DDP would broadcast it to the samples of other ranks."""
        names = [name for name in state_dict if name.startswith(f"{prefix}carry.")]
        kept = {name.removeprefix(f"{prefix}carry."): state_dict.pop(name) for name in names}
        if self.reuse == "carry":
            self._fresh = kept.pop("fresh", None)
            self._last = [last_equilibrium.copied(kept[str(i)]) for i in range(len(kept))] or None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Weights from other programs carry no settings and no state; strict loading must accept them. The state of
        # other options does not fit, and the strategy begins again.
        missing = args[2] if len(args) > 2 else []
        own, kept = self.strategy_state, state_dict.pop(f"{prefix}strategy_state", None)
        if own is not None and kept is not None and kept.shape == own.shape:
            with torch.no_grad():
                own.copy_(kept)
        self._load_carry(state_dict, prefix)
        cached_starts.load(self.warm_start, state_dict, prefix)
        self.strategy_state = None  # so that it is neither missing nor unexpected
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.strategy_state = own
        key = prefix + torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX
        if key in missing:
            missing.remove(key)

    def extra_repr(self) -> str:
        """Return the settings for the printed form."""
        shown = self.settings.shown()
        return ", ".join(shown + ([f"reuse={self.reuse!r}"] if self.reuse else []))
