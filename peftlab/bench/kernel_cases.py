"""One adapted linear to measure: its tensors, its formula in float32, and a check of plans against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftlab import ops
from peftlab.errors import RecipeError
from peftlab.models import import_bitsandbytes

SCALE = 0.5
# Maximum relative error in the Euclidean norm. Three or four roundings to bfloat16 give 3e-3. A missing scale, mask or term
# is off by tens of percent, because base and adapter are equally large.
TOLERANCE = 1e-2
# LLM.int8 rounds x to 8 bits: 1 % for normal values, a little more in longer rows.
INT8_LIBRARY_TOLERANCE = 2e-2
# transformers' default: columns of x with larger values are multiplied in 16 bits.
_INT8_THRESHOLD = 6.0


@dataclass(frozen=True)
class Weight:
    """A frozen weight of one kind. values: [N, K] float32, the values it represents."""

    kind: str
    base: ops.BaseWeight
    values: Tensor


def make_weight(kind: str, values: Tensor, dtype: torch.dtype) -> Weight:
    """Stores ``values`` [N, K] float32 as a model does. dtype: that of a dense weight.

    Raises: RecipeError for a quantized kind if bitsandbytes cannot be imported.
    """
    if kind == "dense":
        dense = values.to(dtype)
        return Weight(kind, ops.DenseWeight(dense), dense.float())
    try:
        bnb = import_bitsandbytes().functional
    except ImportError as error:
        raise RecipeError(
            f"--kinds: {kind} needs bitsandbytes, which cannot be imported ({error}); use --kinds dense"
        ) from error
    if kind == "int8":
        stored, row_absmax, _ = bnb.int8_vectorwise_quant(values.half())
        int8 = ops.Int8Weight(stored, row_absmax, _INT8_THRESHOLD)
        return Weight(kind, int8, stored.float() * row_absmax.float()[:, None] / 127)
    packed, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    nested = (state.state2.code, state.state2.absmax, state.offset)
    shape = (values.shape[0], values.shape[1])
    sizes = {"blocksize": state.blocksize, "nested": nested, "nested_blocksize": state.state2.blocksize}
    # Not by bitsandbytes, which is wrong on a CPU if an even K is not a multiple of 64 (0.50.2).
    meant = ops.nf4_dequant_reference(packed, state.absmax, state.code, shape, **sizes)
    return Weight(kind, ops.NF4Weight(packed, state.absmax, state.code, shape, **sizes), meant)


@dataclass(frozen=True)
class Case:
    """A call of ``lora_linear`` as inside a model: x needs a gradient.

    Attributes:
        leaves: x [M, K], A [R, K] and B [N, R]; the factors are float32. dy: [M, N], the output gradient. seed: of the
            dropout mask.
    """

    weight: Weight
    dropout: float
    leaves: tuple[Tensor, Tensor, Tensor]
    dy: Tensor
    seed: Tensor

    def forward(self, plan: ops.Plan) -> Tensor:
        x, a, b = self.leaves
        with ops.forced_plan(plan):
            return ops.lora_linear(x, self.weight.base, a, b, scale=SCALE, dropout=self.dropout, seed=self.seed)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Returns dx, dA and dB; may be called repeatedly."""
        return torch.autograd.grad(y, self.leaves, self.dy, retain_graph=True)

    def formula(self) -> tuple[Tensor, ...]:
        """Returns y, dx, dA and dB in float32, with the operation's dropout mask."""
        keep, keep_scale = None, 1.0
        if self.dropout:
            keep, keep_scale = ops.dropout_mask(self.leaves[0].detach(), self.dropout, self.seed)
        leaves = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        x, a, b = leaves
        y = ops.lora_linear_reference(x, self.weight.values, a, b, scale=SCALE, keep=keep, keep_scale=keep_scale)
        return y.detach(), *torch.autograd.grad(y, leaves, self.dy.float())

    def fault(self, plan: ops.Plan, want: tuple[Tensor, ...]) -> str:
        """Returns how ``plan`` differs from ``want``, the formula; "" if it does not."""
        y = self.forward(plan)
        for name, actual, wanted in zip(("y", "dx", "dA", "dB"), (y.detach(), *self.backward(y)), want, strict=True):
            rounds_x = name == "y" and self.weight.kind == "int8" and plan.forward == "library"
            allowed = INT8_LIBRARY_TOLERANCE if rounds_x else TOLERANCE
            error = float((actual.float() - wanted).norm() / wanted.norm())
            if not error <= allowed:  # also catches nan
                return f"{name} differs from the formula in float32 by {error:.2g} (allowed {allowed:g})"
        return ""


def make_case(weight: Weight, *, rows: int, rank: int, dropout: float, dtype: torch.dtype, device: str) -> Case:
    """Makes random inputs, always the same. ``scale * B A`` is as large as the weight."""
    num_out, num_in = weight.base.shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, int], std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(std)

    b_std = float(weight.values.std()) / SCALE * (num_in / rank) ** 0.5
    x = normal((rows, num_in), dtype=dtype).requires_grad_()
    a = normal((rank, num_in), num_in**-0.5).requires_grad_()
    b = normal((num_out, rank), b_std).requires_grad_()
    return Case(weight, dropout, (x, a, b), normal((rows, num_out), dtype=dtype), torch.tensor(1))


def candidates(kind: str, device: str, *, dropout: bool, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """Returns the forward and backward plans that apply here. dtype: that of x and of a dense weight."""
    forward, backward = list(ops.FORWARD_PLANS), list(ops.BACKWARD_PLANS)
    # Dropout acts on x, so nothing can be merged; merging into 16 bits would round a small adapter away.
    if dropout or (kind == "dense" and dtype.itemsize == 2):
        forward.remove("merged")
        backward.remove("merged")
    # The library has no dense product, and its int8 product on a CPU rounds x outside training only.
    if kind == "dense" or (kind == "int8" and device == "cpu"):
        forward.remove("library")
    return forward, backward
