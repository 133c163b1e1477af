"""Every error that deqcore raises, with the text that a user reads.

A message says what must hold, what was given and how to fix it. Texts that more than one place raises are class methods
of their type; a caller never composes such a sentence itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

OTHER_NAMES: Final = {
    "growth": "max_residual_growth",
    "memory": "history_size",
    "probes": "measurements",
    "refine_steps": "max_refine_vjps",
    "target": "max_relative_error",
}
"""Names of options in earlier versions, which no distance leads from to today's."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or ``""``.

    In ``forward__rtol`` and the like the section counts more than the rest, unless another section has just this rest.
    """
    import difflib  # errors alone need it

    known = list(known)
    head, mark, name = given.rpartition("__" if "__" in given else ".")
    section = {other.removeprefix(head + mark): other for other in known if other.startswith(head + mark)}
    today = OTHER_NAMES.get(name)
    near = [section[today]] if today in section else [other for other in known if mark and other.endswith(mark + name)]
    if not near:
        near = [section[other] for other in difflib.get_close_matches(name, section, n=1, cutoff=0.5)]
    if not near:
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def listing(known: Iterable[str]) -> str:
    """Return the names as a readable list."""
    return ", ".join(sorted(known)) or "none"


class DeqcoreError(Exception):
    """Base class of all errors of deqcore."""


class ConfigError(DeqcoreError, ValueError):
    """A setting is unknown, malformed or contradicts another one."""

    @classmethod
    def unknown_option(cls, owner: str, given: str, known: Iterable[str]) -> ConfigError:
        """Name an option that its owner (a solver, a strategy, a section of the config) does not have."""
        known = list(known)
        return cls(f"{owner} has no option {given!r}.{did_you_mean(given, known)} Its options are: {listing(known)}.")

    @classmethod
    def bad_value(cls, owner: str, option: str, given: object, expected: str) -> ConfigError:
        """Name an option whose value is out of range or of another type; `expected` continues "must be"."""
        return cls(f"{owner}: {option} must be {expected} (got {given!r}).")

    @classmethod
    def no_entry(cls, owner: str, what: str, given: str, known: Iterable[str]) -> ConfigError:
        """Name an entry that is not on a fixed list, which plugins cannot extend."""
        known = list(known)
        return cls(f"{owner} has no {what} {given!r}.{did_you_mean(given, known)} Available: {listing(known)}.")


class UnknownNameError(ConfigError, LookupError):
    """A solver, strategy, backend, sink, trainer or command that is not registered."""

    @classmethod
    def of(cls, kind: str, given: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
        """Name the request, the registered names and the closest match."""
        known = list(known)
        return cls(
            f"No {kind} is registered as {given!r}.{did_you_mean(given, known)} "
            f"Registered: {listing(known)}. See `deqcore plugins`.{hint}"
        )


class PluginError(DeqcoreError):
    """A plugin is broken, conflicts with another one or uses a reserved name."""

    @classmethod
    def returned(cls, method: str, given: object, expected: str) -> PluginError:
        """Name a method of a plugin whose result breaks the contract; `expected` continues "must return"."""
        return cls(f"{method} must return {expected} (got {described(given)}).")


def described(given: object) -> str:
    """Describe a value by its type and shape, not by its numbers."""
    if isinstance(given, tuple) and not hasattr(given, "_fields"):
        return f"a tuple of {len(given)} ({', '.join(described(item) for item in given)})"
    shape = getattr(given, "shape", None)
    kind = "None" if given is None else f"a {type(given).__name__}"
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"


class BackendError(DeqcoreError):
    """No backend fits, or the one that was asked for cannot do what is needed."""

    @classmethod
    def no_products(cls, reason: str) -> BackendError:
        """Explain that a solver needs products J v, which the backend, or this f, does not have."""
        return cls(
            f"The solver needs forward products J v, which are not available here: {reason} Use a solver that needs "
            f"none: anderson, broyden or picard."
        )


def installing(package: str, extra: str | None) -> str:
    """Return the command that installs a package, through the extra of deqcore that contains it, if one does."""
    return f"pip install {package}" if extra is None else f'pip install "deqcore[{extra}]"'


class MissingFrameworkError(BackendError, ImportError):
    """A backend's framework is not installed."""

    @classmethod
    def of(cls, backend: str, package: str, extra: str | None) -> MissingFrameworkError:
        """Name the extra to install, or the package itself if deqcore has no extra for it."""
        return cls(
            f"The {backend!r} backend needs the package {package!r}, which is not installed. "
            f"Install it with: {installing(package, extra)}"
        )


class MissingExtraError(DeqcoreError, ImportError):
    """A feature needs a package that is optional and not installed."""

    @classmethod
    def of(cls, feature: str, package: str, extra: str | None) -> MissingExtraError:
        """Name the extra to install, or the package itself if deqcore has no extra for it."""
        return cls(f"{feature} needs the package {package!r}. Install it with: {installing(package, extra)}")


class BackendMismatchError(BackendError, TypeError):
    """The arrays belong to another framework than the config names, or to several frameworks."""

    @classmethod
    def of(cls, configured: str, origin: str, given: str) -> BackendMismatchError:
        """Say which setting asked for which backend, and which framework the arrays belong to."""
        return cls(
            f"backend = {configured!r} (set by {origin}), but the arrays belong to {given!r}, and deqcore converts "
            f"nothing silently. Convert the arrays with deqcore.get_backend(...).asarray, or set "
            f"backend = {given!r} or 'auto'."
        )


class InitialIterateError(DeqcoreError, ValueError):
    """The initial iterate z0 does not fit: its structure, shape, dtype or device."""


class ProblemError(DeqcoreError, ValueError):
    """The result of f does not fit the iterate that it was called with, or f changed that iterate."""

    @classmethod
    def in_place(cls) -> ProblemError:
        """Explain that f wrote to z, which the solver still needs."""
        return cls(
            "f writes to its argument z in place, but the solver and the gradient still need z. Compute a new array "
            "(`torch.tanh(z)` instead of `z.tanh_()`, `z = z + x` instead of `z += x`), or begin f with a copy of z."
        )


class StrategyError(DeqcoreError, ValueError):
    """A backward strategy cannot work with this solver, backend or order of differentiation."""

    @classmethod
    def needs_estimate(cls, strategy: str, solver: str, fitting: Iterable[str]) -> StrategyError:
        """Name a strategy that reuses an estimate, and the solver that keeps none."""
        return cls(
            f"The strategy {strategy!r} reuses the solver's inverse-Jacobian estimate, but the solver {solver!r} "
            f"keeps none. Choose a solver that does ({listing(fitting)}), or another strategy."
        )


class ConvergenceError(DeqcoreError, ArithmeticError):
    """A solve ended without meeting its tolerance and on_failure = 'raise'."""


class ConvergenceWarning(UserWarning):
    """A solve ended without meeting its tolerance and on_failure = 'warn'."""


class CoupledRowsWarning(UserWarning):
    """f couples the rows of the state, but forward.batch = true treats them as independent samples."""


class DtypeToleranceWarning(UserWarning):
    """A tolerance is below what the state's dtype can reach."""


class LayerWarning(UserWarning):
    """A layer's cell has no fixed point because of what it does in each call, or a checkpoint has other settings."""


class MonitorError(DeqcoreError, RuntimeError):
    """A trigger of the monitor stops the run, or a log cannot be read."""


class MonitorWarning(UserWarning):
    """A trigger of the monitor fired, or a sink failed."""


class NonDeterministicWarning(UserWarning):
    """f returned different values for the same z: it draws random numbers (dropout), or it keeps a state."""


class DerivativeWarning(UserWarning):
    """A derivative by finite differences is not reliable, or f has a kink where it is differentiated."""
