"""Estimates training time from the model's shape and a matmul timed on the device, to within a factor of two."""

from __future__ import annotations

import statistics
import time
from typing import Any

from peftlab.assembly.assembly import Assembly
from peftlab.models import resolve_precision, runs_on_zeros
from peftlab.specs.storages import STORAGES

# Fixed cost per adapted linear and step: Python and launches, forward and backward.
_LAUNCH_SECONDS = 1e-3
# Rows of the timed matmul: enough to fill the device, as micro-batches do.
_PROBE_ROWS = {"cpu": 512, "cuda": 8192}
_PROBE_REPEATS = 5


def estimate_seconds(
    assembly: Assembly,
    skeleton: Any,
    *,
    steps: int,
    tokens: int,
    squares: float,
    scored: int,
    reads_twice: bool = False,
    flops_per_s: float | None = None,
) -> dict[str, Any]:
    """Estimates ``seconds`` of the training steps, without loading and evaluation, and the ``flops_per_s`` behind it.

    Args:
        skeleton: the model on the meta device.
        tokens: total tokens of the run. squares: sum of the squared row lengths. scored: positions with logits.
        reads_twice: whether a step reads its rows once more before, for a loss that compares all of them.
        flops_per_s: rate of the device's products; None: it is measured.
    """
    shape, recipe = _shape_of(skeleton), assembly.recipe
    # Forward and input gradient; plus the weight gradient if weights are trained, plus a forward pass to recompute.
    passes = 2 + reads_twice + recipe.train.gradient_checkpointing + (not assembly.method.adapts)
    if assembly.spec.reader == "image processor":
        reader = assembly.reader
        flops = float(passes * _flops_per_image(skeleton, reader.shape) * tokens // reader.length)
    else:
        flops = 2.0 * passes * (tokens * shape["body"] + 2 * squares * shape["attention_width"])
        flops += 4.0 * scored * shape["head"]
    dtype = resolve_precision(recipe.train.precision, assembly.device)
    speed = flops_per_s or _matmul_speed(shape["widest"], dtype, assembly.device)
    seconds = STORAGES[assembly.storage].overhead * flops / speed + steps * shape["linears"] * _LAUNCH_SECONDS
    return {"seconds": seconds, "flops": flops, "flops_per_s": speed}


def forward_seconds(
    skeleton: Any, *, tokens: int, squares: float, scored: int, dtype: Any, device: str, storage: str
) -> float:
    """Estimates the seconds to read ``tokens``; arguments as ``estimate_seconds``, storage as model.quantize."""
    shape = _shape_of(skeleton)
    flops: float = 2.0 * (tokens * shape["body"] + 2 * squares * shape["attention_width"] + scored * shape["head"])
    return STORAGES[storage].overhead * flops / _matmul_speed(shape["widest"], dtype, device)


def _flops_per_image(model: Any, shape: tuple[int, ...]) -> int:
    """FLOPs of the forward pass over one image of ``shape``, counted by PyTorch. Args: model: on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    run = runs_on_zeros(model, shape)
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _shape_of(model: Any) -> dict[str, Any]:
    """Returns linear weights in the body and the head, summed width of the attention layers, largest weight; for a model of
    images, convolutions count as layers too."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D | nn.Conv2d) and m is not head]
    shapes = [tuple(m.weight.flatten(1).shape) for m in layers]
    config = model.config.get_text_config()
    return {
        "linears": len(layers),
        "body": sum(m.weight.numel() for m in layers),
        "head": head.weight.numel() if head is not None else 0,
        "attention_width": getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0),
        "widest": max(shapes, key=lambda s: s[0] * s[1], default=(64, 64)),
    }


def _matmul_speed(shape: tuple[int, int], dtype: Any, device: str) -> float:
    """Measures FLOP/s of one linear layer of this shape: the median of several repeats."""
    import torch

    rows = _PROBE_ROWS[device]
    x = torch.ones(rows, shape[1], dtype=dtype, device=device)
    weight = torch.ones(shape, dtype=dtype, device=device)
    seconds = []
    for repeat in range(_PROBE_REPEATS + 1):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat:  # the first call starts threads and libraries
            seconds.append(time.perf_counter() - began)
    return 2.0 * rows * shape[0] * shape[1] / max(statistics.median(seconds), 1e-9)
