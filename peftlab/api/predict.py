"""``predict``: yields one result per input, from a run, a merged model or a base model."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.data import uses_labels
from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource, check_room_to_answer, find_target, open_target
from peftlab.data import Rows, load_rows
from peftlab.errors import DataError, RecipeError
from peftlab.recipe import Recipe
from peftlab.tasks import Task
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
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one result per input, in order: a label with probabilities, or generated text.

    Args:
        inputs: a path (file with the recipe's columns), a list of texts, or a list of rows (dicts).
        max_new_tokens, temperature, top_p: for generated text; temperature 0 is greedy.
    Raises: as ``evaluate``.
    """
    prepare_libraries()
    progress = progress or make_progress()
    resolved = find_target(target, recipe, overrides)
    with located(resolved.loaded):
        settings = resolved.loaded.recipe
        rows = _rows_of_file(inputs, settings, overrides) if isinstance(inputs, Path) else None
        opened = open_target(resolved, progress)
        check_room_to_answer(max_new_tokens or settings.eval.max_new_tokens, opened)
        rows = rows if rows is not None else _input_rows(inputs, opened.task)
        progress.stop()
        for start in range(0, len(rows), _WINDOW):
            window = rows.select(range(start, min(start + _WINDOW, len(rows))))
            with opened.autocast():
                yield from opened.task.predict(
                    opened.model,
                    window,
                    batch_tokens=settings.eval.batch_tokens,
                    max_length=opened.limit,
                    max_new_tokens=max_new_tokens or settings.eval.max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                )


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
    return Rows.from_dicts([i if isinstance(i, dict) else task.row_from_text(i) for i in items], name="input")
