"""Encodes hidden states as bfloat16, float32, or int8 with one bfloat16 scale for 32 neighbours of a row."""

# Shapes: P positions, H width, G groups of a row.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peftlab.distillation.cache.fill import INT8_GROUP, Fill


def encode_hidden(hidden: Tensor, fill: Fill) -> bytes:
    """The bytes of hidden states [P, H] of any float type. Raises: ValueError for another width than the fill's."""
    if hidden.dim() != 2 or hidden.shape[1] != fill.hidden_size:
        raise ValueError(f"expected hidden states [P, {fill.hidden_size}], found {list(hidden.shape)}")
    if fill.hidden == "float32":
        return hidden.float().cpu().numpy().astype("<f4").tobytes()
    if fill.hidden == "bfloat16":
        return hidden.bfloat16().view(torch.int16).cpu().numpy().astype("<i2").tobytes()
    grouped = _grouped(hidden.float())
    scales = _rounded_up(grouped.abs().amax(-1, keepdim=True) / 127)
    steps = torch.where(scales > 0, grouped / scales, 0.0).round().to(torch.int8)
    steps = steps.flatten(1)[:, : hidden.shape[1]]
    return steps.cpu().numpy().tobytes() + (scales.bfloat16().view(torch.int16).cpu().numpy().astype("<i2").tobytes())


def decode_hidden(data: memoryview, num_positions: int, fill: Fill) -> Tensor:
    """[P, H] hidden states: bit-identical bfloat16 if stored so, else float32."""
    assert fill.hidden_size is not None
    shape = (num_positions, fill.hidden_size)
    if fill.hidden == "float32":
        return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape))
    if fill.hidden == "bfloat16":
        return torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.int16).reshape(shape)).view(torch.bfloat16)
    size = num_positions * fill.hidden_size
    steps = torch.from_numpy(np.frombuffer(data[:size], dtype=np.int8).reshape(shape).astype(np.float32))
    scales = torch.from_numpy(np.frombuffer(data[size:], dtype="<i2").astype(np.int16)).view(torch.bfloat16).float()
    grouped = _grouped(steps)
    return (grouped * scales.view(*grouped.shape[:2], 1)).flatten(1)[:, : fill.hidden_size]


def _grouped(rows: Tensor) -> Tensor:
    """[P, G, 32] from [P, H], the last group padded with zeros."""
    groups = -(-rows.shape[1] // INT8_GROUP)
    return torch.nn.functional.pad(rows, (0, groups * INT8_GROUP - rows.shape[1])).view(len(rows), groups, INT8_GROUP)


def _rounded_up(scales: Tensor) -> Tensor:
    """``scales`` (float32, at least 0) rounded up to bfloat16: rounded down, the largest value of a group would not fit."""
    bits = scales.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
