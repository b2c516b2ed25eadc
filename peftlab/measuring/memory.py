"""Memory in use now and at the peak: of the CUDA allocator, or of this process on a CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_M_ARENA_MAX = -8  # malloc.h of glibc


def memory_bytes(device_type: str) -> int:
    """Bytes in use now.

    Args:
        device_type: "cuda": held by tensors on the current device; any other: resident memory of this process.
    """
    if device_type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device_type: str) -> int:
    """The most bytes in use at once, since ``torch.cuda.reset_peak_memory_stats`` ("cuda") or the start (others)."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        # Not ru_maxrss: it survives exec, so a child of a large process begins with the peak of its parent
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
    """Makes all threads allocate from one heap of glibc, which is a setting of the whole process.

    Otherwise what the forward pass frees in its thread is of no use to the backward pass in autograd's (measured: 40 MB
    of 460 for MiniLM). A user's own MALLOC_ARENA_MAX wins.
    """
    import ctypes

    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # musl has no such setting
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Within it the cycle collector looks only at what is made there, not at hundreds of thousands of objects of the
    imported modules, which take it 0.3 s each time. Outermost only: what is frozen thaws at its end."""
    import gc

    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_memory() -> None:
    """Gives freed memory back: Python's cycles, CUDA's cache, and on Linux the C heap.

    Between training and merging glibc otherwise keeps over 1 GB of freed activations as its own (measured: peak of the
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
