"""`layer_audit` on real layers, modules and functions, against dense linear algebra."""

import numpy as np
import pytest

from deqcore.diagnostics import layer_audit
from deqcore.errors import ConfigError

torch = pytest.importorskip("torch")
TIGHT = {"forward__rtol": 1e-6, "forward__max_steps": 200}


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 3)
        torch.nn.init.normal_(self.linear.weight, std=0.3)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def dense(weight, bias, x, g):
    """Return u = (I − J)⁻ᵀ g for each row of tanh(W z + b + x)."""
    z = np.zeros_like(x)
    for _ in range(300):
        z = np.tanh(z @ weight.T + bias + x)
    jacobians = (1 - z**2)[:, :, None] * weight
    return np.stack([np.linalg.solve(np.eye(3) - j.T, row) for j, row in zip(jacobians, g, strict=True)])


def expected(cell, x, g):
    weight, bias = (p.detach().double().numpy() for p in (cell.linear.weight, cell.linear.bias))
    u = dense(weight, bias, x.double().numpy(), g)
    norms = np.linalg.norm(u, axis=1) * np.linalg.norm(g, axis=1)
    return np.sum(u * g, axis=1) / norms  # the cosine of jacobian-free, whose u is g


def test_a_layer_a_module_and_a_function_have_the_same_figures():
    from deqcore_torch.nn import DEQ

    cell, x = Cell(), torch.randn(4, 3)
    g = np.random.default_rng(0).standard_normal((4, 3))
    cotangent = torch.as_tensor(g, dtype=torch.float32)
    free = {"backward__strategy": "jacobian-free", **TIGHT}
    found = [
        layer_audit(DEQ(cell, **free), x, cotangent=cotangent),
        layer_audit(cell, x, cotangent=cotangent, **free),
        layer_audit(lambda z, x: 1.0 * cell(z, x), x, cotangent=cotangent, **free),
    ]
    for audit in found:
        assert audit.cosine == pytest.approx(expected(cell, x, g), abs=1e-4)
    assert found[0].gradient_cosine == found[1].gradient_cosine < 0.9999  # parameters and inputs
    exact = layer_audit(DEQ(cell, **TIGHT), x, samples=2)
    assert exact.gradient_cosine == pytest.approx(1.0, abs=1e-5)
    assert len(exact.rows) == 2
    assert all(p.grad is None for p in cell.parameters())
    with pytest.raises(ConfigError, match="a layer, a module or a function"):
        layer_audit(3, x)


def test_modules_of_equinox_and_flax():
    jax = pytest.importorskip("jax")
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")
    import deqcore_jax.equinox
    import deqcore_jax.nnx

    class Own(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.3))

        def __call__(self, z, x):
            return jax.numpy.tanh(self.linear(z) + x)

    class Other(eqx.Module):
        linear: eqx.nn.Linear
        activation: object = jax.numpy.tanh

        def __call__(self, z, x):
            return self.activation(0.5 * jax.vmap(self.linear)(z) + x)

    x = jax.random.normal(jax.random.key(1), (2, 3))
    other = Other(eqx.nn.Linear(3, 3, key=jax.random.key(0)))
    settings = {**TIGHT, "forward__solver": "picard"}  # the smallest program in JAX
    for layer in (deqcore_jax.nnx.DEQ(Own(), **settings), deqcore_jax.equinox.DEQ(other, **settings)):
        assert layer_audit(layer, x).gradient_cosine == pytest.approx(1.0, abs=1e-4)
        crude = layer_audit(layer, x, backward__strategy="jacobian-free")
        assert 0.5 < crude.gradient_cosine < 0.99999


def test_the_printed_form_of_a_layer_shows_its_settings():
    from deqcore_torch.nn import DEQ

    shown = repr(DEQ(Cell(), forward__rtol=1e-3, evaluation={"forward__max_steps": 7}))
    for part in ("forward__rtol=0.001", "backward__strategy='exact-ift'", "evaluation={'forward__max_steps': 7}"):
        assert part in shown
