from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.data import Rows, balanced_rows, split_groups, split_rows
from peftlab.data.rows import Origin
from peftlab.errors import DataError
from tests.processes import Processes


def rows_of(count: int) -> Rows:
    return Rows(
        name="a.csv",
        columns={"text": ["x"] * count},
        fingerprint="",
        origins=(Origin("a.csv", "line"),),
        origin_index=np.zeros(count, dtype=np.int64),
        positions=np.arange(2, count + 2),
    )


def labels_of(sizes: list[int], seed: int = 0) -> list[str]:
    labels = [f"class {c}" for c, size in enumerate(sizes) for _ in range(size)]
    return [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]


def assert_is_partition(train: np.ndarray, held_out: np.ndarray, count: int) -> None:
    assert train.dtype == held_out.dtype == np.int64
    assert np.all(np.diff(train) > 0)
    assert np.all(np.diff(held_out) > 0)
    assert len(train) > 0
    assert len(held_out) > 0
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 300), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_split_rows_is_a_partition_of_the_right_size(count: int, fraction: float, seed: int) -> None:
    train, held_out = split_rows(rows_of(count), fraction=fraction, seed=seed)
    assert_is_partition(train, held_out, count)
    assert abs(len(held_out) - count * fraction) <= 1
    again = split_rows(rows_of(count), fraction=fraction, seed=seed)
    assert np.array_equal(again[0], train)
    assert np.array_equal(again[1], held_out)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), data=st.data(), seed=st.integers(0, 99))
def test_split_rows_with_labels_keeps_the_proportions(sizes: list[int], data: st.DataObject, seed: int) -> None:
    count = sum(sizes)
    if count < 2:
        return
    num_rows = data.draw(st.integers(1, count - 1))
    labels = labels_of(sizes, seed)
    train, held_out = split_rows(rows_of(count), num_rows=num_rows, seed=seed, labels=labels)
    assert_is_partition(train, held_out, count)
    assert len(held_out) == num_rows

    counts = Counter(labels[i] for i in held_out)
    of_class = [(counts[f"class {c}"], size, size * num_rows / count) for c, size in enumerate(sizes)]
    several = sum(size > 1 for size in sizes)
    if several <= num_rows <= count - len(sizes):
        assert all(1 <= n < size for n, size, _ in of_class if size > 1)
        assert all(n == 0 for n, size, _ in of_class if size == 1)
    # Each count is within one row of the exact share, unless "at least one on each side" needs more.
    if all(share >= 1 and size - share >= 1 for _, size, share in of_class):
        assert all(abs(n - share) < 1 for n, _, share in of_class)


def test_split_rows_rounds_by_largest_remainder() -> None:
    # The shares of 10 of 100 rows are 6.1, 2.7, 1.2. The row left over goes to the share with the largest remainder.
    labels = labels_of([61, 27, 12])
    _, held_out = split_rows(rows_of(100), labels=labels)
    assert Counter(labels[i] for i in held_out) == {"class 0": 6, "class 1": 3, "class 2": 1}


def test_split_rows_puts_a_rare_class_on_both_sides() -> None:
    labels = labels_of([98, 2])
    train, held_out = split_rows(rows_of(100), labels=labels)
    assert Counter(labels[i] for i in held_out) == {"class 0": 9, "class 1": 1}
    assert Counter(labels[i] for i in train) == {"class 0": 89, "class 1": 1}


def test_split_rows_trains_on_a_class_of_one_row() -> None:
    labels = labels_of([3, 1])
    train, held_out = split_rows(rows_of(4), num_rows=2, labels=labels)
    assert labels.index("class 1") in train
    assert len(held_out) == 2


def test_split_rows_changes_with_the_seed() -> None:
    rows, labels = rows_of(100), labels_of([50, 50])
    for given_labels in (None, labels):
        splits = {tuple(split_rows(rows, seed=seed, labels=given_labels)[1].tolist()) for seed in range(20)}
        assert len(splits) == 20


def test_split_rows_draws_rows_evenly() -> None:
    hits = np.zeros(20)
    for seed in range(500):
        hits[split_rows(rows_of(20), fraction=0.5, seed=seed)[1]] += 1
    assert np.abs(hits - 250).max() < 5 * np.sqrt(500 * 0.25)  # five standard deviations


def test_split_rows_does_not_depend_on_the_hash_seed(process: Processes) -> None:
    code = (
        "from tests.data.test_split import rows_of, labels_of, split_rows;"
        "print(split_rows(rows_of(40), labels=labels_of([20, 15, 5]))[1].tolist())"
    )
    here = split_rows(rows_of(40), labels=labels_of([20, 15, 5]))[1].tolist()
    assert process.run_with_other_hashes(code) == f"{here}\n"


@pytest.mark.parametrize("count", [0, 1])
def test_split_rows_refuses_too_few_rows(count: int) -> None:
    with pytest.raises(
        DataError, match=rf"^a.csv has {('no rows', 'one row')[count]}, too few to hold some out; set data.eval$"
    ):
        split_rows(rows_of(count))


@pytest.mark.parametrize("num_rows", [0, 5, 6])
def test_split_rows_refuses_a_wrong_number_of_rows(num_rows: int) -> None:
    with pytest.raises(DataError, match=r"rows cannot be held out of the 5 rows of a.csv: expected 1 to 4") as info:
        split_rows(rows_of(5), num_rows=num_rows)
    assert info.value.key == "data.eval_rows"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_rows_refuses_a_wrong_share(fraction: float) -> None:
    with pytest.raises(DataError, match="expected a share between 0 and 1") as info:
        split_rows(rows_of(5), fraction=fraction)
    assert info.value.key == "data.eval_fraction"


def test_balanced_rows_draws_as_many_of_each_class_as_the_rarest_has() -> None:
    labels = ["ham"] * 20 + ["spam"] * 5 + ["ham"] * 20 + ["other"] * 7
    kept = balanced_rows(labels, seed=1)
    assert Counter(labels[i] for i in kept) == {"ham": 5, "spam": 5, "other": 5}
    assert list(kept) == sorted(set(kept.tolist()))
    assert set(range(20, 25)) <= set(kept.tolist())
    assert kept.tolist() == balanced_rows(labels, seed=1).tolist() != balanced_rows(labels, seed=2).tolist()


@pytest.mark.parametrize(("num_rows", "most"), [(None, 4), (6, 6), (1, 3)])
def test_rows_of_one_group_are_on_one_side(num_rows: int | None, most: int) -> None:
    groups = [f"q{i // 3}" for i in range(36)]
    rows = Rows.from_dicts([{"query": group} for group in groups], name="made")
    kept, held = split_groups(rows, groups, num_rows=num_rows, seed=1)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(36))
    assert not {groups[i] for i in kept} & {groups[i] for i in held} and 0 < len(held) <= most
    again = split_groups(rows, groups, num_rows=num_rows, seed=1)[1]
    assert again.tolist() == held.tolist()
    others = [split_groups(rows, groups, num_rows=num_rows, seed=seed)[1].tolist() for seed in range(2, 6)]
    assert any(other != held.tolist() for other in others)


def test_one_group_cannot_be_split() -> None:
    rows = Rows.from_dicts([{"query": "a"}] * 4, name="made")
    with pytest.raises(DataError, match="belong together"):
        split_groups(rows, ["a"] * 4)
