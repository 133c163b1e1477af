"""The example models: PyTorch and JAX give the same losses and gradients from the same weights, and both learn."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("quick_compiles")
MODELS = Path(__file__).parents[2] / "examples" / "models"
TIGHT = {
    "forward__rtol": 3e-7,
    "forward__max_steps": 100,
    "backward__strategy": "exact-ift",
    "backward__options": {"rtol": 1e-6, "max_steps": 100},
}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(MODELS)
    yield
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(MODELS))]:
        del sys.modules[name]


def deblurring(example: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    found = example.data(rng)
    return found["train_blurred"][:8], found["train"][:8]


def sudoku(example: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    grids = example.solutions()
    return example.puzzles(rng, grids, grids, 8)  # type: ignore[no-any-return]


def forces(example: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    x = example.sample(rng, 3, 1)
    return x, example.forces(x.astype(np.float64)).astype(np.float32)


def graph(example: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    found = example.data(0)
    return tuple(found[name] for name in ("adjacency", "features", "groups", "train"))


def images(example: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    return tuple(part[:8] for part in example.data()["train"])


def text(example: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    _, coded = example.data()
    return (example.windows(coded["train"], 4),)


BATCHES = {
    "deblurring": deblurring,
    "sudoku": sudoku,
    "forces": forces,
    "graph": graph,
    "images": images,
    "text": text,
}
SHAPES = {"images": {"width": 6}, "text": {"width": 16, "hidden": 16, "layers": 0}}  # small ones are enough


@pytest.mark.parametrize("name", BATCHES)
def test_both_frameworks_give_the_same_loss_and_gradients(name: str) -> None:
    common, example = importlib.import_module("common"), importlib.import_module(name)
    rng = np.random.default_rng(1)
    batch = BATCHES[name](example, rng)
    shape = SHAPES.get(name, {})
    weights = example.weights(rng, **shape)
    settings = {**example.SETTINGS, **TIGHT}
    loss, gradients = common.side("torch", name, weights, settings, **shape).gradients(*batch)
    loss_jax, gradients_jax = common.side("jax", name, weights, settings, **shape).gradients(*batch)
    assert loss_jax == pytest.approx(loss, rel=1e-5)
    assert set(gradients) == set(gradients_jax) == set(weights)
    for key, expected in gradients.items():
        assert np.linalg.norm(expected) > 0, key
        assert np.linalg.norm(gradients_jax[key] - expected) <= 1e-4 * np.linalg.norm(expected), key


SHORT = {"RATES": (0.01,), "DECAYS": (0.0,), "MEMORIES": (0.95,), "GRAPHS": 1, "SEEDS": 1, "WINDOWS": 64, "TEST": 40}
SMALL: dict[str, dict[str, Any]] = {  # convolutions are slow in programs that compile quickly
    "deblurring": {"CHANNELS": 8},
    "images": {"WIDTH": 6, "NARROW": 6, "BLOCKS": 1},
    "text": {
        "LENGTH": 24,
        "EQUILIBRIUM": {"width": 32, "hidden": 64, "layers": 0},
        "EXPLICIT": {"width": 16, "hidden": 32, "layers": 1},
    },
}
HOLDS: dict[str, tuple[int, Any]] = {
    "deblurring": (12, lambda r: r["learned"] > r["input"] + 3),
    "sudoku": (6, lambda r: r["halted"] > 0.9),
    "forces": (25, lambda r: r["model"] < r["linear"] < r["typical"]),
    "graph": (30, lambda r: r["implicit"] > 0.4),  # four groups: guessing gives a quarter
    "images": (3, lambda r: 0 < r["implicit"] < 1),  # no more than a run: convolutions are slow in JAX on a CPU
    "text": (20, lambda r: r["equilibrium"] < r["characters"] / 2),
}


@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_short_training_learns_and_stores_its_weights(
    name: str, backend: str, tmp_path: Path, monkeypatch: Any
) -> None:
    example, common = importlib.import_module(name), importlib.import_module("common")
    for setting, value in (SHORT | SMALL.get(name, {})).items():
        if hasattr(example, setting):
            monkeypatch.setattr(example, setting, value)
    steps, holds = HOLDS[name]
    assert holds(example.main(["--steps", str(steps), "--backend", backend, "--device", "cpu", "--out", str(tmp_path)]))
    assert name in {"graph", "text"} or (tmp_path / f"{name}.png").stat().st_size > 1000
    options = common.arguments("Test.", 1, ["--weights", str(tmp_path / f"{name}.safetensors")])
    shape = {"text": SMALL["text"]["EQUILIBRIUM"], "images": {"width": SMALL["images"]["WIDTH"]}}.get(name, {})
    begin = example.weights(np.random.default_rng(0), **shape)
    assert any(np.any(value != begin[key]) for key, value in common.start(options, begin).items())
    with pytest.raises(SystemExit, match="but this example needs"):
        common.start(options, {"other.weight": np.zeros(2)})


@pytest.mark.parametrize("name", BATCHES)
def test_all_of_a_torch_model_is_on_the_device_that_is_asked_for(name: str) -> None:
    """On a device without numbers: an array left on the CPU would be refused there as it is on a GPU."""
    common, example = importlib.import_module("common"), importlib.import_module(name)
    rng, shape = np.random.default_rng(1), SHAPES.get(name, {})
    side = common.side("torch", name, example.weights(rng, **shape), example.SETTINGS, "meta", **shape)

    def one_step(*inputs: Any, z0: Any = None) -> Any:  # a solve looks at numbers
        deq = side.model.deq
        z = deq.cell(deq.initial_state(*inputs) if z0 is None else z0, *inputs)
        return SimpleNamespace(value=z, steps=None, converged=None)

    side.model.deq.solve = one_step
    side.model.deq.forward = lambda *inputs, z0=None: one_step(*inputs, z0=z0).value
    loss = side.model.loss(*side.tensors(BATCHES[name](example, rng)))
    loss.backward()
    assert {loss.device.type, *(p.grad.device.type for p in side.model.parameters())} == {"meta"}


def test_a_jax_model_is_on_the_device_that_is_asked_for() -> None:
    code = (
        "import jax, numpy as np, common, graph\n"
        "side = common.side('jax', 'graph', graph.weights(np.random.default_rng(0)), graph.SETTINGS, 'cpu:1')\n"
        "batch = [graph.data(0)[name] for name in ('adjacency', 'features', 'groups', 'train')]\n"
        "side.fit([batch], 1, 1e-2)\n"
        "assert {d.id for p in side.params.values() for d in p.devices()} == {1}\n"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code], cwd=MODELS, env=env, check=True, timeout=300)


def test_the_peak_memory_is_what_a_step_holds_at_once() -> None:
    import torch

    common = importlib.import_module("common")

    class Model(torch.nn.Module):
        def __init__(self, settings: Any) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def loss(self, x: Any) -> Any:
            return ((self.w * x).exp() * 2.0).sum()  # exp keeps its result; the product and its input are transient

    side = common.TorchSide(SimpleNamespace(Model=Model), {"w": np.ones(1, np.float32)}, {})
    size = 4 * 1_000_000
    found = side.peak(np.ones(1_000_000, np.float32))
    assert 2 * size <= found <= 4.1 * size
    assert found == pytest.approx(side.peak(np.ones(2_000_000, np.float32)) / 2, rel=0.01)


def test_the_equilibrium_transformer_needs_less_memory_than_the_explicit_one() -> None:
    common, example = importlib.import_module("common"), importlib.import_module("text")
    _, coded = example.data()
    rows = example.windows(coded["train"], 64)

    def model(shape: dict[str, int]) -> tuple[int, int]:
        weights = example.weights(np.random.default_rng(0), **shape)
        side = common.side("torch", "text", weights, example.SETTINGS, **shape)
        return sum(value.size for value in weights.values()), side.peak(rows)

    (size, memory), (explicit_size, explicit_memory) = model(example.EQUILIBRIUM), model(example.EXPLICIT)
    assert size == pytest.approx(explicit_size, rel=0.01)
    assert memory < explicit_memory


def test_the_generated_forces_are_the_gradient_of_the_energy() -> None:
    example = importlib.import_module("forces")
    x = example.sample(np.random.default_rng(0), 1, 1).astype(np.float64)
    slope = scipy.optimize.approx_fprime(x.ravel(), lambda v: example.energy(v.reshape(x.shape))[0], 1e-6)
    np.testing.assert_allclose(example.forces(x).ravel(), -slope, rtol=1e-3, atol=1e-3)
    linear = example.pair_design(x) @ np.ones(example.BASIS)

    def pairs(v: Any) -> Any:
        _, r = example.vectors(v.reshape(x.shape))
        return np.exp(-(((r[..., None] - example.CENTRES) / example.SPREAD) ** 2) / 2).sum()

    np.testing.assert_allclose(linear, -scipy.optimize.approx_fprime(x.ravel(), pairs, 1e-6), rtol=1e-3, atol=1e-3)


def test_the_generated_puzzles_have_one_solution() -> None:
    example = importlib.import_module("sudoku")
    grids = example.solutions()
    assert len({tuple(grid) for grid in grids}) == 288  # the known number of 4×4 grids
    clues, answers = example.puzzles(np.random.default_rng(0), grids, grids, 20)
    for given, answer in zip(clues[..., 0], answers, strict=True):
        known = given.any(-1)
        fits = [grid for grid in grids if np.array_equal(grid[known], given.argmax(-1)[known])]
        np.testing.assert_array_equal(fits, [answer])
        assert 4 <= known.sum() < 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1 (got 0)"),
        (["--weights", "none.safetensors"], "none.safetensors: the file does not exist"),
        (["--device", "nowhere"], "--device nowhere: torch cannot use the device"),
        (["--backend", "jax", "--device", "nowhere"], "--device nowhere: jax cannot use the device"),
        (["--backend", "numpy"], "invalid choice: 'numpy'"),
    ],
)
def test_what_cannot_be_is_refused_on_the_command_line(given: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("graph").main(given)
    assert message in capsys.readouterr().err
