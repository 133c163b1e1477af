"""What tests of backends share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture
def collect_new():
    """Collects garbage among the objects of this test only: a full collection takes seconds late in the process.

    Meanwhile nothing else collects, so that these objects stay in the two young generations.
    """
    gc.disable()
    yield lambda: gc.collect(1)
    gc.enable()


@pytest.fixture
def fresh_compiler():
    """No code that torch.compile kept of an earlier test, and the same random numbers in each."""
    import torch

    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def without(monkeypatch):
    """Runs something with the solvers' own steps, without those of torch's compiled kernels."""
    from deqcore_torch import compiled

    def run(do):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "loaded", lambda kind: None)
            return do()

    return run
