"""What a cell of a benchmark is made of: its recipe, and real tokens in rows of equal length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftlab import ops
from peftlab.assembly import Assembly
from peftlab.bench.sweep import Cell, Facts, Sweep, make_sweep
from peftlab.errors import DataError, RecipeError
from peftlab.models import import_bitsandbytes, model_max_length
from peftlab.recipe import Recipe
from peftlab.recipe.schema import AdapterSection
from peftlab.specs.methods import VARIANTS, variant_of
from peftlab.specs.protocol import BATCH, LENGTH
from peftlab.specs.tasks import Predicts
from peftlab.tasks import Example

# Rows encoded at first; twice as many while their tokens do not suffice. A million rows are not read for a few thousand tokens.
_FIRST_ROWS = 256
# Settings of a run that a measured step has no use for.
_UNUSED = {"train": ("epochs", "batch_tokens", "accumulate"), "data": ("packing",), "run": ("dir", "log", "save_every")}


def check_recipe(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe that has no training of its own to measure."""
    if recipe.distill is not None or not recipe.spec.learns_from_labels:
        raise RecipeError(
            "bench measures adapters learning from labels, and this recipe learns from a teacher: give a recipe without a "
            "section distill, such as quickstart or sms-spam",
            key="distill" if recipe.distill is not None else "task",
        )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What the recipe sets, by section, without its lock."""
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude={"lock"})


def method_of(recipe: Recipe) -> str:
    """The recipe's adapter in the words of ``--methods``."""
    return variant_of(recipe.adapter.method, recipe.adapter.model_dump())


def sweep_of(recipe: Recipe, device: str, asked: Mapping[str, Any], fixed_length: int | None) -> Sweep:
    """The sweep that is asked for; a dimension that is not (None) has the recipe's value, paths and weights a small default.

    Raises: RecipeError, see ``make_sweep``.
    """
    length = fixed_length or min(recipe.data.max_length or LENGTH[device], LENGTH[device])
    dense_only = not recipe.method.quantized and asked.get("methods") is None
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
    return make_sweep(**{name: default[name] if asked.get(name) is None else asked[name] for name in default})


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
    """The recipe of ``cell``. Args: base: of ``settings_of``. steps: of the optimizer, warm-up included."""
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
    """The section of the variant ``method``; what the recipe sets and the method uses, such as alpha and targets, stays."""
    spec, variant = VARIANTS[method]
    of_variants = {key for other in spec.variants.values() for key in other.settings}
    given = {k: v for k, v in base.get("adapter", {}).items() if k in spec.keys and k not in of_variants}
    given |= {"method": spec.name} | ({"rank": rank} if spec.has_rank else {})
    return given | {key: variant.settings.get(key, AdapterSection.model_fields[key].default) for key in of_variants}


def write_texts(file: Path, assembly: Assembly, *, num_tokens: int) -> None:
    """Real tokens for all cells: the ids of training rows one after the other, [N], and the label of each: its own, or that of
    the row that it is from, -1 without any. Fewer than ``num_tokens`` are repeated. Raises: DataError when no row is left."""
    rows = assembly.data.train
    taken, examples = _FIRST_ROWS, list[Example]()
    while True:
        some = rows if taken >= len(rows) else rows.select(np.arange(taken))
        examples = assembly.encode(some, training=True).examples
        if taken >= len(rows) or sum(map(len, examples)) >= num_tokens:
            break
        taken *= 2
    if not examples:
        raise DataError(f"no row of {rows.name} is left to measure with", key="data.train")
    ids = np.concatenate([e.ids for e in examples]).astype(np.int32)
    labels = np.concatenate([np.broadcast_to(-1 if e.label is None else e.label, len(e)) for e in examples])
    np.savez(file, ids=ids, labels=labels.astype(np.int32))


def text_examples(file: Path, *, rows: int, length: int, predicts: Predicts) -> list[Example]:
    """``rows`` examples of exactly ``length`` tokens. A language model predicts every token but the first of a row; a
    classifier the label of the text that the row begins in, or of each token."""
    with np.load(file) as stored:
        ids, labels = stored["ids"], stored["labels"]
    at = np.arange(rows * length).reshape(rows, length) % len(ids)
    return [_MAKE[predicts](ids[places], labels[places], row) for row, places in enumerate(at)]


def _of_tokens(ids: np.ndarray, labels: np.ndarray, row: int) -> Example:
    trained = np.ones(len(ids), dtype=bool)
    trained[0] = False
    return Example(ids, row, float(len(ids) - 1), trained=trained)


def _of_token_classes(ids: np.ndarray, labels: np.ndarray, row: int) -> Example:
    return Example(ids, row, float(len(ids)), trained=np.ones(len(ids), dtype=bool), label=labels.astype(np.int64))


def _of_classes(ids: np.ndarray, labels: np.ndarray, row: int) -> Example:
    return Example(ids, row, 1.0, label=int(labels[0]))


_MAKE: dict[str, Callable[[np.ndarray, np.ndarray, int], Example]] = {
    "tokens": _of_tokens,
    "token classes": _of_token_classes,
    "classes": _of_classes,
}
