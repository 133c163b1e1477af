"""What is imported when, and what is said where a framework is missing. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

HEAVY = "{'torch', 'jax', 'jaxlib', 'scipy', 'sklearn', 'matplotlib'}"

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, max_relative_error=None):
        if name.partition('.')[0] in BLOCKED:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name.partition('.')[0])
sys.meta_path.insert(0, Blocked())
"""


def run(script: str, blocked: tuple[str, ...] = ()) -> str:
    """The output of a script in a process in which some packages cannot be found."""
    source = f"BLOCKED = {blocked!r}\n{BLOCK}\n{textwrap.dedent(script)}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEQCORE_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_deqcore_imports_no_framework_and_nothing_heavy() -> None:
    assert run(f"import deqcore, sys; print(sorted({HEAVY} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("command", ["plugins", "backends", "solvers", "strategies"])
def test_listings_import_no_framework(command: str) -> None:
    script = f"""
        import sys
        from deqcore.cli.app import main
        try:
            main([{command!r}, "--json"])
        except SystemExit as exit:
            assert not exit.code
        print(sorted({{'torch', 'jax', 'jaxlib', 'sklearn', 'matplotlib'}} & set(sys.modules)))
    """
    assert run(script).endswith("[]")


def test_a_numpy_solve_imports_no_other_framework() -> None:
    script = """
        import sys
        import numpy as np, deqcore
        sol = deqcore.fixed_point(lambda z: 0.5 * np.cos(z), np.zeros((2, 3)))
        print(bool(sol.converged.all()), sorted({'torch', 'jax', 'sklearn', 'matplotlib'} & set(sys.modules)))
    """
    assert run(script) == "True []"


SOLVE = """
    import deqcore
    from deqcore.errors import MissingFrameworkError
    def solves(name):
        be = deqcore.get_backend(backend=name)
        a = be.asarray([[1.0, 2.0]], dtype="float32")
        z, (da,) = deqcore.vjp(lambda z, a: 0.5 * z + a, 0 * a, a, cotangent=0 * a + 1, forward__solver="broyden")
        return abs(float(be.to_numpy(z)[0, 1]) - 4) < 1e-3 and abs(float(be.to_numpy(da)[0, 1]) - 2) < 1e-3
    def missing(name):
        try:
            deqcore.get_backend(backend=name)
        except MissingFrameworkError as error:
            return str(error)
    print(solves('numpy'))
"""


@pytest.mark.parametrize(("there", "absent"), [("torch", "jax"), ("jax", "torch")])
def test_one_framework_without_the_other(there: str, absent: str) -> None:
    pytest.importorskip(there)
    blocked = (absent, "jaxlib", "flax", "equinox") if absent == "jax" else (absent,)
    out = run(f"{SOLVE}    print(solves({there!r}))\n    print(missing({absent!r}))\n", blocked).splitlines()
    assert out[:2] == ["True", "True"]
    assert f'pip install "deqcore[{absent}]"' in out[2]


def test_neither_framework() -> None:
    script = f"""{SOLVE}
    print(missing('torch'))
    print(missing('jax'))
    print(deqcore.get_backend().name)
    """
    out = run(script, ("torch", "jax", "jaxlib", "flax", "equinox")).splitlines()
    assert out[0] == "True"
    assert 'pip install "deqcore[torch]"' in out[1]
    assert 'pip install "deqcore[jax]"' in out[2]
    assert out[3] == "numpy"
