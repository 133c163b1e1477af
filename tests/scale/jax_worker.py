"""Run in a process of its own with eight host devices: gradients of a sharded batch against those of one device.

Prints one JSON object: relative differences, step counts, and the collectives in the compiled programs by where they
stand (in a loop's body, in its condition, outside of loops).
"""

import json
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import deqcore

DEVICES, WIDTH, BATCH = 8, 16, 24
CASES = {
    "anderson": {
        "forward__solver": "anderson",
        "backward__strategy": "exact-ift",
        "backward__options": {"rtol": 1e-7},
    },
    "broyden": {
        "forward__solver": "broyden",
        "forward__options": {"history_size": 20},
        "backward__strategy": "broyden-reuse",
        "backward__options": {"max_relative_error": 1e-5, "max_refine_vjps": 16},
    },
    "newton-krylov": {
        "forward__solver": "newton-krylov",
        "forward__options": {"inner_steps": 16},
        "backward__strategy": "neumann",
    },
}
COLLECTIVE = re.compile(r"= (\(?[^=]*?\)?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)[-(]")
CALLED = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")


def collectives(text):
    """Places and types of the collectives in an optimised HLO module: `body pred[]`, `outside f32[16,16]`."""
    calls, found, name, entry = {}, {}, None, None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%([\w.-]+) \(.*\{$", line)
        if head:
            name = head[2]
            calls[name], found[name] = [], []
            entry = name if head[1] else entry
        elif name is not None:
            calls[name] += [
                (kind, each) for kind, many in CALLED.findall(line) for each in re.findall(r"[\w.-]+", many)
            ]
            found[name] += [re.sub(r"\{[^}]*\}|[()]", "", kind) for kind, _ in COLLECTIVE.findall(line)]
    places = set()

    def walk(name, place):
        places.update(f"{place} {kind}" for kind in found[name])
        for kind, other in calls[name]:
            walk(other, kind if kind in ("body", "condition") else place)

    walk(entry, "outside")
    return sorted(places)


def data():
    rng = np.random.default_rng(0)
    w = 0.6 * rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    x = rng.standard_normal((BATCH, WIDTH))
    x[: BATCH // 2] *= 0.01  # the first devices need more steps than the last
    x[BATCH // 2 :] *= 3
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def solve(w, x, **settings):
    found = deqcore.fixed_point(
        lambda z, w, x: jnp.tanh(z @ w.T + x),
        jnp.zeros_like(x),
        w,
        x,
        forward__rtol=1e-6,
        forward__max_steps=100,
        **settings,
    )
    return found.value, found.steps


def gradient_of(solve):
    def loss(w, x):
        value, steps = solve(w, x)
        return jnp.sum(value**2), steps

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def apart(found, expected):
    """Largest relative difference of two tuples of arrays."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def batch(name):
    """A batch over all devices, left to the compiler (`jit`), and with a solve per device (`shard_map`)."""
    w, x = data()
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    plain = partial(solve, **CASES[name])
    own = jax.shard_map(plain, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P("data")))
    expected, steps = gradient_of(plain)(w, x)
    report = {"steps": [int(part.max()) for part in np.split(np.asarray(steps), DEVICES)]}
    for way, run in (("jit", plain), ("shard_map", own)):
        compiled = gradient_of(run).lower(jax.device_put(w, everywhere), jax.device_put(x, rows)).compile()
        found, taken = compiled(jax.device_put(w, everywhere), jax.device_put(x, rows))
        report[way] = {
            "apart": apart(found, expected),
            "steps": bool(np.array_equal(taken, steps)),
            "collectives": collectives(compiled.as_text()),
            "lapack": 'target="lapack' in compiled.as_text(),
        }
    return report


def state():
    """A state that is itself split over devices, without jit and with it."""
    w, x = data()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    at = NamedSharding(mesh, P("model", None)), NamedSharding(mesh, P("data", "model"))
    run = gradient_of(partial(solve, **CASES["anderson"]))
    expected, steps = run(w, x)
    split = [jax.device_put(each, where) for each, where in zip((w, x), at, strict=True)]
    found, taken = run(*split)
    value, _ = solve(*split, **CASES["anderson"])
    return {
        "apart": apart(found, expected),
        "value": apart([value], [solve(w, x, **CASES["anderson"])[0]]),
        "steps": int(np.abs(np.asarray(taken) - np.asarray(steps)).max()),
        "devices": len(value.sharding.device_set),
    }


if __name__ == "__main__":
    print(json.dumps({job: state() if job == "state" else batch(job) for job in sys.argv[1:]}))
