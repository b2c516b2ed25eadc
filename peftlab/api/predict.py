"""``predict``: yields one result per input, from a run, a merged model or a base model."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from peftlab.assembly.checks import check_room_to_answer
from peftlab.assembly.data import uses_labels
from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import Opened, RecipeSource, find_target, open_target
from peftlab.data import Rows, load_rows
from peftlab.data.ledger_text import places
from peftlab.errors import DataError, RecipeError
from peftlab.evaluation.mask_files import MaskFiles
from peftlab.evaluation.picture import draw_objects
from peftlab.measuring.drawing import check_picture
from peftlab.recipe import Recipe
from peftlab.runs import finite
from peftlab.tasks import FindsObjects, Segments, Task
from peftlab.tasks.inputs import EMPTY_TEXT
from peftlab.training.progress import Progress, make_progress

# Rows per window: enough to group by length, few enough for quick first results.
_WINDOW = 256


def predict(
    target: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str] | Sequence[dict[str, Any]],
    *,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int | None = None,
    columns: bool = False,
    picture: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one result per input, in order: a label with probabilities, generated text, or a vector.

    An input that cannot be read, such as an empty text, gets a result without values (None), and ``note`` says why. ``note``
    also says how many tokens are cut of an input that is longer than the model reads.

    Args:
        inputs: a path (file with the recipe's columns), a list of texts, or a list of rows (dicts).
        max_new_tokens, temperature, top_p: for generated text; temperature 0 is greedy. beams: width of the search of an
            encoder-decoder, instead of eval.beams.
        columns: put the columns of the input before each result; a column named as one of the result is ``input_NAME``.
        picture: a .png or .svg file to write: the first input, an image, with the objects found in it.
        masks: a folder to write the masks of images into, one PNG per image with a class index per pixel; a result then has the
            ``mask``'s path, and without it none.
    Raises: as ``evaluate``; DataError if the inputs lack a column, or none of the first 256 can be read.
    """
    prepare_libraries()
    progress = progress or make_progress()
    if beams is not None:
        overrides = [*overrides, f"eval.beams={beams}"]
    resolved = find_target(target, recipe, overrides)
    with located(resolved.loaded), progress:
        for line in resolved.loaded.notes:
            progress.note(line)
        settings = resolved.loaded.recipe
        if picture is not None:
            check_picture(Path(picture))
            if settings.spec.predicts != "boxes":
                raise RecipeError(f"task: {settings.task} finds no objects in an image, so there is no picture of them")
        if masks is not None and settings.spec.predicts != "pixels":
            raise RecipeError(f"task: {settings.task} gives the pixels of an image no classes, so there are no masks")
        rows = _rows_of_file(inputs, settings, overrides) if isinstance(inputs, Path) else None
        opened = open_target(resolved, progress)
        new_tokens = max_new_tokens or settings.eval.max_new_tokens
        check_room_to_answer(new_tokens, opened.assembly, key=None if max_new_tokens else "eval.max_new_tokens")
        rows = rows if rows is not None else _input_rows(inputs, opened.task)
        progress.stop()
        notes = _Notes(rows)
        options = {"max_new_tokens": new_tokens, "temperature": temperature, "top_p": top_p}
        names = _input_names(rows, opened.task) if columns else {}
        files = None if masks is None else MaskFiles(Path(masks))
        for start, end in _windows(rows, opened):
            window = rows.select(range(start, end))
            for i, result in enumerate(_results(opened, window, notes, start, options)):
                if picture is not None and start + i == 0 and result["objects"] is not None:
                    image = cast(FindsObjects, opened.task).image_of(window.select([0]))
                    draw_objects(image, result["objects"], Path(picture))
                if (mask := result.pop("mask", None)) is not None and files is not None:
                    result["mask"] = str(files.add(mask, start + i, cast(Segments, opened.task).file_of(window, i)))
                yield {new: _plain(window.columns[old][i]) for old, new in names.items()} | result
        for line in notes.lines():
            progress.note(line)


def _windows(rows: Rows, opened: Opened) -> Iterator[tuple[int, int]]:
    """Ranges of rows; rows in a row that belong together, such as the documents of a query, are in one."""
    role, columns = opened.task.spec.whole, opened.assembly.recipe.data.columns
    groups = rows.columns.get(columns.get(role, role)) if role is not None else None
    start = 0
    while start < len(rows):
        end = min(start + _WINDOW, len(rows))
        while groups is not None and end < len(rows) and groups[end] == groups[end - 1]:
            end += 1
        yield start, end
        start = end


def _results(
    opened: Opened, rows: Rows, notes: _Notes, first: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One result per row, also for those that cannot be read. Args: first: index of the first row among all inputs."""
    problems = opened.task.unusable(rows)
    if first == 0 and len(problems) == len(rows) and (other := [i for i, p in problems.items() if p != EMPTY_TEXT]):
        raise DataError(f"{rows.where(other[0])}: {problems[other[0]]}")
    usable = rows.select([i for i in range(len(rows)) if i not in problems])
    batch_tokens, limit = opened.assembly.recipe.eval.batch_tokens, opened.model_limit
    with opened.autocast():
        results = opened.task.predict(opened.model, usable, batch_tokens=batch_tokens, max_length=limit, **options)
        for i in range(len(rows)):
            if i in problems:
                notes.unread[first + i] = problems[i]
                yield opened.task.no_result() | {"note": problems[i]}
                continue
            result = next(results)
            if "note" in result:
                notes.cut[first + i] = result["note"]
            yield result


class _Notes:
    """What is said at the end about inputs without a result, and inputs that are cut."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.unread: dict[int, str] = {}
        self.cut: dict[int, str] = {}

    def lines(self) -> Iterator[str]:
        total = len(self._rows)
        for noted, what in ((self.unread, "without a result"), (self.cut, "cut")):
            if not noted:
                continue
            first = next(iter(noted.values()))
            if total == 1:
                yield f"the input is {first}" if noted is self.cut else f"no result: {first}"
                continue
            where = places([self._rows.where(i) for i in noted])
            yield f"{len(noted):,} of {total:,} inputs {what}: {where}; the first: {first}"


def _input_names(rows: Rows, task: Task) -> dict[str, str]:
    """Input column -> its name in the output, distinct from those of the result and of its columns in a csv file."""
    result = task.no_result()
    own = {"row", "note", *result, *(f"probability_{name}" for name in result.get("probabilities") or ())}
    names: dict[str, str] = {}
    for column in rows.columns:
        name = column
        while name in own or name in names.values() or (name != column and name in rows.columns):
            name = f"input_{name}"
        names[column] = name
    return names


def _plain(value: Any) -> Any:
    """A value of an input column for JSON."""
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return finite(value) if isinstance(value, str | int | float | bool | None) else str(value)


def _rows_of_file(path: Path, settings: Recipe, overrides: Sequence[str]) -> Rows:
    """The rows of a file or folder, which need not be like the training data unless ``overrides`` say how to read it."""
    named = {override.partition("=")[0] for override in overrides}
    keys = ("format", "delimiter", "column_names", "encoding")
    options = {key: getattr(settings.data, key) for key in keys if f"data.{key}" in named}
    read = functools.partial(load_rows, str(path), default_split=None, classes_from_folders=uses_labels(settings))
    try:
        try:
            return read(**options)
        except DataError as error:
            if error.key != "data.encoding" or "encoding" in options:
                raise
            return read(**options, encoding=settings.data.encoding)
    except DataError as error:
        raise DataError(str(error)) from None  # the error is in the input, not in a recipe key


def _input_rows(inputs: Any, task: Task) -> Rows:
    items = [inputs] if isinstance(inputs, str) else list(inputs)
    if not items:
        raise RecipeError("nothing to predict: the input is empty")
    rows = [i if isinstance(i, dict) else task.row_from_text(i) for i in items]
    names = dict.fromkeys(name for row in rows for name in row)
    return Rows.from_dicts([{name: row.get(name) for name in names} for row in rows], name="input")
