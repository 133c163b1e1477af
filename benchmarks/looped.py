"""Looped models against the loops as people write them by hand: time of a training step, and lines of code.

    OMP_NUM_THREADS=1 python -m benchmarks.looped --json docs/benchmarks/looped.json
    OMP_NUM_THREADS=1 python -m benchmarks.looped --only reversible

The models are those of `examples/models`: `looped_text`, `looped_sudoku` and `attractor`, each with its loop by hand
beside it. Their gradients are equal (`tests/examples/test_looped_models.py`); here both take the same training step,
of one depth, in turn. *Ratio* is the processor time of loss and gradients with deqcore, divided by that of the loop by
hand: the median over rounds of two steps each, with the quartiles.

`reversible` compares the strategy with autograd through the same two-state iteration by hand: time, and peak memory
of a training step at several depths (PyTorch's allocator, without the parameters' gradients).

Lines are those of the functions that differ, without comments, docstrings and blank lines; deqcore's settings count.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

MODELS = Path(__file__).parents[1] / "examples" / "models"
NAMES = ("looped_text", "looped_sudoku", "attractor")
# Functions that differ: with deqcore (and its settings), and by hand.
LOOPS = {
    "looped_text": (["Model.loop", "SETTINGS"], ["ByHand.depth", "ByHand.loop"]),
    "looped_sudoku": (
        ["Model.segment", "Model.best", "Model.halting", "SETTINGS", "HALTING"],
        ["ByHand.depth", "ByHand.segment", "ByHand.best", "ByHand.halting"],
    ),
    "attractor": (["Model.refine", "SETTINGS"], ["ByHand.refine"]),
}
LOOPS_JAX = {
    "looped_text": (["loop", "SETTINGS"], ["loop_by_hand"]),
    "looped_sudoku": (["segment", "SETTINGS"], ["segment_by_hand"]),
    "attractor": (["refine", "SETTINGS"], ["equilibrium", "_forward", "_backward", "refine_by_hand"]),
}
DEPTHS = {"looped_text": 12, "looped_sudoku": 2}  # about the largest of a hundred training steps; cycles of a segment


def lines(paths: list[Path], names: list[str]) -> int:
    """Count the lines of functions and assignments, without comments, docstrings and blank lines."""
    total = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        nodes = {}
        for node in ast.parse(text).body:
            nodes[_name(node)] = node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                nodes[f"{_name(node)}.{_name(inner)}"] = inner
        for name in set(names) & set(nodes):
            node = nodes[name]
            own = range(node.lineno - 1, node.end_lineno or node.lineno)
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                doc = node.body[0]
                own = [k for k in own if not doc.lineno - 1 <= k < (doc.end_lineno or doc.lineno)]
            shown = [text.splitlines()[k].strip() for k in own]
            total += sum(bool(line) and not line.startswith("#") for line in shown)
    return total


def _name(node: Any) -> str:
    return getattr(node, "name", None) or getattr(next(iter(getattr(node, "targets", [])), None), "id", "")


def paired(off: Callable[[], Any], on: Callable[[], Any], budget: float) -> dict[str, Any]:
    """Return the ratio of processor times of `on` and `off`, which take turns until `budget` seconds are used."""

    def seconds(run: Callable[[], Any]) -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin

    for run in (off, on):
        run()
    ratios, base, start = [], [], time.process_time()
    while len(ratios) < 5 or time.process_time() - start < budget:
        a, b, c, d = seconds(off), seconds(on), seconds(on), seconds(off)
        ratios.append((b + c) / (a + d))
        base.append((a + d) / 2)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    milliseconds = 1e3 * float(np.median(base))
    return {"ratio": middle, "quartiles": [low, high], "by hand, ms": milliseconds, "rounds": len(ratios)}


def batch(name: str, example: Any) -> tuple[Any, ...]:
    """Return a training batch of the size that the example trains with."""
    rng = np.random.default_rng(0)
    if name == "looped_sudoku":
        return (*example.puzzles(rng, example.BATCH), example.starts(rng, example.BATCH), np.int32(0))
    text = importlib.import_module("text")
    (windows,) = next(iter(text.batches(rng, text.data()[1]["train"], example.BATCH)))
    return windows, np.int32(0)


def settings_of(name: str, example: Any) -> dict[str, Any]:
    """Return the settings of the example, at one depth and without a tolerance, so that both ways do the same work."""
    if name == "attractor":
        return {**example.SETTINGS, "forward__rtol": 0.0}
    options = {"depth": DEPTHS[name], "recorded": example.SETTINGS["backward__options"]["recorded"]}
    return {**example.SETTINGS, "backward__options": options}


def shared(name: str, example: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the weights, the batch and the settings that both ways get."""
    return example.weights(np.random.default_rng(0)), batch(name, example), settings_of(name, example)


def in_torch(name: str, budget: float) -> dict[str, Any]:
    """Measure a model in PyTorch."""
    common, example, module = (importlib.import_module(each) for each in ("common", name, f"{name}_torch"))
    weights, data, settings = shared(name, example)
    module.ByHand.depth = lambda self, step: DEPTHS[name]
    if name == "attractor":
        module.ByHand.refine.__defaults__ = (example.STEPS, 0.0)
    runs = []
    for cls in (module.ByHand, module.Model):
        side = common.TorchSide(SimpleNamespace(Model=cls), weights, settings)
        given = side.tensors(data)

        def step(side: Any = side, given: Any = given) -> None:
            side.model.zero_grad()
            side.model.loss(*given).backward()

        runs.append(step)
    return paired(*runs, budget)


def in_jax(name: str, budget: float) -> dict[str, Any]:
    """Measure a model in JAX; both ways are one compiled step."""
    import jax

    common, example, module = (importlib.import_module(each) for each in ("common", name, f"{name}_jax"))
    weights, data, settings = shared(name, example)
    by_hand = {
        "looped_text": {"loop": lambda p, settings, e, _: module.loop_by_hand(p, settings, e, np.int32(DEPTHS[name]))},
        "looped_sudoku": {"segment": lambda p, _, x, carry, step: module.segment_by_hand(p, x, carry, DEPTHS[name])},
        "attractor": {"refine": lambda p, _, h, step: module.equilibrium(p, h, example.STEPS, 0.0)},
    }[name]
    runs = []
    for more in (by_hand, {}):
        side = common.JaxSide(module, weights, settings, **more)
        compiled = jax.jit(jax.value_and_grad(side.loss))
        given = [jax.numpy.asarray(part) for part in data]

        def step(compiled: Any = compiled, given: Any = given, side: Any = side) -> None:
            jax.block_until_ready(compiled(side.params, *given))

        runs.append(step)
    return paired(*runs, budget)


def two_state(steps: int, damping: float = 0.5) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a training step by hand and one of `reversible`: two layers of 512 × 512, 64 samples, float32."""
    import torch

    import deqcore

    torch.manual_seed(0)
    first, second = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)
    x = torch.randn(64, 512)
    options = {"steps": steps, "damping": damping}

    def f(z: Any, x: Any) -> Any:
        return torch.tanh(second(torch.relu(first(z))) + x)

    def by_hand() -> None:
        y = z = torch.zeros_like(x)
        for _ in range(steps):
            y = (1 - damping) * y + damping * f(z, x)
            z = (1 - damping) * z + damping * f(y, x)
        z.square().sum().backward()

    def reversible() -> None:
        settings = {"backward__strategy": "reversible", "backward__options": options}
        deqcore.fixed_point(f, torch.zeros_like(x), x, **settings).value.square().sum().backward()

    return by_hand, reversible


def peak(run: Callable[[], Any]) -> float:
    """Return the peak memory of a step in MB, from the events of PyTorch's allocator."""
    from deqcore_torch.study import allocated

    run()
    found = allocated(run)
    assert found is not None, "the profiler saw no allocation"
    return found / 1e6


def reversible(budget: float) -> dict[str, Any]:
    """Compare the strategy with autograd through its iteration: time at 12 steps, memory at three depths."""
    result = paired(*two_state(12), budget)
    for steps in (6, 12, 24):
        by_hand, strategy = two_state(steps)
        result[f"MB, {steps} steps"] = [peak(by_hand), peak(strategy)]
    return result


def main() -> None:
    """Measure, print, and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="parts of these names, such as looped_text, jax or reversible")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of processor time for each ratio")
    parser.add_argument("--json", type=Path, help="file to which the figures are added")
    given = parser.parse_args()
    sys.path.insert(0, str(MODELS))
    parts: dict[str, Callable[[], dict[str, Any]]] = {"reversible": lambda: reversible(given.budget)}
    for name in NAMES:
        for framework, measure, table in (("torch", in_torch, LOOPS), ("jax", in_jax, LOOPS_JAX)):

            def part(name: str = name, framework: str = framework, measure: Any = measure, table: Any = table) -> Any:
                files = [MODELS / f"{name}.py", MODELS / f"{name}_{framework}.py"]
                own, by_hand = (lines(files, names) for names in table[name])
                return measure(name, given.budget) | {"lines": own, "lines by hand": by_hand}

            parts[f"{name} {framework}"] = part
    found = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    for name, measure_part in parts.items():
        if given.only is None or any(each in name for each in given.only):
            found[name] = measure_part() | {"load": os.getloadavg()[0]}
            shown = {key: np.round(value, 3).tolist() for key, value in found[name].items()}
            print(f"{name}: {shown}", flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
