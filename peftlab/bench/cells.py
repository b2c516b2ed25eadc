"""Builds the cells of a benchmark: their recipes, and real tokens in rows of equal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peftlab import ops
from peftlab.assembly import Assembly
from peftlab.bench.sweep import Cell, Facts, Sweep, make_sweep
from peftlab.errors import DataError, RecipeError
from peftlab.models import import_bitsandbytes, model_max_length
from peftlab.recipe import Recipe
from peftlab.recipe.adapter import AdapterSection
from peftlab.recipe.method_options import settings_for
from peftlab.specs.methods import VARIANTS, variant_of
from peftlab.specs.protocol import BATCH, LENGTH
from peftlab.tasks import Example, Task

# Rows encoded first, doubled until there are enough tokens: a few thousand tokens need not read a million rows.
_FIRST_ROWS = 256
# Settings that a measured step does not use.
_UNUSED = {"train": ("epochs", "batch_tokens", "accumulate"), "data": ("packing",), "run": ("dir", "log", "save_every")}
_IDLE = {"run.keep", "run.merge", *(f"{section}.{name}" for section, names in _UNUSED.items() for name in names)}
# Settings that every cell sets, and the option that does.
_SET = {"model.quantize": "quantize", "run.kernels": "kernels", "run.dir": "out", "train.max_steps": "steps"}
# Settings that a cell sets if the option is given.
_SET_IF_GIVEN = {"adapter.rank": "ranks", "adapter.method": "methods", "train.batch_size": "batch"}


def check_recipe(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe without a training to measure."""
    if recipe.distill is not None or not recipe.spec.learns_from_labels:
        raise RecipeError(
            "bench needs a recipe that learns from labels, and this one learns from a teacher: use a recipe without a "
            "section distill, such as quickstart or sms-spam",
            key="distill" if recipe.distill is not None else "task",
        )
    for key, found, without in (("start", "continues one", ""), ("beside", "trains others beside it", "[]")):
        if getattr(recipe.adapter, key):
            raise RecipeError(
                f"bench measures a new adapter of one method, and this recipe {found}; add adapter.{key}={without} to the command",
                key=f"adapter.{key}",
            )


def check_overrides(overrides: Sequence[str], choices: Mapping[str, Any]) -> None:
    """Raises RecipeError for a setting on the command line that no cell uses. Args: choices: see ``sweep_of``."""
    for key, _, value in (text.partition("=") for text in overrides):
        option = _SET.get(key)
        if option is None and choices.get(_SET_IF_GIVEN.get(key, "")) is not None:
            option = _SET_IF_GIVEN[key]
        if value in ("", "null"):  # takes a key of the file away
            continue
        if option is not None:
            raise RecipeError(f"has no effect here, because --{option} decides it; use that instead", key=key)
        if key in _IDLE or (key.startswith("eval.") and key != "eval.choices"):
            raise RecipeError("has no effect on the steps that bench measures; remove it", key=key)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's explicit settings, by section, without its lock."""
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude={"lock"})


def method_of(recipe: Recipe) -> str:
    """The recipe's adapter method, named as in ``--methods``."""
    return variant_of(recipe.adapter.method, recipe.adapter.model_dump())


def sweep_of(recipe: Recipe, device: str, choices: Mapping[str, Any], fixed_length: int | None) -> Sweep:
    """Returns the requested sweep. A missing dimension (None) gets the recipe's value; paths and weights get a small default.

    Raises: RecipeError, see ``make_sweep``.
    """
    length = fixed_length or min(recipe.data.max_length or LENGTH[device], LENGTH[device])
    dense_only = not recipe.method.trains_on("nf4") and choices.get("methods") is None
    default: dict[str, Sequence[Any]] = {
        "what": ["train"],
        "methods": [method_of(recipe)],
        "ranks": [recipe.adapter.rank],
        "quantize": ["none"] if dense_only else ["none", "nf4"],
        "kernels": ["reference", "auto"],
        "batch": [recipe.train.batch_size or BATCH],
        "length": [length],
        "adapters": [1],
    }
    return make_sweep(**{name: default[name] if choices.get(name) is None else choices[name] for name in default})


def facts_of(assembly: Assembly, new_tokens: int) -> Facts:
    problem, on_gpu, tokenizer = None, assembly.device != "cpu", assembly.reader
    no_operands = {name: "it is for a CPU" if on_gpu else ops.operands_problem(name) for name in ops.CPU_OPERANDS}
    try:
        import_bitsandbytes()
    except ImportError as error:
        problem = str(error)
    if assembly.spec.reader == "image processor":
        length = fixed = int(tokenizer.length)
    else:
        length, fixed = model_max_length(assembly.pretrained, tokenizer), None
    known = {name: reason for name, reason in no_operands.items() if reason}
    return Facts(assembly.recipe.task, length, new_tokens, fixed, problem, known)


def cell_settings(base: Mapping[str, Any], cell: Cell, *, steps: int) -> dict[str, Any]:
    """Returns the recipe of ``cell``. Args: base: from ``settings_of``. steps: optimizer steps, including warm-up."""
    settings = {name: dict(part) if isinstance(part, Mapping) else part for name, part in base.items()}
    for section, names in _UNUSED.items():
        for name in names:
            settings.setdefault(section, {}).pop(name, None)
    settings["eval"] = {"before": False}
    settings["train"] |= {"batch_size": cell.batch, "max_steps": steps}
    settings["run"] |= {"kernels": cell.kernels, "merge": "none"}
    settings["model"]["quantize"] = cell.quantize
    settings["adapter"] = adapter_settings(base, cell.method, cell.rank)
    if cell.quantize != "nf4":
        settings["model"].pop("double_quant", None)
        settings["model"].pop("compute_dtype", None)
    return settings


def adapter_settings(base: Mapping[str, Any], method: str, rank: int | None) -> dict[str, Any]:
    """Returns the adapter section for the variant ``method``; keeps the recipe's settings that the method uses, such as alpha."""
    spec, variant = VARIANTS[method]
    of_variants = {key for other in spec.variants.values() for key in other.settings}
    given = {k: v for k, v in base.get("adapter", {}).items() if k not in of_variants}
    given = settings_for(given, spec.name) | {"method": spec.name} | ({} if rank is None else {"rank": rank})
    return given | {key: variant.settings.get(key, AdapterSection.model_fields[key].default) for key in of_variants}


def write_texts(file: Path, assembly: Assembly, *, num_tokens: int) -> None:
    """Writes real tokens for all cells: the concatenated ids of training rows, [N]. Cells repeat them if there are fewer than
    ``num_tokens``. Raises: DataError if no rows remain."""
    rows = assembly.data.train
    taken, examples = _FIRST_ROWS, list[Example]()
    while True:
        some = rows if taken >= len(rows) else rows.select(np.arange(taken))
        examples = assembly.encode(some, training=True).examples
        if taken >= len(rows) or sum(map(len, examples)) >= num_tokens:
            break
        taken *= 2
    if not examples:
        raise DataError(f"no rows of {rows.name} remain to measure with", key="data.train")
    np.savez(file, ids=np.concatenate([e.ids for e in examples]).astype(np.int32))


def text_examples(file: Path, *, rows: int, length: int, task: Task) -> list[Example]:
    """Returns ``rows`` examples of ``length`` tokens that the task makes; of several texts per row each is a part of it."""
    with np.load(file) as stored:
        ids = stored["ids"]
    at = np.arange(rows * length).reshape(rows, length) % len(ids)
    count = len(task.probe(ids[:1])) if task.spec.predicts == "vectors" else 1
    return [replace(task.probe(ids[places[: max(1, length // count)]]), row=row) for row, places in enumerate(at)]
