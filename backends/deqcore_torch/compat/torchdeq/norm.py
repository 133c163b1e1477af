"""torchdeq's normalization of weights, computed once per training step by `reset_norm`.

Parameters have torchdeq's names (`weight_g` and `weight_v`, or `weight_orig` with the buffers `weight_u` and
`weight_v`), so that its checkpoints load.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, TypeAlias

import torch
from torch import Tensor, nn

from deqcore.errors import ConfigError, listing

Targets: TypeAlias = dict[type[nn.Module], tuple[Any, Any]]
LAYERS: Final[Targets] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), ("weight", 0)),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("weight", 1)),
}
OPTIONS: Final = {
    "norm_target_norm": "target_norm",
    "norm_clip": "clip",
    "norm_clip_value": "clip_value",
    "sn_n_power_iters": "n_power_iterations",
}


@dataclass(frozen=True)
class WeightNorm:
    """The weight w = g v / ‖v‖, with the norm of each output channel.

    Attributes:
        names: names of the weights.
        dims: their axes of output channels.
        learn_scale: g is a parameter, otherwise it is `target_norm`.
        target_norm: the norm, or with spectral normalization the first value of g.
        clip: bound g / ‖v‖ by `clip_value`.
        clip_value: the bound.
        n_power_iterations: of spectral normalization, in each reset.
    """

    _target_modules: ClassVar[Targets] = dict(LAYERS)

    names: tuple[str, ...] = ("weight",)
    dims: tuple[int, ...] = (0,)
    learn_scale: bool = True
    target_norm: float = 1.0
    clip: bool = False
    clip_value: float = 1.0
    n_power_iterations: int = field(default=1)

    @classmethod
    def apply(cls, module: nn.Module, deq_args: object = None, **options: Any) -> WeightNorm:
        """Replace the weights of a module by what they are computed from."""
        names, dims = cls._target_modules[type(module)]
        made = cls(_several(options.pop("names", names)), _several(options.pop("dims", dims)))
        made = replace(made, **{name: value for name, value in options.items() if name in cls.__dataclass_fields__})
        made = replace(made, **_settings(deq_args))
        for name, dim in zip(made.names, made.dims, strict=True):
            made.begin(module, name, dim)
        made(module)
        return made

    def __call__(self, module: nn.Module) -> None:
        """Compute the weights from the parameters, with their gradient."""
        for name, dim in zip(self.names, self.dims, strict=True):
            setattr(module, name, self.compute(module, name, dim))

    def begin(self, module: nn.Module, name: str, dim: int) -> None:
        """Register the parameters from which the weight is computed."""
        weight = module._parameters.pop(name)
        assert weight is not None  # a module of this class has it
        if self.learn_scale:
            module.register_parameter(f"{name}_g", nn.Parameter(_channel_norms(weight.detach(), dim)))
        module.register_parameter(f"{name}_v", nn.Parameter(weight.detach().clone()))

    def compute(self, module: nn.Module, name: str, dim: int) -> Tensor:
        """Return the weight."""
        v = module.get_parameter(f"{name}_v")
        return self._scaled(module, name, v, _channel_norms(v, dim))

    def _scaled(self, module: nn.Module, name: str, weight: Tensor, norm: Tensor) -> Tensor:
        g = module.get_parameter(f"{name}_g") if self.learn_scale else self.target_norm
        factor = g / norm
        if self.clip:
            factor = torch.minimum(torch.full_like(factor, self.clip_value), factor)
        return weight * factor

    def remove(self, module: nn.Module) -> None:
        """Make the weights parameters again, with their present values."""
        for name, dim in zip(self.names, self.dims, strict=True):
            weight = self.compute(module, name, dim).detach()
            for suffix in ("", "_g", "_v", "_u", "_orig"):
                if hasattr(module, name + suffix):
                    delattr(module, name + suffix)
            module.register_parameter(name, nn.Parameter(weight))


@dataclass(frozen=True)
class SpectralNorm(WeightNorm):
    """The weight w = g W / σ(W), with the largest singular value σ by power iteration in each reset."""

    _target_modules: ClassVar[Targets] = dict(LAYERS)

    def begin(self, module: nn.Module, name: str, dim: int) -> None:
        """Register the parameters from which the weight is computed, and the singular vectors."""
        weight = module._parameters.pop(name)
        assert weight is not None  # a module of this class has it
        matrix = _matrix(weight.detach(), dim)
        module.register_parameter(f"{name}_orig", weight)
        if self.learn_scale:
            shape = [-1 if axis == dim else 1 for axis in range(weight.ndim)]
            module.register_parameter(f"{name}_g", nn.Parameter(weight.new_full((len(matrix),), self.target_norm)))
            module.get_parameter(f"{name}_g").data = module.get_parameter(f"{name}_g").data.reshape(shape)
        for suffix, size in (("_u", matrix.shape[0]), ("_v", matrix.shape[1])):
            start = nn.functional.normalize(weight.detach().new_empty(size).normal_(), dim=0)
            module.register_buffer(name + suffix, start)

    def compute(self, module: nn.Module, name: str, dim: int) -> Tensor:
        """Return the weight, after the power iterations if the module is in training mode."""
        weight = module.get_parameter(f"{name}_orig")
        matrix = _matrix(weight, dim)
        u, v = module.get_buffer(f"{name}_u"), module.get_buffer(f"{name}_v")
        if module.training:
            with torch.no_grad():
                for _ in range(self.n_power_iterations):
                    v.copy_(nn.functional.normalize(matrix.T @ u, dim=0))
                    u.copy_(nn.functional.normalize(matrix @ v, dim=0))
        return self._scaled(module, name, weight, u.clone() @ (matrix @ v.clone()))


_norms: dict[str, Any] = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | Sequence[str] | None = None,
    filter_out: str | Sequence[str] | None = None,
    args: object = None,
    **norm_kwargs: Any,
) -> None:
    """Normalize the weights of a module's linear layers and convolutions.

    Args:
        model: the module, changed in place.
        norm_type: "weight_norm", "spectral_norm", "none", or one that `register_norm` has added.
        prefix_filter_out: leave out submodules whose name begins like this.
        filter_out: leave out submodules whose name contains this.
        args: a namespace or dictionary with `norm_type`, `norm_no_scale`, `norm_clip`, `norm_clip_value`,
            `norm_target_norm`, `sn_n_power_iters`; above the others.
        **norm_kwargs: options of the normalization: `learn_scale`, `target_norm`, `clip`, `clip_value`.

    Raises:
        ConfigError: the type is not registered.

    Example:
        >>> import torch
        >>> cell = torch.nn.Linear(3, 3)
        >>> apply_norm(cell, "spectral_norm", learn_scale=False, target_norm=0.9)
        >>> for _ in range(50):
        ...     reset_norm(cell)
        >>> round(float(torch.linalg.matrix_norm(cell.weight.detach(), 2)), 3)
        0.9
    """
    given = {**norm_kwargs, **_values(args)}
    norm_type = str(given.pop("norm_type", norm_type))
    if norm_type == "none":
        return
    if norm_type not in _norms:
        expected = f"none, {listing(_norms)}, or added by register_norm"
        raise ConfigError.bad_value("apply_norm", "norm_type", norm_type, expected)
    norm = _norms[norm_type]
    prefixes, parts = _several(prefix_filter_out or ()), _several(filter_out or ())
    for name, module in model.named_modules():
        skipped = name.startswith(prefixes) or any(part in name for part in parts)
        if not skipped and type(module) in norm._target_modules:
            module._deq_norm = norm.apply(module, deq_args=_Args(given), **norm_kwargs)


def reset_norm(model: nn.Module) -> None:
    """Compute the normalized weights again, before each training step.

    Args:
        model: a module that `apply_norm` has changed.

    Example:
        >>> cell = torch.nn.Linear(2, 2)
        >>> apply_norm(cell)
        >>> reset_norm(cell)
        >>> cell.weight.requires_grad, sorted(name for name, _ in cell.named_parameters())
        (True, ['bias', 'weight_g', 'weight_v'])
    """
    for module, norm in _normalized(model):
        norm(module)


def remove_norm(model: nn.Module) -> None:
    """Make normalized weights parameters again, with their present values.

    Args:
        model: a module that `apply_norm` has changed.

    Example:
        >>> cell = torch.nn.Linear(2, 2)
        >>> apply_norm(cell)
        >>> remove_norm(cell)
        >>> sorted(name for name, _ in cell.named_parameters())
        ['bias', 'weight']
    """
    for module, norm in _normalized(model):
        norm.remove(module)
        del module._deq_norm


def register_norm(norm_type: str, norm_class: Any) -> None:
    """Register a class for `apply_norm(norm_type=...)`.

    Args:
        norm_type: its name.
        norm_class: a class with a dictionary `_target_modules` and a class method `apply(module, deq_args, **kwargs)`,
            whose result is called with the module by `reset_norm` and has a method `remove(module)`.

    Example:
        >>> register_norm("mine", WeightNorm)
        >>> apply_norm(torch.nn.Linear(2, 2), "mine")
    """
    _norms[norm_type] = norm_class


def register_norm_module(module_class: type[nn.Module], norm_type: str, names: Any = "weight", dims: Any = 0) -> None:
    """Register a class of modules, and which of its parameters `apply_norm` normalizes.

    Args:
        module_class: the class.
        norm_type: the type of normalization.
        names: one name of a parameter, or several.
        dims: its axis of output channels, or several.

    Raises:
        ConfigError: the type is not registered.

    Example:
        >>> class Mine(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.W = torch.nn.Parameter(torch.ones(2, 2))
        >>> register_norm_module(Mine, "weight_norm", names="W")
        >>> mine = Mine()
        >>> apply_norm(mine)
        >>> [name for name, _ in mine.named_parameters()]
        ['W_g', 'W_v']
    """
    if norm_type not in _norms:
        raise ConfigError.bad_value("register_norm_module", "norm_type", norm_type, listing(_norms))
    _norms[norm_type]._target_modules[module_class] = (names, dims)


def _normalized(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Return the modules that `apply_norm` has changed, with their norms."""
    return [(module, vars(module)["_deq_norm"]) for module in model.modules() if "_deq_norm" in vars(module)]


class _Args(argparse.Namespace):
    """Options by attribute, and by `get(name, default)` as torchdeq's norm classes read them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(**values)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an option."""
        return vars(self).get(name, default)


def _values(args: object) -> dict[str, Any]:
    if args is None:
        return {}
    return dict(args) if isinstance(args, Mapping) else dict(vars(args))


def _settings(args: object) -> dict[str, Any]:
    """Return the fields of a norm that a namespace sets."""
    given = _values(args)
    settings = {OPTIONS[name]: value for name, value in given.items() if name in OPTIONS}
    if "norm_no_scale" in given:
        settings["learn_scale"] = not given["norm_no_scale"]
    return settings


def _several(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, (str, int)) else tuple(given)


def _channel_norms(weight: Tensor, dim: int) -> Tensor:
    axes = [axis for axis in range(weight.ndim) if axis != dim]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True)


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)
