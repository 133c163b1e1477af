"""Tokens per second of processor time with a cache of equilibria, and with a solve of all positions for each new token.

Both generate the most probable tokens from random weights, or from trained ones.

    python examples/generation/run.py                   # PyTorch
    python examples/generation/run.py --backend jax
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np
from model import LENGTH, WORDS, weights

import deqcore


def rate(make: Any, count: int) -> tuple[float, Any]:
    """Return tokens per second of processor time, the best of three runs after one that compiles, and the tokens."""
    make()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        tokens = np.asarray(make())
        seconds.append(time.process_time() - start)
    return len(tokens) * count / min(seconds), tokens


def main(given: list[str] | None = None) -> dict[str, float]:
    """Measure both ways, and check that they generate the same tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=192, help="positions of the model, and of the cache")
    parser.add_argument("--weights", help=f"safetensors of examples/models/text.py, with {LENGTH} positions")
    options = parser.parse_args(given)
    made = weights(length=options.length)
    if options.weights:
        from safetensors.numpy import load_file

        made = load_file(options.weights)
    model = importlib.import_module(f"model_{options.backend}").Model(made)
    backend = deqcore.get_backend(backend=options.backend)
    prompt = np.random.default_rng(0).integers(0, WORDS, (options.batch, model.length // 8))
    tokens, count = backend.asarray(prompt), model.length - prompt.shape[1]
    cached, ours = rate(lambda: model.generate(tokens, count)[0], count)
    recomputed, expected = rate(lambda: model.recompute(tokens, count), count)
    steps = np.stack([backend.to_numpy(taken) for taken in model.generate(tokens, count)[1]])[1:]
    same = float((ours == expected).mean())
    print(f"{options.backend}: {cached:.0f} tokens/s with the cache, {recomputed:.0f} by recomputing", end="; ")
    print(f"{100 * same:.1f} % of the tokens equal; steps of a token {steps.min()} to {steps.max()}")
    return {"cached": cached, "recomputed": recomputed, "same": same}


if __name__ == "__main__":
    main()
