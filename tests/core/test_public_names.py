"""The names that users may rely on. A change here is a change of contract: it needs a line in the changelog."""

import importlib

import pytest

PUBLIC = {
    "deqcore": """AdjointReport Backend Capabilities Config History InverseJacobian Solution Solver Status StepStrategy
        Strategy __version__ errors fixed_point get_backend using vjp""",
    "deqcore.plugins": """BackendSpec CommandSpec DataSpec ModelSpec SinkSpec SolverSpec StrategySpec TrainerSpec
        hookimpl register""",
    "deqcore.schedule": "Ramp Schedule",
}


@pytest.mark.parametrize("module", list(PUBLIC))
def test_public_names_are_there(module):
    found = importlib.import_module(module)
    for name in PUBLIC[module].split():
        assert getattr(found, name) is not None


def test_deqcore_offers_these_names_and_no_others():
    import deqcore

    assert sorted(deqcore.__all__) == sorted(PUBLIC["deqcore"].split())
    assert set(deqcore.__all__) <= set(dir(deqcore))
