"""A serialised JAX program beside `jit`, for `benchmarks.compiled`: `python -m benchmarks.compiled_jax FILE ROUNDS`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import deqcore
from deqcore.bench.timing import Spread, interleave

BATCH, WIDTH = 128, 128
TARGET = 1.1


def solved(w: jax.Array, x: jax.Array) -> jax.Array:
    """Return the fixed point of tanh(W z + x)."""

    def f(z: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(z @ w.T + x)

    value: jax.Array = deqcore.fixed_point(f, jnp.zeros_like(x), w, x, forward__rtol=1e-4).value
    return value


def data() -> tuple[Any, Any]:
    """Return W and x."""
    rng = np.random.default_rng(0)
    w = 0.5 * rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    return w.astype(np.float32), rng.standard_normal((BATCH, WIDTH)).astype(np.float32)


def write(path: Path) -> None:
    """Serialise the compiled solve."""
    path.write_bytes(export.export(jax.jit(solved))(*data()).serialize())


def main(path: str, rounds: int, busy: bool) -> list[dict[str, Any]]:
    """Return the rows of one program."""
    w, x = map(jnp.asarray, data())
    program = jax.jit(export.deserialize(bytearray(Path(path).read_bytes())).call)
    compiled = jax.jit(solved)
    ways: dict[str, Callable[[], object]] = {
        "eager": lambda: solved(w, x).block_until_ready(),
        "jit": lambda: compiled(w, x).block_until_ready(),
        "jax.export": lambda: program(w, x).block_until_ready(),
    }
    for way in ways.values():
        way()
    seconds = interleave(
        ways, rounds=rounds, budget=20.0, clock=time.process_time if busy else time.perf_counter
    ).seconds
    rows = []
    for name, each in seconds.items():
        found = Spread.of_ratios(each, seconds["eager"])
        ratio = [found.median, found.low, found.high]
        target = TARGET if name == "jax.export" else None
        rows.append(
            {"way": name, "seconds": each, "base": "eager", "ratio": ratio, "of eager": ratio, "target": target}
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), "--busy" in sys.argv)))
