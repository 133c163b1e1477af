"""What users of jaxopt and optimistix bring along: their own solvers, steps, aux, numbers and flags in the state."""

import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import deqcore  # noqa: E402

# Plain iteration on both sides compiles fastest.
TIGHT = {"forward__solver": "picard", "forward__rtol": 1e-5, "backward__options": {"rtol": 1e-5, "solver": "picard"}}
A = 0.5
Z = 0.4501836  # 0.5 cos(z) = z
SLOPE = 0.7395  # cos(z) / (1 + 0.5 sin(z))


def f(z, a):
    return a * jnp.cos(z)


def by_while(z0, a):
    return jax.lax.while_loop(lambda z: jnp.abs(f(z, a) - z).max() > 1e-6, lambda z: f(z, a), z0)


def test_a_loop_that_jax_cannot_reverse_gets_the_implicit_gradient():
    solver = deqcore.custom_fixed_point(f, **TIGHT)(by_while)
    loss = lambda a: solver(jnp.ones((1, 1)), a).sum()
    assert jax.jvp(loss, (A,), (1.0,))[1] == pytest.approx(SLOPE, abs=1e-3)
    several = jax.vmap(jax.grad(loss))(jnp.array([A, A]))
    assert several.tolist() == pytest.approx([SLOPE] * 2, abs=1e-3)


def test_a_loop_that_closes_over_its_parameter_does_so_too():
    def loss(a):
        solver = deqcore.custom_fixed_point(lambda z: f(z, a), **TIGHT)(lambda z0: by_while(z0, a))
        return solver(jnp.ones((1, 1))).sum()

    assert jax.grad(loss)(A) == pytest.approx(SLOPE, abs=1e-3)


def test_a_root_of_ones_own_solver():
    solver = deqcore.custom_root(lambda z, a: z**2 - a, backward__options={"rtol": 1e-5})(
        lambda z0, a: jnp.sqrt(a) + 0 * z0
    )
    assert jax.grad(lambda a: solver(jnp.ones((1, 1)), a).sum())(4.0) == pytest.approx(0.25, abs=1e-5)


def test_a_step_at_a_time_inside_and_outside_of_jit():
    stepper = deqcore.Stepper(f, overrides={"forward__solver": "picard", "forward__rtol": 1e-5})

    @jax.jit
    def whole(a):
        start = stepper.init(jnp.ones((1, 1)), a)
        return jax.lax.while_loop(lambda s: ~s.converged.all(), lambda s: stepper.update(s, a), start)

    sol, update = stepper.init(jnp.ones((1, 1)), A), jax.jit(stepper.update)
    while not bool(sol.converged.all()):
        sol = update(sol, A)
    assert float(sol.value[0, 0]) == pytest.approx(Z, abs=1e-5)
    assert int(whole(A).steps[0]) == int(sol.steps[0])
    assert "CONVERGED" in repr(sol)


def test_numbers_flags_and_counters_in_the_state():
    def g(s, a):
        moved = jnp.where(s["mask"], a * jnp.cos(s["z"]), 0.0)
        return {"z": moved, "mask": s["mask"], "count": s["count"] + 1}

    def value(a, mask):
        z0 = {"z": jnp.ones((1, 2)), "mask": mask, "count": 0}
        sol = deqcore.fixed_point(g, z0, a, **TIGHT)
        assert sol.value["count"] == 0
        return sol.value["z"].sum()

    mask = jnp.array([[True, False]])
    assert value(A, mask) == pytest.approx(Z, abs=1e-5)
    assert jax.jit(jax.grad(value))(A, mask) == pytest.approx(SLOPE, abs=1e-3)
    loss = lambda a: deqcore.fixed_point(f, 1.0, a, forward__batch=False, backend="jax", **TIGHT).value
    assert jax.grad(loss)(A) == pytest.approx(SLOPE, abs=1e-3)


def test_aux_has_its_gradient():
    g = lambda z, a: (f(z, a), z.sum())
    loss = lambda a: deqcore.fixed_point(g, jnp.ones((1, 1)), a, has_aux=True, **TIGHT).aux
    assert jax.jit(loss)(A) == pytest.approx(Z, abs=1e-5)
    assert jax.grad(loss)(A) == pytest.approx(SLOPE, abs=1e-3)


def test_without_jit_f_runs_on_values():
    seen = []

    def g(z, a):
        seen.append(float(z.sum()))
        return f(z, a)

    with jax.disable_jit():
        sol = deqcore.fixed_point(g, jnp.ones((1, 1)), A, **TIGHT)
    assert seen[0] == 1.0
    assert len(seen) == int(sol.evaluations[0])
    assert float(sol.value[0, 0]) == pytest.approx(Z, abs=1e-5)
