"""Packs documents into sequences: best-fit decreasing, a pure function of the lengths and their order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[npt.NDArray[np.int64]]:
    """Indices of the documents of each pack: every document once, longest first, at most ``capacity`` tokens per pack.

    Best-fit decreasing: each document goes into the pack with the least room in which it fits. Among documents of
    equal length the earlier comes first. A document longer than ``capacity`` gets its own pack.

    Args: lengths: [N] tokens per document, positive.
    """
    array = np.asarray(lengths, dtype=np.int64)
    assert not len(array) or array.min() > 0
    order = np.argsort(-array, kind="stable")
    pack_of = np.empty(len(order), dtype=np.int64)
    packs_with: dict[int, list[int]] = {}  # room -> packs that have exactly that much left
    rooms: list[int] = []  # the keys of packs_with, ascending
    num_packs = 0
    values, counts = np.unique(-array, return_counts=True)
    start = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        end = start + count
        while start < end:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                chosen = packs_with[room].pop()
                if not packs_with[room]:
                    del packs_with[room], rooms[at]
            else:
                room, chosen = capacity, num_packs
                num_packs += 1
            # If the remaining room fits this length again, it is then the least room that does.
            taken = min(end - start, max(1, room // length))
            pack_of[start : start + taken] = chosen
            start += taken
            left = room - taken * length
            if left > 0:
                if left not in packs_with:
                    packs_with[left] = []
                    insort(rooms, left)
                packs_with[left].append(chosen)
    by_pack = np.argsort(pack_of, kind="stable")
    return np.split(order[by_pack], np.flatnonzero(np.diff(pack_of[by_pack])) + 1) if num_packs else []


def packing_figures(lengths: npt.NDArray[np.int64], capacity: int) -> dict[str, Any]:
    """``capacity``, the number of ``packs`` for rows of [N] ``lengths``, and the share of their room left ``empty``."""
    packs = len(pack(lengths, capacity))
    return {"capacity": capacity, "packs": packs, "empty": 1 - int(lengths.sum()) / (packs * capacity)}
