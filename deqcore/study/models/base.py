"""What a model of the study is: initial weights in NumPy, and four functions written once for every framework.

A model never imports a framework. It computes with `ops.xp` (the array namespace) and with the few operations of
`Ops` that the array API standard lacks; a trainer brings both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.types import Array

DataKind: TypeAlias = Literal["vector", "image", "tokens"]
Weights: TypeAlias = dict[str, NDArray[np.float32]]
Parameters: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Shape:
    """What a model is built for.

    Attributes:
        kind: "vector" `(batch, n)`, "image" `(batch, channels, height, width)` or "tokens" `(batch, length)`.
        sample: shape of one input, without the batch.
        classes: number of classes, or of words.

    Example:
        >>> Shape("image", (1, 8, 8), 10).classes
        10
    """

    kind: DataKind
    sample: tuple[int, ...]
    classes: int


class Ops(Protocol):
    """Operations beyond the array API standard that a trainer's framework brings.

    Example:
        A model uses it like this, with any trainer's `ops`::

            hidden = ops.relu(ops.norm(ops.conv(z, p["kernel"]), groups=4)) + ops.xp.tanh(injected)
    """

    xp: Any

    def relu(self, x: Array) -> Array:
        """Max(x, 0), with derivative 0 at 0."""

    def conv(self, x: Array, kernel: Array, stride: int = 1) -> Array:
        """Return 3×3 convolution, zero padding 1: `(b, c, h, w)` with `(o, c, 3, 3)`."""

    def upsample(self, x: Array) -> Array:
        """Return twice the height and width, each value repeated."""

    def norm(self, x: Array, groups: int) -> Array:
        """Return zero mean and unit variance over each of `groups` groups of channels: `(b, c, …)`."""

    def layer_norm(self, x: Array) -> Array:
        """Return zero mean and unit variance over the last axis."""

    def attention(self, q: Array, k: Array, v: Array) -> Array:
        """Return causal softmax attention, `(b, heads, length, width)`."""

    def embed(self, table: Array, tokens: Array) -> Array:
        """Return the rows of `table` `(words, width)` for integers `(b, length)`."""


class Model(ABC):
    """A classifier: `read(z*)` with `z* = cell(z*, inject(x))`. A user model is a subclass, named `module:Class`.

    Attributes:
        accepts: the kinds of input it can be built for.
        equilibrium: False for an explicit network, which is `cell` applied `depth` times to zero.
        depth: of an explicit network.

    Args:
        shape: of the data that it is built for.
        width: of the state: features, or channels.

    Example:
        >>> class Tiny(Model):
        ...     accepts = ("vector",)
        ...     def initial(self, rng):
        ...         n, m, k = self.shape.sample[0], self.width, self.shape.classes
        ...         return {"u": normal(rng, (n, m), 1.0), "w": contraction(rng, m, 0.5), "v": normal(rng, (m, k), 1.0)}
        ...     def inject(self, ops, p, x):
        ...         return x @ p["u"]
        ...     def start(self, ops, p, injected):
        ...         return 0 * injected
        ...     def cell(self, ops, p, z, injected):
        ...         return ops.xp.tanh(z @ p["w"] + injected)
        ...     def read(self, ops, p, z):
        ...         return z @ p["v"]
        >>> sorted(Tiny(Shape("vector", (4,), 3), width=8).initial(np.random.default_rng(0)))
        ['u', 'v', 'w']
    """

    accepts: ClassVar[tuple[DataKind, ...]]
    equilibrium: ClassVar[bool] = True
    depth: ClassVar[int] = 2

    def __init__(self, shape: Shape, width: int) -> None:
        self.shape = shape
        self.width = width

    @abstractmethod
    def initial(self, rng: np.random.Generator) -> Weights:
        """Return initial weights, float32."""

    @abstractmethod
    def inject(self, ops: Ops, p: Parameters, x: Array) -> Any:
        """Return what the input adds to each step, computed once per solve: an array or a tuple of arrays."""

    @abstractmethod
    def start(self, ops: Ops, p: Parameters, injected: Any) -> Any:
        """Return the initial iterate z0, a tree of arrays with the batch first."""

    @abstractmethod
    def cell(self, ops: Ops, p: Parameters, z: Any, injected: Any) -> Any:
        """f(z): a tree like z."""

    @abstractmethod
    def read(self, ops: Ops, p: Parameters, z: Any) -> Array:
        """Return the logits `(batch, classes)`, or `(batch, length, classes)` for tokens."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> NDArray[np.float32]:
    """Normal weights of standard deviation `scale`."""
    return np.asarray(scale * rng.standard_normal(shape), dtype=np.float32)


def contraction(rng: np.random.Generator, size: int, rate: float) -> NDArray[np.float32]:
    """Return a random matrix `(size, size)` of spectral norm `rate`."""
    made = rng.standard_normal((size, size))
    return np.asarray(made * (rate / np.linalg.norm(made, 2)), dtype=np.float32)
