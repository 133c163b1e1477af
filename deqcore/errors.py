"""Every error that deqcore raises, with the text that a user reads.

A message says what was given, what was expected and what to do next. Texts that more than one place raises
live here beside their type, as class methods; a caller never composes such a sentence itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def listing(known: Iterable[str]) -> str:
    """Return the known names as a readable list."""
    return ", ".join(sorted(known)) or "none"


class DeqcoreError(Exception):
    """Base class of all errors of deqcore."""


class ConfigError(DeqcoreError, ValueError):
    """A setting is unknown, malformed or contradicts another one."""

    @classmethod
    def unknown_option(cls, owner: str, given: str, known: Iterable[str]) -> ConfigError:
        """Return an option that its owner (a solver, a strategy, a section of the config) does not have."""
        known = list(known)
        return cls(f"{owner} has no option {given!r}.{did_you_mean(given, known)} Its options are: {listing(known)}.")

    @classmethod
    def bad_value(cls, owner: str, option: str, given: object, expected: str) -> ConfigError:
        """Return an option whose value is out of range or of another type."""
        return cls(f"{owner}: {option} = {given!r}, but {expected} is expected.")

    @classmethod
    def no_entry(cls, owner: str, what: str, given: str, known: Iterable[str]) -> ConfigError:
        """Return a name that is none of a fixed list, which no plugin can make longer."""
        known = list(known)
        return cls(f"{owner}: there is no {what} {given!r}.{did_you_mean(given, known)} There are: {listing(known)}.")


class UnknownNameError(ConfigError, LookupError):
    """A solver, strategy, backend, sink, trainer or command that nobody registered."""

    @classmethod
    def of(cls, kind: str, given: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
        """Name what was asked for, what exists, and the nearest match."""
        known = list(known)
        return cls(
            f"No {kind} is registered as {given!r}.{did_you_mean(given, known)} "
            f"Registered: {listing(known)}. See `deqcore plugins`.{hint}"
        )


class PluginError(DeqcoreError):
    """A plugin is broken, conflicts with another one or uses a reserved name."""

    @classmethod
    def returned(cls, method: str, given: object, expected: str) -> PluginError:
        """Return a method of a solver or strategy that returned something else than its contract says."""
        return cls(f"{method} returned {described(given)}, but {expected} is expected.")


def described(given: object) -> str:
    """Return a value in a few words: its shape or what it is a tuple of, not its numbers."""
    if isinstance(given, tuple) and not hasattr(given, "_fields"):
        return f"a tuple of {len(given)} ({', '.join(described(each) for each in given)})"
    shape = getattr(given, "shape", None)
    kind = "None" if given is None else f"a {type(given).__name__}"
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"


class BackendError(DeqcoreError):
    """No backend fits, or the one that was asked for cannot do what is needed."""

    @classmethod
    def no_products(cls, reason: str) -> BackendError:
        """Return a product J v that a solver needs and the backend, or this f, does not have."""
        return cls(
            f"The solver needs forward products J v, which cannot be had here: {reason} Use a solver that needs none: "
            f"anderson, broyden or picard."
        )


def installing(package: str, extra: str | None) -> str:
    """Return the command that installs a package, by way of the extra of deqcore that has it, if one does."""
    return f"pip install {package}" if extra is None else f'pip install "deqcore[{extra}]"'


class MissingFrameworkError(BackendError, ImportError):
    """A backend's framework is not installed."""

    @classmethod
    def of(cls, backend: str, package: str, extra: str | None) -> MissingFrameworkError:
        """Name the extra to install, or the package itself where deqcore has no extra for it."""
        return cls(
            f"The {backend!r} backend needs the package {package!r}, which is not installed. "
            f"Install it with: {installing(package, extra)}"
        )


class MissingExtraError(DeqcoreError, ImportError):
    """A feature needs a package that is optional and not installed."""

    @classmethod
    def of(cls, feature: str, package: str, extra: str) -> MissingExtraError:
        """Name the extra to install."""
        return cls(f'{feature} needs the package {package!r}. Install it with: pip install "deqcore[{extra}]"')


class BackendMismatchError(BackendError, TypeError):
    """The arrays belong to another framework than the config names, or to several frameworks."""

    @classmethod
    def of(cls, configured: str, origin: str, found: str) -> BackendMismatchError:
        """Say which setting asked for which backend, and whose arrays came."""
        return cls(
            f"backend = {configured!r} (set by {origin}), but the arrays given belong to {found!r}. Nothing is "
            f"converted silently: convert the arrays with deqcore.get_backend(...).asarray, or set "
            f"backend = {found!r} or 'auto'."
        )


class InitialIterateError(DeqcoreError, ValueError):
    """The initial state cannot be solved for: its structure, shape, dtype or device is unfit."""


class ProblemError(DeqcoreError, ValueError):
    """What f returned does not fit the state that it was given, or f changed that state."""

    @classmethod
    def in_place(cls) -> ProblemError:
        """Return f wrote to its state, which the solver still needs."""
        return cls(
            "f writes to its state z in place, which the solver and the gradient still need: compute a new array, as "
            "in `torch.tanh(z)` for `z.tanh_()`, `z = z + x` for `z += x`, or begin f with a copy of z."
        )


class StrategyError(DeqcoreError, ValueError):
    """A backward strategy cannot work with this solver, backend or order of differentiation."""

    @classmethod
    def needs_estimate(cls, strategy: str, solver: str, fitting: Iterable[str]) -> StrategyError:
        """Return a strategy that reuses an estimate, with a solver that leaves none."""
        return cls(
            f"The strategy {strategy!r} reuses the solver's inverse-Jacobian estimate, but the solver {solver!r} "
            f"keeps none. Solvers that do: {listing(fitting)}. Choose one of them, or another strategy."
        )


class ConvergenceError(DeqcoreError, ArithmeticError):
    """A solve ended without meeting its tolerance and on_failure = 'raise'."""


class ConvergenceWarning(UserWarning):
    """A solve ended without meeting its tolerance and on_failure = 'warn'."""


class CoupledRowsWarning(UserWarning):
    """f couples the rows of the state, which forward.batch = true takes for independent samples."""


class DtypeToleranceWarning(UserWarning):
    """A tolerance below what the state's dtype can reach."""


class LayerWarning(UserWarning):
    """A layer's cell does something that a fixed point does not survive, or a checkpoint has other settings."""


class MonitorError(DeqcoreError, RuntimeError):
    """A trigger of the monitor says that the run must stop, or a log cannot be read."""


class MonitorWarning(UserWarning):
    """What the monitor has to tell: a trigger fired, or a sink failed."""


class NonDeterministicWarning(UserWarning):
    """f gave different values for the same state: dropout or other random numbers, or a state of its own."""


class DerivativeWarning(UserWarning):
    """A derivative by finite differences is not reliable, or f has a kink where it is differentiated."""
