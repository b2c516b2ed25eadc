"""The boxes that a teacher finds in the training images, from which a student learns, before the training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.data import Rows
from peftlab.errors import ArtifactError, DataError
from peftlab.experiments.written_answers import ROWS_NAME
from peftlab.measuring.memory import release_memory
from peftlab.runs import write_json
from peftlab.tasks import FindsObjects
from peftlab.teaching.caches import examples_identity
from peftlab.teaching.capture import TaughtExamples
from peftlab.teaching.teacher import named_teachers
from peftlab.training.progress import Progress

# Images searched before their boxes are stored: an interrupted run repeats at most as many.
_WINDOW = 256
_ABOUT = "answers.json"


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
    """The objects in ``folder``, in the order of ``rows``; the missing ones are found and written there first."""
    (teacher,) = named_teachers(assembly)
    about = {**examples_identity(assembly, rows), **teacher.identity(), "min_score": assembly.recipe.eval.min_score}
    path, noted = folder / ROWS_NAME, folder / _ABOUT
    if noted.is_file() and json.loads(noted.read_text(encoding="utf-8")) != about:
        raise ArtifactError(
            f"the boxes in {folder} were found by another teacher, in other images, or with other settings; start over with "
            "--replace"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(noted, about)
    stored = _stored(path)
    if len(stored) < len(rows):
        progress.stage(
            f"{teacher.name} finds the objects of {len(rows) - len(stored):,} of {len(rows):,} training images"
        )
        model = teacher.open(progress)
        with path.open("a", encoding="utf-8") as file, run_accelerator(assembly, folder):
            for objects in _found(model, rows, len(stored), assembly, progress):
                file.write(json.dumps(objects, ensure_ascii=False) + "\n")
                file.flush()
                stored.append(objects)
        del model
        release_memory()
    else:
        progress.note(f"the teacher's boxes are read from {path}")
    return [line["objects"] for line in stored]


def _stored(path: Path) -> list[dict[str, Any]]:
    """The stored lines; a last one that a killed process left incomplete is removed."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}; delete it, and the boxes are found again") from error


def _found(teacher: Any, rows: Rows, first: int, assembly: Assembly, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yields the objects of the rows from ``first`` on, in order, as the data has them."""
    most = cast(FindsObjects, assembly.task).most_objects  # the likeliest, as a sigmoid gives a box per class
    progress.start(len(rows), first)
    for start in range(first, len(rows), _WINDOW):
        window = rows.select(range(start, min(start + _WINDOW, len(rows))))
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
