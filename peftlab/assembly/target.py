"""Resolves the target of eval, predict, chat and merge: a run, a merged model, an adapter, or a base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from peftlab.adapters import FOLDER_BESIDE, check_adapter_files, folders_beside, load_adapter, made_for
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.process import pick_device
from peftlab.errors import ArtifactError, RecipeError
from peftlab.models import Pretrained
from peftlab.recipe import LoadedRecipe, load_recipe
from peftlab.runs import LOCK_NAME
from peftlab.tasks import FindsSettings, Task
from peftlab.training.padding_check import check_padding
from peftlab.training.progress import Progress

RecipeSource = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A resolved target, before anything is loaded.

    Attributes:
        loaded: its recipe, or the given one, with the ``model.name`` to load. adapter: folder of the adapter, None for a
            plain model.
        lock: the lock file of the run that wrote the adapter; None if the recipe was given instead, or for a plain model.
        kind: ``run``, ``adapter``, ``merged`` or ``base``. labels: class names of a base model that already has the head.
    """

    kind: str
    loaded: LoadedRecipe
    adapter: Path | None
    labels: list[str] | None = None
    lock: Path | None = None

    @property
    def classes(self) -> list[str] | None:
        """Class names the head was trained with; None for a base model, whose classes come from the data."""
        if self.labels is not None:
            return self.labels
        names = (self.loaded.recipe.lock or {}).get("environment", {}).get("class_names")
        return list(names) if names and self.kind != "base" else None

    def assembly(self, *, reads_data: bool = False) -> Assembly:
        """Returns the assembly of its recipe. It reads data.train only for held-out rows or classes that nothing else gives.

        Args: reads_data: see ``Assembly``.
        """
        recipe = self.loaded.recipe
        needs_train = recipe.data.eval is None or (recipe.spec.names_classes and self.classes is None)
        return Assembly(self.loaded, classes=self.classes, reads_data=reads_data, reads_train=needs_train)


@dataclass(frozen=True)
class Opened:
    """A loaded target, with the model in eval mode."""

    target: Target
    assembly: Assembly
    task: Task
    model: Any

    @property
    def device(self) -> str:
        return self.assembly.device

    @property
    def limit(self) -> int:
        """Maximum length of a row in tokens."""
        return self.assembly.limit

    @property
    def model_limit(self) -> int:
        """Maximum length of an input to predict or of a prompt, in tokens."""
        return self.assembly.model_limit

    def autocast(self) -> Any:
        """Autocast as in training, so that eval reproduces the run's final metrics."""
        precision = self.assembly.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device, dtype=dtype, enabled=precision != "no")


def find_target(
    target: str | os.PathLike[str], recipe: RecipeSource | None = None, overrides: Sequence[str] = ()
) -> Target:
    """Resolves ``target``. Raises: RecipeError if it is unknown, or a base model without a recipe."""
    path = Path(target)
    if (path / "adapter_config.json").is_file():
        lock = next((p / LOCK_NAME for p in [path, *path.resolve().parents[:2]] if (p / LOCK_NAME).is_file()), None)
        if recipe is None and lock is None:
            raise RecipeError(f"{path} is an adapter without its run; name its recipe with --recipe")
        source = recipe if recipe is not None else str(lock)
        return Target("adapter", load_recipe(source, overrides), path, lock=lock if recipe is None else None)
    if (path / LOCK_NAME).is_file() and (path / "config.json").is_file():
        return _plain_target("merged", path, recipe if recipe is not None else path / LOCK_NAME, overrides)
    if (path / LOCK_NAME).is_file():
        return _run_target(path, recipe if recipe is not None else path / LOCK_NAME, overrides)
    if recipe is None:
        raise RecipeError(f"{str(target)!r} is neither a run nor a merged folder; for a base model add --recipe NAME")
    return Target("base", load_recipe(recipe, [f"model.name={target}", "model.adapter=", *overrides]), None)


def _run_target(path: Path, recipe: RecipeSource, overrides: Sequence[str]) -> Target:
    loaded = load_recipe(recipe, overrides)
    if (path / "student" / "config.json").is_file():
        return _plain_target("run", path / "student", recipe, overrides)
    name = "adapter" if loaded.recipe.method.adapts else "model"
    if not (path / name).is_dir():
        verb, lacks = ("train", name) if loaded.recipe.distill is None else ("distill", "student")
        raise ArtifactError(f"the run in {path} has no {lacks} yet; continue it with: peftlab {verb} {path} --resume")
    if name == "model":
        return _plain_target("run", path / name, recipe, overrides)
    lock = path / LOCK_NAME
    own = isinstance(recipe, str | os.PathLike) and Path(recipe) == lock
    return Target("run", loaded, path / name, lock=lock if own else None)


def _plain_target(kind: str, folder: Path, recipe: RecipeSource, overrides: Sequence[str]) -> Target:
    """The target for a model folder that a run wrote; its weights include the training."""
    settings = [f"model.name={folder}", "model.quantize=none", "model.double_quant=true", "model.compute_dtype=auto"]
    settings += ["model.revision=", "run.merge=none", "adapter.tokens=[]", "model.adapter="]  # they are in it
    return Target(kind, load_recipe(recipe, [*settings, *overrides]), None)


def open_target(
    target: Target,
    progress: Progress,
    *,
    reads_data: bool = False,
    assembly: Assembly | None = None,
    check: bool = True,
    **model_changes: Any,
) -> Opened:
    """Loads tokenizer, model and adapter of a target.

    Args:
        reads_data: whether to read columns and classes that the target does not define from its recipe's data.
        assembly: that of the training that wrote the target; default: made from the target's recipe.
        check: whether to check that padding does not change outputs; False for a model that training checked.
        model_changes: loading options that differ from the recipe's.
    Raises: RecipeError, ArtifactError (adapter damaged or made for another model).
    """
    recipe = target.loaded.recipe
    assembly = assembly or target.assembly(reads_data=reads_data)
    pick_device(recipe.run.device)  # report a missing device first
    if target.adapter is not None:
        check_adapter_files(target.adapter)
        _check_beside(target)
    check_same_model(target, assembly.pretrained)
    if (note := _other_base(target, assembly.pretrained)) is not None:
        progress.note(note)
    task = assembly.task  # before the model, which takes longer
    if task.spec.finds_settings and target.adapter is not None and (target.adapter / "manifest.json").is_file():
        cast(FindsSettings, task).of_checkpoint()
    progress.stage(f"loading {recipe.model.name}")
    model = assembly.model(**model_changes)
    if target.adapter is not None:
        model = load_adapter(model, target.adapter, kernels=recipe.run.kernels)
    opened = Opened(target, assembly, task, model.eval())
    if check:
        problem = check_padding(model, task, max_length=opened.limit, device=opened.device, autocast=opened.autocast)
        if problem is not None:
            progress.note(problem)
    return opened


def _check_beside(target: Target) -> None:
    """Raises ArtifactError if an adapter's folder lacks adapters that its recipe trains beside it."""
    assert target.adapter is not None
    found = {path.name for path in folders_beside(target.adapter)}
    if absent := [other.method for other in target.loaded.recipe.adapter.beside if other.method not in found]:
        raise ArtifactError(
            f"{target.adapter} lacks the adapter of {', '.join(absent)} that was trained beside it, in {FOLDER_BESIDE}/"
            f"{absent[0]}; copy the folder with all that is in it"
        )


def _other_base(target: Target, pretrained: Pretrained) -> str | None:
    """A note if an adapter without fingerprints names another base: equal shapes do not show that."""
    if target.adapter is None or (target.loaded.recipe.lock or {}).get("fingerprints"):
        return None
    named = made_for(target.adapter)
    same = {Path(name).name.lower() for name in (pretrained.source.name, pretrained.location)}
    if named is None or Path(named).name.lower() in same:
        return None
    return f"the adapter in {target.adapter} was made for {named}, and is used on {pretrained.source.name}"


def check_same_model(target: Target, pretrained: Pretrained) -> None:
    """Raises ArtifactError if an adapter was trained on other weights."""
    expected = (target.loaded.recipe.lock or {}).get("fingerprints", {}).get("model")
    if target.adapter is not None and expected is not None and expected != pretrained.fingerprint:
        raise ArtifactError(
            f"the adapter in {target.adapter} was made for another model: it was trained on weights {expected[:12]}, but "
            f"{pretrained.source.name!r} now has {pretrained.fingerprint[:12]}",
            key="model.name",
        )
