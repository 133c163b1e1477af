"""What a user's type checker sees: checked by mypy and pyright (`make types`), never run.

Framework arrays are `Any` by contract (frameworks share no base class); everything around them has a type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

import numpy as np
import torch
from deqcore_torch.nn import DEQ

import deqcore
from deqcore import AdjointReport, Backend, Config, Solution, Solver, Status
from deqcore.config.schedule import Ramp, Schedule
from deqcore.diagnostics import Audit, Spectrum, gradient_audit, spectral_radius
from deqcore.monitor import Monitor, Trigger
from deqcore.plugins import SolverSpec, register
from deqcore.types import Array, Map


def f(z: Any, x: Any) -> Any:
    return 0.5 * np.tanh(z) + x


z0 = np.zeros((2, 2))
config = Config(backend="numpy", forward={"solver": "anderson", "rtol": 1e-6})
assert_type(config.forward.solver, str)
assert_type(config.forward.max_steps, int)
sol = deqcore.fixed_point(f, z0, z0, config=config, forward__rtol=1e-5)
assert_type(sol, Solution)
assert_type(deqcore.root(f, z0, z0, config=config, forward__rtol=1e-5), Solution)
assert_type(sol.summary(), str)
assert_type(sol.backward, AdjointReport | None)
assert_type(Status(1).sentence, str)
assert_type(deqcore.get_backend(config), Backend)
assert_type(spectral_radius(f, z0, z0), Spectrum)
assert_type(gradient_audit(f, z0, z0, cotangent=z0), Audit)
value, gradients = deqcore.vjp(f, z0, z0, cotangent=z0)
assert_type(gradients, tuple[Any, ...])
with deqcore.using(forward__max_steps=7) as inside:
    assert_type(inside, Config)
with Monitor(triggers=[Trigger("deq_unconverged_fraction", "> 0.05", "warn")]) as monitor:
    monitor.advance()

layer = DEQ(torch.nn.Linear(2, 2), forward__rtol=1e-5)
assert_type(layer.solve(torch.zeros(1, 2)), Solution)
assert_type(Schedule([(0, {"forward__rtol": Ramp(1e-2, 1e-4, until=10)})]).at(3), dict[str, object])


@dataclass(frozen=True)
class Half(Solver):
    """The checker shows a plugin's author what a step must return."""

    def init(self, backend: Backend, z: Array, fz: Array) -> tuple[()]:
        return ()

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: Any) -> tuple[Array, Array, Any]:
        z = (z + fz) / 2
        return z, f(z), state


register(SolverSpec("half", "user:Half"))

# What is wrong must be found: an ignored line without an error is an error itself.
deqcore.fixed_point(f, z0, config="deq.toml")  # type: ignore[arg-type]
Trigger("deq_unconverged_fraction", "> 0.05", "explode")  # type: ignore[arg-type]
_ = sol.converge  # type: ignore[attr-defined]
