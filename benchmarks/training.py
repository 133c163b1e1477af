"""One training step of a layer on the convolutional block (torch): forward, backward, and the whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import deqcore
from benchmarks.cells import EVERY
from deqcore.bench.harness import Harness, Ready
from deqcore.bench.timing import Rounds, Spread, interleave
from deqcore.config import Config

RTOL: Final = 1e-4  # forward residual that all reach
ADJOINT: Final = 0.1  # adjoint residual that certified reuse and the peer's IFT reach
STEPS: Final = 50

Layer = Callable[[Ready], Tensor]


@dataclass(frozen=True)
class Step:
    """A training step of one layer.

    Attributes:
        forward_evaluations: of f until the value is there.
        backward_evaluations: of f in the backward pass.
        residual: of the value, largest of the batch.
        cosine: of the gradient of all parameters with the exact one.
        forward: seconds per kept round. `backward` and `step` likewise.
        reference: seconds per evaluation of f without gradient, beside `step`.
    """

    layer: str
    forward_evaluations: int
    backward_evaluations: int
    residual: float
    cosine: float
    note: str = ""
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    disturbance: list[float] = field(default_factory=list)

    def against(self, other: Step, part: str = "step") -> Spread:
        """Seconds of a part over those of another layer, paired by round."""
        pairs = zip(getattr(self, part), getattr(other, part), strict=True)
        return Spread.of([a / b for a, b in pairs])

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


class Ours:
    """`fixed_point` with a solver and a strategy."""

    def __init__(self, solver: str, strategy: str, rtol: float = RTOL, **options: object) -> None:
        self.config = Config(
            backend="torch",
            forward={"solver": solver, "rtol": rtol, "max_steps": STEPS, "on_failure": "ignore"},
            backward={"strategy": strategy, "options": options},
        )

    def __call__(self, ready: Ready) -> Tensor:
        value: Tensor = deqcore.fixed_point(
            ready.f, ready.z0, ready.params, ready.inputs, config=self.config
        ).value
        return value


class TorchDEQ:
    """Its layer, in training mode."""

    def __init__(self, rtol: float, **settings: Any) -> None:
        from torchdeq import get_deq

        self.layer = get_deq(f_max_iter=STEPS, f_tol=rtol, f_stop_mode="rel", **settings)

    def __call__(self, ready: Ready) -> Tensor:
        found, _ = self.layer(lambda z: ready.f(z, ready.params, ready.inputs), ready.z0)
        value = found[-1]
        return value if isinstance(value, Tensor) else value[0]


def layers(ready: Ready) -> dict[str, tuple[Callable[[float], Layer], str]]:
    """Makers of layers from a forward tolerance, with notes."""
    reuse = {"certify": False, "target": None, "fallback": "none"}
    made: dict[str, tuple[Callable[[float], Layer], str]] = {
        "deqcore, defaults": (lambda rtol: Defaults(rtol), "broyden, default strategy"),
        "deqcore broyden, certified reuse": (
            lambda rtol: Ours("broyden", "broyden-reuse", rtol, target=ADJOINT),
            f"target {ADJOINT}",
        ),
        "deqcore broyden, plain reuse": (lambda rtol: Ours("broyden", "broyden-reuse", rtol, **reuse), ""),
        "deqcore broyden, jacobian-free": (lambda rtol: Ours("broyden", "jacobian-free", rtol), ""),
        "deqcore anderson, jacobian-free": (lambda rtol: Ours("anderson", "jacobian-free", rtol), ""),
        "deqcore picard, jacobian-free": (lambda rtol: Ours("picard", "jacobian-free", rtol), ""),
        "deqcore broyden, exact-ift to 0.1": (
            lambda rtol: Ours("broyden", "exact-ift", rtol, rtol=ADJOINT),
            f"GMRES to {ADJOINT}",
        ),
    }
    if find_spec("torchdeq") is None:
        return made
    b_tol = adjoint_tolerance(ready)
    ift = {"ift": True, "b_solver": "broyden", "b_max_iter": STEPS, "b_stop_mode": "rel", "b_tol": b_tol}
    return made | {
        "torchdeq broyden, IFT broyden": (
            lambda rtol: TorchDEQ(rtol, f_solver="broyden", **ift),
            f"b_tol {b_tol:.2g} reaches adjoint residual {ADJOINT}",
        ),
        "torchdeq defaults": (lambda rtol: TorchDEQ(rtol), "fixed_point_iter, 1-step gradient"),
    }


class Defaults(Ours):
    """The defaults of deqcore, but for the tolerance and the step budget that all layers share."""

    def __init__(self, rtol: float) -> None:
        self.config = Config(backend="torch", forward={"rtol": rtol, "max_steps": STEPS, "on_failure": "ignore"})


def training(harness: Harness, *, rounds: int, budget: float, quick: bool, say: Callable[[str], object]) -> list[Step]:
    """Measure a training step of every layer, interleaved, at equal forward residual."""
    case = EVERY["conv"](batch=4, size=16) if quick else EVERY["conv"]()
    ready = harness.ready(case)
    for parameter in ready.params.values():
        parameter.requires_grad_()
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(ready.z0.shape))).to(ready.z0)

    def loss(value: Tensor) -> Tensor:
        return (value * weights).sum()

    def gradient(layer: Layer, at: Ready = ready) -> Tensor:
        found = torch.autograd.grad(loss(layer(at)), list(at.params.values()))
        return torch.cat([part.flatten() for part in found])

    exact = gradient(Ours("broyden", "exact-ift", 1e-6, rtol=1e-6, max_steps=100))
    steps: list[Step] = []
    tasks: dict[str, Callable[[], object]] = {}
    for name, (make, note) in layers(ready).items():
        say(f"training: {name}")
        layer = make(_equal_tolerance(ready, make))
        counted = ready.counted()
        value = layer(counted)
        before = counted.calls[0]
        found = torch.autograd.grad(loss(value), list(counted.params.values()))
        flat = torch.cat([part.flatten() for part in found])
        steps.append(
            Step(
                name,
                before,
                counted.calls[0] - before,
                _residual(ready, value.detach()),
                float(torch.nn.functional.cosine_similarity(flat, exact, dim=0)),
                note,
            )
        )
        tasks[name] = _split(layer, ready, loss)
    say("training: timing")
    parts = _interleave(tasks, ready, rounds, budget)
    return [
        replace(
            step,
            forward=parts["forward"].seconds[step.layer],
            backward=parts["backward"].seconds[step.layer],
            step=parts["step"].seconds[step.layer],
            reference=parts["step"].reference[step.layer],
            disturbance=parts["step"].disturbance,
        )
        for step in steps
    ]


def _split(layer: Layer, ready: Ready, loss: Callable[[Tensor], Tensor]) -> Callable[[], tuple[float, float]]:
    parameters = list(ready.params.values())

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        value = loss(layer(ready))
        middle = time.perf_counter()
        torch.autograd.grad(value, parameters)
        return middle - start, time.perf_counter() - middle

    return run


def _interleave(
    tasks: dict[str, Callable[[], object]], ready: Ready, rounds: int, budget: float
) -> dict[str, Rounds]:
    """Rounds of whole steps; their parts are taken from the same runs."""
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}

    def recorded(name: str) -> Callable[[], None]:
        def run() -> None:
            parts[name].append(tasks[name]())  # type: ignore[arg-type]

        return run

    def reference() -> None:
        with torch.no_grad():
            ready.f(ready.inputs, ready.params, ready.inputs)

    tried: list[int] = []
    found = interleave(
        {name: recorded(name) for name in tasks}, reference, rounds=rounds, budget=budget, repeat=False, kept=tried
    )
    # The first runs only served to see how long a task takes.
    timed = {name: each[-(found.dropped + len(tried)) :] for name, each in parts.items()}
    forward = {name: [each[i][0] for i in tried] for name, each in timed.items()}
    backward = {name: [each[i][1] for i in tried] for name, each in timed.items()}
    return {
        "step": found,
        "forward": replace(found, seconds=forward),
        "backward": replace(found, seconds=backward),
    }


def _residual(ready: Ready, value: Tensor) -> float:
    with torch.no_grad():
        image = ready.f(value, ready.params, ready.inputs)
    gap = (image - value).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
    return float(gap.max())


def _equal_tolerance(ready: Ready, make: Callable[[float], Layer]) -> float:
    """The loosest tolerance with which the layer's value reaches the residual."""
    best = RTOL * 1e-3
    for tolerance in RTOL * 10.0 ** (np.arange(8, -9, -1) / 4):
        with torch.no_grad():
            value = make(float(tolerance))(ready)
        if _residual(ready, value) <= RTOL:
            best = float(tolerance)
            break
    return best


def adjoint_tolerance(ready: Ready) -> float:
    """The loosest b_tol with which torchdeq's adjoint solve reaches the adjoint residual for every sample."""
    from torchdeq.solver import broyden_solver

    with torch.no_grad():
        z = Ours("broyden", "jacobian-free", 1e-6)(ready)
    z = z.detach().requires_grad_()
    y = ready.f(z, ready.params, ready.inputs)
    g = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(z.shape))).to(z)

    def image(u: Tensor) -> Tensor:
        return torch.autograd.grad(y, z, u, retain_graph=True)[0] + g

    for tolerance in 10.0 ** (-np.arange(0, 17) / 4):
        u, _, _ = broyden_solver(image, torch.zeros_like(g), max_iter=STEPS, tol=float(tolerance), stop_mode="rel")
        if float(((image(u) - u).flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)).max()) <= ADJOINT:
            return float(tolerance)
    return 1e-4
