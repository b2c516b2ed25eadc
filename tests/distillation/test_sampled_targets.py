"""Targets drawn from the teacher are unbiased, repeatable, and contain only classes that exist."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftlab.distillation import targets
from peftlab.distillation.losses import divergence, sparse_divergence
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import RecipeError

V, ROWS = 12, 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teacher(seed: int = 0, std: float = 2.0) -> Tensor:
    return torch.randn(1, V, generator=seeded(seed), dtype=torch.float64) * std


def dense(target: SparseTarget, num_classes: int = V) -> Tensor:
    """[N, V] weights by class. They are added up, so an id with two weights would show."""
    return torch.zeros(len(target), num_classes, dtype=target.probs.dtype).scatter_add_(
        1, target.ids.cpu(), target.probs.cpu()
    )


def drawn(kind: str, logits: Tensor, *, draws: int = 8, T: float = 1.0, seed: int = 0) -> SparseTarget:
    if kind == "sampled":
        return SparseTarget.sampled(logits, draws, temperature=T, generator=seeded(seed))
    return SparseTarget.head_and_samples(logits, 3, draws, temperature=T, generator=seeded(seed))


def chi_square(kind: str, *, T: float = 1.0, draws: int = 8) -> float:
    """Chi-square of the counts per class in ROWS rows against the probabilities, divided by its degrees of freedom."""
    z = teacher()
    p = torch.exp(z[0] / T) / torch.exp(z[0] / T).sum()
    target = drawn(kind, z.expand(ROWS, V), draws=draws, T=T)
    counts = dense(target) * draws
    if kind == "mixed":
        head = p.topk(3).indices
        rest = 1 - p[head].sum()
        torch.testing.assert_close(counts[:, head] / draws, p[head].expand(ROWS, 3), rtol=1e-12, atol=0)
        counts[:, head], p[head] = 0.0, 0.0
        counts, p = counts / rest, p / rest
    expected = p * ROWS * draws
    torch.testing.assert_close(counts.sum(1), torch.full((ROWS,), float(draws), dtype=torch.float64))
    exist = expected > 0
    squares = (counts.sum(0) - expected)[exist] ** 2 / expected[exist]
    return float(squares.sum() / (exist.sum() - 1))


@pytest.mark.parametrize("kind", ["sampled", "mixed"])
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_sampled_targets_have_the_softmax_as_mean(kind: str, T: float) -> None:
    # Mean 1, standard deviation sqrt(2 / 8) for the 8 degrees of freedom of mixed.
    assert chi_square(kind, T=T) < 3.0


def test_sampled_targets_have_the_dense_gradient_as_mean() -> None:
    z, student = teacher(), teacher(seed=1).expand(ROWS, V)
    want = torch.autograd.functional.jacobian(lambda s: divergence(s, z)[0], student[:1])[0]
    for kind in ("sampled", "mixed"):
        target = drawn(kind, z.expand(ROWS, V))
        leaf = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sparse_divergence(leaf, target, temperature=1.0).sum(), leaf)
        spread = gradient.std(0) / math.sqrt(ROWS)
        assert ((gradient.mean(0) - want).abs() < 4 * spread + 1e-12).all()


def test_sampled_targets_comparison_catches_a_biased_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults: a draw at another temperature, and a distribution function that is off by one class."""
    original = targets._drawn
    monkeypatch.setattr(targets, "_drawn", lambda w, n, g: original(w.pow(0.9), n, g))
    assert chi_square("sampled") > 10
    monkeypatch.setattr(targets, "_drawn", lambda w, n, g: original(w.roll(1, -1), n, g))
    assert chi_square("sampled") > 10


def test_mixed_targets_vary_less_than_sampled() -> None:
    z = teacher()
    sampled, mixed = (dense(drawn(kind, z.expand(2_000, V))).var(0).sum() for kind in ("sampled", "mixed"))
    assert mixed < 0.1 * sampled


def test_sampled_targets_never_draw_classes_that_do_not_exist() -> None:
    z = teacher().expand(500, V).clone()
    z[:, [0, 5, V - 1]] = -math.inf
    for kind in ("sampled", "mixed"):
        assert (dense(drawn(kind, z))[:, [0, 5, V - 1]] == 0).all()
        assert torch.isfinite(drawn(kind, z).probs).all()


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1.0, V - 2)])
def test_sampled_targets_at_both_ends_of_the_uniform_numbers(
    uniform: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A uniform number can be 0, and the largest number below 1 times the sum can round up to the sum."""
    z = teacher()
    z[:, [0, V - 1]] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, uniform, dtype=torch.float64))
    assert drawn("sampled", z).ids.tolist() == [[expected]]


def test_mixed_targets_draw_nothing_from_an_empty_rest() -> None:
    z = torch.full((4, V), -math.inf)
    z[:, [2, 7]] = torch.tensor([1.0, 2.0])
    target = drawn("mixed", z)
    torch.testing.assert_close(dense(target)[:, [2, 7]], z[:, [2, 7]].softmax(-1))
    assert (dense(target).sum(1) - 1).abs().max() < 1e-6
    assert set(target.ids[:, 3:].flatten().tolist()) == {7}, "filled up with an id the row has"


def test_sampled_targets_have_unique_ids_and_fill_rows_with_their_own() -> None:
    for kind, k in (("sampled", 0), ("mixed", 3)):
        target = drawn(kind, torch.randn(300, V, generator=seeded()) * 3)
        for ids, probs in zip(target.ids.tolist(), target.probs.tolist(), strict=True):
            real = [i for i, p in zip(ids, probs, strict=True) if p > 0]
            assert len(set(real)) == len(real)
            assert real[k:] == sorted(real[k:])
            assert set(ids) == set(real)


def test_sampled_targets_depend_on_their_seed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z = torch.randn(40, V, generator=seeded(3))
    torch.manual_seed(1)
    whole = drawn("sampled", z, seed=5)
    torch.manual_seed(2)
    monkeypatch.setattr(targets, "_CHUNK_BYTES", 7 * V * 8)
    again = drawn("sampled", z, seed=5)
    assert torch.equal(whole.ids, again.ids) and torch.equal(whole.probs, again.probs)
    assert not torch.equal(dense(whole), dense(drawn("sampled", z, seed=6)))


def test_sampled_targets_draw_rare_classes_often_enough() -> None:
    """100,000 classes of 1e-8 each follow one of 0.999. A float32 distribution function ends before them."""
    num_rare, draws = 100_000, 255
    z = torch.full((200, num_rare + 1), math.log(1e-8))
    z[:, 0] = math.log(0.999)
    target = SparseTarget.sampled(z, draws, generator=seeded())
    rare = float(target.probs[target.ids > 0].sum() * draws)
    expected = 200 * draws * 0.001
    assert abs(rare - expected) < 4 * math.sqrt(expected)
    assert len(target.ids[target.ids > 0].unique()) > 0.9 * rare


def test_sampled_targets_of_no_rows_are_empty() -> None:
    for kind in ("sampled", "mixed"):
        assert len(drawn(kind, torch.zeros(0, V))) == 0


def test_sampled_targets_keep_nan_of_a_broken_row() -> None:
    z = torch.randn(3, V, generator=seeded())
    z[1, 4] = math.nan
    for kind in ("sampled", "mixed"):
        probs = drawn(kind, z).probs
        assert probs[1].isnan().any() and probs[[0, 2]].isfinite().all()


def test_sampled_targets_refuse_wrong_numbers() -> None:
    z = torch.zeros(2, V)
    with pytest.raises(RecipeError, match="at least 1 draw per token, found 0"):
        SparseTarget.sampled(z, 0, generator=seeded())
    with pytest.raises(RecipeError, match="keep 1 to 11 classes per token and to draw from the others, found 12"):
        SparseTarget.head_and_samples(z, 12, 4, generator=seeded())


@pytest.mark.gpu
def test_sampled_targets_on_a_gpu_equal_those_on_the_cpu() -> None:
    """Both use one generator on the CPU. Sums over classes in another order may move a draw to a neighbour."""
    z = torch.randn(200, 50_000, generator=seeded()) * 3
    for kind in ("sampled", "mixed"):
        here, there = drawn(kind, z), drawn(kind, z.cuda())
        assert there.ids.is_cuda and there.probs.is_cuda
        moved = (dense(here, 50_000) - dense(there, 50_000)).abs() > 1e-5
        assert moved.sum() <= 0.01 * here.ids.numel()
