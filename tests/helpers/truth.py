"""Independent truths: closed forms, SciPy and textbook methods, in plain NumPy and float64.

Nothing here imports deqcore. Tests get this module through the fixture `truth`.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import scipy.linalg
import scipy.optimize


def rng(seed):
    return np.random.default_rng(seed)


def matrix(seed, n, rho):
    """A random non-symmetric matrix of spectral radius rho."""
    a = rng(seed).standard_normal((n, n))
    return rho * a / np.abs(np.linalg.eigvals(a)).max()


def affine(seed, batch, n, rho):
    """f(z) = A z + b per sample; rho is one spectral radius or one per sample."""
    radii = np.broadcast_to(rho, (batch,))
    a = np.stack([matrix(1000 * seed + i, n, radii[i]) for i in range(batch)]) if batch else np.zeros((0, n, n))
    b = rng(seed).standard_normal((batch, n))
    eye = np.eye(n)
    root = np.stack([np.linalg.solve(eye - a[i], b[i]) for i in range(batch)]) if batch else b
    return SimpleNamespace(a=a, b=b, root=root, batch=batch, n=n)


def affine_map(be, problem, rows=slice(None), dtype="float64"):
    """The affine f on a backend; rows are summed one by one, so that no sample sees another."""
    a, b = be.asarray(problem.a[rows], dtype=dtype), be.asarray(problem.b[rows], dtype=dtype)
    return lambda z: be.xp.sum(a * z[:, None, :], axis=2) + b


def adjoint(jacobian, g):
    """u = (I − J)^-T g for one sample."""
    return np.linalg.solve((np.eye(len(g)) - jacobian).T, g)


def cell(seed, batch, n, m, gain=0.8):
    """tanh cell, f(z) = tanh(z Wᵀ + x Uᵀ + b) with ‖W‖₂ = gain (a contraction below 1), and its root from SciPy."""
    random = rng(seed)
    w = random.standard_normal((n, n))
    w *= gain / np.linalg.norm(w, ord=2)
    u = random.standard_normal((n, m)) / np.sqrt(m)
    b = 0.1 * random.standard_normal(n)
    x = random.standard_normal((batch, m))
    made = SimpleNamespace(w=w, u=u, b=b, x=x, batch=batch, n=n, m=m)
    made.root = np.stack([cell_root(made, x[i]) for i in range(batch)])
    return made


def cell_root(made, x):
    drive = made.u @ x + made.b
    found = scipy.optimize.root(
        lambda z: np.tanh(made.w @ z + drive) - z,
        np.zeros(made.n),
        jac=lambda z: (1 - np.tanh(made.w @ z + drive) ** 2)[:, None] * made.w - np.eye(made.n),
        tol=1e-14,
    )
    z = found.x
    for _ in range(2):  # what SciPy leaves, to rounding
        value = np.tanh(made.w @ z + drive)
        z = z + np.linalg.solve(np.eye(made.n) - (1 - value**2)[:, None] * made.w, value - z)
    assert np.linalg.norm(np.tanh(made.w @ z + drive) - z) < 1e-14 * np.sqrt(made.n)
    return z


def cell_gradients(made, g, u=None):
    """Gradients of Σ g·z* for W, U, b and x by the implicit function theorem, dense; or for a given u."""
    grads = SimpleNamespace(w=0 * made.w, u=0 * made.u, b=0 * made.b, x=0 * made.x)
    for i, z in enumerate(made.root):
        slope = 1 - np.tanh(made.w @ z + made.u @ made.x[i] + made.b) ** 2
        v = slope * (adjoint(slope[:, None] * made.w, g[i]) if u is None else u[i])
        grads.w += np.outer(v, z)
        grads.u += np.outer(v, made.x[i])
        grads.b += v
        grads.x[i] = made.u.T @ v
    return grads


def central(fun, x, h=1e-5):
    """Gradient of a scalar function at the array x, by central differences."""
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[i] += h
        minus[i] -= h
        found[i] = (fun(plus) - fun(minus)) / (2 * h)
    return found


def picard(f, z, rtol, atol=0.0, max_steps=100, damping=1.0):
    """All iterates of one sample until ‖f(z) − z‖ ≤ atol + rtol‖f(z)‖: a list of (z, f(z), residual)."""
    trace = []
    for _ in range(max_steps + 1):
        fz = f(z)
        residual = np.linalg.norm(fz - z)
        trace.append((z, fz, residual))
        if residual <= atol + rtol * np.linalg.norm(fz):
            break
        z = fz if damping == 1.0 else z + damping * (fz - z)
    return trace


def broyden(f, z, steps):
    """Broyden's good method with B₀ = −I, dense, by definition: iterates, and H = B^-1 after each step."""
    b = -np.eye(len(z))
    g = f(z) - z
    iterates, inverses = [z], [np.linalg.inv(b)]
    for _ in range(steps):
        s = -np.linalg.solve(b, g)
        z = z + s
        new = f(z) - z
        b = b + np.outer(new - g - b @ s, s) / (s @ s)
        g = new
        iterates.append(z)
        inverses.append(np.linalg.inv(b))
    return iterates, inverses


def anderson(f, z, steps, memory, mixing=1.0):
    """Type-II Anderson by a least-squares solver: iterates of one sample."""
    iterates, values, residuals = [z], [], []
    for _ in range(steps):
        fz = f(z)
        values, residuals = [*values, fz], [*residuals, fz - z]
        values, residuals = values[-memory - 1 :], residuals[-memory - 1 :]
        g, bar = residuals[-1], fz
        if len(values) > 1:
            dg = np.diff(np.array(residuals), axis=0).T
            df = np.diff(np.array(values), axis=0).T
            gamma = scipy.linalg.lstsq(dg, g, lapack_driver="gelsy", cond=1e-15)[0]
            bar, g = fz - df @ gamma, g - dg @ gamma
        z = bar - (1 - mixing) * g
        iterates.append(z)
    return iterates


def krylov_residuals(a, b, steps):
    """‖b − A x‖ of the best x in each Krylov space of dimension 0 … steps, by dense least squares."""
    found, basis, v = [np.linalg.norm(b)], np.zeros((len(b), 0)), b
    for _ in range(steps):
        basis, _ = np.linalg.qr(np.column_stack([basis, v]))
        y = np.linalg.lstsq(a @ basis, b, rcond=1e-13)[0]
        found.append(np.linalg.norm(b - a @ basis @ y))
        v = a @ basis[:, -1]
    return found
