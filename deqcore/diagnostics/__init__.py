"""Properties of a fixed-point layer at its solution: spectral radius, norm of the Jacobian, quality of its gradient.

All of it is written on the contract, so it works with every backend. `spectral_radius`, `gradient_audit` and
`residual_curve` measure, and return NumPy arrays on the host; `check_layer` judges a layer of any library;
`check_causality` names a unit of f that reads a later one. `jacobian_penalty`, `spectral_penalty` and
`residual_penalty` are differentiable losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "deqcore.diagnostics.audit": ["Audit", "gradient_audit"],
        "deqcore.diagnostics.causality": ["CausalityLeak", "check_causality"],
        "deqcore.diagnostics.check.record": ["Claims", "LayerUnderTest"],
        "deqcore.diagnostics.check.report": ["Finding", "LayerReport"],
        "deqcore.diagnostics.check.run": ["check_layer"],
        "deqcore.diagnostics.layers": ["layer_audit"],
        "deqcore.diagnostics.penalty": ["jacobian_penalty", "residual_penalty"],
        "deqcore.diagnostics.residuals": ["Curve", "residual_curve"],
        "deqcore.diagnostics.spectrum": ["Spectrum", "spectral_radius"],
        "deqcore.diagnostics.stability": ["SpectralPenalty", "SpectralState", "spectral_penalty"],
    },
)
