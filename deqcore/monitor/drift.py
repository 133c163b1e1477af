"""Drift of a served model: residuals and steps against a reference profile that was saved with it.

The solver of a DEQ shows that inputs have moved away from the training data: residuals and steps change before labels
are available. Two measures, per sample:

    population stability index   Σ_b (p_b − q_b) ln(p_b / q_b) over bins that each hold a tenth of the reference
    Kolmogorov–Smirnov           sup |F(x) − G(x)|, with its p-value, from SciPy

Rules of thumb from credit scoring: an index below 0.1 means no drift, one above 0.25 means drift. Residuals are
compared by their logarithm, so that a factor has the same weight at any size.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.errors import ConfigError, MissingExtraError
from deqcore.monitor.triggers import Trigger
from deqcore.plugins.lookup import is_installed

HostArray: TypeAlias = NDArray[np.float64]

MAX_SAMPLES: Final = 4096  # samples of a profile
WINDOW: Final = 1024  # latest samples that are compared
MIN_SAMPLES: Final = 256  # new samples before the measures are taken (again)
BINS: Final = 10
VERSION: Final = 1

# What is compared: metric's short name -> part of a solve's arrays.
PARTS: Final[Mapping[str, str]] = {"residual": "forward.residual", "steps": "forward.steps"}

METRICS: Final = frozenset(f"deq_{name}_{measure}" for name in PARTS for measure in ("psi", "ks", "ks_pvalue"))
TRIGGERS: Final = tuple(
    Trigger(f"deq_{name}_{measure}", f"> {limit}", action="retrain", window=1)
    for name in PARTS
    for measure, limit in (("psi", 0.25), ("ks", 0.2))
)


@dataclass(frozen=True, eq=False)
class Profile:
    """Residuals and steps of a healthy model, one number per sample.

    Attributes:
        samples: by name ("residual", "steps"), `(n,)` of float; residuals that are not finite are inf.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore.monitor import Monitor
        >>> with Monitor(sinks=[]) as monitor:
        ...     _ = deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((256, 2)))
        >>> monitor.profile().samples["steps"].shape
        (256,)
    """

    samples: Mapping[str, HostArray]

    def __post_init__(self) -> None:
        if set(self.samples) != set(PARTS) or any(
            array.ndim != 1 or array.size < MIN_SAMPLES or np.isnan(array).any() for array in self.samples.values()
        ):
            sizes = {name: array.shape for name, array in self.samples.items()}
            raise ConfigError(
                f"A profile must have {' and '.join(PARTS)} of at least {MIN_SAMPLES} samples each (got {sizes}). "
                f"Monitor more solves before you call monitor.profile()."
            )

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, or as safetensors if the file name ends in .safetensors.

        Raises:
            ConfigError: the file has another ending.
            MissingExtraError: safetensors is not installed.
        """
        path = Path(path)
        if _is_safetensors(path):
            from safetensors.numpy import save_file

            arrays = {name: np.ascontiguousarray(array) for name, array in self.samples.items()}
            save_file(arrays, path, metadata={"deqcore.profile": str(VERSION)})
            return
        lists = {name: [_text(value) for value in array.tolist()] for name, array in self.samples.items()}
        path.write_text(json.dumps({"deqcore.profile": VERSION, **lists}, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file does not exist, or it is not a profile.
            MissingExtraError: safetensors is not installed.
        """
        path = Path(path)
        try:
            if _is_safetensors(path):
                from safetensors.numpy import load_file

                result: Mapping[str, Any] = load_file(path)
            else:
                result = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(result, dict) or result.pop("deqcore.profile", None) != VERSION:
                    raise ValueError(f"it is not a profile of version {VERSION}")
            return cls({name: np.asarray(array, np.float64) for name, array in result.items()})
        except (MissingExtraError, ConfigError):
            raise
        except FileNotFoundError:
            raise ConfigError(
                f"The reference profile {str(path)!r} does not exist. Write one with monitor.profile().save(path)."
            ) from None
        except Exception as error:
            raise ConfigError(f"The reference profile {str(path)!r} cannot be read: {error}.") from error


class Samples:
    """The latest samples that a monitor has seen."""

    def __init__(self) -> None:
        self._arrays: dict[str, deque[HostArray]] = {name: deque() for name in PARTS}
        self.seen = 0

    def add(self, host: Mapping[str, HostArray]) -> None:
        """Take the arrays of one solve."""
        residual = host.get(PARTS["residual"])
        if residual is None or np.isnan(residual).all():
            return
        for name, part in PARTS.items():
            array = np.where(np.isnan(host[part]), np.inf, host[part])
            kept = self._arrays[name]
            kept.append(array)
            while sum(map(len, kept)) - len(kept[0]) >= MAX_SAMPLES:
                kept.popleft()
        self.seen += residual.size

    def latest(self, count: int) -> dict[str, HostArray]:
        """Return the latest samples, `count` at most."""
        return {name: np.concatenate([*kept, np.empty(0)])[-count:] for name, kept in self._arrays.items()}

    def profile(self) -> Profile:
        """Return all kept samples as a reference."""
        return Profile(self.latest(MAX_SAMPLES))


class DriftDetector:
    """Compares the latest samples with a reference whenever there are enough new ones."""

    def __init__(self, reference: Profile) -> None:
        self._reference = {name: _scale(name, array) for name, array in reference.samples.items()}
        self._last = 0

    def measure(self, samples: Samples) -> dict[str, float]:
        """Return the drift metrics, or an empty dict if there are too few new samples."""
        if samples.seen - self._last < MIN_SAMPLES:
            return {}
        self._last = samples.seen
        results: dict[str, float] = {}
        for name, array in samples.latest(WINDOW).items():
            now, reference = _scale(name, array), self._reference[name]
            distance, pvalue = kolmogorov_smirnov(reference, now)
            results[f"deq_{name}_psi"] = stability_index(reference, now)
            results[f"deq_{name}_ks"] = distance
            results[f"deq_{name}_ks_pvalue"] = pvalue
        return results


def stability_index(reference: HostArray, now: HostArray) -> float:
    """Return the population stability index of `now` against `reference`; both `(n,)`.

    Bins are quantiles of the reference, merged where it has ties. Half a sample is added to every bin, so that an
    empty one does not make the index infinite.
    """
    inner = np.unique(np.quantile(reference, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    p, q = (_shares(array, inner) for array in (now, reference))
    return float(((p - q) * np.log(p / q)).sum())


def kolmogorov_smirnov(reference: HostArray, now: HostArray) -> tuple[float, float]:
    """Return the two-sample distance and its p-value."""
    from scipy.stats import ks_2samp

    result: Any = ks_2samp(reference, now, method="asymp")
    return float(result.statistic), float(result.pvalue)


def _shares(array: HostArray, inner: HostArray) -> HostArray:
    counts = np.bincount(np.searchsorted(inner, array, side="left"), minlength=inner.size + 1) + 0.5
    shares: HostArray = counts / counts.sum()
    return shares


def _scale(name: str, array: HostArray) -> HostArray:
    if name != "residual":
        return array
    scaled: HostArray = np.log10(np.maximum(array, np.finfo(np.float64).tiny))
    return scaled


def _is_safetensors(path: Path) -> bool:
    if path.suffix not in (".json", ".safetensors"):
        raise ConfigError.bad_value("Profile", "path", str(path), "a file that ends in .json or .safetensors")
    if path.suffix == ".safetensors" and not is_installed("safetensors"):
        raise MissingExtraError.of("A profile as safetensors", "safetensors", "monitor")
    return path.suffix == ".safetensors"


def _text(value: float) -> float | str:
    return value if np.isfinite(value) else "inf"
