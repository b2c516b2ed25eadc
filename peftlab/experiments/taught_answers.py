"""Sequence distillation: the teacher writes the answers that the student learns from, before the training.

Source: Kim and Rush 2016, arXiv 1606.07947, section 3.2, with the teacher's greedy or beam search output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from peftlab.assembly import Assembly
from peftlab.data import Rows
from peftlab.errors import DataError, RecipeError
from peftlab.experiments.kept_answers import WINDOW, kept_answers
from peftlab.experiments.written_answers import WrittenAnswer
from peftlab.tasks import Generates
from peftlab.teaching.caches import examples_identity
from peftlab.teaching.capture import TaughtExamples
from peftlab.teaching.teacher import named_teachers
from peftlab.training.progress import Progress


def answered_examples(assembly: Assembly, folder: Path, progress: Progress) -> TaughtExamples:
    """The training rows with the teacher's answers, written now or read from ``folder``.

    Args: assembly: that of the student. Raises: RecipeError, DataError, ArtifactError.
    """
    task, rows = cast(Generates, assembly.task), _answerable(assembly, progress)
    answers = _read_or_write(assembly, rows, folder, progress)
    full = [a for a in answers if not a.is_empty]
    if not full:
        raise DataError(f"the teacher gave only empty answers to {len(answers):,} rows", key="distill.answers")
    ended = float(np.mean([a.ended for a in full]))
    if (empty := len(answers) - len(full)) or ended < 1:
        progress.note(
            f"the teacher's answers: {empty:,} of {len(answers):,} are empty and left out, {ended:.0%} of the others end within "
            f"eval.max_new_tokens ({assembly.recipe.eval.max_new_tokens:,})"
        )
    digest = hashlib.sha256(rows.fingerprint.encode())
    digest.update(json.dumps([(a.row, a.tokens) for a in answers]).encode())
    rows = replace(rows, fingerprint=digest.hexdigest())
    tokens = [np.array([] if a.is_empty else a.tokens, dtype=np.int32) for a in answers]
    encoded = task.encode_answers(rows, tokens, max_length=assembly.limit)
    return TaughtExamples(assembly, rows, encoded, examples_identity(assembly, rows))


def _answerable(assembly: Assembly, progress: Progress) -> Rows:
    """The training rows whose prompt leaves room for an answer."""
    rows, task, limit = assembly.data.train, cast(Generates, assembly.task), assembly.limit
    task.answers_need(rows)
    room = limit if assembly.spec.reads_source else limit - assembly.recipe.eval.max_new_tokens
    lengths = np.array(task.prompt_lengths(rows), dtype=np.int64)
    long = np.flatnonzero(lengths > room)
    if not len(long):
        return rows
    problem = f"{rows.where(int(long[0]))}: {len(long):,} of {len(rows):,} rows have more than {room:,} tokens before the answer"
    if assembly.recipe.data.too_long == "error" or len(long) == len(rows):
        raise DataError(
            f"{problem}; raise data.max_length, lower eval.max_new_tokens, or drop such rows with data.too_long: drop",
            key="data.too_long",
        )
    progress.note(f"{problem}; they are left out")
    return rows.select(np.flatnonzero(lengths <= room))


def _read_or_write(assembly: Assembly, rows: Rows, folder: Path, progress: Progress) -> list[WrittenAnswer]:
    """The answers in ``folder``, in the order of ``rows``; the missing ones are written there first."""
    (teacher,) = named_teachers(assembly)
    settings = assembly.recipe.eval.model_dump(include={"max_new_tokens", "beams"})
    return kept_answers(
        assembly,
        folder,
        about={**examples_identity(assembly, rows), **teacher.identity(), "settings": settings},
        num_rows=len(rows),
        write=lambda first: map(asdict, _written(assembly, rows, first, progress)),
        read=lambda line: WrittenAnswer(**line),
        what="answers",
        progress=progress,
    )


def _written(assembly: Assembly, rows: Rows, first: int, progress: Progress) -> Iterator[WrittenAnswer]:
    """Yields the answers to the rows from ``first`` on, in order. They are the teacher's likeliest, so nothing is drawn."""
    (teacher,), recipe = named_teachers(assembly), assembly.recipe
    progress.stage(f"{teacher.name} answers {len(rows) - first:,} of {len(rows):,} training rows")
    model = teacher.open(progress)
    if model.own_texts:
        raise RecipeError(
            f"the teacher {teacher.name} has another tokenizer, and the student learns from its tokens; let it write its answers "
            "with `peftlab predict --file --output`, and train on that file",
            key="distill.answers",
        )
    task = cast(Generates, model.task)
    progress.start(len(rows), first)
    for start in range(first, len(rows), WINDOW):
        window = rows.select(range(start, min(start + WINDOW, len(rows))))
        options: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": recipe.eval.max_new_tokens}
        answers = dict(task.write_answers(model.model, window, batch_tokens=recipe.eval.batch_tokens, **options))
        for i in range(len(window)):
            tokens = answers[i]
            about = (0, start + i, window.where(i), task.prompt_text(window, i))
            yield WrittenAnswer(*about, task.text_of(tokens), task.ends(tokens), tokens.tolist())
        progress.step(start + len(window), {})
    progress.stop()
