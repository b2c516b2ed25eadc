"""The bytes of one example: all its positions, part by part.

topk      ids of k classes, bit-packed | values of k classes and, where kept, of the rest
sampled   number of different classes, bit-packed | their ids, bit-packed | their counts - 1, bit-packed
mixed     as topk, then as sampled
hidden    values [P, H] | for int8: scales [P, H / 32]

Values are little-endian. A part begins at a whole byte. The number of positions is in the index.
"""

# Shapes: P positions, k classes of the head, u different draws in the whole record.

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftlab.distillation.cache.bits import pack, packed_bytes, unpack, width_for
from peftlab.distillation.cache.fill import Fill
from peftlab.distillation.cache.hidden import decode_hidden, encode_hidden
from peftlab.distillation.targets import SparseTarget, Tail
from peftlab.errors import VerificationError

_VALUES = {"float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True, slots=True)
class Classes:
    """Stored classes of P positions, rows padded as in ``SparseTarget``: ids int64, probs float32, both [P, w]."""

    ids: NDArray[np.int64]
    probs: NDArray[np.float32]


def encode(target: SparseTarget | Tensor, fill: Fill, *, where: str) -> bytes:
    """The record of ``target``, which comes from ``fill.target``.

    Args: where: the example, for messages. Raises: VerificationError for non-finite values; ValueError for a target of
    another fill.
    """
    if isinstance(target, Tensor) != (fill.kind == "hidden"):
        raise ValueError(f"expected a target of fill {fill.kind}, found {type(target).__name__}")
    values = target if isinstance(target, Tensor) else target.probs
    if not bool(values.isfinite().all()):
        rows = (~values.isfinite().all(-1)).nonzero()[:, 0]
        raise VerificationError(
            f"expected finite values of the teacher, found NaN or inf at {len(rows)} of {len(values)} positions of {where}, "
            f"the first at position {int(rows[0])}: run the teacher in bfloat16 or float32, or remove this example"
        )
    if isinstance(target, Tensor):
        return encode_hidden(target, fill)
    ids, probs = target.ids.cpu().numpy(), target.probs.cpu().numpy()
    k = fill.k or 0
    fits = probs.shape[1] == k if fill.kind == "topk" else k < probs.shape[1] <= k + (fill.draws or 0)
    if not fits or target.temperature != fill.temperature:
        raise ValueError(
            f"expected a target of {fill.settings()}, found {probs.shape[1]} classes at temperature {target.temperature}"
        )
    parts = []
    if k:
        parts += [pack(ids[:, :k], fill.id_bits), _encode_values(probs, fill)]
    if fill.draws is not None:
        parts += _encode_draws(ids[:, k:], probs[:, k:], fill)
    return b"".join(parts)


def decode(record: bytes, num_positions: int, fill: Fill) -> Classes | Tensor:
    """The stored values: classes, or hidden states [P, H] in bfloat16 if stored so, else float32."""
    data = memoryview(record)
    if fill.kind == "hidden":
        return decode_hidden(data, num_positions, fill)
    k = fill.k or 0
    ids, probs = np.empty((num_positions, 0), dtype=np.int64), np.empty((num_positions, 0), dtype=np.float32)
    rest = np.ones(num_positions, dtype=np.float32)
    if k:
        size = packed_bytes(num_positions * k, fill.id_bits)
        ids, data = unpack(data[:size], num_positions * k, fill.id_bits).reshape(-1, k), data[size:]
        width = k + fill.keeps_rest
        size = num_positions * width * np.dtype(_VALUES[fill.values]).itemsize
        values = np.frombuffer(data[:size], dtype=_VALUES[fill.values]).reshape(-1, width)
        (probs, rest), data = _decode_values(values, fill), data[size:]
    if fill.draws is None:
        return Classes(ids, probs)
    return _with_draws(ids, probs, rest, data, fill)


def join(parts: list[Classes], fill: Fill) -> SparseTarget:
    """The concatenated target of several examples, rows padded to the widest with their first id."""
    width = max((part.ids.shape[1] for part in parts if len(part.ids)), default=max(fill.k or 0, 1))
    num_rows = sum(len(part.ids) for part in parts)
    ids, probs = np.empty((num_rows, width), dtype=np.int64), np.zeros((num_rows, width), dtype=np.float32)
    ends = itertools.accumulate(len(part.ids) for part in parts)
    for part, end in zip(parts, ends, strict=True):
        if len(part.ids):
            rows, own = slice(end - len(part.ids), end), part.ids.shape[1]
            ids[rows, :own], probs[rows, :own] = part.ids, part.probs
            ids[rows, own:] = part.ids[:, :1]
    tail: Tail = "bucket" if fill.kind == "topk" else "none"
    return SparseTarget(torch.from_numpy(ids), torch.from_numpy(probs), fill.temperature, tail)


def _encode_values(probs: NDArray[np.floating], fill: Fill) -> bytes:
    """Head [P, k] and rest: the probability of all classes outside the head; for mixed the mass of its draws."""
    assert fill.k is not None
    head = probs[:, : fill.k]
    if fill.keeps_rest:
        # In float64: for a small rest, 1 - sum would be mostly rounding. The weights of draws give it exactly.
        drawn, above = probs[:, fill.k :].sum(1, dtype=np.float64), 1.0 - head.sum(1, dtype=np.float64)
        head = np.column_stack([head, drawn if fill.kind == "mixed" else np.maximum(above, 0.0)])
    if fill.values == "float16":
        with np.errstate(divide="ignore"):  # log 0 = -inf: a class that does not exist
            head = np.log(head)
    return head.astype(_VALUES[fill.values]).tobytes()


def _decode_values(values: NDArray[np.floating], fill: Fill) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Head [P, k] and rest [P]; their sum is 1 for a distribution, never above."""
    assert fill.k is not None
    exact = np.exp(values.astype(np.float32)) if fill.values == "float16" else values.astype(np.float32)
    total = exact.sum(1, dtype=np.float64)
    # Rounded logarithms: all classes are stored, so the difference to 1 is rounding, which a bucket would count as mass of
    # others. float32 probabilities are restored bit for bit unless their sum is above 1.
    divisor = total if fill.values == "float16" else np.maximum(total, 1.0)
    exact = (exact / divisor[:, None]).astype(np.float32)
    return exact[:, : fill.k], exact[:, fill.k] if fill.keeps_rest else np.zeros(len(exact), dtype=np.float32)


def _encode_draws(ids: NDArray[np.int64], weights: NDArray[np.floating], fill: Fill) -> list[bytes]:
    """Args: ids, weights: [P, m]; ``weights`` are proportional to the counts; weight 0 is no draw."""
    assert fill.draws is not None
    drawn = weights > 0
    mass = weights.sum(1, dtype=np.float64, keepdims=True)
    counts = np.rint(weights / np.where(mass > 0, mass, 1.0) * fill.draws).astype(np.int64)
    if not (counts.sum(1)[drawn.any(1)] == fill.draws).all():
        raise ValueError(f"expected weights of {fill.draws} draws, found {counts.sum(1).tolist()} per position")
    return [
        pack(drawn.sum(1), width_for(fill.draws)),
        pack(ids[drawn], fill.id_bits),
        pack(counts[drawn] - 1, width_for(fill.draws - 1)),
    ]


def _with_draws(
    ids: NDArray[np.int64], probs: NDArray[np.float32], rest: NDArray[np.float32], data: memoryview, fill: Fill
) -> Classes:
    """The head [P, k] followed by the drawn classes, each with its count's share of ``rest`` [P]."""
    assert fill.draws is not None
    num_rows, k = ids.shape
    size = packed_bytes(num_rows, width_for(fill.draws))
    different, data = unpack(data[:size], num_rows, width_for(fill.draws)), data[size:]
    u = int(different.sum())
    size = packed_bytes(u, fill.id_bits)
    drawn, counts = unpack(data[:size], u, fill.id_bits), unpack(data[size:], u, width_for(fill.draws - 1)) + 1
    width = k + (int(different.max()) if num_rows else 0)
    rows = np.repeat(np.arange(num_rows), different)
    columns = k + np.arange(u) - np.repeat(np.cumsum(different) - different, different)
    all_probs = np.zeros((num_rows, width), dtype=np.float32)
    all_probs[:, :k] = probs
    all_probs[rows, columns] = rest[rows] * (counts / fill.draws).astype(np.float32)
    all_ids = np.zeros((num_rows, width), dtype=np.int64)
    all_ids[:, :k] = ids
    all_ids[rows, columns] = drawn
    filled = np.arange(width) < k + different[:, None]
    return Classes(np.where(filled, all_ids, all_ids[:, :1]), all_probs)
