"""The ledger of questions about contexts: rows, the windows that they become, and where the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftlab.data.ledger import Indices, Ledger
from peftlab.data.questions import Question
from peftlab.data.rows import Rows
from peftlab.data.tokens import Tokens


class QuestionLedger(Ledger):
    """``Ledger`` of rows with a question and a context. No row is too long: a long context becomes several windows.

    Args: max_length: the longest window in tokens. withholds: whether the model may find that there is no answer.
    """

    def __init__(self, rows: Rows, tokenizer: Any, *, max_length: int, withholds: bool) -> None:
        super().__init__(rows, tokenizer, max_length=max_length, too_long="error", style="questions")
        self.withholds = withholds
        self._windows: list[int] = []
        self.num_with_answer = self.num_unanswered = self.num_labelled = 0

    def add_windows(
        self, row: int, question: Question, lengths: list[int], with_answer: int, *, labelled: bool
    ) -> None:
        """Adds the windows of a row. Args: lengths: tokens of each. with_answer: number of windows with the whole answer."""
        self._windows += lengths
        self.num_with_answer += with_answer
        self.num_labelled += labelled
        self.num_unanswered += labelled and not question.answers
        if question.ambiguous:
            self._mark("note ambiguous_answer", np.array([row]))

    def _leave_out(
        self, tokens: Tokens, kept: Indices, limits: Sequence[tuple[str, int, Indices]], in_row: Indices
    ) -> None:
        """No row is left out for its length."""

    @property
    def lengths(self) -> Indices:
        """[W] tokens of each window, in order, as ``Encoded.lengths``."""
        return np.array(self._windows, dtype=np.int64)

    @property
    def trained(self) -> Indices:
        """[W] zeros: no token is trained, but two positions of each window."""
        return np.zeros(len(self._windows), dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return sum(self._windows)

    def report(self, *, most_places: int | None = None) -> dict[str, Any]:
        """As ``Ledger.report``, with ``questions``: figures of windows and answers."""
        return super().report(most_places=most_places) | {
            "questions": {
                "windows": len(self._windows),
                "windows_with_answer": self.num_with_answer,
                "rows_labelled": self.num_labelled,
                "rows_without_answer": self.num_unanswered,
                "rows_of_several_windows": int((self.row_lengths > self.max_length).sum()),
                "rows_not_aligned": len(self.marked("note unaligned")),
                "window": self.max_length,
            }
        }
