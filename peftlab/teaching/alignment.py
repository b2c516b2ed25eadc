"""Checks which rows, ids and tokens teacher and student share, with an error if there are none."""

from __future__ import annotations

from typing import Any

import numpy as np

from peftlab.assembly import Assembly
from peftlab.data import Rows
from peftlab.distillation import aligned_answers
from peftlab.errors import DataError
from peftlab.tasks import Encoded, Example
from peftlab.tasks.trained_spans import trained_spans
from peftlab.teaching.teacher import named_teachers


def check_ids(tokenizer: Any, rows: Rows, encoded: Encoded, num_shared: int) -> None:
    """Raises DataError for the first row with a token that is missing in a teacher's tokenizer."""
    for example in encoded.examples:
        if len(example.ids) and (last := int(example.ids.max())) >= num_shared:
            raise DataError(
                f"{rows.where(example.row)}: the teacher's tokenizer has no {tokenizer.convert_ids_to_tokens(last)!r} (id "
                f"{last:,}), which the student's tokenizer uses in this row; use a chat template or a teacher without this token",
                key="distill",
            )


def check_routes(assembly: Assembly) -> None:
    """Raises DataError for a training or held-out row without a teacher, and for a teacher without rows."""
    data, teachers = assembly.data, named_teachers(assembly)
    for teacher in teachers:
        if teacher.section.rows and not teacher.takes(data.train).any():
            (column, wanted), *_ = teacher.section.rows.items()
            values = sorted({str(v) for v in data.train.column(column)})
            shown = ", ".join(values[:8]) + (f" and {len(values) - 8:,} more" if len(values) > 8 else "")
            raise DataError(
                f"no training row has {column}: {wanted}, so this teacher has no rows; the values are {shown}",
                key=f"{teacher.key}.rows",
            )
    if not all(teacher.section.rows for teacher in teachers):
        return
    for rows in (data.train, data.eval):
        taken = np.any([teacher.takes(rows) for teacher in teachers], axis=0)
        if not taken.all():
            first, key = int(np.flatnonzero(~taken)[0]), teachers[0].key
            raise DataError(
                f"{rows.where(first)}: no teacher for this row and {len(taken) - int(taken.sum()) - 1:,} more; remove `rows` from "
                "one of the teachers, or add the missing values",
                key=key.rpartition(".")[0] if len(teachers) > 1 else f"{key}.rows",
            )


def aligned_tokens(ours: Any, theirs: Any, rows: Rows, example: Example, other: Example) -> list[tuple[int, int]]:
    """Pairs of trained tokens, of student and teacher, that begin at the same byte of an answer."""
    row, where = rows.row(example.row), rows.where(example.row)
    pairs = []
    both = (trained_spans(task.tokenizer, task.formatter, row, where) for task in (ours, theirs))
    assert example.trained is not None
    for a, b in zip(*both, strict=False):
        for i, j in aligned_answers(a.text, a.offsets, b.text, b.offsets):
            left, right = a.tokens[i], b.tokens[j]
            if left < len(example) and example.trained[left] and 0 < right < len(other):
                pairs.append((left, right))
    return pairs
