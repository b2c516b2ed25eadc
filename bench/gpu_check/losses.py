"""gpu-check: the fused linear losses, every gradient, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peftlab_kernels.cases import Loss, LossInputs, gathered
from peftlab_kernels.heads import Head
from peftlab_kernels.lora_linear import DenseWeight
from torch.nn import functional as F

from bench.gpu_check.base import Device, Row, Task

SHAPES = [(63, 96, 1009), (257, 576, 49152), (1, 64, 300)]
DRY_SHAPES = [(63, 96, 300)]
NUM_STORED = 64
TEMPERATURE, HARD_WEIGHT, SOFTCAP = 2.0, 0.3, 20.0


def loss_correctness(device: Device) -> Iterator[Task]:
    """Error against float64. It may be at most the error of eager code in the same dtype plus slack."""
    losses = [item for losses_of_op in gathered("LOSSES").values() for item in losses_of_op.items()]
    shapes = device.pick(SHAPES, DRY_SHAPES)
    for dtype, slack in (("float32", 5e-4), ("float16", 4e-3), ("bfloat16", 2e-2)):
        for shape, (name, loss) in itertools.product(shapes, losses):
            what = {"check": name, "dtype": dtype, "shape": list(shape)}
            yield Task(what, partial(_loss, device, dtype, slack, shape, loss, None))
        for name, loss in losses:  # dW is a sum over chunks, but one product in eager code
            what = {"check": name, "dtype": dtype, "shape": list(shapes[0]), "chunk": 20}
            yield Task(what, partial(_loss, device, dtype, slack, shapes[0], loss, 20))


def _loss(
    device: Device, dtype_name: str, slack: float, shape: tuple[int, int, int], loss: Loss, chunk: int | None
) -> Row:
    """Soft-cap on both heads, a bias, everything trained."""
    num_tokens, hidden, vocab = shape
    dtype = getattr(torch, dtype_name)
    x = device.randn(num_tokens, hidden, seed=0, dtype=dtype)
    w = (3 * device.randn(vocab, hidden, seed=1) / hidden**0.5).to(dtype)
    b = device.randn(vocab, seed=2, dtype=dtype)
    teacher_logits = (2 * device.randn(num_tokens, vocab, seed=3)).to(dtype)
    t = torch.randint(0, vocab, (num_tokens,), device=device.kind)
    probs, ids = (teacher_logits.double() / TEMPERATURE).softmax(-1).topk(NUM_STORED)
    inputs = LossInputs(t, teacher_logits, probs, ids, TEMPERATURE, HARD_WEIGHT)

    def fused(x: Any, w: Any, b: Any) -> Any:
        head = Head(DenseWeight(w), b, softcap=SOFTCAP)
        return loss.fused(x, head, inputs, backend=device.backend(dtype), chunk=chunk)

    def eager(x: Any, w: Any, b: Any) -> Any:
        z = F.linear(x, w, b)
        return loss.eager(SOFTCAP * torch.tanh((z if x.dtype == torch.float64 else z.float()) / SOFTCAP), inputs)

    def run(value_of: Callable[..., Any], *tensors: Any) -> tuple[Any, ...]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        value = value_of(*leaves)
        return value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))

    truth, ours, plain = run(eager, x.double(), w.double(), b.double()), run(fused, x, w, b), run(eager, x, w, b)
    row: Row = {"ok": True}
    for part, want, got, base in zip(("loss", "hidden", "weight", "bias"), truth, ours, plain, strict=True):
        error, allowed = float((got - want).abs().max()), float((base - want).abs().max())
        limit = allowed + slack * float(want.abs().max())
        row[part] = {"error": error, "limit": limit}
        row["ok"] = row["ok"] and error <= limit
    return row
