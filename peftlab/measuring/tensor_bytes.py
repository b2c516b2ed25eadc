"""Bytes of tensors on a CPU, counted where PyTorch's allocator gives and takes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from torch import Tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind ``tensors``, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_allocated(run: Callable[[], object]) -> int:
    """The largest number of bytes that tensors on the CPU take while ``run`` runs, beyond those that exist before.

    PyTorch's profiler reports each allocation, also inside of operators. It takes time: for tests and short runs.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and "CPU" in str(event.device_type())
    ]
    changes = (change for _, change in sorted(events, key=lambda event: event[0]))
    return max(itertools.accumulate(changes), default=0)
