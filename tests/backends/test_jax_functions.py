"""JAX: every kind of function inside f, through every transformation, against dense differentiation by differences.

Row k of the state solves its own equation z = c·fn_k(z) + x_k(t), so that one compiled program per transformation
tests all functions that have the same modes. The reference uses neither deqcore nor autodiff: it iterates in
NumPy, takes J by central differences of the map, and solves the dense equation; second derivatives are differences
of first ones.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import deqcore
from deqcore.errors import StrategyError

jax = pytest.importorskip("jax")
jnp = jax.numpy
lax = jax.lax
nn = jax.nn

N = 4
C = 0.15
RNG = np.random.default_rng(0)
W = 0.4 * RNG.standard_normal((N, N))
SETTINGS = {
    "forward__solver": "picard",
    "forward__rtol": 1e-13,
    "forward__max_steps": 300,
    "forward__on_failure": "ignore",
    "backward__options": {"solver": "picard", "rtol": 1e-13, "max_steps": 300},
    "backward__on_failure": "ignore",
}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True, scope="module")
def _double():
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # more programs than a cache is worth
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_enable_compilation_cache", before)


# -- functions of R^4 ---------------------------------------------------------------------------------------------

wide = lambda fn: lambda z: jnp.concatenate([fn(z), fn(z[::-1])])  # for a fn that halves its input
spread = lambda fn: lambda z: fn(z) + 0.1 * z  # for a fn that returns one number


def attention(z, **options):
    q = z.reshape(1, 2, 1, 2)
    return nn.dot_product_attention(q, q @ W[:2, :2], q, **options).reshape(N)


NN = {
    "celu": nn.celu,
    "dot_product_attention": attention,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "glu": wide(nn.glu),
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_silu": nn.hard_silu,
    "hard_swish": nn.hard_swish,
    "hard_tanh": nn.hard_tanh,
    "identity": nn.identity,
    "leaky_relu": nn.leaky_relu,
    "log1mexp": nn.log1mexp,
    "log_sigmoid": nn.log_sigmoid,
    "log_softmax": nn.log_softmax,
    "logmeanexp": spread(nn.logmeanexp),
    "logsumexp": spread(nn.logsumexp),
    "mish": nn.mish,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "selu": nn.selu,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "soft_sign": nn.soft_sign,
    "softmax": nn.softmax,
    "softplus": nn.softplus,
    "sparse_plus": nn.sparse_plus,
    "sparse_sigmoid": nn.sparse_sigmoid,
    "squareplus": nn.squareplus,
    "standardize": lambda z: nn.standardize(z * jnp.arange(1.0, 5.0), variance=jnp.ones(())),
    "swish": nn.swish,
    "tanh": nn.tanh,
}
# They map no floating-point state to another one, or need a narrow dtype or an accelerator.
NO_MAPS = {
    "one_hot", "scaled_matmul", "scaled_dot_general", "get_scaled_dot_general_config", "fp8", "truncate",
    "relu_squared", "initializers", "log1pexp",
}  # fmt: skip

NUMPY = {
    "arctan2": lambda z: jnp.arctan2(z, 1.0 + z[::-1]),
    "average": lambda z: z * jnp.average(z),
    "clip": lambda z: jnp.clip(z, 0.1, 0.9),
    "concatenate": lambda z: jnp.concatenate([z[2:], z[:2]]),
    "convolve": lambda z: jnp.convolve(z, jnp.asarray([0.2, 0.5, 0.2]), mode="same"),
    "cross": lambda z: jnp.append(jnp.cross(z[:3], jnp.asarray([0.1, 0.2, 0.3])), z[3]),
    "cumprod": jnp.cumprod,
    "cumsum": lambda z: 0.3 * jnp.cumsum(z),
    "einsum": lambda z: jnp.einsum("i,ij,j->i", z, W, z),
    "exp": lambda z: jnp.exp(-z),
    "fft": lambda z: jnp.fft.irfft(jnp.fft.rfft(z) * 0.5, N),
    "gather": lambda z: z[jnp.asarray([3, 1, 1, 0])],
    "interp": lambda z: jnp.interp(z, jnp.linspace(-1.0, 3.0, 9), jnp.linspace(-1.0, 3.0, 9) ** 2 / 4),
    "inv": lambda z: (jnp.linalg.inv(2 * jnp.eye(2) + z.reshape(2, 2))).reshape(N),
    "kron": lambda z: jnp.kron(z[:2], z[2:]),
    "linalg.norm": spread(jnp.linalg.norm),
    "linalg.solve": lambda z: jnp.linalg.solve(2 * jnp.eye(N) + W, z),
    "log1p": jnp.log1p,
    "logaddexp": lambda z: jnp.logaddexp(z, 0.0),
    "logaddexp2": lambda z: jnp.logaddexp2(z, 1.0),
    "matmul": lambda z: W @ z,
    "maximum": lambda z: jnp.maximum(z, 0.35),
    "mod": lambda z: jnp.mod(z, 5.0),
    "nan_to_num": jnp.nan_to_num,
    "outer": lambda z: 0.3 * jnp.outer(z, z).sum(0),
    "pad": lambda z: jnp.pad(z, 1)[:N],
    "power": lambda z: jnp.power(jnp.abs(z) + 0.5, 1.5),
    "reciprocal": lambda z: jnp.reciprocal(2.0 + z),
    "roll": lambda z: jnp.roll(z, 1),
    "scatter": lambda z: z.at[1].set(0.3 * z[2]).at[0].add(z[3]),
    "sinc": jnp.sinc,
    "sin": jnp.sin,
    "sort": jnp.sort,
    "sqrt": lambda z: jnp.sqrt(z * z + 0.5),
    "stack": lambda z: jnp.stack([z, z[::-1]]).mean(0),
    "take_along_axis": lambda z: jnp.take_along_axis(z, jnp.argsort(z), 0),
    "tril": lambda z: jnp.tril(W) @ z,
    "var": lambda z: z * jnp.var(z),
    "where": lambda z: jnp.where(z > 0.35, z, z * z),
    "erf": jax.scipy.special.erf,
    "complex": lambda z: jnp.real(jnp.exp(1j * z) * (1 + 0.2j)),
}


@jax.custom_jvp
def ruled(z):
    return jnp.sin(z)


ruled.defjvp(lambda p, t: (ruled(p[0]), jnp.cos(p[0]) * t[0]))


class Bound:
    """A bound method, and state that no transformation knows of."""

    def __init__(self):
        self.w, self.flag, self.count, self.half = W, True, 3, np.float32(0.5)

    def __call__(self, z):
        return self.method(z)

    def method(self, z):
        return (self.w @ z) * self.half / self.count if self.flag else z


def weak(z):
    key = jax.random.key(0)  # typed keys, ints, bools and weak types inside f
    return z * jax.random.uniform(key, (N,), dtype=z.dtype) * (jnp.int32(2) > 1) + 1


CONTROL = {
    "associative_scan": lambda z: lax.associative_scan(lambda a, b: 0.3 * a + b, z),
    "bound method": Bound().method,
    "callable object": Bound(),
    "checkpoint": jax.checkpoint(lambda z: jnp.tanh(W @ z)),
    "cond": lambda z: lax.cond(z[0] > 0.3, jnp.sin, jnp.tanh, z),
    "custom_jvp": ruled,
    "custom_jvp in scan": lambda z: lax.scan(lambda c, _: (ruled(c), None), z, None, length=2)[0],
    "fori_loop": lambda z: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(W @ c) + 0.1 * i, z),
    "jit": lambda z: jax.jit(jnp.tanh)(W @ z),
    "jit in jit": jax.jit(jax.jit(lambda y: jnp.sin(y) * y)),
    "linearize": lambda z: jax.linearize(jnp.sin, z)[1](z),
    "map": lambda z: lax.map(jnp.tanh, z),
    "partial": partial(lambda w, z, scale: scale * jnp.tanh(w @ z), W, scale=np.float64(0.7)),
    "inner gradient": jax.grad(lambda z: jnp.log(jnp.cosh(W @ z)).sum()),
    "reduce_window": lambda z: lax.reduce_window(z, -jnp.inf, lax.max, (2,), (1,), "SAME"),
    "saved checkpoint": jax.checkpoint(jnp.tanh, policy=jax.checkpoint_policies.dots_saveable),
    "scan": lambda z: lax.scan(lambda c, w: (jnp.tanh(w * c), c.sum()), z, jnp.asarray([0.5, 0.8]))[0],
    "stop_gradient": lambda z: z + 0 * lax.stop_gradient(z),
    "switch": lambda z: lax.switch(jnp.int32(z[0] > 9), [jnp.sin, jnp.tanh], z),
    "vmap": jax.vmap(jnp.tanh),
    "weak types and keys": weak,
    "while without derivative": lambda z: z * lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0) / 4,
}
BOTH = {**{f"nn.{name}": fn for name, fn in NN.items()}, **{f"jnp.{name}": fn for name, fn in NUMPY.items()}, **CONTROL}


def twice(z):
    from jax.experimental import pallas as pl

    def kernel(z_ref, o_ref):
        o_ref[...] = jnp.sin(z_ref[...]) * 0.5

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(z.shape, z.dtype), interpret=True)(z)


def with_vjp(fn, derivative):
    found = jax.custom_vjp(fn)
    found.defvjp(lambda z: (fn(z), z), lambda z, g: (derivative(z) * g,))
    return found


REVERSE = {
    "custom_vjp": with_vjp(jnp.sin, jnp.cos),
    "custom_vjp in scan": lambda z: lax.scan(lambda c, _: (REVERSE["custom_vjp"](c), None), z, None, length=2)[0],
    "custom_vjp in cond": lambda z: lax.cond(z[0] > 0, REVERSE["custom_vjp"], jnp.tanh, z),
    "custom_vjp in jit": jax.jit(lambda z: REVERSE["custom_vjp"](W @ z)),
    "custom_vjp in checkpoint": jax.checkpoint(lambda z: REVERSE["custom_vjp"](W @ z)),
}
ONCE = {"pallas with a rule": with_vjp(twice, lambda z: 0.5 * jnp.cos(z))}  # its forward rule cannot be differentiated
FORWARD = {
    "while_loop": lambda z: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1])), (0, z))[1],
    "fori_loop with a traced bound": lambda z: lax.fori_loop(
        0, jnp.where(z[0] > 9.0, 1, 2), lambda _, c: jnp.sin(W @ c) + 0.1 * c, z
    ),
}
AHEAD_ONCE = {"pallas": twice}  # JAX has no second derivative of a kernel


# -- the problem and its reference --------------------------------------------------------------------------------


class Rows:
    """z_k = c·fn_k(z_k) + x_k, x_k(t) = x0_k + t₀ d_k + t₁² e_k; what is differentiated is w·z_k, one number per row.

    A row has parameters of its own `t` `(rows, 2)`, or shares them, `(2,)`.
    """

    def __init__(self, functions):
        self.names, self.functions = list(functions), list(functions.values())
        rng = np.random.default_rng(1)
        self.x0 = rng.uniform(0.3, 0.8, (len(self.names), N))
        self.d, self.e, self.w = rng.standard_normal((3, len(self.names), N))
        self.apply = jax.jit(self.map)
        self.t = np.asarray([0.02, 0.2])

    def map(self, z):
        return jnp.stack([C * fn(row) for fn, row in zip(self.functions, z, strict=True)])

    def x(self, t):
        t = t[..., None, :] if t.ndim == 1 else t[:, None, :]
        return self.x0 + t[..., 0] * self.d + t[..., 1] ** 2 * self.e

    def solve(self, t, **settings):
        """Half of x is closed over, half is an argument."""
        x = 0.5 * self.x(t)
        f = lambda z, half: self.map(z) + half + x
        z = deqcore.fixed_point(f, jnp.full(x.shape, 0.5), x, **{**SETTINGS, **settings}).value
        return (self.w * z).sum(1)

    def reference(self, t):
        """The values `(rows,)` and their derivatives in a shared `t`, `(rows, 2)`."""
        x, z = self.x(t), np.full(self.x0.shape, 0.5)
        for _ in range(100):
            z = np.asarray(self.apply(z)) + x
        step = 1e-5 * np.eye(N)
        columns = [(np.asarray(self.apply(z + e)) - np.asarray(self.apply(z - e))) / 2e-5 for e in step]
        jacobian = np.stack(columns, axis=2)
        dx = np.stack([self.d, 2 * t[1] * self.e], axis=2)
        dz = np.linalg.solve(np.eye(N) - jacobian, dx)
        return (self.w * z).sum(1), (self.w[:, :, None] * dz).sum(1)

    def curvature(self, t):
        """Second derivatives, `(rows, 2, 2)`."""
        step = 1e-4 * np.eye(2)
        return np.stack([(self.reference(t + e)[1] - self.reference(t - e)[1]) / 2e-4 for e in step], axis=2)

    def own(self):
        return np.tile(self.t, (len(self.names), 1))


def total(rows):
    return lambda t: rows.solve(t).sum()


V = np.asarray([0.7, -0.4])
# What is computed, and the reference of it from values, first and second derivatives.
VALUE = {"value": (lambda r: r.solve(r.t), lambda v, d, h: v)}
BACK = {
    "grad": (lambda r: jax.grad(total(r))(r.own()), lambda v, d, h: d),
    "jit of grad": (lambda r: jax.jit(jax.grad(total(r)))(r.own()), lambda v, d, h: d),
    "vmap of grad": (lambda r: jax.vmap(jax.grad(total(r)))(np.stack([r.own()] * 2))[1], lambda v, d, h: d),
    "jacrev": (lambda r: jax.jit(jax.jacrev(r.solve))(r.t), lambda v, d, h: d),
}
# Eager: under jit, JAX's own TypeError for an f without forward mode comes after deqcore has returned.
AHEAD = {
    "jvp": (lambda r: jax.jvp(r.solve, (r.t,), (V,))[1], lambda v, d, h: d @ V),
    "jacfwd": (lambda r: jax.jacfwd(r.solve)(r.t), lambda v, d, h: d),
}
HESSIAN = {"hessian": (lambda r: jax.jit(jax.hessian(r.solve))(r.t), lambda v, d, h: h)}
BACK_TWICE = {"jacrev of jacrev": (lambda r: jax.jit(jax.jacrev(jax.jacrev(r.solve)))(r.t), lambda v, d, h: h)}
AHEAD_TWICE = {"jacfwd of jacfwd": (lambda r: jax.jit(jax.jacfwd(jax.jacfwd(r.solve)))(r.t), lambda v, d, h: h)}
TABLES = {
    "both": (BOTH, VALUE | BACK | AHEAD | HESSIAN, {}),
    "reverse": (REVERSE, VALUE | BACK | BACK_TWICE, AHEAD | HESSIAN),
    "once": (ONCE, VALUE | BACK, AHEAD),
    "forward": (FORWARD, VALUE | AHEAD | AHEAD_TWICE, BACK),
    "forward once": (AHEAD_ONCE, VALUE | AHEAD, BACK),
}
RIGHT = [(table, way) for table, (_, right, _) in TABLES.items() for way in right]
REFUSED = [(table, way) for table, (_, _, refused) in TABLES.items() for way in refused]
CURES = {"reverse": "which has reverse mode only", "forward": "cannot be differentiated in reverse mode"}
CURES["once"], CURES["forward once"] = CURES["reverse"], CURES["forward"]


@pytest.fixture(scope="module")
def problems():
    made = {}

    def problem(table):
        if table not in made:
            rows = Rows(TABLES[table][0])
            made[table] = rows, (*rows.reference(rows.t), rows.curvature(rows.t))
        return made[table]

    return problem


@pytest.mark.parametrize(("table", "way"), RIGHT)
def test_a_transformation_agrees_with_differences(problems, table, way):
    rows, truth = problems(table)
    compute, expected = TABLES[table][1][way]
    found, expected = np.asarray(compute(rows)), expected(*truth)
    tolerance = 2e-5 if expected is truth[2] else 1e-7
    apart = dict(zip(rows.names, np.abs(found - expected).reshape(len(rows.names), -1).max(1), strict=True))
    if (single := apart.pop("nn.dot_product_attention", None)) is not None:  # in float32, for any dtype
        assert single < 1e-2 or expected is truth[2]
    assert {name: off for name, off in apart.items() if not off < tolerance} == {}


@pytest.mark.parametrize(("table", "way"), REFUSED)
def test_a_mode_that_f_lacks_is_refused_with_the_cure(problems, table, way):
    rows, _ = problems(table)
    with pytest.raises(StrategyError, match=CURES[table]) as error:
        TABLES[table][2][way][0](rows)
    assert "jax.custom_" in str(error.value)


def test_the_table_holds_all_of_jax_nn():
    """A function that JAX adds is a line to add, or the name of one that maps no arrays to arrays."""
    public = {name for name in dir(nn) if not name.startswith("_") and callable(getattr(nn, name))}
    assert public - NN.keys() - NO_MAPS == set()
