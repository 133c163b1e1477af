"""The training step of a study in PyTorch."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import deqcore
from deqcore.config import Config
from deqcore.diagnostics import spectral_radius
from deqcore.solution import Solution
from deqcore.study.models.base import Model, Weights
from deqcore.study.train.trainer import BETA1, BETA2, EPSILON, Figures, Numbers, Step, Trainer
from deqcore.types import AdjointReport


class TorchOps:
    """Operations beyond the array API standard, see `deqcore.study.models.base.Ops`."""

    xp = xp

    def relu(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def conv(self, x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, kernel, stride=stride, padding=1)

    def upsample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    def norm(self, x: Tensor, groups: int) -> Tensor:
        return F.group_norm(x, groups)

    def layer_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, table)


class TorchTrainer(Trainer):
    """Adam on a model, on the GPU if one is available and no other device is requested."""

    def __init__(self, model: Model, weights: Weights, config: Config, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = deqcore.get_backend(config).to_device(torch.zeros(1), device).device
        self._ops = TorchOps()
        self._model = model
        self._config = config
        self._weights = {name: self._move(weights[name].copy()).requires_grad_() for name in sorted(weights)}
        self._memory = deqcore.StrategyState()
        self._adam = torch.optim.Adam(self._weights.values(), lr=0.0, betas=(BETA1, BETA2), eps=EPSILON)

    def device(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else str(self._device)

    def warm_up(self, x: Numbers, y: Numbers, count: int) -> None:
        for _ in range(2):
            self.gradient(x, y, self._config)
        self.predict(np.repeat(x[:1], count, axis=0))

    def step(self, x: Numbers, y: Numbers, rate: float) -> Step:
        inputs, targets = self._move(x), self._move(y)
        start = self._now()
        loss, sol = self._loss(inputs, targets, self._config, self._memory)
        middle = self._now()
        self._adam.zero_grad()
        loss.backward()
        end = self._now()
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        done = self._now()
        return Step(loss.item(), middle - start, end - middle, done - end, self._figures(sol))

    def predict(self, x: Numbers) -> Numbers:
        with torch.no_grad():
            z, _ = self._solve(self._move(x), self._config)
            logits: Tensor = self._model.read(self._ops, self._weights, z)
            return logits.float().cpu().numpy()

    def gradient(self, x: Numbers, y: Numbers, config: Config) -> tuple[float, Numbers]:
        memory = deqcore.StrategyState(self._memory.values) if config == self._config else None
        loss, _ = self._loss(self._move(x), self._move(y), config, memory)
        gradients = torch.autograd.grad(loss, list(self._weights.values()))
        return loss.item(), torch.cat([part.flatten() for part in gradients]).double().cpu().numpy()

    def radius(self, x: Numbers, config: Config, products: int) -> Numbers:
        inputs = self._move(x)
        with torch.no_grad():
            z, _ = self._solve(inputs, config)
            injected = self._model.inject(self._ops, self._weights, inputs)
        step = partial(self._model.cell, self._ops, self._weights)
        return spectral_radius(lambda z: step(z, injected), z, max_products=products).radius

    def save(self) -> Weights:
        saved = {f"weight.{name}": value for name, value in self._weights.items()}
        for name, value in self._weights.items():
            saved |= {f"adam.{name}.{key}": entry for key, entry in self._adam.state[value].items()}
        if self._memory.values is not None:
            saved["strategy_state"] = self._memory.values
        return {name: value.detach().cpu().numpy().copy() for name, value in saved.items()}

    def restore(self, saved: Weights) -> None:
        self._memory.values = self._move(saved["strategy_state"]) if "strategy_state" in saved else None
        with torch.no_grad():
            for name, value in self._weights.items():
                value.copy_(self._move(saved[f"weight.{name}"]))
                keys = [key for key in saved if key.startswith(f"adam.{name}.")]
                self._adam.state[value] = {key.rpartition(".")[2]: torch.from_numpy(saved[key].copy()) for key in keys}
                for key, entry in self._adam.state[value].items():
                    self._adam.state[value][key] = entry if key == "step" else entry.to(self._device)

    def reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def step_memory(self, x: Numbers, y: Numbers) -> int | None:
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            self.reset_peak()
            self.step(x, y, 0.0)
            return torch.cuda.max_memory_allocated(self._device) - before
        return allocated(partial(self.step, x, y, 0.0))

    def _solve(
        self, x: Tensor, config: Config, memory: deqcore.StrategyState | None = None
    ) -> tuple[Any, Solution | None]:
        model, ops, weights = self._model, self._ops, self._weights
        injected = model.inject(ops, weights, x)
        z = model.start(ops, weights, injected)
        if model.equilibrium:
            sol = deqcore.fixed_point(
                lambda z: model.cell(ops, weights, z, injected), z, config=config, strategy_state=memory
            )
            return sol.value, sol
        for _ in range(model.depth):
            z = model.cell(ops, weights, z, injected)
        return z, None

    def _loss(
        self, x: Tensor, y: Tensor, config: Config, memory: deqcore.StrategyState | None = None
    ) -> tuple[Tensor, Solution | None]:
        z, sol = self._solve(x, config, memory)
        logits = self._model.read(self._ops, self._weights, z)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten()), sol

    def _figures(self, sol: Solution | None) -> Figures:
        if sol is None:
            return Figures.explicit(self._model.depth)
        with torch.no_grad():
            leaves = [leaf.flatten(1) for leaf in sol.backend.flatten(sol.value)[0]]
            scale = torch.cat(leaves, dim=1).norm(dim=1)
        steps = [figure.cpu().numpy() for figure in (sol.evaluations, sol.residual, sol.status)]
        report = sol.backward
        if report is not None:
            report = AdjointReport(*(figure.detach().cpu().numpy() for figure in report))
        return Figures.of(steps, scale.cpu().numpy(), report)

    def _move(self, a: Numbers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def allocated(task: Callable[[], object]) -> int | None:
    """Return the highest sum of what a task allocates on the CPU, in bytes; None if the profiler saw nothing."""
    gc.collect()  # or what earlier tasks left is given back in the profile, and lowers its sums
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        task()
    return _highest(run)


def _highest(run: torch.profiler.profile) -> int | None:
    """Return the highest sum of the allocations that a profile saw, in bytes."""
    results = run.profiler.kineto_results if run.profiler is not None else None
    if results is None:
        return None
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    sums = itertools.accumulate(size for _, size in sorted(events, key=lambda event: event[0]))
    return max(sums, default=0)
