"""A function as the problem of an operator: the graph that `torch.compile` made of f, solved by `fixed_point`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.base_hop import BaseHOP

from deqcore.api import fixed_point
from deqcore.errors import BackendError
from deqcore.solution import Solution
from deqcore_torch import operators, problems
from deqcore_torch.layout import arrange, autocast_dtype, batch_axes, describe, rows_shape, wanted

Graph = Callable[..., Any]


class GraphProblem:
    """See `problems.OperatorProblem`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def rows(self, layout: str, state: Sequence[Tensor]) -> tuple[Any, ...]:
        """See `problems.OperatorProblem`."""
        _, overrides, _ = arrange(layout, iter(state))
        return rows_shape(state[0], batch_axes(overrides.get("forward__batch")))

    def run(self, layout: str, tensors: list[Tensor], warm: bool) -> tuple[Solution, list[Tensor]]:
        """Solve for z0 and the arguments as the graph takes them: its tensors one after the other."""
        rest = iter(tensors)
        z0, overrides, carrying = arrange(layout, rest)
        start: list[Tensor] = []
        describe(z0, start)

        def f(z: list[Tensor], *others: Tensor) -> list[Tensor]:
            return list(self.graph(*z, *others))

        solution = fixed_point(f, start, *tensors[len(start) :], batched_args=tuple(carrying), **overrides)
        return solution, solution.value


def _function(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph without the tensors that stand for the other results of the operator."""
    reduced = copy.deepcopy(graph)
    (output,) = reduced.graph.find_nodes(op="output")
    output.args = (tuple(output.args[0][1 + operators.REPORTS :]),)
    reduced.graph.eliminate_dead_code()
    reduced.recompile()
    return reduced


class Captured:
    """Keeps the problem of a graph while the graph or a copy of it exists.

    Compiled code keeps the number of the problem alone, but the function that Dynamo stores keeps the graph.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.number = problems.register(GraphProblem(_function(graph)), self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return self


class SolveGraph(BaseHOP):
    """Takes f as a graph from the compiler, and puts the operator in its place."""

    def __init__(self) -> None:
        super().__init__("deqcore_solve_graph")

    def __call__(self, subgraph: fx.GraphModule, *operands: Tensor, layout: str, leaves: int) -> Any:
        """Return what `operators.solve` returns.

        Raises:
            BackendError: Dynamo broke its graph in f, and runs this call with a function instead of a graph.
        """
        if not isinstance(subgraph, fx.GraphModule):
            subgraph(*operands)  # an error of f itself comes first
            raise BackendError(
                "f of a compiled fixed_point must be one graph (torch.compile cannot trace all of it). Write branches "
                "on values of tensors with torch.where, or make f the cell of a DEQ layer, which Python runs."
            )
        if "deqcore" not in subgraph.meta:
            subgraph.meta["deqcore"] = Captured(subgraph)
        number = subgraph.meta["deqcore"].number
        anchor = torch.empty((0,), device=operands[0].device)
        given = list(operands)
        recording, narrow = torch.is_grad_enabled(), autocast_dtype(given[0])
        outputs = torch.ops.deqcore.solve(
            anchor, given, number, layout, leaves, wanted(given), recording, narrow, False
        )
        return tuple(outputs)


solve_graph = SolveGraph()
