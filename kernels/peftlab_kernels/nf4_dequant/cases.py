"""What to compile, check and time for ``nf4_dequant``.

Stored weights are random bytes and scales. Any bytes are a valid weight, so none needs a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftlab_kernels.cases import MERGE, UNALIGNED_MERGE, Compiled, Device, Storage
from peftlab_kernels.nf4_dequant.op import NF4Weight, dequant_options, merge_options, nf4_dequant
from peftlab_kernels.nf4_dequant.reference import nf4_dequant_reference

# QLoRA's sixteen levels (Dettmers et al. 2023, appendix E), as bitsandbytes defines them.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED, FLAT = "*u8 *u8 *fp32 *fp32 *fp32 *fp32", "*u8 *fp32 *fp32 *fp32 *fp32 *fp32"


def _values(nested: bool, options: dict[str, Any], *, blocksize: int = 64) -> dict[str, Any]:
    return {"NESTED": nested, "BLOCK2": 256, "BLOCKSIZE": blocksize, **options}


COMPILED = [
    Compiled("nf4_dequant_kernel", "nested", f"{NESTED} *T i16 i16",
             lambda dtype, rank: _values(True, dequant_options(64)), matrix=False),
    Compiled("nf4_dequant_kernel", "flat", f"{FLAT} *T i16 i16",
             lambda dtype, rank: _values(False, dequant_options(64)), matrix=False),
    Compiled("nf4_merge_kernel", "nested", f"{NESTED} {MERGE}",
             lambda dtype, rank: _values(True, merge_options(4096, rank, 64, dtype)), wide=True),
    Compiled("nf4_merge_kernel", "flat", f"{FLAT} {MERGE}",
             lambda dtype, rank: _values(False, merge_options(4096, rank, 64, dtype)), wide=True),
    Compiled("nf4_merge_kernel", "nested, blocks of 128", f"{NESTED} {MERGE}",
             lambda dtype, rank: _values(True, merge_options(4096, rank, 128, dtype), blocksize=128)),
    Compiled("nf4_merge_kernel", "nested, unaligned", f"{NESTED} {UNALIGNED_MERGE}",
             lambda dtype, rank: _values(True, merge_options(4100, rank, 64, dtype)), wide=True),
    Compiled("nf4_merge_kernel", "flat, unaligned", f"{FLAT} {UNALIGNED_MERGE}",
             lambda dtype, rank: _values(False, merge_options(4100, rank, 64, dtype)), wide=True),
]  # fmt: skip


def make(device: Device, N: int, K: int, *, nested: bool, blocksize: int = 64, seed: int = 0) -> NF4Weight:
    """A random weight with values as large as a layer's, about 1 / sqrt(K)."""
    g = torch.Generator(device.kind).manual_seed(seed)
    blocks = -(-N * K // blocksize)

    def draw(*size: int, below: int = 256) -> Tensor:
        return torch.randint(0, below, size, generator=g, device=device.kind, dtype=torch.uint8)

    packed, code = draw(-(-N * K // 2)), torch.tensor(CODE, device=device.kind)
    scale = 2 / max(K, 1) ** 0.5
    if not nested:
        absmax = scale * (0.5 + torch.rand(blocks, generator=g, device=device.kind))
        return NF4Weight(packed, absmax, code, (N, K), blocksize)
    absmax2 = 0.3 * scale * (0.5 + torch.rand(-(-blocks // 256), generator=g, device=device.kind))
    second = (torch.linspace(-1, 1, 256, device=device.kind), absmax2, torch.tensor(scale, device=device.kind))
    return NF4Weight(packed, draw(blocks), code, (N, K), blocksize, second)


def dense(weight: NF4Weight, **options: Any) -> Tensor:
    return nf4_dequant(weight, **options)


def truth(weight: NF4Weight) -> Tensor:
    nested = None
    if weight.nested is not None:
        code2, absmax2, offset = weight.nested
        nested = code2.double(), absmax2.double(), offset.double()
    return nf4_dequant_reference(
        weight.packed, weight.absmax if nested else weight.absmax.double(), weight.code.double(), weight.shape,
        blocksize=weight.blocksize, nested=nested, dtype=torch.float64,
    )  # fmt: skip


def library(weight: NF4Weight, dtype: torch.dtype) -> Callable[[Tensor | None], Tensor]:
    """bitsandbytes' dequantization of the same tensors. It writes to ``out`` on CUDA only."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    make_state: Any = QuantState
    second, offset = None, None
    if weight.nested is not None:
        code2, absmax2, offset = weight.nested
        second = make_state(absmax=absmax2, blocksize=weight.nested_blocksize, code=code2, dtype=absmax2.dtype)
    state = make_state(
        absmax=weight.absmax, shape=torch.Size(weight.shape), dtype=dtype, blocksize=weight.blocksize, code=weight.code,
        quant_type="nf4", offset=offset, state2=second,
    )  # fmt: skip
    packed = weight.packed.view(-1, 1)
    return lambda out: dequantize_4bit(packed, state, out=out if packed.is_cuda else None)


STORAGE = Storage(
    kind="nf4",
    stored_bytes=0.516,
    make=make,
    dense=dense,
    truth=truth,
    library=library,
    library_columns=64,  # it compiles for odd K, but is wrong where blocks span rows
    variants=({"nested": False}, {"nested": True}),
    forms=({"blocksize": 64}, {"blocksize": 128}),
    merge_timed=((4096, 4096), (14336, 4096)),
)
