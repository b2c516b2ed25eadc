"""The file of a teacher's answers, one line per training row. An interrupted run continues it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.errors import ArtifactError
from peftlab.experiments.written_answers import ROWS_NAME
from peftlab.measuring.memory import release_memory
from peftlab.runs import write_json
from peftlab.training.progress import Progress

# Rows answered before they are stored: an interrupted run repeats at most as many.
WINDOW = 256
_ABOUT = "answers.json"
_Answer = TypeVar("_Answer")


def kept_answers(
    assembly: Assembly,
    folder: Path,
    *,
    about: Mapping[str, Any],
    num_rows: int,
    write: Callable[[int], Iterator[dict[str, Any]]],
    read: Callable[[dict[str, Any]], _Answer],
    what: str,
    progress: Progress,
) -> list[_Answer]:
    """The answers in ``folder``, in the order of the rows; the missing ones are made and stored there first.

    Args:
        assembly: that of the student. about: what the answers depend on. what: their name in messages, such as ``boxes``.
        write: yields the lines of the rows from an index on. read: the answer in a line.
    Raises: ArtifactError if the folder has other answers, or a damaged file.
    """
    path, noted = folder / ROWS_NAME, folder / _ABOUT
    if noted.is_file() and json.loads(noted.read_text(encoding="utf-8")) != about:
        raise ArtifactError(
            f"the {what} in {folder} come from another teacher, other rows or other settings; start over with --replace"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(noted, about)
    try:
        answers = [read(line) for line in _stored(path)]
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; delete it, and the {what} are made again") from error
    if len(answers) == num_rows:
        progress.note(f"the teacher's {what} are read from {path}")
        return answers
    with path.open("a", encoding="utf-8") as file, run_accelerator(assembly, folder):
        for line in write(len(answers)):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            answers.append(read(line))
    release_memory()
    return answers


def _stored(path: Path) -> list[dict[str, Any]]:
    """The stored lines; a last one that a killed process left incomplete is removed."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
