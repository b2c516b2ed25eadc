"""Batch plans hold every row once, keep budgets, cut optimally, and depend only on lengths, seed and epoch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.data import BatchPlan, eval_batches, fit_lengths
from peftlab.data import batching as batching_module
from peftlab.data.batching import _cheapest_cuts
from tests.processes import Processes

GROUPINGS = ("none", "step", "epoch")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    lengths = draw(LENGTHS)
    size = draw(st.sampled_from(["batch_size", "batch_tokens"]))
    options: dict[str, Any] = {
        size: draw(st.integers(1, 6) if size == "batch_size" else st.integers(1, 90)),
        "accumulate": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 5)),
        "split_cost": draw(st.sampled_from([0, 8, 64])),
    }
    return lengths, options


def steps_of_epoch(plan: BatchPlan, epochs: int) -> list[list[Any]]:
    """The planned steps, by epoch."""
    steps = [plan.step(i) for i in range(plan.total_steps)]
    return [[s for s in steps if s.epoch == e] for e in range(epochs)]


def rows_of(step: Any) -> list[int]:
    return sorted(int(i) for part in step.micro_batches for i in part)


def padded(step: Any, lengths: list[int]) -> int:
    return sum(len(part) * max(lengths[i] for i in part) for part in step.micro_batches)


@settings(max_examples=80, deadline=None)
@given(plan=plans(), grouping=st.sampled_from(GROUPINGS))
def test_batch_plan_has_every_row_exactly_once_per_epoch(plan: Any, grouping: str) -> None:
    lengths, options = plan
    for steps in steps_of_epoch(BatchPlan(lengths, grouping=grouping, epochs=2, **options), 2):
        assert sorted(i for step in steps for i in rows_of(step)) == list(range(len(lengths)))
        assert all(len(part) for step in steps for part in step.micro_batches)


def test_batch_plan_comparison_catches_a_lost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BatchPlan._micro_batches
    monkeypatch.setattr(
        BatchPlan, "_micro_batches", lambda self, rows: right(self, rows[1:] if len(rows) > 1 else rows)
    )
    with pytest.raises(AssertionError):
        test_batch_plan_has_every_row_exactly_once_per_epoch.hypothesis.inner_test(
            ([3, 4, 5, 6], {"batch_size": 2}), "step"
        )


@settings(max_examples=60, deadline=None)
@given(plan=plans(), grouping=st.sampled_from(GROUPINGS))
def test_batch_plan_is_a_pure_function_of_its_arguments(plan: Any, grouping: str) -> None:
    lengths, options = plan
    one, two = (BatchPlan(lengths, grouping=grouping, epochs=3, **options) for _ in range(2))
    assert one.total_steps == two.total_steps
    order = np.random.default_rng(0).permutation(one.total_steps)
    jumped = {int(i): two.step(int(i)) for i in order}
    for i in range(one.total_steps):
        sequential = one.step(i)
        assert sequential.epoch == jumped[i].epoch
        assert [p.tolist() for p in sequential.micro_batches] == [p.tolist() for p in jumped[i].micro_batches]


def test_batch_plan_order_changes_with_seed_and_epoch() -> None:
    plan = BatchPlan([5] * 50, batch_size=10, epochs=2, grouping="none")
    other = BatchPlan([5] * 50, batch_size=10, epochs=2, grouping="none", seed=1)
    first = plan.step(0).micro_batches[0].tolist()
    assert first != other.step(0).micro_batches[0].tolist()
    assert first != plan.step(5).micro_batches[0].tolist()


def test_batch_plan_does_not_depend_on_the_hash_seed(process: Processes) -> None:
    code = (
        "from peftlab.data import BatchPlan\n"
        "p = BatchPlan([3, 9, 4, 4, 7, 1, 2], batch_tokens=12, epochs=2)\n"
        "print([[m.tolist() for m in p.step(i).micro_batches] for i in range(p.total_steps)])"
    )
    p = BatchPlan([3, 9, 4, 4, 7, 1, 2], batch_tokens=12, epochs=2)
    here = [[m.tolist() for m in p.step(i).micro_batches] for i in range(p.total_steps)]
    assert process.run_with_other_hashes(code) == f"{here}\n"


@settings(max_examples=80, deadline=None)
@given(plan=plans())
def test_grouping_step_keeps_the_rows_of_each_step(plan: Any) -> None:
    """Grouping may cut a step freely (C3), but it must not change the rows of a step, and so the training."""
    lengths, options = plan
    none, step = (BatchPlan(lengths, grouping=g, epochs=2, **options) for g in ("none", "step"))
    assert none.total_steps == step.total_steps
    for i in range(none.total_steps):
        assert rows_of(none.step(i)) == rows_of(step.step(i))


@settings(max_examples=80, deadline=None)
@given(plan=plans(), grouping=st.sampled_from(GROUPINGS))
def test_micro_batches_keep_their_budget(plan: Any, grouping: str) -> None:
    lengths, options = plan
    planned = BatchPlan(lengths, grouping=grouping, epochs=1, **options)
    for i in range(planned.total_steps):
        step = planned.step(i)
        total = sum(lengths[r] for r in rows_of(step))
        if size := options.get("batch_size"):
            assert all(len(part) <= size for part in step.micro_batches)
            assert len(rows_of(step)) <= size * options["accumulate"]
        else:
            budget = options["batch_tokens"]
            assert all(len(p) == 1 or len(p) * max(lengths[r] for r in p) <= budget for p in step.micro_batches)
            assert len(rows_of(step)) == 1 or total <= budget * options["accumulate"]


@settings(max_examples=80, deadline=None)
@given(plan=plans())
def test_grouping_step_never_costs_more_than_data_order(plan: Any) -> None:
    """The cost is padded tokens plus split cost, which the cut minimises. Without split cost it is the padding alone."""
    lengths, options = plan
    none, step = (BatchPlan(lengths, grouping=g, epochs=1, **options) for g in ("none", "step"))
    for i in range(none.total_steps):
        costs = [
            padded(s, lengths) + options["split_cost"] * len(s.micro_batches) for s in (none.step(i), step.step(i))
        ]
        assert costs[1] <= costs[0]


def brute_force_cost(lengths: list[int], max_rows: int, max_tokens: int, split_cost: int) -> float:
    """Least cost over every way to cut ``lengths`` into consecutive parts that fit."""
    best = float("inf")
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *[i + 1 for i, cut in enumerate(cuts) if cut], len(lengths)]
        parts = [lengths[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(p) == 1 or (len(p) <= max_rows and len(p) * p[0] <= max_tokens) for p in parts):
            best = min(best, sum(len(p) * p[0] + split_cost for p in parts))
    return best


def assert_cuts_are_cheapest(lengths: list[int], max_rows: int, max_tokens: int, split_cost: int) -> None:
    cuts = batching_module._cheapest_cuts(lengths, max_rows=max_rows, max_tokens=max_tokens, split_cost=split_cost)
    assert cuts[0] == 0 and cuts[-1] == len(lengths) and sorted(set(cuts)) == cuts
    parts = [lengths[a:b] for a, b in itertools.pairwise(cuts)]
    assert all(len(p) == 1 or (len(p) <= max_rows and len(p) * p[0] <= max_tokens) for p in parts)
    cost = sum(len(p) * p[0] + split_cost for p in parts)
    assert cost == brute_force_cost(lengths, max_rows, max_tokens, split_cost)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    max_rows=st.integers(1, 9),
    max_tokens=st.integers(1, 200),
    split_cost=st.integers(0, 80),
)
def test_cheapest_cuts_equal_brute_force(lengths: list[int], max_rows: int, max_tokens: int, split_cost: int) -> None:
    assert_cuts_are_cheapest(sorted(lengths, reverse=True), max_rows, max_tokens, split_cost)


def test_most_tokens_limits_micro_batches_of_any_batch_size() -> None:
    lengths = [64] * 40 + [7] * 40 + [300]
    kept = {}
    for most in (None, 1024, 256):
        plan = BatchPlan(lengths, batch_size=32, max_steps=3, most_tokens=most)
        steps = [plan.step(i).micro_batches for i in range(3)]
        kept[most] = [sorted(int(row) for part in step for row in part) for step in steps]
        padded = [len(part) * max(lengths[row] for row in part) for step in steps for part in step]
        assert max(padded) <= max(most or 32 * 300, 300)  # one longer row makes a micro-batch of its own
        assert most is None or max(padded) > most // 2
    assert kept[None] == kept[1024] == kept[256], "the rows of a step, and so its gradient, are the same"


def test_cheapest_cuts_comparison_catches_greedy_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(lengths: list[int], *, max_rows: int, max_tokens: int, split_cost: int) -> list[int]:
        return _cheapest_cuts(lengths, max_rows=max_rows, max_tokens=max_tokens, split_cost=10**9)

    monkeypatch.setattr(batching_module, "_cheapest_cuts", greedy)
    with pytest.raises(AssertionError):
        assert_cuts_are_cheapest([50, 1, 1, 1, 1], 9, 10**6, 8)


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.5, 5), (1.0, 10), (1.5, 15), (2.01, 21), (0.001, 1), (0.91, 10), (None, 10)]
)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_fractional_epochs_give_a_share_of_the_steps(epochs: float | None, steps: int, grouping: str) -> None:
    plan = BatchPlan([7] * 39, batch_size=4, epochs=epochs, grouping=grouping)
    assert plan.total_steps == steps
    assert plan.step(steps - 1).epoch == (steps - 1) // 10


@settings(max_examples=40, deadline=None)
@given(plan=plans(), max_steps=st.integers(1, 60), grouping=st.sampled_from(GROUPINGS))
def test_max_steps_continues_into_further_epochs(plan: Any, max_steps: int, grouping: str) -> None:
    lengths, options = plan
    planned = BatchPlan(lengths, grouping=grouping, max_steps=max_steps, **options)
    assert planned.total_steps == max_steps
    assert len(rows_of(planned.step(max_steps - 1))) > 0


@settings(max_examples=60, deadline=None)
@given(plan=plans(), max_steps=st.integers(1, 60), packing=st.sampled_from([None, 40, 64]))
def test_times_seen_counts_the_planned_steps(plan: Any, max_steps: int, packing: int | None) -> None:
    lengths, options = plan
    planned = BatchPlan(lengths, max_steps=max_steps, packing=packing, **options)
    planned_rows = np.concatenate([np.array(rows_of(planned.step(i))) for i in range(max_steps)])
    assert planned.times_seen().tolist() == np.bincount(planned_rows, minlength=len(lengths)).tolist()


def test_batch_plan_step_after_a_far_jump_equals_sequential_reading() -> None:
    """Reading on from epoch 40 gives what reading from the start gives."""
    near, far = (BatchPlan([3, 5, 8, 2, 2], batch_size=2, epochs=50, grouping="epoch") for _ in range(2))
    sequence = [near.step(i) for i in range(near.total_steps)]
    for i in (120, 121, 122, 123, 0, 149, 60):
        assert [p.tolist() for p in far.step(i).micro_batches] == [p.tolist() for p in sequence[i].micro_batches]


def test_grouping_epoch_pads_less_and_stays_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 400)
    step, epoch = (BatchPlan(lengths, batch_size=8, grouping=g, epochs=1, split_cost=64) for g in ("step", "epoch"))
    cost = [sum(padded(p.step(i), lengths.tolist()) for i in range(p.total_steps)) for p in (step, epoch)]
    assert cost[1] < cost[0]
    longest = [max(lengths[r] for r in rows_of(epoch.step(i))) for i in range(epoch.total_steps)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def padding(lengths: list[int]) -> int:
    return max(lengths) * len(lengths) - sum(lengths)


def test_eval_batches_pad_texts_of_many_lengths_little() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 25, 240).tolist()
    share, without = (
        sum(padding([lengths[i] for i in part]) for part in eval_batches(lengths, 4096, **limit)) / sum(lengths)
        for limit in ({}, {"max_padding": math.inf})
    )
    assert share < 0.25 and without > 0.4, (share, without)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=50),
    budget=st.integers(1, 200),
    max_padding=st.integers(0, 60) | st.just(math.inf),
)
def test_eval_batches_are_a_partition_within_budget(lengths: list[int], budget: int, max_padding: float) -> None:
    batches = eval_batches(lengths, budget, max_padding=max_padding)
    assert sorted(int(i) for part in batches for i in part) == list(range(len(lengths)))
    for part, after in itertools.zip_longest(batches, batches[1:]):
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget
        assert padding([lengths[i] for i in part]) <= max_padding
        if after is not None:  # no batch is closed early
            grown = [lengths[i] for i in [*part, after[0]]]
            assert max(grown) * len(grown) > budget or padding(grown) > max_padding
    flat = [lengths[i] for part in batches for i in part]
    assert flat == sorted(flat, reverse=True), "the largest batch comes first, so that it fails first"


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), limit=st.integers(2, 25))
def test_fit_lengths_truncates_or_drops(lengths: list[int], limit: int) -> None:
    array = np.array(lengths)
    assert fit_lengths(array, max_length=limit, too_long="truncate").tolist() == [min(n, limit) for n in lengths]
    for too_long in ("drop", "error"):
        kept = fit_lengths(array, max_length=limit, too_long=too_long)
        assert kept.tolist() == [n if n <= limit else 0 for n in lengths]
    assert array.tolist() == lengths, "the caller's array stays as it was"
