"""The ceilings of this machine: the speed of a large matmul in the compute dtype, and of copying memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# Large enough to be compute-bound, small enough for a laptop: 2 x 4 MB on a CPU, 3 x 128 MB on a GPU.
_MATMUL = {"cpu": 1024, "cuda": 8192}
# Many times the last-level cache.
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_REPEATS = 9
# A processor without bfloat16 units takes three seconds for one such product.
_LONGEST_S = 3.0


def measure_ceilings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Measures ``matmul_flops_per_s`` of a square matmul in ``dtype`` and ``copy_bytes_per_s`` (read and written). Each is the
    fastest of nine runs (fewer if they take seconds): other load on the machine can only slow them down."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul": _MATMUL[device],
        "matmul_flops_per_s": matmul_speed(device, dtype),
        "copy_bytes_per_s": copy_speed(device),
    }


def copy_speed(device: str) -> float:
    """Measures bytes per second, read and written: the fastest of nine runs."""
    source = torch.ones(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * _COPY_BYTES[device] / min(_seconds(lambda: target.copy_(source), device))


def matmul_speed(device: str, dtype: torch.dtype) -> float:
    """Measures operations per second: the fastest of nine runs."""
    n = _MATMUL[device]
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    return 2.0 * n**3 / min(_seconds(lambda: torch.mm(a, b), device))


def _seconds(run: Callable[[], object], device: str) -> list[float]:
    seconds: list[float] = []
    while len(seconds) < _REPEATS + 2 and sum(seconds) < _LONGEST_S:
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds[2:] or seconds  # the first runs start threads and libraries


def wait(device: str) -> None:
    """Waits until ``device`` has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
