"""Different tokenizers: the tokens that bytes align, and the distance of sorted probabilities."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftlab.distillation.uld import aligned_tokens, byte_starts, uld
from peftlab.errors import DataError


def cut(text: str, bounds: list[int]) -> list[tuple[int, int]]:
    edges = [0, *bounds, len(text)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def test_byte_starts_are_counted_in_bytes() -> None:
    text = "a\u00e9\u4f60\U0001f600b"
    assert byte_starts(text, [(i, i + 1) for i in range(5)]) == [0, 1, 3, 6, 10]


def test_byte_starts_has_none_for_a_token_inside_a_character() -> None:
    """A byte-level tokenizer gives each byte the offsets of its whole character. Here: 'x' + first bytes, rest, 'y'."""
    assert byte_starts("x\U0001f600y", [(0, 2), (1, 2), (2, 3)]) == [0, None, 5]
    assert byte_starts("\U0001f600", [(0, 1)] * 4) == [0, None, None, None]


def test_byte_starts_ignores_a_blank_before_a_word() -> None:
    """' b' has the offsets (1, 3), or (2, 3) from tokenizers that trim offsets. It is the same token."""
    assert byte_starts("a b", [(0, 1), (1, 3)]) == byte_starts("a b", [(0, 1), (2, 3)]) == [0, 1]


def test_aligned_tokens_with_beginning_and_end_tokens() -> None:
    """A beginning token on one side only moves nothing. The two end tokens are aligned with each other."""
    text = "hello world"
    student = [(0, 0), (0, 5), (5, 11), (11, 11)]
    teacher = [(0, 2), (2, 5), (5, 11), (11, 11)]
    assert aligned_tokens(text, student, teacher) == [(1, 0), (2, 2), (3, 3)]
    assert aligned_tokens(text, student[:-1], teacher) == [(1, 0), (2, 2)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), text=st.text("a \u00e9\u4f60\U0001f600", min_size=1, max_size=12))
def test_aligned_tokens_have_read_the_same_text(data: st.DataObject, text: str) -> None:
    cuts = st.lists(st.integers(0, len(text)), max_size=6).map(sorted)
    student, teacher = cut(text, data.draw(cuts)), cut(text, data.draw(cuts))
    pairs = aligned_tokens(text, student, teacher)
    assert pairs[0] == (0, 0)
    common = {a for a, _ in student} & {a for a, _ in teacher}
    assert [student[i][0] for i, _ in pairs] == [teacher[j][0] for _, j in pairs] == sorted(common)
    assert aligned_tokens(text, student, student) == [(i, i) for i in range(len(student))]


def test_byte_starts_refuses_offsets_of_another_text() -> None:
    with pytest.raises(DataError, match=r"within the 3 characters of the text, found 2\.\.5"):
        byte_starts("abc", [(0, 2), (2, 5)])


def truth(student: Tensor, teacher: Tensor, T: float) -> list[float]:
    out = []
    for s, t in zip(student, teacher, strict=True):
        q, p = (
            sorted((torch.exp(z.double() / T) / torch.exp(z.double() / T).sum()).tolist(), reverse=True) for z in (s, t)
        )
        width = max(len(q), len(p))
        q, p = q + [0.0] * (width - len(q)), p + [0.0] * (width - len(p))
        out.append(sum(abs(a - b) for a, b in zip(p, q, strict=True)))
    return out


@settings(max_examples=40, deadline=None)
@given(V_s=st.integers(1, 12), V_t=st.integers(1, 12), T=st.floats(0.5, 5.0), seed=st.integers(0, 99))
def test_uld_equals_the_definition(V_s: int, V_t: int, T: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, n, generator=g, dtype=torch.float64) * 2 for n in (V_s, V_t))
    distance = uld(student, teacher, temperature=T)
    assert distance.tolist() == pytest.approx(truth(student, teacher, T), abs=1e-12)
    shuffled = student[:, torch.randperm(V_s, generator=g)]
    assert torch.allclose(uld(shuffled, teacher, temperature=T), distance, atol=1e-14)
    half = uld(student.bfloat16(), teacher.bfloat16(), temperature=T)
    assert half.dtype == torch.float32 and torch.equal(
        half, uld(student.bfloat16().float(), teacher.bfloat16(), temperature=T)
    )


def test_uld_gradient_equals_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, n, generator=g, dtype=torch.float64) for n in (5, 7))
    student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: uld(z, teacher, temperature=2.0), student)
    uld(student, teacher).sum().backward()
    assert teacher.grad is None
    assert not uld(student, student.detach()).any()


def test_uld_comparison_catches_faults() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, n, generator=g, dtype=torch.float64) for n in (5, 7))
    want = truth(student, teacher, 2.0)
    unsorted = (student / 2).softmax(-1) - (teacher[:, :5] / 2).softmax(-1)
    faults = [
        uld(student, teacher, temperature=1.0),
        uld(student, teacher * 2, temperature=2.0),
        unsorted.abs().sum(-1),
    ]
    for fault in faults:
        assert fault.tolist() != pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    ("student", "teacher", "T", "message"),
    [((2, 3), (3, 3), 1.0, r"found \[2, 3\] and \[3, 3\]"), ((2, 3), (2, 3), 0.0, "temperature above 0")],
)
def test_uld_refuses_wrong_input(student: tuple[int, int], teacher: tuple[int, int], T: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uld(torch.zeros(student), torch.zeros(teacher), temperature=T)
