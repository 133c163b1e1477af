"""What the examples share: weights that both frameworks load, one training loop per framework, arguments.

A model `NAME` has three files: `NAME.py` (data, initial weights, what it learnt), `NAME_torch.py` with a class `Model`,
and `NAME_jax.py` with functions on a dictionary of weights. Both have `loss` and `predict`, which take the same arrays.
Weights are NumPy arrays under PyTorch's names: `state_dict` on one side, the dictionary on the other.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

import deqcore
from deqcore.errors import BackendError

Weights = dict[str, Any]


def arguments(text: str, steps: int, given: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of every example."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch", help="framework that trains")
    parser.add_argument(
        "--device", default="cpu", help="where it trains, such as cuda or cuda:1 (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=steps, help="training steps; 0 only scores --weights (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the picture and the weights")
    parser.add_argument("--weights", type=Path, help="start from this safetensors file, of either framework")
    options = parser.parse_args(given)
    if options.steps < (1 if options.weights is None else 0):
        parser.error(f"--steps must be at least 1 (got {options.steps})")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights {options.weights}: the file does not exist")
    backend = deqcore.get_backend(backend=options.backend)
    try:
        backend.to_device(backend.asarray([0.0]), options.device)
    except BackendError as error:
        parser.error(f"--device {options.device}: {error}")
    return options


def start(options: argparse.Namespace, weights: Weights) -> Weights:
    """Load the weights to start from, or return the given ones if no file is named."""
    if options.weights is None:
        return weights
    from safetensors.numpy import load_file

    found = load_file(options.weights)
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in weights.items()}:
        raise SystemExit(f"{options.weights} holds {sorted(found)}, but this example needs {sorted(weights)}.")
    return found


def finish(options: argparse.Namespace, name: str, weights: Weights) -> None:
    """Store the weights for either framework."""
    if options.out is not None:
        from safetensors.numpy import save_file

        options.out.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, options.out / f"{name}.safetensors")


def matrix(rng: np.random.Generator, *shape: int, gain: float = 1.0) -> Any:
    """Normal numbers, scaled by the root of what is summed over: all axes but the first."""
    return (gain * rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def linear(p: Mapping[str, Any], name: str, x: Any) -> Any:
    """x Wᵀ + b with the weights of a `torch.nn.Linear`."""
    found = x @ p[f"{name}.weight"].T
    return found + p[f"{name}.bias"] if f"{name}.bias" in p else found


def part(p: Mapping[str, Any], prefix: str) -> Weights:
    """Return the weights of a part, by their names in it."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def tune(
    run: Callable[[float, float, int], tuple[float, float, Any]],
    rates: Iterable[float],
    decays: Iterable[float],
    seeds: int,
) -> tuple[float, float, Any, str]:
    """Find the setting of a grid with the best mean validation score, its mean test score, and one of its models.

    `run(rate, decay, seed)` trains and returns validation score (higher is better), test score and model.
    """
    found = []
    for rate in rates:
        for decay in decays:
            tried = [run(rate, decay, seed) for seed in range(seeds)]
            scores = (float(np.mean([each[0] for each in tried])), float(np.mean([each[1] for each in tried])))
            found.append((*scores, tried[0][2], f"rate {rate}, decay {decay}"))
    return max(found, key=lambda each: each[0])


def side(
    backend: str, name: str, weights: Weights, settings: Mapping[str, object], device: str = "cpu", **options: Any
) -> Any:
    """Build the model `name` on one framework and device, with these weights."""
    made = {"torch": TorchSide, "jax": JaxSide}[backend]
    return made(importlib.import_module(f"{name}_{backend}"), weights, settings, device, **options)


def cosine(step: int, steps: int) -> float:
    """Return a factor for the learning rate: a short warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


class TorchSide:
    """A `Model` of `NAME_torch.py`."""

    def __init__(
        self, module: Any, weights: Weights, settings: Mapping[str, object], device: str = "cpu", **options: Any
    ) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(device)
        self.model = module.Model(dict(settings), **options)
        self.model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        self.model.to(self.device)

    def weights(self) -> Weights:
        return {name: p.numpy(force=True).copy() for name, p in self.model.named_parameters()}

    def tensors(self, arrays: Iterable[Any]) -> list[Any]:
        return [self.torch.as_tensor(a, device=self.device) for a in arrays]

    def gradients(self, *batch: Any) -> tuple[float, Weights]:
        """Return the loss and its derivatives by the weights' names."""
        self.model.zero_grad()
        loss = self.model.loss(*self.tensors(batch))
        loss.backward()
        return loss.item(), {name: p.grad.numpy(force=True).copy() for name, p in self.model.named_parameters()}

    def peak(self, *batch: Any) -> int:
        """Return the peak memory of loss and gradients in bytes, from the allocator's events."""
        from torch.profiler import ProfilerActivity, profile

        self.gradients(*batch)  # what is allocated once, and the gradients themselves
        if self.device.type == "cuda":
            before = self.torch.cuda.memory_allocated(self.device)
            self.torch.cuda.reset_peak_memory_stats(self.device)
            self.gradients(*batch)
            return int(self.torch.cuda.max_memory_allocated(self.device)) - int(before)
        gc.collect()  # or what earlier steps left is given back in the profile, and lowers its sums
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.gradients(*batch)
        events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
        return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))

    def fit(
        self,
        batches: Iterable[tuple[Any, ...]],
        steps: int,
        rate: float,
        decay: float = 0.0,
        *,
        memory: float = 0.999,
        quiet: bool = False,
    ) -> None:
        """AdamW with gradients clipped to norm 1; `memory` is its β₂."""
        if not steps:
            return
        optimizer = self.torch.optim.AdamW(self.model.parameters(), rate, (0.9, memory), weight_decay=decay)
        schedule = self.torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
        self.model.train()
        progress = Progress(steps, quiet)
        for _, batch in zip(range(steps), batches, strict=False):
            optimizer.zero_grad()
            loss = self.model.loss(*self.tensors(batch))
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.tell(loss)

    def predict(self, *arrays: Any) -> Any:
        """Return the outputs of the model as NumPy arrays."""
        self.model.eval()
        found = self.model.predict(*self.tensors(arrays))
        return tuple(a.numpy(force=True) for a in found) if isinstance(found, tuple) else found.numpy(force=True)


class JaxSide:
    """The functions of `NAME_jax.py`."""

    def __init__(
        self, module: Any, weights: Weights, settings: Mapping[str, object], device: str = "cpu", **options: Any
    ) -> None:
        import jax

        self.jax = jax
        backend = deqcore.get_backend(backend="jax")
        self.params = {name: backend.to_device(value, device) for name, value in weights.items()}
        self.loss = lambda params, *batch: module.loss(params, settings, *batch, **options)
        self._predict = jax.jit(lambda params, *arrays: module.predict(params, settings, *arrays, **options))

    def weights(self) -> Weights:
        return {name: np.asarray(value) for name, value in self.params.items()}

    def gradients(self, *batch: Any) -> tuple[float, Weights]:
        """Return the loss and its derivatives by the weights' names."""
        loss, found = self.jax.jit(self.jax.value_and_grad(self.loss))(self.params, *batch)
        return float(loss), {name: np.asarray(value) for name, value in found.items()}

    def fit(
        self,
        batches: Iterable[tuple[Any, ...]],
        steps: int,
        rate: float,
        decay: float = 0.0,
        *,
        memory: float = 0.999,
        quiet: bool = False,
    ) -> None:
        """AdamW with gradients clipped to norm 1; `memory` is its β₂."""
        if not steps:
            return
        import optax

        jnp = self.jax.numpy
        rates = jnp.asarray([rate * cosine(step, steps) for step in range(steps)])
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(lambda count: rates[count], b2=memory, weight_decay=decay)
        )

        @self.jax.jit
        def step(params: Any, state: Any, *batch: Any) -> Any:
            loss, found = self.jax.value_and_grad(self.loss)(params, *batch)
            updates, state = optimizer.update(found, state, params)
            return optax.apply_updates(params, updates), state, loss

        state, progress = optimizer.init(self.params), Progress(steps, quiet)
        for _, batch in zip(range(steps), batches, strict=False):
            self.params, state, loss = step(self.params, state, *batch)
            progress.tell(loss)

    def predict(self, *arrays: Any) -> Any:
        """Return the outputs of the model as NumPy arrays."""
        return self.jax.tree.map(np.asarray, self._predict(self.params, *arrays))


class Progress:
    """The mean loss of each tenth of a training, with the time."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.steps, self.quiet, self.begin = steps, quiet, time.perf_counter()
        self.losses: list[float] = []

    def tell(self, loss: Any) -> None:
        self.losses.append(loss.item())
        every = max(1, self.steps // 10)
        if len(self.losses) % every == 0 and not self.quiet:
            mean = sum(self.losses[-every:]) / every
            print(f"step {len(self.losses):5d}  loss {mean:.5f}  {time.perf_counter() - self.begin:.0f} s", flush=True)


def batches(rng: np.random.Generator, size: int, *arrays: Any) -> Iterable[tuple[Any, ...]]:
    """Yield batches without end, with every sample once an epoch."""
    while True:
        order = rng.permutation(len(arrays[0]))
        for begin in range(0, len(order) - size + 1, size):
            rows = order[begin : begin + size]
            yield tuple(a[rows] for a in arrays)


def figure(options: argparse.Namespace, name: str, draw: Any, size: tuple[float, float] = (7, 3)) -> None:
    """Let `draw(figure)` paint, and save it."""
    if options.out is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    options.out.mkdir(parents=True, exist_ok=True)
    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    draw(fig)
    fig.savefig(options.out / f"{name}.png", dpi=110)
    print(f"picture: {options.out / name}.png")
