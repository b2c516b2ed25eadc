"""The boxes that a teacher finds in the training images, from which a student learns, before the training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peftlab.assembly import Assembly
from peftlab.data import Rows
from peftlab.errors import DataError
from peftlab.experiments.kept_answers import WINDOW, kept_answers
from peftlab.tasks import FindsObjects
from peftlab.teaching.caches import examples_identity
from peftlab.teaching.capture import TaughtExamples
from peftlab.teaching.teacher import named_teachers
from peftlab.training.progress import Progress


def found_examples(assembly: Assembly, folder: Path, progress: Progress) -> TaughtExamples:
    """The training images with the teacher's boxes as their objects, found now or read from ``folder``.

    Args: assembly: that of the student. Raises: RecipeError, DataError, ArtifactError.
    """
    rows = assembly.data.train
    found = _read_or_find(assembly, rows, folder, progress)
    count, empty = sum(len(one["bbox"]) for one in found), sum(not one["bbox"] for one in found)
    least = assembly.recipe.eval.min_score
    if not count:
        raise DataError(
            f"the teacher found no object with a score of {least:g} in {len(found):,} images; lower eval.min_score",
            key="distill.answers",
        )
    progress.note(
        f"the teacher's boxes: {count:,} with a score of at least {least:g} (eval.min_score) in {len(found):,} images, {empty:,} of "
        "them without any"
    )
    digest = hashlib.sha256(rows.fingerprint.encode())
    digest.update(json.dumps(found).encode())
    column = assembly.recipe.data.columns.get("objects", "objects")
    rows = replace(rows, columns={**rows.columns, column: list[Any](found)}, fingerprint=digest.hexdigest())
    return TaughtExamples(assembly, rows, assembly.encode(rows, training=True), examples_identity(assembly, rows))


def _read_or_find(assembly: Assembly, rows: Rows, folder: Path, progress: Progress) -> list[dict[str, list[Any]]]:
    """The objects in ``folder``, in the order of ``rows``; the missing ones are found and stored there first."""
    (teacher,) = named_teachers(assembly)
    settings = {"min_score": assembly.recipe.eval.min_score}
    return kept_answers(
        assembly,
        folder,
        about={**examples_identity(assembly, rows), **teacher.identity(), **settings},
        num_rows=len(rows),
        write=lambda first: _found(assembly, rows, first, progress),
        read=lambda line: line["objects"],
        what="boxes",
        progress=progress,
    )


def _found(assembly: Assembly, rows: Rows, first: int, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yields a line for each of the rows from ``first`` on, in order, with its objects as the data has them."""
    (named,) = named_teachers(assembly)
    progress.stage(f"{named.name} finds the objects of {len(rows) - first:,} of {len(rows):,} training images")
    teacher = named.open(progress)
    most = cast(FindsObjects, assembly.task).most_objects  # the likeliest, as a sigmoid gives a box per class
    progress.start(len(rows), first)
    for start in range(first, len(rows), WINDOW):
        window = rows.select(range(start, min(start + WINDOW, len(rows))))
        results = teacher.task.predict(teacher.model, window, batch_tokens=assembly.recipe.eval.batch_tokens)
        for i, result in enumerate(results):
            boxes, names, scores = [], [], []
            for one in result["objects"][:most]:
                left, top, right, bottom = one["box"]
                if right > left and bottom > top:  # in the tenths of a pixel that a prediction has
                    boxes.append([left, top, right - left, bottom - top])
                    names.append(one["label"])
                    scores.append(round(one["score"], 4))
            objects = {"bbox": boxes, "category": names}
            yield {"row": start + i, "where": window.where(i), "objects": objects, "scores": scores}
        progress.step(start + len(window), {})
    progress.stop()
