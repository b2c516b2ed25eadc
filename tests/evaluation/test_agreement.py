"""The agreement of two models' outputs, and what decides whether they are the same model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftlab.evaluation.agreement import Agreement, Distributions, agreement, as_logits


def compare(reference: Tensor, logits: Tensor) -> Agreement:
    return agreement([(Distributions.of(reference), logits)])


def test_agreement_of_equal_logits_is_perfect() -> None:
    logits = torch.randn(5, 7)
    same = compare(logits, logits + 7.0)
    assert same.kl_max < 1e-6 and same.top1 == 1.0 and same.num_positions == 5


def test_agreement_equals_the_kl_by_hand() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    result = compare(p.log(), q.log())
    assert result.kl_mean == result.kl_max == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_agreement_of_many_classes_takes_the_unlikely_ones_as_one() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(70, 2000) * 3, torch.randn(70, 2000) * 3
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p, q = (torch.cat([x[:, :512], x[:, 512:].sum(-1, keepdim=True)], -1) for x in (p, q))
    result = compare(a, b)
    assert result.kl_mean == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)
    assert Distributions.of(a).log_p.shape == (70, 512)


def test_agreement_is_the_same_in_parts() -> None:
    a, b = torch.randn(9, 5), torch.randn(9, 5)
    reference = Distributions.of(a)
    parts = agreement([(reference[4:], b[4:]), (reference[:4], b[:4])])
    assert parts.kl_mean == pytest.approx(compare(a, b).kl_mean) and parts.top1 == compare(a, b).top1
    with pytest.raises(ValueError, match="expected logits at 9 positions, found 8"):
        agreement([(reference, b[:8])])


def test_agreement_catches_swapped_logits() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 9) * 3, torch.randn(40, 9) * 3
    assert compare(a, b).kl_mean > 1 and compare(a, b).top1 < 0.5
    assert compare(a, a.flip(-1)).top1 < 0.5


def test_agreement_catches_infinities() -> None:
    """A broken head must not pass as agreement because of a NaN."""
    a = torch.randn(4, 5)
    broken = a.clone()
    broken[0, 0] = float("nan")
    result = compare(a, broken)
    assert result.failures(kl_mean=1e9, top1=0.0)


def test_agreement_counts_a_tie_as_agreement() -> None:
    assert compare(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])).top1 == 1.0


def test_agreement_with_one_near_tie_of_35_is_no_failure() -> None:
    logits = torch.zeros(35, 3)
    logits[:, 0] = 1e-3
    other = logits.clone()
    other[0, 1] = 2e-3
    result = compare(logits, other)
    assert result.top1 == pytest.approx(34 / 35)
    assert result.top1_interval == pytest.approx((0.8547, 0.9949), abs=1e-3)
    assert result.failures(kl_mean=1e-3, top1=0.99) == []
    many = compare(logits.repeat(20, 1), other.repeat(20, 1))
    (failure,) = many.failures(kl_mean=1e-3, top1=0.99)
    assert "same top class at 680 of them (97.1%, 95 % interval 95.6% to 98.1%); 99.0% are required" in failure


def test_agreement_of_vectors_tells_close_vectors_apart() -> None:
    torch.manual_seed(0)
    a = torch.randn(20, 384)
    close = a + 0.3 * torch.randn(20, 384)
    same = compare(as_logits(a), as_logits(3.0 * a))
    assert same.kl_mean < 1e-9 and same.top1 == 1.0
    assert compare(as_logits(a), as_logits(close)).kl_mean > 1e-2
