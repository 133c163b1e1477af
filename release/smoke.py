"""What a fresh installation must be able to do: `python smoke.py core|torch|jax|all`. Needs nothing but the wheel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import deqcore

FRAMEWORKS = ("torch", "jax")
OPTIONAL = (*FRAMEWORKS, "flax", "equinox", "optax", "sklearn", "matplotlib", "safetensors", "tensorboard")
STUDY = """
[study]
name = "smoke"
backends = ["torch", "jax"]
data = ["digits"]
models = [{ name = "dense", width = 8 }]
strategies = ["broyden-reuse"]
seeds = [0]
[study.training]
epochs = 1
audits = 1
"""


def affine(z: np.ndarray, a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return a z + x, whose equilibrium is x / (1 − a)."""
    return a * z + x


def command(*words: str) -> str:
    """Run the command that the wheel has installed."""
    program = Path(sys.executable).with_name("deqcore")
    done = subprocess.run([str(program), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"deqcore {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def core() -> None:
    """Run without a framework: NumPy works, and the others say what to install."""
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
    """Train a layer, load its checkpoint, and compare its gradient with the closed form."""
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


def all_extras() -> None:
    """Run every layer, the commands over all frameworks, a log for TensorBoard, and a study with its report."""
    import jax.numpy as jnp
    from deqcore_jax import equinox, nnx

    torch()
    jax()
    for layer in (nnx.DEQ(affine), equinox.DEQ(affine)):
        assert np.allclose(layer(jnp.asarray(0.5), jnp.ones((2, 1)), z0=jnp.zeros((2, 1))), 2.0, atol=1e-2), layer
    command("check", "gradients", "--solver", "broyden", "--strategy", "exact-ift")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        sinks = [
            {"sink": "tensorboard", "folder": str(folder / "events")},
            {"sink": "jsonl", "path": str(folder / "log")},
        ]
        with deqcore.monitor.Monitor(sinks=sinks) as monitor:
            deqcore.fixed_point(affine, np.zeros((2, 1)), np.array(0.5), np.ones((2, 1)))
            monitor.advance()
        assert any((folder / "events").iterdir())
        (folder / "study.toml").write_text(STUDY, encoding="utf-8")
        command("study", str(folder / "study.toml"), "--out", str(folder / "out"))
        rows = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
        assert rows, rows
        assert (folder / "out" / "report.html").stat().st_size > 10_000


def main(kind: str) -> None:
    """Run the checks of one kind of environment."""
    assert "site-packages" in str(deqcore.__file__), f"not the wheel: {deqcore.__file__}"
    names = {row["name"] for row in json.loads(command("solvers", "--json"))}
    assert {"picard", "anderson", "broyden", "newton-krylov"} <= names, names
    checks: dict[str, Callable[[], None]] = {"core": core, "torch": torch, "jax": jax, "all": all_extras}
    checks[kind]()
    there = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    others = [name for name in FRAMEWORKS if name in there and name != kind]
    assert kind == "all" or not others, f"{others} came along with {kind}"
    versions = ", ".join(f"{name} {__import__(name).__version__}" for name in ("numpy", *there))
    print(f"{kind}: fine with Python {sys.version.split()[0]}, deqcore {deqcore.__version__}, {versions}")


if __name__ == "__main__":
    main(sys.argv[1])
