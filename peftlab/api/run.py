"""A run folder: what a training run leaves behind, and opening it again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import ArtifactError, RecipeError
from peftlab.recipe import LoadedRecipe, load_recipe

LOCK_NAME = "recipe.lock.yaml"
RUN_NAME = "run.json"


@dataclass(frozen=True)
class Run:
    """A finished or interrupted training run.

    Attributes:
        folder: holds recipe.lock.yaml, metrics.jsonl, run.json, adapter/ (or model/, without an adapter) and, if asked
            for, checkpoints/ and merged/.
        summary: contents of run.json: status, metrics before and after, training figures, samples, merge report.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def recipe(self) -> LoadedRecipe:
        """The resolved recipe of the run."""
        return load_recipe(self.folder / LOCK_NAME)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        from peftlab.training.metrics_log import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")


def open_run(folder: str | os.PathLike[str]) -> Run:
    """The run in ``folder``. Raises: RecipeError (no run there), ArtifactError (its run.json is damaged)."""
    path = Path(folder)
    if not (path / LOCK_NAME).is_file():
        raise RecipeError(f"{path} is not a run folder: it has no {LOCK_NAME}")
    try:
        summary = json.loads((path / RUN_NAME).read_text(encoding="utf-8")) if (path / RUN_NAME).exists() else {}
    except ValueError as error:
        raise ArtifactError(f"{path / RUN_NAME} is damaged: {error}") from error
    return Run(path, summary)


def write_json(path: Path, document: Any) -> None:
    """Writes JSON by a rename, so that a reader sees the old or the new file; non-finite floats become text."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(finite(document), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """``value`` with inf and nan, which JSON does not have, replaced by their names."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def free_run_folder(name: str) -> Path:
    """``runs/NAME``, or the first ``runs/NAME-2``, ``-3``, ... that does not exist yet."""
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return path


def check_run_folder(folder: Path, *, replace: bool, key: str = "run.dir") -> None:
    """Raises RecipeError when ``folder`` cannot take a new run; a folder that is no run is never replaced."""
    if folder.is_file():
        raise RecipeError(f"{folder} is a file, not a folder", key=key)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / LOCK_NAME).is_file():
        raise RecipeError(f"{folder} holds other files and no run; choose another run.dir", key=key)
    if not replace:
        raise RecipeError(
            f"{folder} holds another run; continue it with --resume, replace it with --replace, or choose another run.dir",
            key=key,
        )
