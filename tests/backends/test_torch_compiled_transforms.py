"""Transforms of `torch.func` inside of compiled code: the numbers of eager code by a graph break, never others."""

from __future__ import annotations

import pytest

import deqcore

torch = pytest.importorskip("torch")
from deqcore_torch.nn import DEQ  # noqa: E402
from torch.func import grad, hessian, jvp, vmap  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quiet_forward_mode", "fresh_compiler"),
]
N = 3
SETTINGS = {"forward__rtol": 1e-12, "backward__options": {"rtol": 1e-12}}


def solved(x):
    return deqcore.fixed_point(lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros_like(x), x, **SETTINGS).value


def unrolled(x):
    z = torch.zeros_like(x)
    for _ in range(60):
        z = 0.5 * torch.sin(z) + x
    return z


VALUES = {"function": lambda: solved, "layer": lambda: DEQ(lambda z, x: 0.5 * torch.sin(z) + x, **SETTINGS)}


def cubed(value):
    return lambda x: (value(x) ** 3).sum()


TRANSFORMS = {
    "grad": lambda value, x: grad(cubed(value))(x),
    "jvp": lambda value, x: jvp(value, (x,), (torch.cos(x),))[1],
    "gradients of each sample": lambda value, x: vmap(grad(cubed(value)))(x[:, None]),
    "hessian": lambda value, x: hessian(cubed(value))(x[:1]),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("layer", "grad"), ("layer", "jvp"), ("function", "gradients of each sample"), ("function", "hessian")],
)
@pytest.mark.supports(
    "`torch.compile` around `torch.func`: grad, vmap, jvp, hessian",
    backends="torch",
    strategies="exact-ift",
    answer="yes, with a graph break; `fullgraph=True` is refused",
)
def test_a_compiled_transform_gives_the_derivatives_of_unrolled_steps(kind, name):
    value = VALUES[kind]()
    transform, x = TRANSFORMS[name], torch.randn(2, N, dtype=torch.float64)
    run = torch.compile(lambda x: 2.0 * transform(value, x), backend="aot_eager")
    assert torch.allclose(run(x), 2.0 * transform(unrolled, x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["layer", "function"])
def test_one_graph_around_a_transform_is_refused_with_what_to_do(kind):
    run = torch.compile(grad(cubed(VALUES[kind]())), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"no transform of torch\.func"):
        run(torch.ones(2, N, dtype=torch.float64))
