"""Run folders: chooses one for a new run, opens an existing one, and protects other files."""

from __future__ import annotations

import glob
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import ArtifactError, RecipeError
from peftlab.recipe import LoadedRecipe, load_recipe, local_files

LOCK_NAME = "recipe.lock.yaml"
RUN_NAME = "run.json"


@dataclass(frozen=True)
class Run:
    """A finished or interrupted training run.

    Attributes:
        folder: holds recipe.lock.yaml, metrics.jsonl, run.json, adapter/ (or model/, without an adapter) and, if asked
            for, checkpoints/ and merged/.
        summary: the contents of run.json: status, metrics before and after, training figures, samples, merge report.
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

    @property
    def is_finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def is_trained(self) -> bool:
        """Whether training and evaluation are complete; the merge may be missing."""
        return self.summary.get("status") in ("trained", "finished")

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


def open_source(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), *, resume: bool = False
) -> tuple[LoadedRecipe, Path | None]:
    """The recipe, and the run folder if ``recipe`` is a run folder to resume.

    Args: recipe: path, shipped name, dict, or a run folder, whose lock file is the recipe.
    """
    if isinstance(recipe, Mapping):
        return load_recipe(recipe, overrides), None
    path = Path(recipe)
    if path.is_dir():
        path = open_run(path).folder / LOCK_NAME
    loaded = load_recipe(path, overrides)
    return loaded, path.parent if resume and path.name == LOCK_NAME else None


def choose_folder(loaded: LoadedRecipe, *, resume: bool, replace: bool) -> Path:
    """The run folder: run.dir, or one named after the recipe. Raises: RecipeError if it cannot hold the run."""
    wanted = loaded.recipe.run.dir
    if resume:
        folder = Path(wanted) if wanted else Path("runs") / loaded.name
        if not (folder / LOCK_NAME).is_file():
            verb = "train" if loaded.recipe.distill is None else "distill"
            raise RecipeError(f"no run to resume in {folder}; name the run folder: peftlab {verb} RUN --resume")
        return folder
    if wanted is None:
        folder = Path("runs") / loaded.name
        if not (replace and folder.exists()):
            return _free_folder(loaded.name)
    else:
        folder = Path(wanted)
    check_folder_is_free(folder, replace=replace)
    if replace:
        _check_unneeded(loaded, folder)
    return folder


def check_folder_is_free(folder: Path, *, replace: bool, key: str = "run.dir") -> None:
    """Raises RecipeError if ``folder`` cannot hold a new run; a folder that is not a run is never overwritten."""
    if folder.is_file():
        raise RecipeError(f"{folder} is a file, not a folder", key=key)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / LOCK_NAME).is_file():
        raise RecipeError(f"{folder} contains other files but no run; choose another run.dir", key=key)
    if not replace:
        raise RecipeError(
            f"{folder} contains another run; resume it with --resume, overwrite it with --replace, or choose another run.dir",
            key=key,
        )


def check_unfinished(folder: Path) -> None:
    """Raises RecipeError if the run in ``folder`` is finished: a finished run is never touched."""
    run = open_run(folder)
    if not run.is_finished:
        return
    others = [p for p in _numbered(folder) if not open_run(p).is_finished]
    verb = "distill" if run.summary.get("kind") == "distill" else "train"
    hint = f"; not finished: peftlab {verb} {shlex.quote(str(others[-1]))} --resume" if others else ""
    raise RecipeError(
        f"{folder}: the run is finished and cannot be resumed; use it (peftlab eval {shlex.quote(str(folder))}), or start a new "
        f"run with --replace or another run.dir{hint}"
    )


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The newest checkpoint of an unfinished run; None if it is trained and lacks only the merge.

    Raises: RecipeError if the run is finished or has no checkpoint.
    """
    from peftlab.training.checkpoint import list_checkpoints

    check_unfinished(folder)
    run = open_run(folder)
    if run.is_trained:
        return None
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        saved = next((path for path in (run.adapter, run.model) if path.is_dir()), None)
        trained = f"; {saved} has the weights after the last step, without an evaluation" if saved else ""
        raise RecipeError(
            f"the run in {folder} cannot be resumed: it has no checkpoint (run.save_every){trained}; start over with --replace"
        )
    return checkpoints[-1]


def _numbered(folder: Path) -> list[Path]:
    """The runs ``FOLDER-2``, ``-3``, ... that a recipe without run.dir writes next to ``folder``, oldest first."""
    others = [p for p in folder.parent.glob(f"{glob.escape(folder.name)}-*") if (p / LOCK_NAME).is_file()]
    numbers = {p: p.name.removeprefix(f"{folder.name}-") for p in others}
    return sorted((p for p in others if numbers[p].isdigit()), key=lambda p: int(numbers[p]))


def _free_folder(name: str) -> Path:
    """``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that does not exist."""
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return path


def _check_unneeded(loaded: LoadedRecipe, folder: Path) -> None:
    """Raises RecipeError if the run folder to overwrite contains files that the recipe reads, such as its teacher."""
    for key, path in local_files(loaded).items():
        if path.resolve().is_relative_to(folder.resolve()):
            raise RecipeError(
                f"{os.path.relpath(path)} is in the run folder {folder}, which --replace overwrites; move it, or choose another "
                "run.dir",
                key=key,
            )
