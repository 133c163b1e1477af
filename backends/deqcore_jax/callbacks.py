"""A monitor inside compiled code: a host callback passes the figures of a solve to it.

    @jax.jit
    def step(params, x):
        sol = deqcore.fixed_point(f, z0, params, x)
        deqcore_jax.callbacks.observe(monitor, sol)
        ...

    with Monitor(...) as monitor, deqcore_jax.callbacks.collecting(monitor):
        for x in data:
            params = step(params, x)
            monitor.advance()

The call is explicit, because compiled code is reused wherever its function is called: it reports to the monitor that
it was traced with. The callback is asynchronous and unordered and takes numbers only; triggers and sinks run in
`monitor.advance()` and at the end, in the thread that trains. `deqcore_jax.adjoint_tap` reports backward passes: pass
its figures to `monitor.observe_backward(adjoint_tap.read(figures))` outside `jit`, or to `observe_backward` inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np

from deqcore.api import get_backend
from deqcore.monitor.monitor import Monitor
from deqcore.solution import Solution
from deqcore.types import AdjointReport
from deqcore_jax import adjoint_tap


def observe(monitor: Monitor, solution: Solution, *, name: str = "") -> None:
    """Report a solution from inside `jit`; it also works outside.

    Under `vmap` every lane is a separate solve.

    Args:
        monitor: the monitor, which gets a row each time that the compiled code runs.
        solution: the result of `fixed_point`.
        name: name of the layer.

    Example:
        >>> import jax, jax.numpy as jnp, deqcore
        >>> from deqcore.monitor import Monitor
        >>> with Monitor(sinks=[]) as monitor, collecting(monitor):
        ...     @jax.jit
        ...     def step(x):
        ...         sol = deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x)
        ...         observe(monitor, sol, name="layer")
        ...         return sol.value
        ...     _ = step(jnp.ones((2, 3)))
    """
    monitor.learn(solution)
    arrays = (solution.residual, solution.status, solution.steps, solution.evaluations)
    jax.debug.callback(partial(_solved, monitor, name), *arrays)


def observe_backward(monitor: Monitor, figures: adjoint_tap.AdjointTap, *, name: str = "") -> None:
    """Report a backward pass from inside `jit`.

    Args:
        monitor: the monitor, which gets a row each time that the compiled code runs.
        figures: the gradient with respect to an adjoint tap.
        name: name of the layer.

    Example:
        >>> import jax, jax.numpy as jnp, deqcore
        >>> def loss(figures, x):
        ...     with adjoint_tap.reporting(figures):
        ...         return deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x).value.sum()
        >>> with deqcore.monitor.Monitor(sinks=[]) as monitor, collecting(monitor):
        ...     @jax.jit
        ...     def step(x):
        ...         observe_backward(monitor, jax.grad(loss)(adjoint_tap.new(2), x))
        ...     step(jnp.ones((2, 3)))
        >>> monitor.rows[-1].values["deq_backward_steps"] > 0
        True
    """
    jax.debug.callback(partial(_differentiated, monitor, name), adjoint_tap.read(figures))


@contextmanager
def collecting(monitor: Monitor) -> Iterator[None]:
    """Wait at the end of the block until all callbacks have run. Use it inside the monitor's own block.

    The monitor then assumes that compiled code reports by `observe`, and does not warn about solves that it cannot see.

    Example:
        >>> import jax.numpy as jnp, deqcore
        >>> with deqcore.monitor.Monitor(sinks=[]) as monitor, collecting(monitor):
        ...     _ = jax.jit(lambda x: observe(monitor, deqcore.fixed_point(jnp.cos, x)))(jnp.ones((2, 1)))
        >>> len(monitor.rows)
        1
    """
    monitor.collects = True
    try:
        yield
    finally:
        jax.effects_barrier()


def _solved(
    monitor: Monitor, name: str, residual: jax.Array, status: jax.Array, steps: jax.Array, evaluations: jax.Array
) -> None:
    solution = Solution(
        value=None,
        residual=np.asarray(residual),
        status=np.asarray(status),
        steps=np.asarray(steps),
        evaluations=np.asarray(evaluations),
        state=None,
        backend=get_backend(backend="numpy"),
    )
    monitor.observe(solution, name=name, defer=True)


def _differentiated(monitor: Monitor, name: str, report: AdjointReport) -> None:
    monitor.observe_backward(AdjointReport(*[np.asarray(array) for array in report]), name=name)
