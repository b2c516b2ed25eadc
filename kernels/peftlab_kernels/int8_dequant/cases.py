"""What to compile, check and time for ``int8_dequant``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftlab_kernels.cases import MERGE, UNALIGNED_MERGE, Compiled, Device, Storage
from peftlab_kernels.int8_dequant.op import int8_dequant, tile_options

Weight = tuple[Tensor, Tensor]  # the values, and one scale per row

COMPILED = [
    Compiled("int8_dequant_kernel", "alone", "*i8 *fp32 *fp32 *fp32 *T i16 i16 i16 fp32",
             lambda dtype, rank: {"MERGE": False, **tile_options(0)}, matrix=False),
    Compiled("int8_dequant_kernel", "merge", f"*i8 *fp32 {MERGE}",
             lambda dtype, rank: {"MERGE": True, **tile_options(rank)}, wide=True),
    Compiled("int8_dequant_kernel", "merge, unaligned", f"*i8 *fp32 {UNALIGNED_MERGE}",
             lambda dtype, rank: {"MERGE": True, **tile_options(rank)}, wide=True),
]  # fmt: skip


def make(device: Device, N: int, K: int, *, seed: int = 0) -> Weight:
    """Random values, and row scales that make them as large as a layer's."""
    g = torch.Generator(device.kind).manual_seed(seed)
    q = torch.randint(-127, 128, (N, K), generator=g, device=device.kind, dtype=torch.int8)
    return q, (0.5 + torch.rand(N, generator=g, device=device.kind)) / max(K, 1) ** 0.5


def dense(weight: Weight, **options: Any) -> Tensor:
    return int8_dequant(*weight, **options)


def truth(weight: Weight) -> Tensor:
    q, row_absmax = weight
    return q.double() * row_absmax.double()[:, None] / 127


def library(weight: Weight, dtype: torch.dtype) -> Callable[[Tensor | None], Tensor]:
    """bitsandbytes' dequantization to float32, then a cast to ``dtype``."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    return lambda out: int8_vectorwise_dequant(*weight).to(dtype)


STORAGE = Storage(kind="int8", stored_bytes=1.0, make=make, dense=dense, truth=truth, library=library)
