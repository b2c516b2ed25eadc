"""The file of measured plans: merges old and new plans and writes them atomically."""

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
    """Checks that ``path`` can be written, before minutes of measuring; returns notes for the user.

    Raises: RecipeError if it cannot be written or is another kind of file; ResourceError if the disk is full.
    """
    if path.is_dir():
        raise RecipeError(f"cannot write {path}: it is a folder; set --out to a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error
    used = kernel_plans_file()
    is_used = path.absolute() == used.absolute()
    notes = [] if is_used else [f"runs read plans from {used} only, not from {path}"]
    if path.exists():
        try:
            ops.read_plans(path)
        except ArtifactError as error:
            if not is_used:
                raise RecipeError(f"{path} is not a file of kernel plans; choose another --out") from error
            notes.append(f"{path} was damaged and has been replaced")
    return notes


def write_plans(path: Path, plans: list[dict[str, Any]], **about: Any) -> int:
    """Writes ``plans`` and the old file's rows with other keys atomically; returns the number of old rows kept.

    Raises: RecipeError, ResourceError.
    """
    old: list[dict[str, Any]] = []
    with contextlib.suppress(ArtifactError):  # reported by check_file
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
        return ResourceError(f"cannot write {path}: {error.strerror}; free disk space or choose another --out")
    return RecipeError(f"cannot write {path}: {error.strerror}; choose another --out")
