"""The causal transformer in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from deqcore_torch.nn import DEQ
from text import HEADS, LENGTH, WORDS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, relu, scaled_dot_product_attention


class Block(nn.Module):
    """Attention and a perceptron, on states `(batch, length, width)`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width, bias=False)

    def attend(self, z: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.mix(z).chunk(3, -1))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def think(self, z: Tensor) -> Tensor:
        return self.second(relu(self.first(z)))


class Cell(Block):
    """Add the text at each step and normalise the state, so that states stay bounded."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        heard = norm(x + z / 2 + self.attend(z))
        return norm(heard + self.think(heard))


class Layer(Block):
    """An explicit layer: residual, normalised first."""

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attend(norm(z))
        return z + self.think(norm(z))


def norm(z: Tensor) -> Tensor:
    return layer_norm(z, z.shape[-1:])


class Model(nn.Module):
    """The equilibrium of one block, or `layers` blocks one after the other."""

    def __init__(self, settings: dict[str, Any], width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(torch.zeros(LENGTH, width))
        if layers:
            self.cells = nn.Sequential(*(Layer(width, hidden) for _ in range(layers)))
        else:  # keeps the states of the recorded steps, and activations of one step at a time
            self.deq = DEQ(Cell(width, hidden), checkpoint=True, **settings)
        self.layers = layers
        self.read = nn.Linear(width, WORDS)

    def predict(self, windows: Tensor) -> Tensor:
        """Return the negative log-probability of each next character, `(batch, length)`."""
        x = self.embed(windows[:, :-1]) + self.place
        z = norm(self.cells(x)) if self.layers else self.deq(x)
        return cross_entropy(self.read(z).transpose(1, 2), windows[:, 1:], reduction="none")

    def loss(self, windows: Tensor) -> Tensor:
        return self.predict(windows).mean()
