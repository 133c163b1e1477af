"""Generation with a cache: one token solved alone is what a solve of the whole sequence gives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quick_compiles")
FOLDER = Path(__file__).parents[2] / "examples" / "generation"
SIZES = {"length": 10, "width": 16, "hidden": 16}
TIGHT = {"forward__rtol": 1e-6, "forward__options": {"escalate": False}}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(FOLDER))]:
        del sys.modules[name]


def made(framework: str) -> tuple[Any, Any]:
    weights = importlib.import_module("model").weights(**SIZES)
    tokens = np.random.default_rng(0).integers(0, 80, (3, 10))
    return importlib.import_module(f"model_{framework}").Model(weights, **TIGHT), tokens


def test_a_token_solved_alone_is_that_of_the_whole_sequence() -> None:
    model, tokens = made("torch")
    tokens = torch.from_numpy(tokens)
    whole, _ = model.extend(tokens, model.cache(3))
    cache = model.cache(3)
    parts = [model.extend(tokens[:, :4], cache)[0], model.extend(tokens[:, 4:6], cache)[0]]
    steps = []
    for i in range(6, 10):
        logits, solution = model.extend(tokens[:, i : i + 1], cache)
        parts.append(logits)
        steps.append(solution.steps)
        assert bool(solution.converged.all())
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert len(torch.stack(steps).unique()) > 1  # each token of each sequence stops at its own step
    generated, _ = model.generate(tokens[:, :4], 6)
    torch.testing.assert_close(generated, model.recompute(tokens[:, :4], 6))


def test_both_frameworks_generate_the_same() -> None:
    pytest.importorskip("jax")
    (model, tokens), (other, _) = made("torch"), made("jax")
    import jax.numpy as jnp

    cache = model.cache(3)
    expected = [model.extend(torch.from_numpy(tokens[:, :4]), cache)[0][:, -1]]
    logits, _, kept = other.begin(jnp.asarray(tokens[:, :4]))
    found = [logits]
    for i in range(4, 7):
        expected.append(model.extend(torch.from_numpy(tokens[:, i : i + 1]), cache)[0][:, -1])
        logits, _, kept = other.extend(jnp.asarray(tokens[:, i]), kept)
        found.append(logits)
    np.testing.assert_allclose(np.stack(found), torch.stack(expected).numpy(), rtol=1e-3, atol=1e-3)
    generated, steps = other.generate(jnp.asarray(tokens[:, :4]), 6)
    np.testing.assert_array_equal(generated, model.generate(torch.from_numpy(tokens[:, :4]), 6)[0].numpy())
    np.testing.assert_array_equal(generated, other.recompute(jnp.asarray(tokens[:, :4]), 6))
    assert len(steps) == 6
    with pytest.raises(ValueError, match=r"at most 10 tokens.*\(got 11\)"):
        other.generate(jnp.asarray(tokens[:, :4]), 7)


def test_a_sequence_longer_than_the_cache_is_refused() -> None:
    model, tokens = made("torch")
    cache = model.cache(3)
    model.extend(torch.from_numpy(tokens), cache)
    for wrong in (
        lambda: model.extend(torch.from_numpy(tokens[:, :1]), cache),
        lambda: model.generate(torch.from_numpy(tokens), 1),
        lambda: model.extend(torch.zeros(1, 11, dtype=torch.long), model.cache(1)),
    ):
        with pytest.raises(ValueError, match=r"at most 10 tokens.*\(got 11\)"):
            wrong()


def test_transformers_generate_from_it() -> None:
    pytest.importorskip("transformers")
    face, (model, tokens) = importlib.import_module("hugging_face"), made("torch")
    language = face.EquilibriumForCausalLM(face.EquilibriumConfig(**SIZES), **TIGHT).eval()
    language.load({name: value.numpy() for name, value in model.p.items()})
    prompt = torch.from_numpy(tokens[:, :4])
    expected, _ = model.generate(prompt, 6)
    solved = []
    extend = face.model_torch.Model.extend

    def counted(self: Any, tokens: Any, cache: Any) -> Any:
        solved.append(tokens.shape[1])
        return extend(self, tokens, cache)

    face.model_torch.Model.extend = counted
    found = language.generate(prompt, max_new_tokens=6, do_sample=False)
    torch.testing.assert_close(found, expected)
    assert solved == [4, 1, 1, 1, 1, 1]  # the prompt, then one token at a time
    beams = language.generate(prompt[:1], max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (1, 8)
    with pytest.raises(ValueError, match="at most 10 tokens"):
        language.generate(prompt, max_new_tokens=8, do_sample=False)  # the last token is not solved for
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        language(prompt, attention_mask=torch.tensor([[0, 1, 1, 1]] * 3))


def test_the_measurement_runs(capsys: Any) -> None:
    found = importlib.import_module("run").main(["--batch", "1", "--length", "12"])
    assert found["same"] == 1.0
    assert "tokens/s with the cache" in capsys.readouterr().out
