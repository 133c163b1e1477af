"""What both frameworks share: sizes, weights, and the error of a sequence that is too long.

The model is that of `examples/models/text.py`: one block of attention and a perceptron, whose equilibrium is the state
of all positions. Weights that it has trained (`text.safetensors`) fit, and the same arrays serve both frameworks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LENGTH, WORDS, HEADS, WIDTH, HIDDEN = 48, 80, 4, 64, 206
SETTINGS = {"forward__solver": "auto", "forward__rtol": 1e-4, "forward__max_steps": 80}


def weights(seed: int = 0, length: int = LENGTH, width: int = WIDTH, hidden: int = HIDDEN) -> dict[str, Any]:
    """Draw weights of an untrained model, small enough that the block contracts."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float) -> Any:
        return (gain * rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    return {
        "embed.weight": rng.standard_normal((WORDS, width)).astype(np.float32),
        "place": (0.5 * rng.standard_normal((length, width))).astype(np.float32),
        "read.weight": matrix(WORDS, width, 1.0),
        "read.bias": np.zeros(WORDS, np.float32),
        "deq.cell.mix.weight": matrix(3 * width, width, 1.0),
        "deq.cell.out.weight": matrix(width, width, 0.5),
        "deq.cell.first.weight": matrix(hidden, width, 1.0),
        "deq.cell.first.bias": np.zeros(hidden, np.float32),
        "deq.cell.second.weight": matrix(width, hidden, 0.5),
    }


def check_length(wanted: int, room: int) -> None:
    """Refuse a sequence for which the cache, and the model, have no positions.

    Raises:
        ValueError: it is longer than the cache.
    """
    if wanted > room:
        raise ValueError(
            f"The sequence must have at most {room} tokens, the length of the cache and of the model's positions (got "
            f"{wanted}). Shorten the prompt, ask for fewer new tokens, or train a model with more positions."
        )
