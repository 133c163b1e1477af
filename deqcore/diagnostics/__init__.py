"""Properties of a fixed-point layer at its solution: spectral radius, norm of the Jacobian, quality of its gradient.

All of it is written on the contract, so it works with every backend. `spectral_radius`, `gradient_audit` and
`residual_curve` measure, and return NumPy arrays on the host; `check_layer` judges a layer of any library;
`check_causality` names a unit of f that reads a later one. `jacobian_penalty`, `spectral_penalty` and
`residual_penalty` are differentiable losses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deqcore.diagnostics.audit import Audit, gradient_audit
    from deqcore.diagnostics.causality import CausalityLeak, check_causality
    from deqcore.diagnostics.check.record import Claims, LayerUnderTest
    from deqcore.diagnostics.check.report import Finding, LayerReport
    from deqcore.diagnostics.check.run import check_layer
    from deqcore.diagnostics.layers import layer_audit
    from deqcore.diagnostics.penalty import jacobian_penalty, residual_penalty
    from deqcore.diagnostics.residuals import Curve, residual_curve
    from deqcore.diagnostics.spectrum import Spectrum, spectral_radius
    from deqcore.diagnostics.stability import SpectralPenalty, SpectralState, spectral_penalty

_HOME: Final = {
    "Audit": "deqcore.diagnostics.audit",
    "CausalityLeak": "deqcore.diagnostics.causality",
    "Claims": "deqcore.diagnostics.check.record",
    "Curve": "deqcore.diagnostics.residuals",
    "Finding": "deqcore.diagnostics.check.report",
    "LayerReport": "deqcore.diagnostics.check.report",
    "LayerUnderTest": "deqcore.diagnostics.check.record",
    "SpectralPenalty": "deqcore.diagnostics.stability",
    "SpectralState": "deqcore.diagnostics.stability",
    "Spectrum": "deqcore.diagnostics.spectrum",
    "check_causality": "deqcore.diagnostics.causality",
    "check_layer": "deqcore.diagnostics.check.run",
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
    "Claims",
    "Curve",
    "Finding",
    "LayerReport",
    "LayerUnderTest",
    "SpectralPenalty",
    "SpectralState",
    "Spectrum",
    "check_causality",
    "check_layer",
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
