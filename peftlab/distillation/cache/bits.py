"""Packs integers of any width up to 32 bits without gaps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Eight values of `width` bits fill exactly `width` bytes, at most four words of 64 bits.
_GROUP, _WORD, _WORDS = 8, 64, 4


def width_for(largest: int) -> int:
    """The number of bits for 0 to ``largest``; 0 for a value that is always 0. Raises: ValueError beyond 32 bits."""
    if not 0 <= largest < 2**32:
        raise ValueError(f"expected values from 0 to 2^32 - 1, found {largest}")
    return largest.bit_length()


def packed_bytes(count: int, width: int) -> int:
    """The number of bytes that ``pack`` returns for ``count`` values."""
    return (count * width + 7) // 8


def pack(values: NDArray[np.integer], width: int) -> bytes:
    """``values`` in row order, ``width`` bits each, lowest bit first; the last byte is padded with zeros.

    At width 8, 16 and 32 these are the bytes of little-endian unsigned integers.
    Args: values: of any shape, from 0 to 2^width - 1. Raises: ValueError for a value out of range.
    """
    flat = values.reshape(-1)
    if flat.size and not (int(flat.min()) >= 0 and int(flat.max()) < 2**width):
        raise ValueError(f"expected values of {width} bits, found {flat.min()} to {flat.max()}")
    count = -(-flat.size // _GROUP)
    grouped = np.zeros((count, _GROUP), dtype=np.uint64)
    grouped.reshape(-1)[: flat.size] = flat
    words = np.zeros((count, _WORDS), dtype="<u8")
    for i, word, shift in _places(width):
        words[:, word] |= grouped[:, i] << np.uint64(shift)
        if shift + width > _WORD:
            words[:, word + 1] |= grouped[:, i] >> np.uint64(_WORD - shift)
    return words.view(np.uint8)[:, :width].tobytes()[: packed_bytes(flat.size, width)]


def unpack(data: bytes | memoryview, count: int, width: int) -> NDArray[np.int64]:
    """[count] the packed values. Raises: ValueError if ``data`` does not have the length for them."""
    if len(data) != packed_bytes(count, width):
        raise ValueError(f"expected {packed_bytes(count, width)} bytes of {count} values, found {len(data)}")
    groups = -(-count // _GROUP)
    padded = np.zeros(groups * width, dtype=np.uint8)
    padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    words = np.zeros((groups, _WORDS * 8), dtype=np.uint8)
    words[:, :width] = padded.reshape(groups, width)
    words64, values = words.view("<u8"), np.empty((groups, _GROUP), dtype=np.uint64)
    for i, word, shift in _places(width):
        value = words64[:, word] >> np.uint64(shift)
        if shift + width > _WORD:
            value |= words64[:, word + 1] << np.uint64(_WORD - shift)
        values[:, i] = value & np.uint64(2**width - 1)
    return values.reshape(-1)[:count].astype(np.int64)


def _places(width: int) -> Iterator[tuple[int, int, int]]:
    """For each value in a group: its number, and the word and bit where it begins."""
    return ((i, i * width // _WORD, i * width % _WORD) for i in range(_GROUP))
