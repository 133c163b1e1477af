"""Every model, on both frameworks: the same functions, the same gradients, a contraction at the start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deqcore.config import Config
from deqcore.errors import ConfigError
from deqcore.study.models import find
from deqcore.study.models.base import Model, Shape

SHAPES = {
    "dense": Shape("vector", (12,), 3),
    "slow": Shape("vector", (12,), 3),
    "conv": Shape("image", (3, 8, 8), 3),
    "attention": Shape("tokens", (6,), 11),
}


def built(name: str, width: int = 16) -> tuple[Model, dict[str, Any], Any, Any]:
    shape = SHAPES[name.removesuffix("-explicit")]
    model = find(name)(shape, width)
    rng = np.random.default_rng(1)
    if shape.kind == "tokens":
        x, y = rng.integers(0, shape.classes, (2, 5, *shape.sample))
    else:
        x, y = rng.standard_normal((5, *shape.sample)).astype(np.float32), rng.integers(0, shape.classes, 5)
    return model, model.initial(np.random.default_rng(0)), x, y


def settings(backend: str) -> Config:
    forward = {"solver": "broyden", "rtol": 1e-5, "max_steps": 60, "on_failure": "ignore"}
    return Config(backend=backend, forward=forward, backward={"strategy": "exact-ift", "options": {"rtol": 1e-5}})


def trainers() -> dict[str, Any]:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    from deqcore_jax.study import JaxTrainer
    from deqcore_torch.study import TorchTrainer

    return {"torch": TorchTrainer, "jax": JaxTrainer}


def steps(backend: str) -> Config:
    """A fixed number of plain steps: the functions are compared here, not the solvers."""
    forward = {"solver": "picard", "rtol": 1e-6, "max_steps": 12, "on_failure": "ignore"}
    return Config(backend=backend, forward=forward, backward={"strategy": "jacobian-free"})


@pytest.mark.parametrize("name", ["dense-explicit", "slow", "conv", "attention"])
def test_loss_and_gradient_agree_between_torch_and_jax(name: str):
    model, weights, x, y = built(name)
    found = {}
    for backend, make in trainers().items():
        found[backend] = make(model, weights, steps(backend)).gradient(x, y, steps(backend))
    (loss, gradient), (other, second) = found.values()
    assert loss == pytest.approx(other, abs=1e-5)
    assert np.linalg.norm(gradient - second) < 2e-4 * np.linalg.norm(gradient)
    assert np.linalg.norm(gradient) > 1e-3


@pytest.mark.parametrize("name", ["dense", "conv", "attention"])
def test_the_cell_contracts_at_the_start(name: str):
    model, weights, x, _ = built(name, width=32)
    trainer = trainers()["torch"](model, weights, settings("torch"))
    radius = trainer.radius(x, settings("torch"), 40)
    assert radius.shape == (5,)
    assert (radius < 0.95).all()
    assert (radius > 0.05).all()  # an equilibrium that depends on nothing but the input would prove nothing


@pytest.mark.parametrize("name", ["dense", "conv", "attention"])
def test_the_explicit_network_has_the_same_weights(name: str):
    one, two = built(name), built(f"{name}-explicit")
    assert one[1].keys() == two[1].keys()
    assert all(one[1][key].tobytes() == two[1][key].tobytes() for key in one[1])
    assert one[0].equilibrium
    assert not two[0].equilibrium


def test_slow_has_the_equilibria_and_gradients_of_dense():
    (dense, weights, x, y), (slow, same, _, _) = built("dense"), built("slow")
    assert all(weights[name].tobytes() == same[name].tobytes() for name in weights)
    make = trainers()["torch"]
    config = Config(
        backend="torch",
        forward={"solver": "newton-krylov", "rtol": 1e-6, "max_steps": 30, "on_failure": "ignore"},
        # float32 reaches 2.5e-6, which the bound below allows for
        backward={"strategy": "exact-ift", "on_failure": "ignore", "options": {"rtol": 1e-6, "max_steps": 60}},
    )
    one, two = (make(model, weights, config) for model in (dense, slow))
    np.testing.assert_allclose(one.predict(x), two.predict(x), atol=1e-4)
    first, second = one.gradient(x, y, config)[1], two.gradient(x, y, config)[1]
    assert np.linalg.norm(first - second) < 1e-3 * np.linalg.norm(first)
    assert two.radius(x, config, 60).min() > 0.98
    assert one.radius(x, config, 60).max() < 0.95


def test_a_quarter_of_slows_modes_is_slow():
    torch = pytest.importorskip("torch")
    from deqcore_torch.study import TorchOps

    model, weights, _, _ = built("slow", width=32)
    p = {name: torch.from_numpy(value * (name != "W")) for name, value in weights.items()}
    unit, nothing = torch.eye(32), torch.zeros(32, 32)
    moved = model.cell(TorchOps(), p, unit, nothing) - model.cell(TorchOps(), p, nothing, nothing)
    rates = np.linalg.eigvalsh(moved.double().numpy())
    np.testing.assert_allclose(rates[:24], 0.0, atol=1e-6)
    assert rates[24:].tolist() == pytest.approx([0.9] * 4 + [1 - 0.1**1.33333] * 2 + [1 - 0.1**1.66667, 0.99], abs=1e-4)


def test_slow_wants_a_power_of_two():
    with pytest.raises(ConfigError, match=r"width must be a power of two, such as 32 \(got 24\)"):
        built("slow", width=24)


def test_attention_does_not_see_the_future():
    model, weights, x, _ = built("attention")
    trainer = trainers()["torch"](model, weights, settings("torch"))
    changed = x.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    one, two = trainer.predict(x), trainer.predict(changed)
    np.testing.assert_allclose(one[:, :-1], two[:, :-1], atol=2e-3)  # up to the solver's tolerance
    assert np.abs(one[:, -1] - two[:, -1]).max() > 0.1


def test_an_audit_judges_the_gradient_that_a_state_has_in_force():
    model, weights, x, y = built("dense")
    options = {"max_relative_error": 0.9, "max_vjps": 0}
    forward = {"solver": "picard", "rtol": 1e-5, "max_steps": 60, "on_failure": "ignore"}
    config = Config(backend="torch", forward=forward, backward={"strategy": "adaptive", "options": options})
    exact = Config(backend="torch", forward=forward, backward={"strategy": "exact-ift"})
    trainer = trainers()["torch"](model, weights, config)
    for _ in range(2):
        trainer.step(x, y, 0.0)
    before = trainer.save()["strategy_state"]
    (_, found), (_, wanted) = trainer.gradient(x, y, config), trainer.gradient(x, y, exact)
    assert np.linalg.norm(found - wanted) > 1e-2 * np.linalg.norm(wanted)
    np.testing.assert_array_equal(np.asarray(trainer.save()["strategy_state"]), np.asarray(before))
