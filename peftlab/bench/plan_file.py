"""The file of measured plans: what is kept of the old one, and writing the new one in one step."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from peftlab import ops
from peftlab.errors import ArtifactError, PeftlabError, RecipeError, ResourceError
from peftlab.paths import kernel_plans_file


def check_file(path: Path) -> list[str]:
    """Whether ``path`` can be written, before minutes are spent on what goes into it; lines to tell.

    Raises: RecipeError when it cannot, or is a file of something else; ResourceError when the disk is full.
    """
    if path.is_dir():
        raise RecipeError(f"cannot write {path}: it is a folder; give --out a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error
    used = kernel_plans_file()
    is_used = path.absolute() == used.absolute()
    notes = [] if is_used else [f"runs read these plans from {used} only, not from {path}"]
    if path.exists():
        try:
            ops.read_plans(path)
        except ArtifactError as error:
            if not is_used:
                raise RecipeError(f"{path} holds something else than kernel plans; give another --out") from error
            notes.append(f"{path} was damaged and has been replaced")
    return notes


def write_plans(path: Path, plans: list[dict[str, Any]], **about: Any) -> int:
    """Writes ``plans`` and the rows of the old file that have other keys, all or nothing; the number of those rows.

    Raises: RecipeError, ResourceError.
    """
    old: list[dict[str, Any]] = []
    with contextlib.suppress(ArtifactError):  # told by check_file
        old = ops.read_plans(path) if path.exists() else []
    new = {_key(row) for row in plans}
    kept = [row for row in old if _key(row) not in new]
    text = json.dumps({"plans": sorted([*kept, *plans], key=_key), **about}, indent=1) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return len(kept)


def _key(row: dict[str, Any]) -> ops.PlanKey:
    return ops.PlanKey(*(row[name] for name in ops.PlanKey._fields))


def _cannot_write(path: Path, error: OSError) -> PeftlabError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"cannot write {path}: {error.strerror}; free some room or give another --out")
    return RecipeError(f"cannot write {path}: {error.strerror}; give another --out")
