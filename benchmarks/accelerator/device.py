"""What measuring needs of a device: harness, peak memory, waits, clock of its queue, a description."""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.harnesses import torch_harness
from deqcore.bench.harness import Contender, Harness, Ready

QUEUED: Final = 10  # evaluations of f in a row: the cost of f in a queue without a host wait
ASKED: Final = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
SAID: Final = "synchronizing CUDA operation"  # torch's own words for a wait, see `set_sync_debug_mode`


def harness(device: str, dtype: str) -> Harness:
    """Eager PyTorch there: residuals and peaks are taken on the device, f is timed in a queue."""
    made = replace(torch_harness(device, dtype), relative=relative, queued=QUEUED)
    return replace(made, peak=peak_allocated) if device == "cuda" else made


def relative(z: Tensor, fz: Tensor) -> Any:
    """‖f(z) − z‖ / ‖f(z)‖ per sample in float64, one sample at a time: a large batch has no room for its copy."""
    result = []
    for one, image in zip(z, fz, strict=True):
        wide = image.double()
        result.append((wide - one.double()).norm() / wide.norm().clamp(min=1e-300))
    return torch.stack(result).cpu().numpy()


def peak_allocated(task: Callable[[], object]) -> int:
    """Return the bytes that tensors took beyond those from before, at most, while `task` ran."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    task()
    return int(torch.cuda.max_memory_allocated()) - before


def waits(measured: Harness, ready: Ready, contender: Contender, tolerance: float) -> int | None:
    """Return how often one solve makes the host wait for the device; None where there is none to wait for."""
    if not ready.z0.is_cuda:
        return None
    unasked = replace(measured, block=lambda _: None, to_numpy=lambda _: np.zeros(1))  # the benchmark's own waits
    solve = contender.prepare(unasked, ready, ready.case.max_steps)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return counted_warnings(lambda: solve(tolerance), SAID)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def counted_warnings(task: Callable[[], object], words: str) -> int:
    """Return how many warnings with these words `task` gives."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        task()
    return sum(words in str(item.message) for item in given)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether float32 convolutions may round their factors to ten bits, as torch allows by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Laps:
    """Seconds between marks: on a device in its own queue, so that nothing waits before `seconds` is called."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [1e-3 * a.elapsed_time(b) for a, b in pairs]
        return [b - a for a, b in pairs]


def settle(device: str) -> None:
    """Wait, and give memory that is not in use back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def describe_device(device: str) -> dict[str, Any]:
    """Return the name, driver, clocks as found; the precision that torch takes for float32."""
    results: dict[str, Any] = {
        "device": device,
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matrix products": torch.backends.cuda.matmul.allow_tf32,
        },
    }
    if device != "cuda":
        return results
    properties = torch.cuda.get_device_properties(0)
    results |= {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    return results | smi()


def smi() -> dict[str, str]:
    """Return the driver, clocks, power and temperature as nvidia-smi reports them; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return {}
    return dict(zip(ASKED.split(","), done.stdout.splitlines()[0].split(", "), strict=False))
