"""What tests of studies share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def tiny_study() -> Callable[..., str]:
    """Return the text of a config of one cell that trains for seconds."""

    def text(**training: int) -> str:
        lines = "\n".join(f"{name} = {value}" for name, value in {"audits": 0, **training}.items())
        return f"""
[study]
name = "tiny"
backends = ["torch"]
solvers = ["picard"]
strategies = ["jacobian-free"]
models = [{{ name = "dense", width = 16 }}]
max_steps = 10
[study.training]
{lines}
"""

    return text
