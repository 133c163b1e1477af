"""jaxopt's page "Fixed point resolution", in deqcore."""

import jax
import jax.numpy as jnp

import deqcore


def T(z, theta):
    """Return a contraction of z, whose fixed point is θ / 2."""
    return 0.5 * z + 0.25 * theta


def main():
    theta = jnp.array([1.0, -2.0, 4.0])
    z0 = jnp.zeros(3)

    # FixedPointIteration(T, maxiter=50, tol=1e-5).run(z0, theta); forward__batch=False: one system
    plain = deqcore.fixed_point(
        T, z0, theta, forward__solver="picard", forward__max_steps=50, forward__rtol=1e-5, forward__batch=False
    )

    # AndersonAcceleration(T, history_size=5, beta=1.0).run(z0, theta)
    anderson = deqcore.fixed_point(
        T,
        z0,
        theta,
        forward__solver="anderson",
        forward__options={"history_size": 5, "mixing": 1.0},
        forward__rtol=1e-5,
        forward__batch=False,
    )

    # jax.jacobian(lambda theta: fpi.run(z0, theta).params)(theta), with implicit_diff=True
    def solution(theta):
        return deqcore.fixed_point(T, z0, theta, forward__rtol=1e-6, forward__batch=False).value

    jacobian = jax.jacobian(solution)(theta)

    # jax.vmap(fpi.run): with a batch axis no vmap is needed, and each row stops on its own
    several = deqcore.fixed_point(T, jnp.zeros((2, 3)), jnp.stack([theta, -theta]), forward__rtol=1e-5)
    return plain, anderson, jacobian, several


if __name__ == "__main__":
    plain, anderson, jacobian, several = main()
    print(f"picard   {plain.value} in {plain.steps} steps, residual {plain.residual}")
    print(f"anderson {anderson.value} in {anderson.steps} steps, residual {anderson.residual}")
    print(f"jacobian of the solution\n{jacobian}")
    print(several)
