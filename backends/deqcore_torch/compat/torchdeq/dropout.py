"""torchdeq's dropout layers: one mask for a whole solve, on the device and in the dtype of their input."""

from __future__ import annotations

from torch import nn

from deqcore_torch.cells import VariationalDropout as Dropout


class VariationalDropout(Dropout):
    """Dropout of single numbers, with one mask until `reset_dropout`.

    Args:
        dropout: probability that a number becomes zero, from 0 to below 1.

    Raises:
        ConfigError: the probability is out of range.

    Example:
        >>> import torch
        >>> layer, x = VariationalDropout(0.5), torch.ones(2, 8)
        >>> bool((layer(x) == layer(x)).all())
        True
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__(dropout)
        self.dropout = dropout


class _Shared(Dropout):
    """Dropout whose mask is shared along the axes of the tokens, or along that of the channels.

    Args:
        dropout: probability that a channel or a token becomes zero, from 0 to below 1.
        token_first: the input is `(batch, *tokens, channels)`, otherwise `(batch, channels, *tokens)`.

    Raises:
        ConfigError: the probability is out of range.
    """

    rank = 1
    drops_tokens = False

    def __init__(self, dropout: float = 0.5, token_first: bool = True) -> None:
        tokens = range(1, 1 + self.rank) if token_first else range(2, 2 + self.rank)
        channel = 1 + self.rank if token_first else 1
        super().__init__(dropout, (channel,) if self.drops_tokens else tuple(tokens))
        self.dropout = dropout
        self.token_first = token_first


class VariationalDropout1d(_Shared):
    """Dropout of channels of a sequence `(batch, tokens, channels)`."""


class VariationalDropout2d(_Shared):
    """Dropout of channels of images `(batch, height, width, channels)`."""

    rank = 2


class VariationalDropout3d(_Shared):
    """Dropout of channels of videos `(batch, time, height, width, channels)`."""

    rank = 3


class VariationalDropToken1d(_Shared):
    """Dropout of tokens of a sequence `(batch, tokens, channels)`."""

    drops_tokens = True


class VariationalDropToken2d(VariationalDropToken1d):
    """Dropout of pixels of images `(batch, height, width, channels)`."""

    rank = 2


class VariationalDropToken3d(VariationalDropToken1d):
    """Dropout of pixels of videos `(batch, time, height, width, channels)`."""

    rank = 3


def reset_dropout(model: nn.Module) -> None:
    """Forget the masks of a module's dropout layers, before each training step.

    Args:
        model: the module.

    Example:
        >>> import torch
        >>> layer = VariationalDropout(0.5)
        >>> _ = layer(torch.ones(1, 2))
        >>> reset_dropout(layer)
        >>> layer.mask is None
        True
    """
    for module in model.modules():
        if isinstance(module, Dropout):
            module.mask = None
