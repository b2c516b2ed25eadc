"""Imports bitsandbytes without letting it fetch code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any


def import_bitsandbytes() -> Any:
    """The ``bitsandbytes`` module; call this before anything else (PEFT, transformers) imports it.

    On processors with AVX512-BF16 its import requests code from the model hub through the package ``kernels``, if
    installed (0.50.2, backends/cpu/ops.py). peftlab makes no unrequested connections (contract C12), so that package is
    hidden meanwhile. Raises: ImportError.
    """
    with _without_hub_kernels(), _compiling_later():
        return importlib.import_module("bitsandbytes")


@functools.cache
def misreads_nf4(width: int) -> bool:
    """Whether bitsandbytes on a CPU reads NF4 weights with ``width`` input features wrongly: version 0.50.2 does so for many
    multiples of 16 that are no multiples of 64, its block size, without an error."""
    import torch

    functional = import_bitsandbytes().functional
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    read = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", blocksize=64))
    # Half of the largest distance between two values of NF4 is 0.15 of the largest weight of a block.
    return float((read - weight).abs().max() / weight.abs().max()) > 0.2


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Delays ``torch.compile`` of decorated functions until their first call: as a decorator it imports the compiler (0.6 s)
    but compiles nothing."""
    import torch

    compiler = torch.compile

    def later(function: Any = None, /, **options: Any) -> Any:
        if function is None:
            return lambda decorated: later(decorated, **options)
        compiled: Callable[[], Callable[..., Any]] = functools.cache(lambda: compiler(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = compiler


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    log = logging.getLogger("bitsandbytes")
    level, known = log.level, "kernels" in sys.modules
    log.setLevel(logging.ERROR)
    if not known:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        log.setLevel(level)
        if not known:
            del sys.modules["kernels"]
