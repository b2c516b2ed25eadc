"""The frozen weight under an adapter: dense, NF4 or int8, as plain tensors."""

# Shape suffixes: M rows of x, N out features, K in features, R rank.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.int8_dequant import int8_dequant
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant

LowRank = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class DenseWeight:
    """weight: [N, K] of any float type. Products run in the type of x."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def tensors(self) -> list[Tensor]:
        return [self.weight]


@dataclass(frozen=True)
class Int8Weight:
    """A weight as bitsandbytes' LLM.int8 stores it.

    Attributes:
        weight: [N, K] int8. row_absmax: [N] float32, the magnitude that 127 represents. threshold: on CUDA, columns of x that
            reach it are multiplied in 16 bits (0: none).
    """

    weight: Tensor
    row_absmax: Tensor
    threshold: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.row_absmax]


BaseWeight = DenseWeight | NF4Weight | Int8Weight
KINDS = {DenseWeight: "dense", NF4Weight: "nf4", Int8Weight: "int8"}


def kind_of(base: BaseWeight) -> str:
    return KINDS[type(base)]


def as_float(base: BaseWeight, dtype: torch.dtype, *, low_rank: LowRank | None = None, backend: str) -> Tensor:
    """[N, K] in ``dtype``, plus ``s * B @ A`` where ``low_rank`` is (A, B, s).

    A dense weight of that type is returned unchanged. Everything else is written to scratch memory, which is valid until
    the next call.
    """
    if isinstance(base, DenseWeight):
        weight = base.weight
        if weight.dtype == dtype and low_rank is None:
            return weight
        out = runtime.scratch(base.shape, dtype, weight.device)
        if low_rank is None:
            return out.copy_(weight)
        A_RK, B_NR, scale = low_rank
        if weight.dtype == dtype:
            return torch.addmm(weight, B_NR.to(dtype), A_RK.to(dtype), alpha=scale, out=out)
        # addmm_, not addmm: autocast would round the operands of addmm.
        return out.copy_(weight.to(torch.float32, copy=True).addmm_(B_NR.float(), A_RK.float(), alpha=scale))
    out = runtime.scratch(base.shape, dtype, base.tensors()[0].device)
    if isinstance(base, NF4Weight):
        return nf4_dequant(base, dtype=dtype, low_rank=low_rank, out=out, backend=backend)
    return int8_dequant(
        base.weight, base.row_absmax, dtype=dtype, low_rank=low_rank, out=out, backend=backend
    )  # fmt: skip


def library_linear(x_MK: Tensor, base: BaseWeight, bias_N: Tensor | None) -> Tensor:
    """[M, N] = x W^T + bias by bitsandbytes' own product: NF4 for few rows, int8 on CUDA. bias_N: in the type of x."""
    if isinstance(base, NF4Weight):
        return _nf4_library(x_MK, base, bias_N)
    if isinstance(base, Int8Weight):
        return _int8_library(x_MK, base, bias_N)
    raise TypeError(f"bitsandbytes has no product with a {type(base).__name__}")


def _nf4_library(x_MK: Tensor, base: NF4Weight, bias_N: Tensor | None) -> Tensor:
    import bitsandbytes  # noqa: F401  # registers the ops

    nested = {}
    absmax = base.absmax
    if base.nested is not None:
        code2, absmax2, offset = base.nested
        nested = {"absmax_8bit": absmax, "absmax_code": code2, "absmax_offset": offset}
        absmax = absmax2
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x_MK, base.packed.view(-1, 1), base.shape, absmax, base.blocksize, "nf4", bias=bias_N, **nested
    )
    return out


def _int8_library(x_MK: Tensor, base: Int8Weight, bias_N: Tensor | None) -> Tensor:
    from bitsandbytes import functional as bnb

    quantized, x_scale, outliers = bnb.int8_vectorwise_quant(
        x_MK.to(torch.float16, copy=True),  # a copy, because it temporarily sets outliers to zero in place
        threshold=base.threshold,
    )
    weight, scale = base.weight, base.row_absmax
    out: Tensor
    if base.threshold > 0:
        out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x_MK, quantized, weight, x_scale, scale, outliers, bias_N)
    else:
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(
            quantized, weight, x_scale, scale, bias=bias_N, dtype=x_MK.dtype
        )
    return out
