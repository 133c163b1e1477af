"""What takes part: strategies of the library, plain GMRES, and torchdeq."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

import deqcore
from benchmarks.backward.cells import Cell

FORWARD: Final[Mapping[str, Any]] = {"forward__rtol": 1e-4, "forward__max_steps": 100}
STRATEGIES: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "jacobian-free": ("broyden", "jacobian-free", {}),
    "reuse, not certified": (
        "broyden", "broyden-reuse", {"certify": False, "max_relative_error": None, "fallback": "none"},
    ),
    "neumann, 6 terms": ("broyden", "neumann", {"terms": 6}),
    "neumann, 12 terms": ("broyden", "neumann", {"terms": 12}),
    "neumann, 20 terms": ("broyden", "neumann", {"terms": 20}),
    "exact-ift, residual 1e-4": ("broyden", "exact-ift", {"rtol": 1e-4}),
    "exact-ift, residual 0.1": ("broyden", "exact-ift", {"rtol": 0.1}),
    "exact-ift behind picard, error 0.1": ("picard", "exact-ift", {"max_relative_error": 0.1}),
    "exact-ift, error 0.01": ("broyden", "exact-ift", {"max_relative_error": 0.01}),
    "broyden-reuse, error 0.1": ("broyden", "broyden-reuse", {"max_relative_error": 0.1}),
    "broyden-reuse, error 0.01": ("broyden", "broyden-reuse", {"max_relative_error": 0.01}),
    "broyden-reuse, error 0.1, preconditioned": (
        "broyden", "broyden-reuse", {"max_relative_error": 0.1, "reuse": "precondition"},
    ),
}  # fmt: skip
"""Forward solver, strategy and its options."""

SOLVERS: Final = ("fixed_point_iter", "anderson", "broyden")
TOLERANCES: Final = (0.1, 0.01, 1e-4)
"""Solvers of torchdeq's adjoint equation, and their tolerances: relative residuals of the batch's worst sample."""

SAME: Final = "plain GMRES, as good as certified"
CERTIFIED: Final = "broyden-reuse, error 0.1"
ONE: Final = "one backward of f"

CLOCKS: Final = {"wall": time.perf_counter, "thread": time.thread_time}
"""Other processes disturb the time of the thread less."""

USED: Final = {"clock": "wall"}

PLAIN: Final = {"plain GMRES, residual 1e-4": (1e-4, False), "plain GMRES, estimated error 0.1": (0.1, True)}
"""Target, and whether it is one for the estimated error."""


def now() -> float:
    """Return seconds by the chosen clock."""
    return CLOCKS[USED["clock"]]()


def plain_gmres(
    vjp: Callable[[Tensor], Tensor], g: Tensor, target: float, estimated: bool, most: int = 40
) -> tuple[Tensor, int]:
    """Solve u = g + Jᵀu from zero with one projection a step, until all samples are there: the plain alternative."""
    batch, width = g.shape
    basis, norm = g.new_empty(batch, most + 1, width), g.norm(dim=1)
    hessenberg, null = g.new_zeros(batch, most + 1, most), g.new_zeros(batch, most + 1)
    basis[:, 0], null[:, 0], square = g / norm[:, None], 1.0, torch.ones_like(norm)
    for k in range(most):
        used, w = basis[:, : k + 1], basis[:, k] - vjp(basis[:, k])
        h = torch.bmm(used, w[:, :, None])
        w = torch.baddbmm(w[:, None], h.transpose(1, 2), used, alpha=-1)[:, 0]
        height = w.norm(dim=1)
        hessenberg[:, : k + 1, k], hessenberg[:, k + 1, k] = h[:, :, 0], height
        torch.div(w, height[:, None], out=basis[:, k + 1])
        null[:, k + 1] = -(null[:, : k + 1] * h[:, :, 0]).sum(1) / height
        square = square + null[:, k + 1] ** 2
        if not (square.rsqrt() <= target).all() and k + 1 < most:
            continue
        side = -null[:, 1 : k + 2] * (null[:, 0] / square)[:, None]
        y = torch.linalg.solve_triangular(hessenberg[:, 1 : k + 2, : k + 1], side[:, :, None], upper=True)
        least = torch.linalg.svdvals(hessenberg[:, : k + 2, : k + 1])[:, -1] if estimated else square
        if not estimated or (1.2 * square.rsqrt() / least / y.norm(dim=(1, 2)) <= target).all():
            break
    return torch.bmm(y.transpose(1, 2) * norm[:, None, None], basis[:, : k + 1])[:, 0], k + 1


@dataclass
class Timed:
    """One contender: `run` returns seconds; u and the vjps of the slowest sample are known after it."""

    run: Callable[[], float]
    vjps: int = 0
    mean: float = 0.0
    u: Tensor | None = None
    least: float = float("inf")


Counts = Callable[[], tuple[int, float]]
Layer = Callable[..., tuple[Tensor, Counts]]
"""`(f, z0, *args)` to a value with a gradient, and to what tells the vjps of the slowest sample and their mean."""


def library(solver: str, strategy: str, options: Mapping[str, Any]) -> Layer:
    """Return `fixed_point` with these settings."""

    def layer(f: Callable[..., Tensor], z0: Tensor, *args: Tensor) -> tuple[Tensor, Counts]:
        settings: dict[str, Any] = dict(FORWARD) | {
            "backward__strategy": strategy,
            "backward__options": options,
            "forward__solver": solver,
        }
        solution = deqcore.fixed_point(f, z0, *args, **settings)

        def counts() -> tuple[int, float]:
            found: Any = solution.backward
            return int(found.vjps.max()), float(found.vjps.float().mean())

        return solution.value, counts

    return layer


def torchdeq(solver: str, tolerance: float) -> Layer:
    """Return torchdeq's implicit differentiation by its hook, which keeps one evaluation of f as deqcore does."""
    from torchdeq import get_deq

    settings = {"f_solver": "broyden", "f_max_iter": 100, "f_tol": FORWARD["forward__rtol"], "f_stop_mode": "rel"}
    backward = {"b_solver": solver, "b_max_iter": 100, "b_tol": tolerance, "b_stop_mode": "rel", "hook_ift": True}

    def layer(f: Callable[..., Tensor], z0: Tensor, *args: Tensor) -> tuple[Tensor, Counts]:
        found: list[Any] = []
        values, _ = get_deq(**settings, **backward)(lambda z: f(z, *args), z0, backward_writer=found.append)
        value = values[-1]
        return value if isinstance(value, Tensor) else value[0], lambda: _steps(found[-1]["nstep"])

    return layer


def _steps(steps: Tensor) -> tuple[int, float]:
    """Return the steps of the slowest sample, which all samples take, and again as a mean."""
    return int(steps.max()), float(steps.max())


def layers() -> dict[str, Layer]:
    """Return all strategies, and those of torchdeq if it is installed."""
    own = {name: library(*parts) for name, parts in STRATEGIES.items()}
    if find_spec("torchdeq") is None:
        return own
    return own | {f"torchdeq, {solver}, {tol:g}": torchdeq(solver, tol) for solver in SOLVERS for tol in TOLERANCES}


def through_layer(cell: Cell, layer: Layer) -> Timed:
    """Time `backward` of a value, without the forward solve."""

    def run() -> float:
        value, counts = layer(cell.f, cell.z0, cell.x)
        begin = now()
        value.backward(cell.g)
        seconds = now() - begin
        timed.vjps, timed.mean = counts()
        return seconds

    timed = Timed(run)
    return timed


def through_plain(vjp: Callable[[Tensor], Tensor], g: Tensor, target: float, estimated: bool, most: int = 40) -> Timed:
    """Time plain GMRES alone."""

    def run() -> float:
        begin = now()
        timed.u, timed.vjps = plain_gmres(vjp, g, target, estimated, most)
        timed.mean = timed.vjps
        return now() - begin

    timed = Timed(run)
    return timed


def adjoint(cell: Cell, z: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`u ↦ Jᵀu` on `(batch, n)` at z, and the cotangent."""
    at = z.detach().requires_grad_()
    value = cell.f(at, cell.x)

    def vjp(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(value, at, u.reshape(value.shape), retain_graph=True)
        return product.reshape(u.shape)

    return vjp, cell.g.reshape(cell.g.shape[0], -1)


def adjoint_of(cell: Cell, layer: Layer) -> Tensor:
    """Return the u of a layer, from the gradient of a shift that f is added to: ∂L/∂shift = u."""
    shift = torch.zeros_like(cell.x, requires_grad=True)
    value, _ = layer(lambda z, x, s: cell.f(z, x) + s, cell.z0, cell.x, shift)
    (u,) = torch.autograd.grad(value, shift, cell.g)
    return u.reshape(u.shape[0], -1)


def one_backward(cell: Cell, z: Tensor) -> Timed:
    """Time the gradients of f's parameters from a recorded evaluation at z: what no strategy can do without."""

    def run() -> float:
        at = z.detach().requires_grad_()
        value = cell.f(at, cell.x)
        begin = now()
        value.backward(cell.g, inputs=leaves(value, at))
        return now() - begin

    return Timed(run)


def leaves(value: Tensor, at: Tensor) -> list[Tensor]:
    """Return the parameters that a value depends on, without `at`."""
    found: dict[int, Tensor] = {}
    stack, seen = [value.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", at)
        if variable is not at:
            found[id(variable)] = variable
        stack += [following for following, _ in node.next_functions]
    return list(found.values())


def largest(u: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of a sample."""
    return float(((u - exact).norm(dim=1) / exact.norm(dim=1)).max())
