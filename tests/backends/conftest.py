"""What tests of backends share."""

from __future__ import annotations

import pytest


@pytest.fixture
def without(monkeypatch):
    """Runs something with the solvers' own steps, without those of torch's compiled kernels."""
    from deqcore_torch import compiled

    def run(do):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "loaded", lambda kind: None)
            return do()

    return run
