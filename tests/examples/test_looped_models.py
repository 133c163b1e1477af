"""The looped models against the loops as people write them by hand, and against the other framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("optax")
pytestmark = pytest.mark.usefixtures("quick_compiles")
MODELS = Path(__file__).parents[2] / "examples" / "models"
STEP = 6  # a training step that draws a depth above the recorded steps
SMALL = {"width": 8, "hidden": 8}
CLOSE = {"forward__rtol": 1e-12, "forward__max_steps": 200}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(MODELS)
    yield
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(MODELS))]:
        del sys.modules[name]


def batch(name: str, example: Any) -> tuple[Any, ...]:
    if name == "looped_sudoku":
        clues, answers = example.puzzles(np.random.default_rng(0), 2)
        start = example.starts(np.random.default_rng(1), 2).astype(np.float64)
        return clues.astype(np.float64), answers, start, np.int32(STEP)
    text = importlib.import_module("text")
    windows = text.windows(text.data()[1]["train"], 2)
    return windows, np.int32(STEP)


def in_torch(common: Any, module: Any, cls: str, weights: Any, settings: Any, given: Any) -> Any:
    side = common.TorchSide(SimpleNamespace(Model=getattr(module, cls)), weights, settings, **given)
    side.model.double()
    return side


@pytest.mark.parametrize("name", ["looped_text", "looped_sudoku", "attractor"])
def test_both_loops_and_both_frameworks_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    common, example = importlib.import_module("common"), importlib.import_module(name)
    torch_side, jax_side = (importlib.import_module(f"{name}_{framework}") for framework in ("torch", "jax"))
    given: dict[str, Any] = {} if name == "looped_sudoku" else SMALL
    weights = {
        key: value.astype(np.float64) for key, value in example.weights(np.random.default_rng(1), **given).items()
    }
    data = batch(name, example)
    settings = example.SETTINGS
    by_hand: dict[str, Any] = {}
    if name == "attractor":
        # Both must be at the equilibrium: by hand the value is one step further.
        weights |= {key: 0.3 * value for key, value in weights.items() if key.startswith("deq.cell.")}
        settings = settings | CLOSE
        monkeypatch.setattr(torch_side.ByHand.refine, "__defaults__", (200, 1e-13))
        by_hand["refine"] = lambda p, _, h, step: jax_side.equilibrium(p, h, 200, 1e-13)
    if name == "looped_sudoku":
        options, steps = settings["backward__options"], range(STEP * example.SEGMENTS, (STEP + 1) * example.SEGMENTS)
        cycles = {step: deqcore_depth(options, step) for step in steps}
        assert len(set(cycles.values())) > 1
        monkeypatch.setattr(torch_side.ByHand, "depth", lambda self, step: cycles[step])
        drawn_cycles = jax.numpy.asarray(list(cycles.values()))
        by_hand["segment"] = lambda p, _, x, carry, step: jax_side.segment_by_hand(
            p, x, carry, drawn_cycles[step - steps[0]]
        )
    if name == "looped_text":
        options = settings["backward__options"]
        drawn = deqcore_depth(options, STEP)
        assert drawn > options["recorded"]
        monkeypatch.setattr(torch_side.ByHand, "depth", lambda self, step: drawn)
        by_hand["loop"] = lambda p, settings, e, _: jax_side.loop_by_hand(p, settings, e, np.int32(drawn))

    loss, expected = in_torch(common, torch_side, "ByHand", weights, settings, given).gradients(*data)
    assert all(np.linalg.norm(value) > 0 for key, value in expected.items()), expected
    found = [in_torch(common, torch_side, "Model", weights, settings, given).gradients(*data)]
    with jax.enable_x64(True):
        for more in ({}, by_hand):
            found.append(common.JaxSide(jax_side, weights, settings, **more).gradients(*data))
    for other, gradients in found:
        assert other == pytest.approx(loss, rel=1e-7)
        for key, value in expected.items():
            assert np.linalg.norm(gradients[key] - value) <= 1e-6 * np.linalg.norm(value), key


def deqcore_depth(options: dict[str, Any], step: int) -> int:
    """Return the depth that the strategy draws."""
    import deqcore

    solution = deqcore.fixed_point(
        np.cos, np.zeros((1, 1)), backward__strategy="looped", backward__options=options, backward__step=step
    )
    return int(solution.steps[0])


def test_evaluation_has_the_results_of_the_loops_by_hand() -> None:
    common, example = importlib.import_module("common"), importlib.import_module("looped_sudoku")
    module = importlib.import_module("looped_sudoku_torch")
    rng = np.random.default_rng(0)
    clues, _ = example.puzzles(rng, 3, (26, 34))
    weights = example.weights(rng)
    weights["halt.bias"] = np.full(1, 0.05, np.float32)  # one halts early, another late or never
    starts = [example.starts(rng, 3) for _ in range(3)]
    side, other = (
        common.TorchSide(SimpleNamespace(Model=cls), weights, example.at_depth(4))
        for cls in (module.Model, module.ByHand)
    )
    x = side.model.inject(*side.tensors([clues])).detach()
    pairs = [(z, z) for z in side.tensors(starts)]
    with side.torch.no_grad():
        for best, right in zip(side.model.best(x, pairs), other.model.best(x, pairs, 4), strict=True):
            side.torch.testing.assert_close(best, right)
        stops = [side.model.stop(side.model.halting(x, cycles)[0][1]) for cycles in (1, 2, 3)]
        side.model.halt.bias -= stops[1].median()
        other.model.load_state_dict(side.model.state_dict())
        (state, steps), (expected, taken) = side.model.halting(x, 6), other.model.halting(x, 6)
    for one, right in zip(state, expected, strict=True):
        side.torch.testing.assert_close(one, right)
    assert steps.tolist() == taken.tolist()
    assert len(set(steps.tolist())) > 1
    functions = importlib.import_module("looped_sudoku_jax")
    guess, found = functions.until_solved({**side.weights()}, clues, 6)
    expected_guess, _ = side.model.until_solved(*side.tensors([clues]), 6)
    assert found.tolist() == steps.tolist()
    np.testing.assert_array_equal(guess, expected_guess.numpy())


@pytest.mark.parametrize("name", ["looped_text", "looped_sudoku", "attractor"])
def test_a_short_training_is_scored_at_every_depth(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, text = importlib.import_module(name), importlib.import_module("text")
    short = {"TRAIN": 8, "TEST": 4, "BATCH": 4, "DEPTHS": (1, 3), "BREADTHS": (1, 2)}
    for setting, value in short.items():
        if hasattr(example, setting):
            monkeypatch.setattr(example, setting, value)
    monkeypatch.setattr(text, "WINDOWS", 64)
    found = example.main(["--steps", "2", "--out", str(tmp_path)])
    assert len(found) == (5 if name == "looped_sudoku" else 4)
    assert all(np.isfinite(value) for value in found.values())
    assert (tmp_path / f"{name}.safetensors").exists()


def test_every_puzzle_has_the_one_solution() -> None:
    example = importlib.import_module("looped_sudoku")
    clues, answers = example.puzzles(np.random.default_rng(3), 5)
    for given, answer in zip(clues[..., 0].reshape(5, 81, 9), answers, strict=True):
        known = given.any(1)
        assert example.CLUES[0] <= known.sum()
        np.testing.assert_array_equal(given.argmax(1)[known], answer[known])
        for group in range(27):
            assert sorted(answer[(group == example.GROUPS).any(0)]) == list(range(9))
        assert solutions(known, answer) == 1


def solutions(known: Any, answer: Any) -> int:
    """Count solutions by integer programming: the given one, and one that differs from it, if there is any."""
    from scipy.optimize import LinearConstraint, milp

    example = importlib.import_module("looped_sudoku")
    cell, digit = np.divmod(np.arange(729), 9)
    rows = [cell == k for k in range(81)]
    rows += [(group == example.GROUPS).any(0)[cell] & (digit == d) for group in range(27) for d in range(9)]
    lower = np.where(known[cell] & (digit == answer[cell]), 1.0, 0.0)
    result = milp(
        np.where(digit == answer[cell], 1.0, 0.0),  # as few digits of the known solution as possible
        constraints=LinearConstraint(np.array(rows, float), 1, 1),
        bounds=(lower, np.ones(729)),
        integrality=np.ones(729),
    )
    return 1 if round(result.fun) == 81 else 2
