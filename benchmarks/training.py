"""One training step of a layer (torch): forward, backward, and the whole, beside torchdeq."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

import deqcore
from benchmarks.steps import Step
from deqcore.bench.cases import Case
from deqcore.bench.harness import Harness, Ready
from deqcore.bench.timing import interleave
from deqcore.config import Config

RTOL: Final = 1e-4  # forward residual that all reach
LOOSE: Final = 0.07  # adjoint residual with which the batch's gradient errs by less than 0.1, not certified
ADJOINT: Final = 0.1  # adjoint residual that certified reuse and the peer's IFT reach
STEPS: Final = 50
PARTS: Final = "parts of a step"


class Found(NamedTuple):
    """A layer's value, the evaluations of f that its solver counts, and its backward pass (None: it does not say)."""

    value: Tensor
    evaluations: int | None
    record: Any = None


Layer = Callable[[Ready], Found]


class Ours:
    """`fixed_point` with a solver and a strategy."""

    def __init__(self, solver: str, strategy: str, tolerance: float = RTOL, /, **options: object) -> None:
        self.config = Config(
            backend="torch",
            forward={"solver": solver, "rtol": tolerance, "max_steps": STEPS, "on_failure": "ignore"},
            backward={"strategy": strategy, "options": options},
        )

    def __call__(self, ready: Ready) -> Found:
        result = deqcore.fixed_point(ready.f, ready.z0, ready.params, ready.inputs, config=self.config)
        return Found(result.value, int(result.evaluations.max()), result.record)


class TorchDEQ:
    """Its layer, in training mode."""

    def __init__(self, rtol: float, **settings: Any) -> None:
        from torchdeq import get_deq

        self.ift = bool(settings.get("ift"))
        self.layer = get_deq(f_max_iter=STEPS, f_tol=rtol, f_stop_mode="rel", **settings)

    def __call__(self, ready: Ready) -> Found:
        result, _ = self.layer(lambda z: ready.f(z, ready.params, ready.inputs), ready.z0)
        value = result[-1]
        return Found(value if isinstance(value, Tensor) else value[0], None)


def layers(ready: Ready) -> dict[str, tuple[Callable[[float], Layer], str]]:
    """Return makers of layers from a forward tolerance, with notes."""
    reuse = {"certify": False, "max_relative_error": None, "fallback": "none"}
    made: dict[str, tuple[Callable[[float], Layer], str]] = {
        "deqcore, defaults": (Defaults, "auto, exact-ift"),
        "deqcore, gradient error 0.1": (
            lambda rtol: Ours("auto", "exact-ift", rtol, max_relative_error=ADJOINT),
            f"auto, exact-ift certified to {ADJOINT}",
        ),
        f"deqcore, exact-ift to {LOOSE}": (
            lambda rtol: Ours("auto", "exact-ift", rtol, rtol=LOOSE),
            f"auto, GMRES to {LOOSE}, no certificate",
        ),
        "deqcore, jacobian-free": (lambda rtol: Ours("auto", "jacobian-free", rtol), "auto"),
        "deqcore broyden, certified reuse": (
            lambda rtol: Ours("broyden", "broyden-reuse", rtol, max_relative_error=ADJOINT),
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
        "torchdeq defaults": (TorchDEQ, "fixed_point_iter, 1-step gradient"),
    }


class Defaults(Ours):
    """The defaults of deqcore, except for the tolerance and the step budget that all layers share."""

    def __init__(self, rtol: float) -> None:
        self.config = Config(backend="torch", forward={"rtol": rtol, "max_steps": STEPS, "on_failure": "ignore"})


def training(
    harness: Harness,
    problem: Case,
    *,
    rounds: int,
    budget: float,
    say: Callable[[str], object],
    failed: dict[str, str] | None = None,
) -> list[Step]:
    """Measure a training step of every layer, interleaved, at equal forward residual.

    `failed`: takes the name and the error of a layer that raises; without it the first error ends the run.
    """
    ready = harness.ready(problem)
    for parameter in ready.params.values():
        parameter.requires_grad_()
    loss = Loss(ready, harness.block)
    exact = loss.gradient(Ours("broyden", "exact-ift", 1e-6, rtol=1e-6, max_steps=100), ready)
    steps: list[Step] = []
    tasks: dict[str, Callable[[], object]] = {}
    for name, (make, note) in layers(ready).items():
        say(f"training: {name}")
        try:
            layer = make(_equal_tolerance(ready, make))
            step, task = _counted(name, note, layer, ready, loss, exact), loss.timed(layer, ready)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        steps.append(step)
        tasks[name] = task
    if not tasks:
        return steps
    say("training: timing")
    with torch.no_grad():
        start = ready.f(ready.inputs, ready.params, ready.inputs)

    def reference() -> None:
        with torch.no_grad():
            for _ in range(harness.queued):
                image = ready.f(start, ready.params, ready.inputs)
            harness.block(image)

    times = interleave({**tasks, PARTS: loss.parts(start, ready)}, reference, rounds=rounds, budget=budget)
    reference_of = {name: [item / harness.queued for item in beside] for name, beside in times.reference.items()}
    split = [_split(step, times.returned[step.layer], reference_of[step.layer], times.disturbance) for step in steps]
    return [replace(step, floor=_floor(step, times.returned[PARTS])) for step in split]


def _floor(step: Step, parts: Sequence[Any]) -> list[float]:
    """Return the seconds of the step's evaluations and products alone, per kept round; empty if they are not known."""
    if step.vjps is None:
        return []
    return [
        (step.forward_evaluations - 1) * alone + recorded + step.vjps * vjp + gradient
        for alone, (recorded, vjp, gradient) in zip(step.reference, parts, strict=True)
    ]


class Loss:
    """A linear loss with fixed weights, and how a step of it is run."""

    def __init__(self, ready: Ready, wait: Callable[[Tensor], object]) -> None:
        self.wait = wait
        rng = np.random.default_rng(0)
        self.weights = torch.from_numpy(rng.standard_normal(tuple(ready.z0.shape))).to(ready.z0)

    def __call__(self, value: Tensor) -> Tensor:
        return (value * self.weights).sum()

    def gradient(self, layer: Layer, ready: Ready) -> Tensor:
        """Return the flat gradient of all parameters."""
        result = torch.autograd.grad(self(layer(ready).value), list(ready.params.values()))
        return torch.cat([part.flatten() for part in result])

    def timed(self, layer: Layer, ready: Ready) -> Callable[[], tuple[float, float]]:
        """Return one step; returns the seconds of its forward and of its backward pass."""
        parameters = list(ready.params.values())

        def run() -> tuple[float, float]:
            start = time.perf_counter()
            value = self(layer(ready).value)
            self.wait(value)
            middle = time.perf_counter()
            result = torch.autograd.grad(value, parameters)
            self.wait(result[0])
            return middle - start, time.perf_counter() - middle

        run()
        return run

    def parts(self, z: Tensor, ready: Ready) -> Callable[[], tuple[float, float, float]]:
        """Return a task that returns the seconds of a recorded evaluation, of a vjp and of the parameters' gradient."""
        parameters = list(ready.params.values())
        z = z.detach().requires_grad_()

        def run() -> tuple[float, float, float]:
            marks = [time.perf_counter()]
            value = ready.f(z, ready.params, ready.inputs)
            self.wait(value)
            marks.append(time.perf_counter())
            for wanted in ([z], parameters):
                result = torch.autograd.grad(value, wanted, self.weights, retain_graph=True)
                self.wait(result[0])
                marks.append(time.perf_counter())
            recorded, vjp, gradient = (after - before for before, after in pairwise(marks))
            return recorded, vjp, gradient

        run()
        return run


def _counted(name: str, note: str, layer: Layer, ready: Ready, loss: Loss, exact: Tensor) -> Step:
    counted = ready.counted()
    result = layer(counted)
    forward = counted.calls[0]
    parts = torch.autograd.grad(loss(result.value), list(counted.params.values()))
    flat = torch.cat([part.flatten() for part in parts])
    return Step(
        name,
        ready.case.name,
        forward,
        counted.calls[0] - forward,
        result.evaluations,
        _residual(ready, result.value.detach()),
        float(torch.nn.functional.cosine_similarity(flat, exact, dim=0)),
        float((flat - exact).norm() / exact.norm()),
        note,
        vjps=_vjps(layer, result.record),
    )


def _vjps(layer: Layer, record: Any) -> int | None:
    """Return the products of the backward pass; torchdeq's one-step gradient takes none."""
    if record is None:
        return 0 if isinstance(layer, TorchDEQ) and not layer.ift else None
    return int(record.report.vjps.max())


def _split(step: Step, returned: Sequence[Any], reference: list[float], disturbance: list[float]) -> Step:
    return replace(
        step,
        forward=[forward for forward, _ in returned],
        backward=[backward for _, backward in returned],
        step=[forward + backward for forward, backward in returned],
        reference=reference,
        disturbance=disturbance,
    )


def _residual(ready: Ready, value: Tensor) -> float:
    with torch.no_grad():
        image = ready.f(value, ready.params, ready.inputs)
    gap = (image - value).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
    return float(gap.max())


def _equal_tolerance(ready: Ready, make: Callable[[float], Layer]) -> float:
    """Return the loosest tolerance with which the layer's value reaches the residual."""
    best = RTOL * 1e-3
    for tolerance in RTOL * 10.0 ** (np.arange(8, -9, -1) / 4):
        with torch.no_grad():
            value = make(float(tolerance))(ready).value
        if _residual(ready, value) <= RTOL:
            best = float(tolerance)
            break
    return best


def adjoint_tolerance(ready: Ready) -> float:
    """Return the loosest b_tol with which torchdeq's adjoint solve reaches the adjoint residual for every sample."""
    from torchdeq.solver import broyden_solver

    with torch.no_grad():
        z = Ours("broyden", "jacobian-free", 1e-6)(ready).value
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
