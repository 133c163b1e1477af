"""The training step of a study in JAX."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import deqcore
import deqcore_jax.adjoint_tap
import deqcore_jax.strategy_state
from deqcore import plugins
from deqcore.config import Config
from deqcore.diagnostics import spectral_radius
from deqcore.solution import Solution
from deqcore.study.models.base import Model, Weights
from deqcore.study.train.trainer import BETA1, BETA2, EPSILON, Figures, Numbers, Step, Trainer
from deqcore.types import Tree
from deqcore_jax.adjoint_tap import AdjointTap

Leaves: TypeAlias = dict[str, jax.Array]
Solved: TypeAlias = tuple[jax.Array, ...] | None
"""Evaluations, residual, status and the norm of the solution `(batch,)`; None for an explicit network."""

LAYOUT = ("NCHW", "OIHW", "NCHW")


class JaxOps:
    """Operations beyond the array API standard, see `deqcore.study.models.base.Ops`."""

    xp = jnp

    def relu(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)

    def conv(self, x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)

    def upsample(self, x: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)

    def norm(self, x: jax.Array, groups: int) -> jax.Array:
        grouped = x.reshape(x.shape[0], groups, -1)
        return _standard(grouped).reshape(x.shape)

    def layer_norm(self, x: jax.Array) -> jax.Array:
        return _standard(x)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        length = q.shape[-2]
        scores = q @ jnp.swapaxes(k, -1, -2) / jnp.sqrt(jnp.asarray(q.shape[-1], q.dtype))
        seen = jnp.tril(jnp.ones((length, length), bool))
        return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1) @ v

    def embed(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        return table[tokens]


class JaxTrainer(Trainer):
    """Adam on a model, on JAX's default device unless another is requested.

    Forward and backward are compiled separately, so that each can be timed: the first returns the pullback as data.
    """

    def __init__(self, model: Model, weights: Weights, config: Config, device: str = "auto") -> None:
        like = jnp.zeros(1)
        placed = like if device == "auto" else deqcore.get_backend(config).to_device(like, device)
        (self._device,) = placed.devices()
        self._ops = JaxOps()
        self._model = model
        self._config = config
        self._weights = {name: self._move(weights[name]) for name in sorted(weights)}
        self._adam = optax.scale_by_adam(BETA1, BETA2, EPSILON)
        self._state = self._adam.init(self._weights)
        strategy = plugins.make_strategy(config.backward.strategy, config.backward.options)
        begin = strategy.init_state() if isinstance(strategy, deqcore.StatefulStrategy) else None
        self._memory = None if begin is None else self._move(np.asarray(begin, np.float32))
        self._forward = jax.jit(self._pullback, static_argnames="config")
        self._backward = jax.jit(lambda vjp: vjp(jnp.ones((), jnp.float32)))
        self._update = jax.jit(self._updated)
        self._predict = jax.jit(self._logits)
        self._solved = jax.jit(self._at, static_argnames="config")
        self._step_bytes: dict[tuple[int, ...], int | None] = {}

    def device(self) -> str:
        return "cpu" if self._device.platform == "cpu" else str(self._device.device_kind)

    def warm_up(self, x: Numbers, y: Numbers, count: int) -> None:
        gradient, _ = self._gradient(x, y, self._config)
        jax.block_until_ready(self._update(self._weights, self._state, gradient, 0.0))
        self.predict(np.repeat(x[:1], count, axis=0))

    def step(self, x: Numbers, y: Numbers, rate: float) -> Step:
        inputs, targets = jax.block_until_ready((jnp.asarray(x), jnp.asarray(_narrow(y))))
        start = time.perf_counter()
        loss, vjp, figures = jax.block_until_ready(
            self._forward(self._weights, inputs, targets, self._memory, config=self._config)
        )
        middle = time.perf_counter()
        gradient, adjoint_tap, self._memory = jax.block_until_ready(self._backward(vjp))
        end = time.perf_counter()
        self._weights, self._state = jax.block_until_ready(self._update(self._weights, self._state, gradient, rate))
        done = time.perf_counter()
        return Step(float(loss), middle - start, end - middle, done - end, self._figures(figures, adjoint_tap))

    def predict(self, x: Numbers) -> Numbers:
        return np.asarray(self._predict(self._weights, jnp.asarray(_narrow(x))))

    def gradient(self, x: Numbers, y: Numbers, config: Config) -> tuple[float, Numbers]:
        gradient, loss = self._gradient(x, y, config)
        return loss, np.concatenate([np.asarray(gradient[name], np.float64).ravel() for name in sorted(gradient)])

    def radius(self, x: Numbers, config: Config, products: int) -> Numbers:
        z, injected = self._solved(self._weights, jnp.asarray(_narrow(x)), config=config)
        step = jax.jit(partial(self._model.cell, self._ops))
        return spectral_radius(lambda z: step(self._weights, z, injected), z, max_products=products).radius

    def save(self) -> Weights:
        count, mu, nu = self._state
        saved = {"adam.count": count}
        for prefix, tree in (("weight", self._weights), ("adam.mu", mu), ("adam.nu", nu)):
            saved |= {f"{prefix}.{name}": value for name, value in tree.items()}
        if self._memory is not None:
            saved["strategy_state"] = self._memory
        return {name: np.array(value) for name, value in saved.items()}

    def restore(self, saved: Weights) -> None:
        def tree(prefix: str) -> dict[str, jax.Array]:
            return {name: self._move(saved[f"{prefix}.{name}"]) for name in self._weights}

        if self._memory is not None and "strategy_state" in saved:
            self._memory = self._move(saved["strategy_state"])
        self._weights = tree("weight")
        self._state = type(self._state)(self._move(saved["adam.count"]), tree("adam.mu"), tree("adam.nu"))

    def peak(self) -> int | None:
        # JAX cannot restart the measurement: the peak is that of the whole process.
        peak_bytes = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak_bytes is None or self._device.platform == "cpu" else int(peak_bytes)

    def step_memory(self, x: Numbers, y: Numbers) -> int | None:
        if x.shape not in self._step_bytes:  # XLA's plan depends on nothing else, and to read it is to compile again
            self._step_bytes[x.shape] = self._planned(jnp.asarray(x), jnp.asarray(_narrow(y)))
        return self._step_bytes[x.shape]

    def _planned(self, x: jax.Array, y: jax.Array) -> int | None:
        given = (self._weights, x, y, self._memory)
        forward = self._forward.lower(*given, config=self._config).compile()
        backward = self._backward.lower(self._forward(*given, config=self._config)[1]).compile()
        first, second = _plan(forward), _plan(backward)
        if first is None or second is None:
            return None
        # The results of the forward pass, which are the arguments of the backward pass, are held through both.
        return max(sum(first), first[1] + sum(second))

    def _move(self, a: Numbers) -> jax.Array:
        """Return a copy on the device; results computed from it stay there."""
        return jax.device_put(np.array(a), self._device)

    def _gradient(self, x: Numbers, y: Numbers, config: Config) -> tuple[Leaves, float]:
        memory = self._memory if config == self._config else None
        inputs, targets = jnp.asarray(_narrow(x)), jnp.asarray(_narrow(y))
        loss, vjp, _ = self._forward(self._weights, inputs, targets, memory, config=config)
        return self._backward(vjp)[0], float(loss)

    def _pullback(
        self, weights: Leaves, x: jax.Array, y: jax.Array, memory: jax.Array | None, config: Config
    ) -> tuple[jax.Array, Callable[..., Tree], Solved]:
        def loss(weights: Leaves, adjoint_tap: AdjointTap, memory: jax.Array | None) -> tuple[jax.Array, Solved]:
            z, figures = self._solve(weights, x, config, adjoint_tap, memory)
            logits = self._model.read(self._ops, weights, z)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), figures

        value, vjp, figures = jax.vjp(loss, weights, deqcore_jax.adjoint_tap.new(x.shape[0]), memory, has_aux=True)
        return value, vjp, figures

    def _solve(
        self,
        weights: Leaves,
        x: jax.Array,
        config: Config,
        adjoint_tap: AdjointTap | None = None,
        memory: jax.Array | None = None,
    ) -> tuple[jax.Array, Solved]:
        model, ops = self._model, self._ops
        injected = model.inject(ops, weights, x)
        z = model.start(ops, weights, injected)
        if not model.equilibrium:
            for _ in range(model.depth):
                z = model.cell(ops, weights, z, injected)
            return z, None

        def solve() -> Solution:
            return deqcore.fixed_point(lambda z: model.cell(ops, weights, z, injected), z, config=config)

        if adjoint_tap is None:
            return solve().value, None
        with deqcore_jax.adjoint_tap.reporting(adjoint_tap), deqcore_jax.strategy_state.carrying(memory):
            sol = solve()
        leaves = [leaf.reshape(x.shape[0], -1) for leaf in jax.tree.leaves(sol.value)]
        scale = jnp.linalg.norm(jnp.concatenate(leaves, axis=1), axis=1)
        return sol.value, jax.lax.stop_gradient((sol.evaluations, sol.residual, sol.status, scale))

    def _updated(
        self, weights: Leaves, state: optax.OptState, gradient: Leaves, rate: jax.Array
    ) -> tuple[Leaves, optax.OptState]:
        direction, state = self._adam.update(gradient, state)
        return jax.tree.map(lambda w, d: w - rate * d, weights, direction), state

    def _logits(self, weights: Leaves, x: jax.Array) -> jax.Array:
        return self._model.read(self._ops, weights, self._solve(weights, x, self._config)[0])

    def _at(self, weights: Leaves, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
        return self._solve(weights, x, config)[0], self._model.inject(self._ops, weights, x)

    def _figures(self, figures: Solved, adjoint_tap: AdjointTap) -> Figures:
        if figures is None:
            return Figures.explicit(self._model.depth)
        *steps, scale = [np.asarray(figure) for figure in figures]
        ran = bool(np.all(np.asarray(adjoint_tap.runs) == 1))  # a step strategy fills no adjoint tap
        return Figures.of(steps, scale, deqcore_jax.adjoint_tap.read(adjoint_tap) if ran else None)


def _standard(x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)


def _narrow(a: Numbers) -> Numbers:
    """Return integers in the dtype that JAX keeps without its switch for 64 bits."""
    return a.astype(np.int32) if np.issubdtype(a.dtype, np.integer) else a


def _plan(compiled: jax.stages.Compiled) -> tuple[int, int] | None:
    """Return the bytes that XLA's plan gives to temporary values and to results."""
    plan = compiled.memory_analysis()
    return None if plan is None else (int(plan.temp_size_in_bytes), int(plan.output_size_in_bytes))
