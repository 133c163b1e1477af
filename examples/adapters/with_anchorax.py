"""anchorax: solvers of one problem; its gradients (Jacobian-free, GDEQ) are approximations, so none is judged."""

from dataclasses import dataclass, field

from common import JaxSolver


@dataclass(frozen=True)
class Picard(JaxSolver):
    """One of `anchorax.solvers`."""

    packages = ("anchorax", "jax")
    claims = frozenset({"batch"})
    best = {"stop_mode": "rel"}  # noqa: RUF012

    method: str = field(default="picard", kw_only=True)
    stop_mode: str = field(default="abs", kw_only=True)

    def one(self, f, z0, args, rtol, max_steps):
        import jax
        from anchorax import solvers

        z, *_ = getattr(solvers, self.method)(
            None, lambda u, _, **_settings: f(u, *args), z0, u0=z0, eps=rtol, max_depth=max_steps,
            stop_mode=self.stop_mode, key=jax.random.PRNGKey(0),
        )  # fmt: skip
        return z, None, None


@dataclass(frozen=True)
class Anderson(Picard):
    method: str = field(default="anderson", kw_only=True)


@dataclass(frozen=True)
class Broyden(Picard):
    method: str = field(default="broyden", kw_only=True)
