"""Losses between inner representations, compared with loops in float64: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftlab.distillation import features
from peftlab.distillation.features import (
    attention_kl,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    relation_kl,
    similarity_kl,
    similarity_mse,
)
from peftlab.errors import RecipeError

Loss = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def dot(x: Tensor, y: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def causal(lengths: list[int], T: int) -> Tensor:
    """[B, 1, T, T]: a query sees the real positions up to its own. Padded queries see nothing."""
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    return (real[:, None, :] & real[:, :, None] & torch.ones(T, T, dtype=torch.bool).tril())[:, None]


def truth_attention(s: Tensor, t: Tensor, seen: Tensor, kind: str) -> Tensor:
    B, A, T, _ = s.shape
    out = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for q in range(T):
            keys = [k for k in range(T) if seen[b, 0, q, k]]
            for a in range(A):
                own, other = [float(s[b, a, q, k]) for k in keys], [float(t[b, a, q, k]) for k in keys]
                if not keys:
                    continue
                if kind == "mse":
                    out[b, q] += sum((x - y) ** 2 for x, y in zip(own, other, strict=True)) / len(keys) / A
                else:
                    out[b, q] += kl(softmax(other), softmax(own)) / A
    return out


def relation_scores(x: Tensor, num_heads: int) -> Tensor:
    B, T, H = x.shape
    width = H // num_heads
    out = torch.zeros(B, num_heads, T, T, dtype=torch.float64)
    for b in range(B):
        for r in range(num_heads):
            part = x[b, :, r * width : (r + 1) * width]
            for i in range(T):
                for j in range(T):
                    out[b, r, i, j] = dot(part[i], part[j]) / math.sqrt(width)
    return out


def numeric_gradient(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.clone().view(-1), x.clone().view(-1)
        up[i] += step
        down[i] -= step
        out.view(-1)[i] = (function(up.view_as(x)).sum() - function(down.view_as(x)).sum()) / (2 * step)
    return out


def check_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(leaf.grad, numeric_gradient(function, x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fault", [None, lambda x: x * 2, lambda x: x.sum()[None].expand(6)])
def test_hidden_mse_equals_the_loop(fault: Callable[[Tensor], Tensor] | None) -> None:
    s, t = normal(6, 5), normal(6, 5, seed=1)
    want = torch.tensor(
        [sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) / 5 for x, y in zip(s, t, strict=True)]
    )
    loss = hidden_mse(s, t).float()
    if fault is not None:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(fault(loss), want)
        return
    torch.testing.assert_close(loss, want)
    check_gradient(lambda x: hidden_mse(x, t), s)


def test_hidden_cosine_equals_the_loop() -> None:
    s, t = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    for b in range(2):
        for i in range(3):
            x, y = s[b, i], t[b, i]
            want = 1 - dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))
            assert float(hidden_cosine(s, t)[b, i]) == pytest.approx(want, abs=1e-12)
    check_gradient(lambda x: hidden_cosine(x, t), s)
    assert hidden_cosine(s, 3 * s).abs().max() < 1e-12
    assert torch.allclose(hidden_cosine(s, -s), torch.full((2, 3), 2.0, dtype=torch.float64))


def test_projector_bridges_widths_and_is_trained() -> None:
    s, t = normal(4, 3), normal(4, 7, seed=1)
    projector = nn.Linear(3, 7, bias=False).double()
    torch.testing.assert_close(hidden_mse(s, t, projector=projector), ((s @ projector.weight.T - t) ** 2).mean(-1))
    hidden_cosine(s, t, projector=projector).sum().backward()
    assert projector.weight.grad is not None and projector.weight.grad.any()
    with pytest.raises(RecipeError, match="student have 3 values and those of the teacher 7"):
        hidden_mse(s, t)


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_losses_equal_the_loop(kind: str, masked: bool) -> None:
    function = {"mse": attention_mse, "kl": attention_kl}[kind]
    s, t = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    seen = causal([4, 2], 4) if masked else torch.ones(2, 1, 4, 4, dtype=torch.bool)
    arguments = {"visible": seen} if masked else {}
    torch.testing.assert_close(function(s, t, **arguments), truth_attention(s, t, seen, kind))
    check_gradient(lambda x: function(x, t, **arguments), s)
    assert not function(s, s, **arguments).any()


@pytest.mark.parametrize("function", [attention_mse, attention_kl])
def test_attention_losses_ignore_hidden_keys(function: Loss) -> None:
    """Scores of hidden keys may have any value, also the -inf that models write."""
    s, t, seen = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), causal([4, 2], 4)
    want = function(s, t, visible=seen)
    for filler in (-math.inf, 1e4, math.nan):
        a, b = (torch.where(seen, x, torch.tensor(filler, dtype=torch.float64)).requires_grad_() for x in (s, t))
        loss = function(a, b, visible=seen)
        torch.testing.assert_close(loss, want)
        loss.sum().backward()
        assert a.grad is not None and torch.isfinite(a.grad).all() and b.grad is None
    assert not want[1, 2:].any(), "padded queries see nothing"


def test_relation_kl_needs_neither_equal_widths_nor_equal_heads() -> None:
    s, t, seen = normal(2, 4, 6), normal(2, 4, 10, seed=1), causal([4, 3], 4)
    want = truth_attention(relation_scores(s, 2), relation_scores(t, 2), seen, "kl")
    torch.testing.assert_close(relation_kl(s, t, num_heads=2, visible=seen), want)
    check_gradient(lambda x: relation_kl(x, t, num_heads=2, visible=seen), s)
    assert relation_kl(s, s, num_heads=3).abs().max() < 1e-14
    with pytest.raises(RecipeError, match="10 cannot be split into 3 relation heads"):
        relation_kl(s, t, num_heads=3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(relation_kl(s, t, num_heads=1, visible=seen), want)


def test_relation_kl_comparison_catches_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = normal(1, 4, 6), normal(1, 4, 10, seed=1)
    want = truth_attention(relation_scores(s, 2), relation_scores(t, 2), torch.ones(1, 1, 4, 4, dtype=torch.bool), "kl")
    torch.testing.assert_close(relation_kl(s, t, num_heads=2), want)
    right = features._relation
    monkeypatch.setattr(features, "_relation", lambda x, n: right(x, n) * math.sqrt(x.shape[-1] // n))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(relation_kl(s, t, num_heads=2), want)


def test_similarity_losses_equal_the_loop() -> None:
    s, t = normal(5, 3), normal(5, 7, seed=1)
    cosines = []
    for x in (s, t):
        unit = [row / math.sqrt(dot(row, row)) for row in x]
        cosines.append([[dot(a, b) for b in unit] for a in unit])
    for i in range(5):
        own, other = ([c[i][j] for j in range(5) if j != i] for c in cosines)
        mse = sum((a - b) ** 2 for a, b in zip(own, other, strict=True)) / 4
        assert float(similarity_mse(s, t)[i]) == pytest.approx(mse, abs=1e-12)
        want = kl(softmax([x / 0.1 for x in other]), softmax([x / 0.1 for x in own]))
        assert float(similarity_kl(s, t, temperature=0.1)[i]) == pytest.approx(want, abs=1e-11)
    check_gradient(lambda x: similarity_mse(x, t), s)
    check_gradient(lambda x: similarity_kl(x, t, temperature=0.5), s)
    for function in (similarity_mse, similarity_kl):
        one = s[:1].clone().requires_grad_()
        loss = function(one, t[:1])
        loss.sum().backward()
        assert not loss.any() and one.grad is not None and not one.grad.any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_feature_losses_sum_16_bit_states_in_float32(half: torch.dtype) -> None:
    s, t = normal(2, 4, 64).to(half), normal(2, 4, 64, seed=1).to(half)
    for function in (hidden_mse, hidden_cosine, lambda a, b: relation_kl(a, b, num_heads=4)):
        loss = function(s, t)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, function(s.float(), t.float()))


@pytest.mark.parametrize("function", [hidden_mse, hidden_cosine, similarity_mse, similarity_kl])
def test_feature_losses_give_the_teacher_no_gradient(function: Loss) -> None:
    s, t = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    function(s, t).sum().backward()
    assert s.grad is not None and t.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hidden_mse(normal(2, 3), normal(4, 3)), r"found \[2, 3\] and \[4, 3\]"),
        (lambda: attention_kl(normal(2, 3, 4), normal(2, 3, 4)), r"scores \[B, A, T, S\]"),
        (
            lambda: attention_kl(normal(1, 2, 4, 4), normal(1, 3, 4, 4)),
            "student has 2 attention heads and the teacher 3",
        ),
        (lambda: relation_kl(normal(1, 3, 4), normal(1, 2, 4), num_heads=2), r"states \[B, T, H\]"),
        (lambda: similarity_kl(normal(2, 3), normal(2, 3), temperature=0), "temperature above 0"),
        (lambda: similarity_mse(normal(2, 3), normal(3, 3)), r"embeddings \[N, H\]"),
    ],
)
def test_feature_losses_refuse_wrong_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
