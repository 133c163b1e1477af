"""States that are NamedTuples, dataclasses, dicts with other leaves, or single numbers, in every framework."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import optree
import pytest

import deqcore
from deqcore.errors import InitialIterateError

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Pair(NamedTuple):
    position: object
    speed: object


@dataclass
class State:
    position: object
    speed: object


@dataclass
class Other:
    position: object


def registered(every):
    """Register `State` as each framework does, once."""
    if every.name == "jax":
        import jax

        register = lambda: jax.tree_util.register_dataclass(State, ["position", "speed"], [])
    elif every.name == "torch":
        import torch.utils._pytree as pytree

        register = lambda: pytree.register_pytree_node(
            State, lambda s: ([s.position, s.speed], None), lambda children, _: State(*children)
        )
    else:
        register = lambda: optree.register_pytree_node(
            State, lambda s: ((s.position, s.speed), None), lambda _, children: State(*children), namespace="deqcore"
        )
    with contextlib.suppress(ValueError):  # an earlier test registered it
        register()
    return State


@pytest.mark.parametrize("kind", ["named tuple", "dataclass"])
@pytest.mark.supports(
    "NamedTuples and registered dataclasses as states", backends="numpy torch jax", strategies="exact-ift"
)
def test_a_state_keeps_its_class_and_gradients_reach_arguments(every, kind):
    make = Pair if kind == "named tuple" else registered(every)
    x = every.asarray(np.array([[1.0, 2.0]]))

    def f(z, x):
        assert type(z) is make
        return make(0.5 * z.position + z.speed, 0.25 * x)

    settings = {"forward__rtol": 1e-10, "forward__solver": "picard"}
    z, (dx,) = deqcore.vjp(f, make(0 * x, 0 * x), x, cotangent=make(1 + 0 * x, 0 * x), **settings)
    assert type(z) is make
    assert every.to_numpy(z.position) == pytest.approx(np.array([[0.5, 1.0]]), abs=1e-8)
    assert every.to_numpy(dx) == pytest.approx(0.5 * np.ones((1, 2)), abs=1e-5)


@pytest.mark.supports(
    "dataclasses that are not registered", backends="numpy torch jax", strategies="any", answer="refused"
)
def test_a_dataclass_that_is_no_tree_is_refused_with_the_registration(every):
    state = Other(every.asarray(np.ones((1, 2))))
    words = {"jax": "register_dataclass", "torch": "register_pytree_node", "numpy": "optree.dataclasses.dataclass"}
    with pytest.raises(InitialIterateError, match=rf"got a Other\).*{words[every.name]}"):
        deqcore.fixed_point(lambda z: z, state)


@pytest.mark.supports("integers and flags in a state", backends="numpy torch jax", strategies="any")
def test_counts_flags_and_names_ride_along_unchanged(every):
    z0 = {"h": every.asarray(np.zeros((2, 1))), "mask": every.asarray(np.array([True, False])), "depth": 3, "on": True}

    def f(z):
        return {**z, "h": 0.5 * z["h"] + z["depth"], "depth": z["depth"] + 1}

    value = deqcore.fixed_point(f, z0, forward__rtol=1e-10, forward__solver="picard").value
    assert every.to_numpy(value["h"]) == pytest.approx(6.0 * np.ones((2, 1)), abs=1e-7)
    assert every.to_numpy(value["mask"]).tolist() == [True, False]
    assert (value["depth"], value["on"]) == (3, True)


@pytest.mark.parametrize(("shape", "batch"), [((1, 1), True), ((1,), False), ((), False)])
@pytest.mark.supports("states of one number", backends="numpy torch jax", strategies="exact-ift")
def test_states_of_one_number(every, shape, batch):
    x = every.asarray(np.full(shape, 3.0))
    settings = {"forward__batch": batch, "forward__rtol": 1e-10, "forward__solver": "anderson"}
    z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, 0 * x, x, cotangent=1 + 0 * x, **settings)
    assert tuple(z.shape) == shape
    assert every.to_numpy(z) == pytest.approx(np.full(shape, 6.0), rel=1e-8)
    assert every.to_numpy(dx) == pytest.approx(np.full(shape, 2.0), rel=1e-6)


def test_a_warm_start_of_a_layer_keeps_other_leaves():
    torch = pytest.importorskip("torch")
    from deqcore_torch.nn import DEQ

    class Cell(torch.nn.Module):
        def initial_state(self, x):
            return {"h": torch.zeros_like(x), "depth": 2}

        def forward(self, z, x):
            return {"h": 0.5 * z["h"] + z["depth"] * x, "depth": z["depth"]}

    layer = DEQ(Cell(), reuse="batch", forward__rtol=1e-5)
    x = torch.ones(2, 3)
    first, second = layer.solve(x), layer.solve(x)
    assert torch.allclose(second.value["h"], torch.full((2, 3), 4.0), atol=1e-3)
    assert second.value["depth"] == 2
    assert second.steps.max() < first.steps.max()
