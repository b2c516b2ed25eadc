"""Distillation between different tokenizers: universal logit distillation on byte-aligned positions.

Two tokenizers split a text at different places. Where both start a token at the same byte, both models have read the
same text, and their predictions can be compared; other positions are skipped. The vocabularies do not match, so sorted
probabilities are compared. Source: Boizard et al. 2024 (ULD), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftlab.errors import DataError

Offsets = Sequence[tuple[int, int]]
# Rows whose probabilities are sorted at once: 256 x 128,256 in float32 are 131 MB on each side.
_ROWS = 256


def byte_starts(text: str, offsets: Offsets) -> list[int | None]:
    """For each token, the number of UTF-8 bytes of ``text`` before it; None for a token that begins inside a character.

    A token starts where the previous one ends, because equal tokenizers differ in whether a token's offsets include the
    space before a word. A token without text, such as a start or end token, starts there too.

    Args: offsets: characters [begin, end) per token, as ``offset_mapping`` of a fast tokenizer.
    Raises: DataError if offsets are outside ``text``.
    """
    bytes_before = [0]
    for character in text:
        bytes_before.append(bytes_before[-1] + len(character.encode("utf-8", "surrogatepass")))
    starts: list[int | None] = []
    end = 0
    for first, last in offsets:
        if not 0 <= first <= last <= len(text):
            raise DataError(
                f"expected token offsets within the {len(text):,} characters of the text, found {first}..{last}"
            )
        if first == last:
            starts.append(bytes_before[end])
            continue
        # Each token of a multi-token character has the whole character as offsets: all but the first begin inside it.
        starts.append(bytes_before[end] if first >= end else None)
        end = max(end, last)
    return starts


def aligned_tokens(text: str, student_offsets: Offsets, teacher_offsets: Offsets) -> list[tuple[int, int]]:
    """Pairs (student token, teacher token) that begin at the same byte, in the order of the text.

    The predictions of a pair are at the position *before* each token. Among tokens at one byte the one with text counts,
    and at the end of the text the first one without text: end tokens are compared with each other, and a start token that
    only one side has is skipped.
    """
    student, teacher = (_token_at(text, offsets) for offsets in (student_offsets, teacher_offsets))
    return [(student[at], teacher[at]) for at in sorted(student.keys() & teacher.keys())]


def aligned_answers(
    student: str, student_offsets: Offsets, teacher: str, teacher_offsets: Offsets
) -> list[tuple[int, int]]:
    """``aligned_tokens`` of one answer in two chat templates, within their common prefix and at its end.

    Args: student, teacher: the answer with the end that each template writes.
    """
    length = next((i for i, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b), None)
    length = min(len(student), len(teacher)) if length is None else length
    cut = [[(min(a, length), min(b, length)) for a, b in offsets] for offsets in (student_offsets, teacher_offsets)]
    return aligned_tokens(student[:length], cut[0], cut[1])


@dataclass(frozen=True, slots=True)
class UldObjective:
    """The loss between tokenizers, at ``temperature``."""

    temperature: float = 1.0

    def losses(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[N] see ``uld``; computed a few rows at a time and recomputed in backward, because sorting copies every logit."""
        parts = zip(torch.split(student_logits, _ROWS), torch.split(teacher_logits, _ROWS), strict=True)
        return torch.cat([checkpoint(uld, s, t, temperature=self.temperature, use_reentrant=False) for s, t in parts])


def uld(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """[N] L1 distance of the sorted probabilities, in probability (0 to 2), not nats; no factor T^2.

    The smaller vocabulary is padded with classes of probability 0. It is the Wasserstein distance with a cost of 1 between
    any two classes. Zero does not mean equal models: only the shapes of their distributions are compared.

    Args: student_logits: [N, V_s] at aligned positions. teacher_logits: [N, V_t], -inf or cut where padded.
    temperature: above 0, of both sides. Returns: [N] float32 (float64 stays). Raises: ValueError on a shape mismatch.
    """
    if student_logits.dim() != 2 or teacher_logits.dim() != 2 or len(student_logits) != len(teacher_logits):
        raise ValueError(
            f"expected logits [N, V] of aligned rows, found {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, found {temperature}")
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    q, p = (
        (z.to(dtype) / temperature).softmax(-1).sort(-1, descending=True).values
        for z in (student_logits, teacher_logits.detach())
    )
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return (p - q).abs().sum(-1)


def _token_at(text: str, offsets: Offsets) -> dict[int, int]:
    """Byte -> index of the token that begins there."""
    end = len(text.encode("utf-8", "surrogatepass"))
    tokens: dict[int, int] = {}
    for i, ((first, last), start) in enumerate(zip(offsets, byte_starts(text, offsets), strict=True)):
        if start is not None and (first < last or start == end):
            tokens.setdefault(start, i)
    return tokens
