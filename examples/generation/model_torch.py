"""The equilibrium transformer in PyTorch: a solve of all positions, and of one new token with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from model import HEADS, SETTINGS, check_length
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu, scaled_dot_product_attention

import deqcore


@dataclass
class Cache:
    """Keys and values at the equilibrium of the tokens so far.

    Attributes:
        keys: `(batch, heads, length, width / heads)`, of which the first `used` positions hold a token.
        values: like the keys.
        used: number of tokens.
    """

    keys: Tensor
    values: Tensor
    used: int = 0


class Model:
    """Weights under the names of `model.weights`, and the settings of the solves."""

    def __init__(self, weights: dict[str, Any], **settings: Any) -> None:
        self.p = {name: torch.as_tensor(value) for name, value in weights.items()}
        self.settings = SETTINGS | settings
        self.length, self.width = self.p["place"].shape

    def cache(self, batch: int) -> Cache:
        """Return an empty cache for as many tokens as the model has positions."""
        shape = (batch, HEADS, self.length, self.width // HEADS)
        return Cache(self.p["place"].new_zeros(shape), self.p["place"].new_zeros(shape))

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values `(batch, heads, tokens, width / heads)` of the states of tokens."""
        mixed = linear(z, self.p["deq.cell.mix.weight"])
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in mixed.chunk(3, -1))
        return query, key, value

    def block(self, z: Tensor, x: Tensor, attended: Tensor) -> Tensor:
        """Return the next states from the attention's `(batch, heads, tokens, width / heads)`."""
        p = self.p
        heard = norm(x + z / 2 + linear(attended.transpose(1, 2).flatten(2), p["deq.cell.out.weight"]))
        thought = relu(linear(heard, p["deq.cell.first.weight"], p["deq.cell.first.bias"]))
        return norm(heard + linear(thought, p["deq.cell.second.weight"]))

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        """Update the states of all positions."""
        return self.block(z, x, scaled_dot_product_attention(*self.split(z), is_causal=True))

    def cell_of_one(self, z: Tensor, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Update the state `(batch, 1, width)` of one new token, which sees the tokens in the cache and itself."""
        query, key, value = self.split(z)
        attended = scaled_dot_product_attention(query, torch.cat([keys, key], 2), torch.cat([values, value], 2))
        return self.block(z, x, attended)

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, deqcore.Solution]:
        """Solve for `tokens` `(batch, count)` that follow those in the cache, and add them to it.

        A prompt, for an empty cache, is solved as a whole. One token that follows is solved alone: the states before it
        do not depend on it. Each sequence of the batch stops at its own step.

        Returns:
            The logits `(batch, count, words)`, and the solution with steps and status of each sequence.

        Raises:
            ValueError: there are more tokens than positions.
        """
        start, end = cache.used, cache.used + tokens.shape[1]
        check_length(end, self.length)
        x = self.p["embed.weight"][tokens] + self.p["place"][start:end]
        if start and tokens.shape[1] > 1:  # several tokens after a prompt: one after the other
            parts = [self.extend(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])]
            return torch.cat([logits for logits, _ in parts], 1), parts[-1][1]
        past = (cache.keys[:, :, :start], cache.values[:, :, :start]) if start else ()
        cell = self.cell_of_one if start else self.cell
        solution = deqcore.fixed_point(cell, torch.zeros_like(x), x, *past, **self.settings)
        _, cache.keys[:, :, start:end], cache.values[:, :, start:end] = self.split(solution.value)
        cache.used = end
        return linear(solution.value, self.p["read.weight"], self.p["read.bias"]), solution

    def generate(self, tokens: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
        """Return `tokens` with the `count` most probable next ones, and the steps that each new token took.

        Raises:
            ValueError: there are more tokens than positions.
        """
        check_length(tokens.shape[1] + count, self.length)
        cache, steps = self.cache(len(tokens)), []
        new = tokens
        for _ in range(count):
            logits, solution = self.extend(new, cache)
            steps.append(solution.steps)
            new = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], 1)
        return tokens, steps

    def recompute(self, tokens: Tensor, count: int) -> Tensor:
        """Return what `generate` does by a solve of all positions for each new token."""
        for _ in range(count):
            logits, _ = self.extend(tokens, self.cache(len(tokens)))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        return tokens


def norm(z: Tensor) -> Tensor:
    """Normalise each state."""
    return layer_norm(z, z.shape[-1:])
