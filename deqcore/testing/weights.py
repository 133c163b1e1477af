"""Weights that two implementations of one model share, as a dict of NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deqcore.errors import ProblemError


def weights(path: str | Path) -> dict[str, Any]:
    """Read `path.safetensors` or `path.npz`; keys are the tensors' names, as in a torch module's `state_dict`.

    Args:
        path: the file. A relative one is looked for in the working directory.

    Returns:
        Arrays by name, for `Problem(params=...)`. Dtypes that NumPy lacks (bfloat16) come as float32.

    Raises:
        ProblemError: no such file, another format, damaged, or safetensors is not installed.

    Example:
        A torch module and a JAX function that share a file::

            from deqcore.testing import Problem, weights

            def cell(p, z, x):
                import torch
                from model import Cell
                return torch.func.functional_call(Cell(), p, (z, x))

            def same_in_jax(p, z, x):
                import jax.numpy as jnp
                return jnp.tanh(z @ p["lin.weight"].T + p["lin.bias"] + x)

            problem = Problem("cell", weights("cell.safetensors"), x, z0, {"torch": cell, "jax": same_in_jax})
    """
    path = Path(path)
    if not path.is_file():
        raise ProblemError(f"weights({str(path)!r}): the file does not exist in {Path.cwd()}.")
    try:
        if path.suffix == ".npz":
            with np.load(path) as stored:
                return {name: stored[name] for name in stored.files}
        if path.suffix == ".safetensors":
            return _safetensors(path)
    except ImportError as error:
        raise ProblemError(
            f"{path}: the package safetensors is not installed. Install it with `pip install 'deqcore[study]'`."
        ) from error
    except Exception as error:
        raise ProblemError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    raise ProblemError(f"The file must be one that ends in .safetensors or .npz (got {path}).")


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    result = {}
    with safe_open(path, framework="numpy") as stored:
        for name in stored.keys():  # noqa: SIM118 - not a mapping
            kind = stored.get_slice(name).get_dtype()
            result[name] = _bfloat16(path, name) if kind == "BF16" else stored.get_tensor(name)
    return result


def _bfloat16(path: Path, name: str) -> Any:
    """Return a bfloat16 tensor is the upper half of a float32 one."""
    import json

    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + header])[name]
    start, end = (8 + header + offset for offset in entry["data_offsets"])
    halves = np.frombuffer(raw[start:end], "<u2").astype(np.uint32) << 16
    return halves.view(np.float32).reshape(entry["shape"])
