"""What a fresh installation must be able to do: `python smoke.py core|torch|jax`. Needs nothing but the wheel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import deqcore

FRAMEWORKS = ("torch", "jax")


def affine(z: np.ndarray, a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A z + x, whose equilibrium is x / (1 − a)."""
    return a * z + x


def command(*words: str) -> str:
    """Run the command that the wheel has installed."""
    program = Path(sys.executable).with_name("deqcore")
    done = subprocess.run([str(program), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"deqcore {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def core() -> None:
    """Without a framework: NumPy works, and the others say what to install."""
    one = np.ones((1, 1))
    z, (da, dx) = deqcore.vjp(affine, 0 * one, np.array(0.5), one, cotangent=one)
    assert np.allclose([z.item(), da.item(), dx.item()], [2.0, 4.0, 2.0])
    for strategy in ("broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled"):
        deqcore.vjp(affine, 0 * one, np.array(0.5), one, cotangent=one, backward__strategy=strategy)
    for name in FRAMEWORKS:
        try:
            deqcore.get_backend(backend=name)
        except deqcore.errors.MissingFrameworkError as error:
            said = str(error)
        else:
            raise AssertionError(f"{name} is installed, but this environment should have the core alone")
        assert f"deqcore[{name}]" in said, said
    command("check", "gradients", "--backend", "numpy", "--solver", "broyden", "--strategy", "exact-ift")


def torch() -> None:
    """A layer trains, its checkpoint loads, and its gradient is the closed form."""
    import torch
    from deqcore_torch.nn import DEQ

    x = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    DEQ(lambda z, x: 0.5 * z + x, forward__rtol=1e-10)(x).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 2.0))
    cell = torch.nn.Linear(4, 4)
    layer = DEQ(lambda z, x: 0.1 * torch.tanh(cell(z)) + x)
    layer(torch.randn(3, 4)).sum().backward()
    assert cell.weight.grad is not None
    layer.load_state_dict(layer.state_dict())


def jax() -> None:
    """Compiled gradients are the closed form."""
    import jax
    import jax.numpy as jnp

    def total(a: jax.Array) -> jax.Array:
        return deqcore.fixed_point(affine, jnp.zeros((2, 1)), a, jnp.ones((2, 1)), forward__rtol=1e-6).value.sum()

    assert abs(float(jax.jit(jax.grad(total))(jnp.asarray(0.5))) - 8.0) < 1e-3


def main(kind: str) -> None:
    """Run the checks of one kind of environment."""
    assert "site-packages" in str(deqcore.__file__), f"not the wheel: {deqcore.__file__}"
    names = {row["name"] for row in json.loads(command("solvers", "--json"))}
    assert {"picard", "anderson", "broyden", "newton-krylov"} <= names, names
    checks: dict[str, Callable[[], None]] = {"core": core, "torch": torch, "jax": jax}
    checks[kind]()
    others = [name for name in FRAMEWORKS if name != kind and importlib.util.find_spec(name)]
    assert not others, f"{others} came along with {kind}"
    versions = ", ".join(f"{name} {__import__(name).__version__}" for name in ("numpy", kind) if name != "core")
    print(f"{kind}: fine with Python {sys.version.split()[0]}, deqcore {deqcore.__version__}, {versions}")


if __name__ == "__main__":
    main(sys.argv[1])
