"""The output head of a loss: logits of a chunk of tokens, and their gradients.

No tensor has a row for every token and a column for every class. Gradients are computed while the logits of a chunk exist.
"""

# Shape suffixes: N tokens of a call, C of a chunk, H hidden, V vocabulary, R rank.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab_kernels.int8_dequant import int8_dequant
from peftlab_kernels.lora_linear.base import BaseWeight, DenseWeight, Int8Weight, LowRank, kind_of
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant

# Logits of a chunk, in bytes. On a CPU 64 MiB hold 341 tokens of a 49k vocabulary, far more than an efficient product
# needs. A GPU uses a share of its memory, because every chunk reads W and writes dW again.
_CPU_CHUNK_BYTES = 64 * 2**20
_GPU_SHARE = 1 / 64
_CPU_PRODUCT_ROWS, _CPU_PIECE = 8192, 2**16  # rows, and elements
# Rows of logits per chunk on a GPU, including a teacher's. More than the largest saves no time: at 2,048 tokens and
# 128k classes a product has 60 waves of tiles, and reading W again is a tenth of its time.
_FEWEST, _MOST = 256, 4096


@dataclass(frozen=True)
class Head:
    """Logits ``cap(scale * (h W^T + bias + s a A^T B^T))``, with ``cap(z) = softcap * tanh(z / softcap)``.

    Attributes:
        weight: [V, H] dense, NF4 or int8. A dense one may be trained. bias: [V] or None. low_rank: (A [R, H],
            B [V, R], s) of a LoRA adapter, or None; a is the hidden state, or its copy after dropout (``adapter_hidden``
            of the losses). softcap: > 0 or None. scale: factor on the logits before the cap.
        num_classes: the first rows of W are this many classes; the rows after them are padding and are ignored.
    """

    weight: BaseWeight
    bias: Tensor | None = None
    low_rank: LowRank | None = None
    softcap: float | None = None
    scale: float = 1.0
    num_classes: int | None = None

    @property
    def num_logits(self) -> int:
        return self.weight.shape[0] if self.num_classes is None else self.num_classes

    def check(self, hidden_NH: Tensor) -> None:
        """Raises: ValueError on sizes that do not match."""
        V, H = self.weight.shape
        if hidden_NH.dim() != 2 or hidden_NH.shape[1] != H:
            raise ValueError(f"expected hidden [N, {H}] for a head [{V}, {H}], found {list(hidden_NH.shape)}")
        if self.bias is not None and self.bias.shape != (V,):
            raise ValueError(f"expected a bias [{V}], found {list(self.bias.shape)}")
        if self.low_rank is not None:
            A_RH, B_VR, _ = self.low_rank
            R = A_RH.shape[0]
            if A_RH.shape != (R, H) or B_VR.shape != (V, R):
                raise ValueError(
                    f"expected A [R, {H}] and B [{V}, R] for a head [{V}, {H}], found {list(A_RH.shape)} and "
                    f"{list(B_VR.shape)}"
                )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"expected a softcap above 0, found {self.softcap}")
        if not 0 < self.num_logits <= V:
            raise ValueError(f"expected 1 to {V} classes for a head [{V}, {H}], found {self.num_logits}")


@dataclass(frozen=True)
class Rows:
    """Bytes that a loss holds for each token, and once for a trained head.

    Attributes:
        row_bytes: logits of one token of one model. sides: number of models whose logits are computed, 2 with an online teacher.
        sum_bytes: the sum over chunks of a trained head's gradient, which each chunk reads and writes. spared_bytes: the same
            bytes if a single chunk needs no sum, because its product is written in 16 bits directly; else 0.
    """

    row_bytes: int
    sides: int = 1
    sum_bytes: int = 0
    spared_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        return self.row_bytes * self.sides


def rows_of(head: Head, hidden_NH: Tensor, needs: NeedsGrad, *, sides: int = 1, deferred: bool = True) -> Rows:
    """deferred: a single chunk may leave a trained weight's gradient to backward."""
    row_bytes = head.num_logits * hidden_NH.element_size()
    if not needs.weight:
        return Rows(row_bytes, sides)
    weight = head.weight.tensors()[0]
    sum_bytes = weight.numel() * _sum_dtype(hidden_NH.dtype).itemsize
    spares = deferred and weight.dtype.itemsize < 4 and written_at_once(weight.dtype, hidden_NH.dtype)
    return Rows(row_bytes, sides, sum_bytes, sum_bytes if spares else 0)


def num_tokens_per_chunk(num_tokens: int, rows: Rows, device: torch.device) -> int:
    """Tokens per chunk so that the logits fit the device's budget: all tokens, if one chunk takes less memory than several."""
    if device.type != "cuda":
        if num_tokens * rows.token_bytes <= rows.spared_bytes:
            return max(1, num_tokens)
        return max(1, min(num_tokens, max(_CPU_CHUNK_BYTES, rows.sum_bytes // 4) // rows.token_bytes))
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
    held = torch.cuda.memory_allocated(device)
    # From the second step on this is enough, and it needs no call to the driver.
    unused = torch.cuda.memory_reserved(device) - held
    size = num_tokens_on_a_gpu(num_tokens, rows, total=allowed, free=min(unused, allowed - held))
    if size < num_tokens_on_a_gpu(num_tokens, rows, total=allowed, free=allowed):
        free = torch.cuda.mem_get_info(device)[0] + unused
        size = num_tokens_on_a_gpu(num_tokens, rows, total=allowed, free=min(free, allowed - held))
    return size


def num_tokens_on_a_gpu(num_tokens: int, rows: Rows, *, total: int, free: int) -> int:
    """Tokens per chunk on a GPU with ``total`` bytes, of which ``free`` are free.

    The budget is a share of all memory, not of the free memory, so that a repeated run computes the same bytes. Chunks
    get smaller only if they would take more than half of the free memory.
    """
    chunk = num_tokens
    if num_tokens * rows.token_bytes > rows.spared_bytes:
        chunk, budget = _MOST // rows.sides, max(total * _GPU_SHARE, rows.sum_bytes / 4)
        while chunk > _FEWEST and chunk * rows.token_bytes > budget:
            chunk //= 2
    while chunk > 16 and chunk * rows.token_bytes > free / 2:
        chunk //= 2
    return max(1, min(num_tokens, chunk))


def walk_of(
    head: Head, hidden_NH: Tensor, needs: NeedsGrad, chunk: int | None, *, sides: int = 1
) -> tuple[int | None, bool]:
    """Tokens per chunk, and whether backward computes a trained weight's gradient. With one chunk it does: one product then
    includes the upstream factor and is written in the weight's type directly.

    While ``torch.compile`` traces, sizes and memory are unknown: the tokens are None, and the operator chooses them.
    """
    if torch.compiler.is_compiling():
        return chunk, False
    N = hidden_NH.shape[0]
    size = chunk or num_tokens_per_chunk(N, rows_of(head, hidden_NH, needs, sides=sides), hidden_NH.device)
    return size, needs.weight and 0 < N <= size


def size_where_nothing_is_deferred(head: Head, hidden_NH: Tensor, needs: NeedsGrad, *, sides: int = 1) -> int:
    """Tokens per chunk that an operator uses when the caller gives none."""
    rows = rows_of(head, hidden_NH, needs, sides=sides, deferred=False)
    return num_tokens_per_chunk(hidden_NH.shape[0], rows, hidden_NH.device)


def pass_bytes(
    hidden_NH: Tensor, head: Head, needs: NeedsGrad, *, chunk: int | None, sides: int, gpu_bytes: int | None = None
) -> int:
    """Bytes that the forward pass of a loss holds beside its results: the logits of a chunk, and W in the type of the products.

    Args: chunk: tokens; None: by the rule. gpu_bytes: memory of a GPU whose rule holds; None: that of the device.
    """
    rows, N = rows_of(head, hidden_NH, needs, sides=sides), hidden_NH.shape[0]
    if gpu_bytes is not None:
        size = num_tokens_on_a_gpu(N, rows, total=gpu_bytes, free=gpu_bytes // 4)
    else:
        size = chunk or num_tokens_per_chunk(N, rows, hidden_NH.device)
    weight = head.weight.tensors()[0]
    copied = not isinstance(head.weight, DenseWeight) or weight.dtype != hidden_NH.dtype
    return (
        min(size, N) * rows.token_bytes
        + copied * head.weight.shape[0] * head.weight.shape[1] * hidden_NH.element_size()
    )


def chunks(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(num_tokens, start + size))


@dataclass(frozen=True)
class NeedsGrad:
    """Which gradients autograd needs: ``weight`` and ``bias`` of a trained head, ``factors`` of an adapter on it."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    factors: bool = False
    adapter_hidden: bool = False

    def flags(self) -> list[bool]:
        return [self.hidden, self.weight, self.bias, self.factors, self.adapter_hidden]


class HeadPass:
    """One forward and backward pass of N tokens through a head, chunk by chunk.

    Args:
        hidden_NH: in the type of the products. adapter_NH: the adapter's input if it is not ``hidden_NH``.
        deferred: all tokens are one chunk, and the pass keeps the gradient of its logits instead of the weight's.
    """

    def __init__(
        self,
        head: Head,
        hidden_NH: Tensor,
        adapter_NH: Tensor | None,
        needs: NeedsGrad,
        backend: str,
        *,
        deferred: bool = False,
    ) -> None:
        V, dtype = head.num_logits, hidden_NH.dtype
        self._hidden_NH, self._adapter_NH = hidden_NH, adapter_NH
        self._needs = needs
        low_rank = head.low_rank
        if low_rank is not None:
            low_rank = (low_rank[0], low_rank[1][:V], low_rank[2])
        # A quantized weight is written out anyway: there the adapter is merged in the same pass, before its one rounding.
        merged = low_rank is not None and adapter_NH is None and not isinstance(head.weight, DenseWeight)
        self._W_VH = _as_float(head.weight, dtype, head.low_rank if merged else None, backend)[:V]
        self._bias_V = head.bias[:V].to(dtype) if head.bias is not None else None
        wide = _sum_dtype(dtype)
        like: dict[str, Any] = {"device": hidden_NH.device, "dtype": wide}
        self._split = low_rank is not None and not merged
        if low_rank is not None:
            self._A_RH, self._sB_VR = low_rank[0].to(dtype), (low_rank[2] * low_rank[1].to(wide)).to(dtype)
            self._scale = low_rank[2]
        self.dH_NH = torch.empty_like(hidden_NH, memory_format=torch.contiguous_format) if needs.hidden else None
        self._deferred, self._shape = deferred, head.weight.shape
        self.dW_VH: Tensor | None = None  # the sum, or with deferred the gradient of the logits
        self.dbias_V = torch.zeros(head.weight.shape[0], **like) if needs.bias else None
        self.dA_RH = torch.zeros(low_rank[0].shape, **like) if low_rank is not None and needs.factors else None
        self.dB_VR = torch.zeros(head.low_rank[1].shape, **like) if head.low_rank and needs.factors else None
        self.dadapter_NH = torch.empty_like(hidden_NH) if needs.adapter_hidden else None

    def logits(self, part: slice) -> Tensor:
        """[C, V] before scale and cap, in the type of the hidden states; a new tensor."""
        h_CH = self._hidden_NH[part]
        if not self._split:
            return F.linear(h_CH, self._W_VH, self._bias_V)
        # The adapter's small part comes first, as in lora_linear: the sum is rounded once.
        return F.linear(self._down(part), self._sB_VR, self._bias_V).addmm_(h_CH, self._W_VH.t())

    def _down(self, part: slice) -> Tensor:
        return (self._hidden_NH if self._adapter_NH is None else self._adapter_NH)[part] @ self._A_RH.t()

    def backward(self, part: slice, dz_CV: Tensor) -> None:
        """Takes the gradient of a chunk's logits and adds to, or fills in, every needed gradient."""
        h_CH, V = self._hidden_NH[part], len(self._W_VH)
        if self._split or self.dA_RH is not None:
            dS_CR = dz_CV @ self._sB_VR
            if self.dA_RH is not None and self.dB_VR is not None:
                self.dA_RH += dS_CR.t() @ (h_CH if self._adapter_NH is None else self._adapter_NH[part])
                self.dB_VR[:V] += (dz_CV.t() @ self._down(part)).mul_(self._scale)
            if self.dadapter_NH is not None:
                torch.mm(dS_CR, self._A_RH, out=self.dadapter_NH[part])
        if self.dH_NH is not None:
            if self._split and self._adapter_NH is None:
                torch.mm(dS_CR, self._A_RH, out=self.dH_NH[part]).addmm_(dz_CV, self._W_VH)
            else:
                torch.mm(dz_CV, self._W_VH, out=self.dH_NH[part])
        if self.dbias_V is not None:
            self.dbias_V[:V] += dz_CV.sum(0, dtype=self.dbias_V.dtype)
        if not self._needs.weight:
            return
        if self._deferred:
            assert len(dz_CV) == len(self._hidden_NH), "deferred takes one chunk"
            self.dW_VH = dz_CV
        elif self.dW_VH is None:
            self.dW_VH = product(dz_CV.t(), h_CH, rows=self._shape[0], dtype=_sum_dtype(h_CH.dtype))
        else:
            _add_product(self.dW_VH[:V], dz_CV.t(), h_CH)

    def gradients(self, head: Head) -> list[Tensor]:
        """The needed ones of hidden, adapter_hidden, weight, bias, A and B, in the types of their tensors. The weight's is an
        exception: see ``Finish``."""
        gradients = [t for t in (self.dH_NH, self.dadapter_NH) if t is not None]
        if self._needs.weight:
            if self.dW_VH is None:  # of no tokens
                self.dW_VH = self._hidden_NH.new_zeros(self._shape, dtype=_sum_dtype(self._hidden_NH.dtype))
            gradients.append(self.dW_VH)
        if self.dbias_V is not None and head.bias is not None:
            gradients.append(self.dbias_V.to(head.bias.dtype))
        if self.dA_RH is not None and self.dB_VR is not None and head.low_rank is not None:
            gradients += [self.dA_RH.to(head.low_rank[0].dtype), self.dB_VR.to(head.low_rank[1].dtype)]
        return gradients


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of hidden states in ``dtype`` are summed over chunks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def written_at_once(weight: torch.dtype, hidden: torch.dtype) -> bool:
    """Whether a weight's gradient is one product, in the weight's type, with hidden states that are scaled first. A product has
    the type of its factors or the wider type of sums. Scaling float16 could overflow."""
    return hidden != torch.float16 and weight in (hidden, _sum_dtype(hidden))


def product(one: Tensor, other: Tensor, *, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, ..] one @ other in ``dtype``, the type of its factors or of their sums, with zeros below the rows of ``one``."""
    out = torch.empty((rows, other.shape[1]), dtype=dtype, device=one.device)
    top, _ = out[: len(one)], out[len(one) :].zero_()
    if dtype == one.dtype:
        torch.mm(one, other, out=top)
    elif out.is_cuda:
        torch.mm(one, other, out_dtype=dtype, out=top)
    else:
        _cpu_product(top, one, other, beta=0)
    return out


def _add_product(out: Tensor, one: Tensor, other: Tensor) -> None:
    """out += one @ other, summed in the type of ``out``."""
    if out.dtype == one.dtype:
        out.addmm_(one, other)
    elif out.is_cuda:
        torch.addmm(out, one, other, out_dtype=out.dtype, out=out)
    else:
        _cpu_product(out, one, other, beta=1)


def _cpu_product(out: Tensor, one: Tensor, other: Tensor, *, beta: int) -> None:
    """out = beta * out + one @ other in the type of ``out``, piece by piece, without a product or copy of that size."""
    wide = other.to(out.dtype)
    for rows in chunks(len(out), _CPU_PRODUCT_ROWS):
        out[rows].addmm_(one[rows].to(out.dtype), wide, beta=beta)


@dataclass(frozen=True)
class Finish:
    """Multiplies the gradients of a sum by the upstream gradient ``dtotal``.

    Attributes:
        rows, dtype: of a trained head's weight. deferred: see ``HeadPass``.
    """

    rows: int
    dtype: torch.dtype
    deferred: bool

    def weight(self, gradient: Tensor, dtotal: Tensor, hidden_NH: Tensor, *, last: bool) -> Tensor:
        """The weight's gradient from its entry in ``HeadPass.gradients``. last: nothing reads that entry again."""
        if self.deferred:
            if written_at_once(self.dtype, hidden_NH.dtype):
                return product(gradient.t(), scaled(hidden_NH, dtotal), rows=self.rows, dtype=self.dtype)
            gradient = product(gradient.t(), hidden_NH, rows=self.rows, dtype=_sum_dtype(hidden_NH.dtype))
        if type(gradient) is not Tensor:  # traced
            return (gradient * dtotal).to(self.dtype)
        keeps_memory = gradient.dtype == self.dtype and (last or self.deferred)
        out = gradient if keeps_memory else torch.empty_like(gradient, dtype=self.dtype)
        if out.dtype == gradient.dtype or gradient.is_cuda:
            return torch.mul(gradient, dtotal, out=out)
        # On a CPU PyTorch would make a cast copy of the whole tensor.
        for rows in chunks(len(out), max(1, _CPU_PIECE // out.shape[1])):
            torch.mul(gradient[rows], dtotal, out=out[rows])
        return out


def scaled(gradient: Tensor, dtotal: Tensor) -> Tensor:
    """``gradient * dtotal`` rounded once. A 16-bit factor would be off by up to 0.4 %, the same way in all elements."""
    if gradient.dtype.itemsize >= 4:
        return gradient * dtotal.to(gradient.dtype)
    return (gradient.float() * dtotal).to(gradient.dtype)


def _as_float(weight: BaseWeight, dtype: torch.dtype, low_rank: LowRank | None, backend: str) -> Tensor:
    """[V, H] in ``dtype``. A quantized weight gets new memory, because two heads may be in use at once."""
    if isinstance(weight, NF4Weight):
        return nf4_dequant(weight, dtype=dtype, low_rank=low_rank, backend=backend)
    if isinstance(weight, Int8Weight):
        return int8_dequant(weight.weight, weight.row_absmax, dtype=dtype, low_rank=low_rank, backend=backend)
    return weight.weight.detach().to(dtype)


def needs_grad_of(head: Head, hidden_NH: Tensor, adapter_NH: Tensor | None) -> NeedsGrad:
    """The gradients that autograd will need."""
    if not torch.is_grad_enabled():
        return NeedsGrad()
    return NeedsGrad(
        hidden=hidden_NH.requires_grad,
        weight=isinstance(head.weight, DenseWeight) and head.weight.weight.requires_grad,
        bias=head.bias is not None and head.bias.requires_grad,
        factors=head.low_rank is not None and any(t.requires_grad for t in head.low_rank[:2]),
        adapter_hidden=adapter_NH is not None and adapter_NH.requires_grad,
    )


def empty_gradients(
    needs: NeedsGrad,
    hidden_NH: Tensor,
    adapter_NH: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    *,
    deferred: bool,
) -> list[Tensor]:
    """Uninitialized tensors as ``HeadPass.gradients`` returns them, for an operator's fake implementation."""
    num_classes, stored, has_bias = numbers[2], numbers[3], numbers[4]
    chosen = [hidden_NH] if needs.hidden else []
    chosen += [adapter_NH] if needs.adapter_hidden and adapter_NH is not None else []
    empty = [t.new_empty(t.shape) for t in chosen]
    if needs.weight and deferred:
        empty.append(hidden_NH.new_empty((hidden_NH.shape[0], num_classes)))
    elif needs.weight:
        empty.append(tensors[0].new_empty(tensors[0].shape, dtype=_sum_dtype(hidden_NH.dtype)))
    rest = [tensors[stored]] if needs.bias else []
    rest += tensors[stored + has_bias :] if needs.factors else []
    return [*empty, *(t.new_empty(t.shape) for t in rest)]


def spread_gradients(
    gradients: list[Tensor], needs: NeedsGrad, num_tensors: int, numbers: list[int]
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of hidden, adapter_hidden and each tensor of ``pack_head`` from those of ``HeadPass.gradients``."""
    rest = list(gradients)
    hidden = rest.pop(0) if needs.hidden else None
    adapter = rest.pop(0) if needs.adapter_hidden else None
    stored, has_bias = numbers[3], numbers[4]
    head: list[Tensor | None] = [None] * num_tensors
    if needs.weight:
        head[0] = rest.pop(0)
    if needs.bias:
        head[stored] = rest.pop(0)
    if needs.factors:
        head[stored + has_bias :] = rest
    return hidden, adapter, head


def wide_logits(raw_CV: Tensor, head: Head, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Logits after scale and cap in float32 (or float64), and the derivative of the cap. Overwrites ``raw_CV`` if it has that
    type."""
    z_CV = raw_CV if raw_CV.dtype == torch.float64 else raw_CV.float()
    if head.scale != 1.0:
        z_CV.mul_(head.scale)
    if head.softcap is None:
        return z_CV, None
    z_CV.div_(head.softcap).tanh_()
    slope_CV = 1 - z_CV.square() if slope else None
    return z_CV.mul_(head.softcap), slope_CV


@torch.no_grad()
def head_logits(hidden_NH: Tensor, head: Head, *, backend: str = "torch") -> Tensor:
    """[N, C] float32 logits (float64 stays) of all classes of ``head``, for a few hundred tokens at a time."""
    head.check(hidden_NH)
    raw_NV = HeadPass(head, hidden_NH, None, NeedsGrad(), backend).logits(slice(None))
    return wide_logits(raw_NV, head, slope=False)[0]


def pack_head(head: Head) -> tuple[list[Tensor], str, list[int], list[float]]:
    """A head as the plain values that an operator schema accepts; ``unpack_head`` is the inverse."""
    weight, tensors = head.weight, list(head.weight.tensors())
    numbers = [
        *weight.shape,
        head.num_logits,
        len(tensors),
        int(head.bias is not None),
        int(head.low_rank is not None),
    ]
    numbers += [weight.blocksize, weight.nested_blocksize] if isinstance(weight, NF4Weight) else [0, 0]
    factors = [head.scale, head.softcap or 0.0, head.low_rank[2] if head.low_rank is not None else 0.0]
    if head.bias is not None:
        tensors.append(head.bias)
    if head.low_rank is not None:
        tensors += [head.low_rank[0], head.low_rank[1]]
    return tensors, kind_of(weight), numbers, factors


def unpack_head(tensors: list[Tensor], kind: str, numbers: list[int], factors: list[float]) -> Head:
    V, H, num_classes, stored, has_bias, has_low_rank, blocksize, nested_blocksize = numbers
    rest = tensors[stored:]
    weight: BaseWeight
    if kind == "nf4":
        nested = (tensors[3], tensors[4], tensors[5]) if stored > 3 else None
        weight = NF4Weight(tensors[0], tensors[1], tensors[2], (V, H), blocksize, nested, nested_blocksize)
    elif kind == "int8":
        weight = Int8Weight(tensors[0], tensors[1])
    else:
        weight = DenseWeight(tensors[0])
    scale, softcap, low_rank_scale = factors
    head = Head(weight, None, None, softcap or None, scale, num_classes)
    if has_bias:
        head = replace(head, bias=rest.pop(0))
    if has_low_rank:
        head = replace(head, low_rank=(rest[0], rest[1], low_rank_scale))
    return head
