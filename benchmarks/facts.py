"""Single figures that no common table holds: limited memory, slow modes, fixed cost, stored vectors (torch, eager)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import deqcore
from benchmarks.harnesses import torch_harness
from benchmarks.roofline import bandwidth
from deqcore.bench.cases import slow_modes
from deqcore.bench.compare import Say, counted
from deqcore.bench.harness import Deqcore, residuals
from deqcore.bench.machine import give_back_blocks, peak_memory
from deqcore.bench.timing import interleave
from deqcore.testing.problems import golden

Facts = dict[str, Any]
QUIET: Final = {"backend": "torch", "forward__on_failure": "ignore", "backward__strategy": "jacobian-free"}
RADIUS: Final = 0.95
SIZE: Final = 64
FEW, MANY = 2, 22  # steps between which the cost of one is measured


def facts(*, quick: bool, say: Say) -> dict[str, Facts]:
    """Return all of them."""
    makers: dict[str, Callable[[bool], Facts]] = {
        "limited memory": limited_memory,
        "anderson linear": anderson_linear,
        "slow modes": newton_on_slow_modes,
        "not a contraction": newton_on_expansive,
        "fixed cost": fixed_cost,
        "bandwidth": memory_speed,
        "memory of the default": default_memory,
        "stored vectors": stored_vectors,  # last: it makes allocation slow
    }
    result = {}
    for name, make in makers.items():
        say(f"torch: {name}")
        result[name] = make(quick)
    return result


def linear(seeds: int) -> tuple[Tensor, Tensor]:
    """Random non-symmetric matrices of spectral radius .95 and right-hand sides, `(seeds, n, n)`, `(seeds, n)`."""
    matrices, sides = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        a = rng.standard_normal((SIZE, SIZE))
        matrices.append(RADIUS * a / np.abs(np.linalg.eigvals(a)).max())
        sides.append(rng.standard_normal(SIZE))
    return torch.from_numpy(np.stack(matrices)), torch.from_numpy(np.stack(sides))


def apply(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return A z + b per sample."""
    return torch.einsum("bij,bj->bi", a, z) + b


def _relative(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    image = apply(z, a, b)
    return (image - z).norm(dim=1) / image.norm(dim=1)


def limited_memory(quick: bool, memory: int = 10, steps: int = 200, rtol: float = 1e-6) -> Facts:
    """Count how many of 200 seeds Broyden with ten pairs does not solve, by each solver's residual of its iterate.

    deqcore returns f(z), whose residual may slightly exceed that of the z that met the tolerance.
    """
    a, b = linear(20 if quick else 200)
    value = deqcore.fixed_point(
        apply,
        torch.zeros_like(b),
        a,
        b,
        forward__options={"history_size": memory},
        forward__solver="broyden",
        forward__rtol=rtol,
        forward__max_steps=steps,
        **QUIET,
    )
    result: Facts = {
        "seeds": len(b),
        "failures": int((~value.converged).sum()),
        "median steps": float(value.steps.double().median()),
    }
    if find_spec("torchdeq") is not None:
        from torchdeq.solver import broyden_solver

        _, _, info = broyden_solver(
            lambda z: apply(z, a, b),
            torch.zeros_like(b),
            max_iter=steps,
            tol=rtol,
            stop_mode="rel",
            LBFGS_thres=memory,
        )
        result["torchdeq failures"] = int((info["rel_lowest"] > rtol).sum())
    return result


def anderson_linear(quick: bool, rtol: float = 1e-6, steps: int = 400) -> Facts:
    """Return the evaluations of Anderson, median over 20 seeds."""
    a, b = linear(5 if quick else 20)
    zero = torch.zeros_like(b)
    settings = {"forward__solver": "anderson", "forward__rtol": rtol, "forward__max_steps": steps, **QUIET}
    value = deqcore.fixed_point(apply, zero, a, b, **settings)
    six = deqcore.fixed_point(apply, zero, a, b, forward__options={"history_size": 6}, **settings)
    result: Facts = {
        "evaluations": float(value.evaluations.double().median()),
        "evaluations with memory 6": float(six.evaluations.double().median()),
        "residual": float(_relative(value.value, a, b).max()),
    }
    if find_spec("torchdeq") is not None:
        result["torchdeq evaluations"] = statistics.median(
            _torchdeq_anderson(a[i : i + 1], b[i : i + 1], rtol, steps) for i in range(len(b))
        )
    return result


def _torchdeq_anderson(a: Tensor, b: Tensor, rtol: float, steps: int) -> int:
    from torchdeq.solver import anderson_solver

    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return apply(z, a, b)

    anderson_solver(f, torch.zeros_like(b), max_iter=steps, tol=rtol, stop_mode="rel")
    return calls


def newton_on_slow_modes(quick: bool) -> Facts:
    """Return the evaluations (products J v among them) to 1e-8 on 20 slow modes, float64."""
    harness = torch_harness(dtype="float64")
    case = slow_modes(4, 64) if quick else slow_modes()
    ready = harness.ready(case)
    result: Facts = {}
    for solver in ("newton-krylov", "broyden"):
        contender = Deqcore(solver)
        solve = contender.prepare(harness, ready, case.max_steps)
        count, value = counted(harness, ready, contender, solve, 1e-8, case.max_steps)
        result[solver] = {"evaluations": count, "residual": float(residuals(harness, ready, value).max())}
    return result


def newton_on_expansive(quick: bool) -> Facts:
    """Return the golden problem with ‖J‖ > 1: distance to the stored solution, and what plain iteration makes of it."""
    problem = golden("expansive")
    backend = deqcore.get_backend(backend="torch")
    params, inputs, z0 = (
        {key: backend.asarray(value, dtype="float64") for key, value in tree.items()}
        if isinstance(tree, dict)
        else backend.asarray(tree, dtype="float64")
        for tree in (problem.problem.params, problem.problem.inputs, problem.problem.z0)
    )
    f = problem.problem.bound(backend)
    result: Facts = {}
    for solver in ("newton-krylov", "picard"):
        output = deqcore.fixed_point(f, z0, params, inputs, forward__solver=solver, forward__rtol=1e-12, **QUIET)
        distance = np.abs(backend.to_numpy(output.value) - problem.truth.z).max()
        result[solver] = {
            "converged": bool(output.converged.all()),
            "distance": float(distance) if np.isfinite(distance) else None,
            "evaluations": int(output.evaluations.max()),
        }
    return result


def fixed_cost(quick: bool, device: str = "cpu", budget: float = 15.0) -> Facts:
    """Return the milliseconds of a call and of a step where f costs next to nothing: a tanh cell, 4×16.

    The cost of a call is what remains of a short solve without its steps, so that all steps of a solver must cost the
    same. Those of newton-krylov do not: each takes as many products as it needs.
    """
    block = torch_harness(device).block
    generator = torch.Generator().manual_seed(0)
    w = 0.2 * torch.randn(16, 16, generator=generator).to(device)
    x = torch.randn(4, 16, generator=generator).to(device)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    def task(solver: str, steps: int) -> Callable[[], object]:
        config = deqcore.Config(
            backend="torch",
            forward={"solver": solver, "rtol": 0.0, "max_steps": steps, "on_failure": "ignore"},
            backward={"strategy": "jacobian-free"},
        )

        def run() -> None:
            with torch.no_grad():
                block(deqcore.fixed_point(f, torch.zeros_like(x), config=config).value)

        run()
        return run

    solvers = ("auto", "picard", "anderson", "broyden")
    tasks = {f"{solver} {steps}": task(solver, steps) for solver in solvers for steps in (FEW, MANY)}
    times = interleave(tasks, lambda: block(f(x)), rounds=3 if quick else 15, budget=2.0 if quick else budget)
    result: Facts = {"f": {"ms": 1e3 * statistics.median(times.reference[f"picard {FEW}"])}}
    for solver in solvers:
        pairs = zip(times.seconds[f"{solver} {FEW}"], times.seconds[f"{solver} {MANY}"], strict=True)
        steps = [(1e3 * (many - few) / (MANY - FEW), 1e3 * few) for few, many in pairs]
        result[solver] = {
            "ms per step": statistics.median(step for step, _ in steps),
            "ms per call": statistics.median(few - FEW * step for step, few in steps),
        }
    return result


def memory_speed(quick: bool) -> Facts:
    """Return the bytes per second that the machine moves."""
    return {"bytes per second": bandwidth()}


def default_memory(quick: bool, steps: int = 24) -> Facts:
    """Return how many states the process grows by in 24 steps where f contracts well, per solver."""
    x = torch.ones(8, 2**14 if quick else 2**17)

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(x, x, z, value=0.3)

    give_back_blocks()
    result: Facts = {"steps": steps}
    for solver in ("picard", "auto"):
        config = deqcore.Config(
            backend="torch",
            forward={"solver": solver, "rtol": 0.0, "max_steps": steps, "on_failure": "ignore"},
            backward={"strategy": "jacobian-free"},
        )

        def solve(config: deqcore.Config = config) -> object:
            return deqcore.fixed_point(f, torch.zeros_like(x), config=config)

        solve()
        grown = peak_memory(solve)
        result[solver] = None if grown is None else grown / (x.numel() * x.element_size())
    return result


def stored_vectors(quick: bool, steps: int = 24) -> Facts:
    """Return how many states the process grows by during a Broyden solve of 24 steps: history and everything else."""
    size = 2**14 if quick else 2**17
    rate = torch.linspace(-0.9, 0.95, size)
    x = torch.ones(8, size)
    state = x.numel() * x.element_size()

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(x, rate, z)

    def ours(history_dtype: str | None) -> Callable[[], object]:
        config = deqcore.Config(
            backend="torch",
            forward={
                "solver": "broyden",
                "rtol": 0.0,
                "max_steps": steps,
                "on_failure": "ignore",
                "options": {"history_size": steps, "history_dtype": history_dtype},
            },
            backward={"strategy": "jacobian-free"},
        )
        return lambda: deqcore.fixed_point(f, torch.zeros_like(x), config=config)

    tasks: dict[str, Callable[[], object]] = {"float32": ours(None), "bfloat16": ours("bfloat16")}
    if find_spec("torchdeq") is not None:
        from torchdeq.solver import broyden_solver

        tasks["torchdeq"] = lambda: broyden_solver(f, torch.zeros_like(x), max_iter=steps, tol=0.0)
    give_back_blocks()
    result: Facts = {"steps": steps}
    for name, task in tasks.items():
        task()
        grown = peak_memory(task)
        result[name] = None if grown is None else grown / state
    return result
