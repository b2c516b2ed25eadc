"""The best span of each window, by the logits of its start and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab.tasks.example import Example


@dataclass(frozen=True)
class Source:
    """What the spans of a window are compared with and shown as.

    Attributes:
        context: the whole context. starts, ends: [n] where each token of the window's part is in it, in characters.
        first: the position of its first token. null: the position that stands for no answer.
        answers: the right answers, empty if there are none; None if they are not known.
    """

    context: str
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    first: int
    null: int
    answers: tuple[str, ...] | None = None

    def text(self, start: int, end: int) -> tuple[str, int]:
        """The text of the tokens ``start`` to ``end`` of the window without white space around it, and its place."""
        begin, stop = int(self.starts[start - self.first]), int(self.ends[end - self.first])
        text = self.context[begin:stop]
        return text.strip(), begin + len(text) - len(text.lstrip())


@dataclass(frozen=True)
class Span:
    """The best span of a window.

    Attributes:
        text: the answer. start: its place in the context, in characters. score: sum of its two logits; -inf if the window
            has no context. null_score: that of having no answer. probability, null_probability: of the two.
    """

    text: str
    start: int
    score: float
    null_score: float
    probability: float
    null_probability: float


def best_spans(logits: Tensor, examples: Sequence[Example], *, max_tokens: int) -> list[Span]:
    """The span of each window with the largest sum of logits, at most ``max_tokens`` long and with its start not after its end.

    Args: logits: [W, 2, T] of start and end, -inf at positions that are none. examples: with ``reference`` of ``Source``.
    """
    sources = [e.reference for e in examples]
    null = torch.tensor([s.null for s in sources], device=logits.device)
    windows = torch.arange(len(sources), device=logits.device)
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    null_score, null_log_p = (x[windows, :, null].sum(-1) for x in (logits, log_p))
    inside = logits.clone()
    inside[windows, :, null] = -torch.inf
    longest = min(max_tokens, logits.shape[-1])
    ends = F.pad(inside[:, 1], (0, longest - 1), value=-torch.inf).unfold(-1, longest, 1)  # [W, T, longest]
    score, flat = (inside[:, 0, :, None] + ends).flatten(1).max(-1)
    start = flat // longest
    end = start + flat % longest
    probability = (log_p[windows, 0, start] + log_p[windows, 1, end.clamp_max(logits.shape[-1] - 1)]).exp()
    columns = [x.tolist() for x in (start, end, score, null_score, probability, null_log_p.exp())]
    return [_span(source, *values) for source, *values in zip(sources, *columns, strict=True)]


def _span(source: Source, start: int, end: int, score: float, null: float, p: float, null_p: float) -> Span:
    if score == -torch.inf:
        return Span("", 0, score, null, 0.0, null_p)
    text, place = source.text(start, end)
    return Span(text, place, score, null, p, null_p)


def best_of_row(spans: Sequence[Span], threshold: float | None) -> dict[str, Any]:
    """The result of a row from the best spans of its windows: no answer if that scores higher by more than ``threshold`` in
    each of them (Devlin et al. 2019, section 4.3)."""
    best, null = max(spans, key=lambda span: span.score), min(span.null_score for span in spans)
    result: dict[str, Any] = {"answer": "", "start": None, "end": None}
    if best.text and (threshold is None or null - best.score <= threshold):
        result = {"answer": best.text, "start": best.start, "end": best.start + len(best.text)}
    none = min(span.null_probability for span in spans)
    return result | {"probability": best.probability, "no_answer_probability": none}
