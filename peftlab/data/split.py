"""Splits rows into training rows and held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peftlab.data.rows import IntArray, Rows
from peftlab.errors import DataError


def split_rows(
    rows: Rows,
    *,
    fraction: float = 0.1,
    num_rows: int | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> tuple[IntArray, IntArray]:
    """The indices of the training rows and of the held-out rows, each ascending; each row is in exactly one of them.

    The same arguments give the same split on every machine. With labels, each class gets its proportional share of the
    held-out rows (largest remainder, so the total is exact). A class of two rows or more is in both parts if there are
    enough held-out rows; a class of one row is trained on, unless all others together are too few.

    Args:
        fraction: share of held-out rows, between 0 and 1; at least one row is held out, and never all.
        num_rows: number of held-out rows, instead of the share.
        seed: >= 0.
        labels: [N] the class of each row.

    Returns: two int64 arrays, train and eval.

    Raises: DataError: fewer than two rows, or nothing would be left to train on.
    """
    num_eval = _num_eval(rows, fraction, num_rows)
    rng = np.random.default_rng(seed)
    if labels is None:
        held_out = rng.permutation(len(rows))[:num_eval]
    else:
        assert len(labels) == len(rows)
        members = _members(labels)
        counts = _eval_counts(np.array([len(rows) for rows in members]), num_eval)
        held_out = np.concatenate([rng.permutation(m)[:n] for m, n in zip(members, counts, strict=True)])
    is_eval = np.zeros(len(rows), dtype=bool)
    is_eval[held_out] = True
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def split_groups(
    rows: Rows, groups: Sequence[str], *, fraction: float = 0.1, num_rows: int | None = None, seed: int = 0
) -> tuple[IntArray, IntArray]:
    """As ``split_rows``, but rows of one group are in the same part: at most as many rows are held out as there.

    Args: groups: [N] the group of each row. Raises: DataError: also if there is one group only.
    """
    num_eval = _num_eval(rows, fraction, num_rows)
    members = _members(groups)
    if len(members) < 2:
        raise DataError(
            f"all rows of {rows.name} belong together ({groups[0][:40]!r}), so none can be held out; set data.eval",
            key="data.eval_fraction",
        )
    order = np.random.default_rng(seed).permutation(len(members))
    held_out, count = list[IntArray](), 0
    for group in (members[i] for i in order):
        if not held_out or count + len(group) <= num_eval:
            held_out.append(group)
            count += len(group)
    is_eval = np.zeros(len(rows), dtype=bool)
    is_eval[np.concatenate(held_out[: len(members) - 1])] = True
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def balanced_rows(labels: Sequence[str], *, shares: Mapping[str, float] | None = None, seed: int = 0) -> IntArray:
    """Ascending indices of rows of which each class has its share, as many as there are; the same arguments draw the same.

    Args: labels: [N] the class of each row, N >= 1. shares: of each class, above 0; default: equal ones.
    """
    members, names = _members(labels), sorted(set(labels))
    parts = [1.0 if shares is None else shares[name] for name in names]
    whole = min(len(rows) / part for rows, part in zip(members, parts, strict=True))
    rng = np.random.default_rng(seed)
    counts = [max(1, round(whole * part)) for part in parts]
    return np.sort(np.concatenate([rng.permutation(rows)[:n] for rows, n in zip(members, counts, strict=True)]))


def rows_per_class(labels: Sequence[str], count: int, *, seed: int = 0) -> IntArray:
    """Ascending indices of ``count`` rows of each class; the same arguments draw the same. Args: labels: [N] their classes.

    Raises: DataError if a class has fewer.
    """
    members, names = _members(labels), sorted(set(labels))
    few = {name: len(rows) for name, rows in zip(names, members, strict=True) if len(rows) < count}
    if few:
        found = ", ".join(f"{rows:,} of {name!r}" for name, rows in list(few.items())[:8])
        raise DataError(f"expected {count:,} training rows of each class, found {found}; draw fewer")
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(rows)[:count] for rows in members]))


def _members(labels: Sequence[str]) -> list[IntArray]:
    """The rows of each class, in the order of the classes' names."""
    # Not a numpy text array: that would pad each label to the longest one.
    names, class_of_row = np.unique(np.array(labels, dtype=object), return_inverse=True)
    return [np.flatnonzero(class_of_row == c) for c in range(len(names))]


def _num_eval(rows: Rows, fraction: float, num_rows: int | None) -> int:
    if len(rows) < 2:
        count = "one row" if len(rows) else "no rows"
        raise DataError(f"{rows.name} has {count}, too few to hold some out; set data.eval", key="data.eval_fraction")
    if num_rows is None:
        if not 0 < fraction < 1:
            raise DataError(f"expected a share between 0 and 1, found {fraction}", key="data.eval_fraction")
        return min(max(int(len(rows) * fraction + 0.5), 1), len(rows) - 1)
    if not 1 <= num_rows < len(rows):
        raise DataError(
            f"{num_rows} rows cannot be held out of the {len(rows)} rows of {rows.name}: "
            f"expected 1 to {len(rows) - 1}, to leave some for training",
            key="data.eval_rows",
        )
    return num_rows


def _eval_counts(sizes: IntArray, num_eval: int) -> IntArray:
    """[C] held-out rows of each class, given [C] rows of each: the proportional share, rounded and within bounds."""
    share = sizes * num_eval / sizes.sum()
    fewest = np.minimum(sizes - 1, 1)
    most = sizes - 1
    if fewest.sum() > num_eval:
        fewest = np.zeros_like(sizes)
    if most.sum() < num_eval:
        most = sizes
    counts: IntArray = np.clip(np.floor(share).astype(np.int64), fewest, most)
    while (missing := num_eval - counts.sum()) != 0:
        step = 1 if missing > 0 else -1
        movable = counts < most if step > 0 else counts > fewest
        counts[np.argmax(np.where(movable, step * (share - counts), -np.inf))] += step
    return counts
