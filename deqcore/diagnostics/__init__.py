"""Properties of a fixed-point layer at its solution: spectral radius, norm of the Jacobian, quality of its gradient.

All of it is written on the contract, so it works with every backend. `spectral_radius`, `gradient_audit` and
`residual_curve` measure, and return NumPy arrays on the host; `jacobian_penalty`, `spectral_penalty` and
`residual_penalty` are differentiable losses, and `check_causality`
names a unit of f that reads a later one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deqcore.diagnostics.audit import Audit, gradient_audit
    from deqcore.diagnostics.causality import CausalityLeak, check_causality
    from deqcore.diagnostics.layers import layer_audit
    from deqcore.diagnostics.penalty import jacobian_penalty, residual_penalty
    from deqcore.diagnostics.residuals import Curve, residual_curve
    from deqcore.diagnostics.spectrum import Spectrum, spectral_radius
    from deqcore.diagnostics.stability import SpectralPenalty, SpectralState, spectral_penalty

_HOME: Final = {
    "Audit": "deqcore.diagnostics.audit",
    "CausalityLeak": "deqcore.diagnostics.causality",
    "Curve": "deqcore.diagnostics.residuals",
    "SpectralPenalty": "deqcore.diagnostics.stability",
    "SpectralState": "deqcore.diagnostics.stability",
    "Spectrum": "deqcore.diagnostics.spectrum",
    "check_causality": "deqcore.diagnostics.causality",
    "gradient_audit": "deqcore.diagnostics.audit",
    "jacobian_penalty": "deqcore.diagnostics.penalty",
    "layer_audit": "deqcore.diagnostics.layers",
    "residual_curve": "deqcore.diagnostics.residuals",
    "residual_penalty": "deqcore.diagnostics.penalty",
    "spectral_penalty": "deqcore.diagnostics.stability",
    "spectral_radius": "deqcore.diagnostics.spectrum",
}

__all__ = [
    "Audit",
    "CausalityLeak",
    "Curve",
    "SpectralPenalty",
    "SpectralState",
    "Spectrum",
    "check_causality",
    "gradient_audit",
    "jacobian_penalty",
    "layer_audit",
    "residual_curve",
    "residual_penalty",
    "spectral_penalty",
    "spectral_radius",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'deqcore.diagnostics' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
