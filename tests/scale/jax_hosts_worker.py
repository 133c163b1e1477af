"""Run in each of two processes of one JAX program: gradients of a batch over both, for an affine f in closed form.

    python jax_hosts_worker.py PORT PROCESS

Prints one JSON object: distances from the closed form, and the steps of the samples of this process.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import deqcore

WIDTH, ROWS = 4, 3  # of the state; samples of each process
FACTORS = np.array([0.1, 0.1, 0.9, 0.9])  # the samples of the second process lie in slow directions
SETTINGS = {
    "forward__solver": "picard",
    "forward__rtol": 1e-5,
    "backward__strategy": "exact-ift",
    "backward__options": {"rtol": 1e-6, "solver": "picard", "max_steps": 200},
}


def data():
    x = np.ones((2 * ROWS, WIDTH), np.float32)
    x[:ROWS, 2:] = x[ROWS:, :2] = 0
    return np.diag(FACTORS).astype(np.float32), x


def solve(w, x):
    found = deqcore.fixed_point(
        lambda z, w, x: z @ w.T + x, jnp.zeros_like(x), w, x, forward__max_steps=300, **SETTINGS
    )
    return found.value, found.steps


def loss(w, x, run):
    value, steps = run(w, x)
    return jnp.sum(value**2), steps


def expected():
    """The gradient of W: Uᵀ Z with U = 2 Z (I − W)⁻¹."""
    w, x = (each.astype(float) for each in data())
    inverse = np.linalg.inv(np.eye(WIDTH) - w)
    z = x @ inverse.T
    return (2 * z @ inverse).T @ z


def main(port, process):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    w, x = data()
    mine = slice(process * ROWS, (process + 1) * ROWS)
    w = jax.make_array_from_process_local_data(everywhere, w)
    x = jax.make_array_from_process_local_data(rows, x[mine])
    own = jax.shard_map(solve, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P("data")))
    report = {"processes": jax.process_count(), "devices": jax.device_count()}
    for way, run in (("jit", solve), ("shard_map", own)):
        step = jax.jit(jax.grad(lambda w, x, run=run: loss(w, x, run), has_aux=True), donate_argnums=0)
        before = jax.make_array_from_process_local_data(everywhere, data()[0])
        gradient, steps = step(before, x)
        found = np.asarray(gradient.addressable_shards[0].data)  # each process has all of it
        report[way] = {
            "apart": float(np.abs(found - expected()).max() / np.abs(expected()).max()),
            "steps": np.concatenate([np.asarray(part.data) for part in steps.addressable_shards]).tolist(),
            "donated": before.is_deleted(),
        }
    return report


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
