"""Current and peak memory: of the CUDA allocator, or of this process on a CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_M_ARENA_MAX = -8  # malloc.h of glibc
_frozen = False  # inside of frozen_heap; gc.get_freeze_count walks over all frozen objects


def memory_bytes(device_type: str) -> int:
    """Returns the bytes in use.

    Args:
        device_type: "cuda": memory of tensors on the current device; otherwise: resident memory of this process.
    """
    if device_type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device_type: str) -> int:
    """Returns the peak bytes in use since ``torch.cuda.reset_peak_memory_stats`` ("cuda") or the start (others)."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        # Not ru_maxrss: it survives exec, so a child of a large process starts with its parent's peak
        # (measured: 598 MB instead of 11 MB under a 600 MB parent).
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def share_one_heap() -> None:
    """Makes all threads of the process allocate from one glibc heap.

    Otherwise autograd's backward thread cannot reuse what the forward thread frees (measured: 40 MB of 460 for MiniLM). A
    user's MALLOC_ARENA_MAX takes precedence.
    """
    import ctypes

    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # musl has no such setting
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Excludes existing objects from the cycle collector: scanning the hundreds of thousands of objects of imported modules
    takes 0.3 s each time. Nested uses have no effect; the outermost one unfreezes at its end."""
    import gc

    global _frozen
    if _frozen:
        yield
        return
    gc.collect()
    gc.freeze()
    _frozen = True
    try:
        yield
    finally:
        _frozen = False
        gc.unfreeze()


def release_memory() -> None:
    """Releases freed memory: Python's cycles, CUDA's cache, and on Linux the C heap.

    Otherwise glibc keeps over 1 GB of freed activations between training and merging (measured: peak of the
    quickstart 4.1 GB).
    """
    import ctypes
    import gc

    import torch

    from peftlab.ops import release_scratch

    release_scratch()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
