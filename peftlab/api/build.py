"""From a recipe to the parts of a run. The only place that reads recipe values; the parts take plain ones."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from peftlab.adapters import HeadLoss
from peftlab.data import Rows, class_names, load_rows, read_labels, require, split_rows
from peftlab.errors import DataError, PeftlabError, RecipeError, ResourceError
from peftlab.models import (
    Pretrained,
    find_pretrained,
    import_bitsandbytes,
    load_image_reader,
    load_model,
    load_tokenizer,
    model_max_length,
    resolve_precision,
    sentence_files,
    tokenizer_fingerprint,
)
from peftlab.ops import use_plans
from peftlab.paths import kernel_plans_file
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.tasks import Encoded, Task, TaskParts, task_class
from peftlab.training.memory import share_one_heap

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class DataParts:
    """Training and held-out rows, and what identifies them.

    Attributes:
        labelled: rows that tell the classes: those of data.train that are not held out.
        has_labels: whether ``train`` has labels; a transfer set has none.
    """

    train: Rows
    eval: Rows
    fingerprints: dict[str, str]
    labelled: Rows
    has_labels: bool = True


@contextlib.contextmanager
def located(loaded: LoadedRecipe | None) -> Iterator[None]:
    """Adds the recipe's file and line to errors about a recipe key, and turns a full disk into a clear error."""
    try:
        yield
    except PeftlabError as error:
        if loaded is None:
            raise
        raise loaded.locate(error) from error.__cause__
    except MemoryError as error:
        raise ResourceError("out of memory; use a smaller model, model.quantize=nf4, or smaller batches") from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise RecipeError(f"cannot write here: {error}; choose another run.dir", key="run.dir") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(f"the disk is full: {error}; free some room or choose another run.dir") from error
    except Exception as error:
        # safetensors reports a failed write as its own error with the system's text in it.
        if "No space left on device" not in str(error):
            raise
        raise ResourceError(f"the disk is full: {error}; free some room or choose another run.dir") from error


def prepare_libraries(*, measured_plans: bool = True) -> None:
    """What must be done before the libraries start: a quiet tokenizer, deterministic cuBLAS, a guarded bitsandbytes,
    the kernel plans measured on this machine.

    Raises: ArtifactError when the file of measured plans is damaged.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with contextlib.suppress(ImportError):  # only a quantized model needs it, and says so
        import_bitsandbytes()
    if measured_plans:
        use_plans(_plans_here())


def _plans_here() -> Path | None:
    with contextlib.suppress(RuntimeError):  # without a home folder there is no cache
        file = kernel_plans_file()
        return file if os.path.exists(file) else None
    return None


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda``. Raises: RecipeError when cuda is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("cuda was asked for, but torch finds no CUDA device; see `peftlab doctor`", key="run.device")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def pretrained_of(recipe: Recipe) -> Pretrained:
    model = recipe.model
    return find_pretrained(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)


def tokenizer_of(recipe: Recipe, pretrained: Pretrained) -> Any:
    """What turns inputs into numbers: the tokenizer, or for images the ``ImageReader``."""
    if recipe.spec.reader == "image processor":
        return load_image_reader(pretrained)
    return load_tokenizer(pretrained, chat_template=recipe.model.chat_template)


def model_of(recipe: Recipe, pretrained: Pretrained, task: Task, device: str, **changes: Any) -> Any:
    """The frozen backbone of the recipe; ``changes`` replace loading options, such as ``quantize="none"``."""
    # Not before the rows are encoded: the tokenizer's threads would wait for each other (measured: twice the time).
    share_one_heap()
    model = recipe.model
    options: dict[str, Any] = {
        "quantize": model.quantize,
        "double_quant": model.double_quant,
        "compute_dtype": model.compute_dtype,
        # Weights that are trained take many small steps, each below what 16 bits can hold.
        "dtype": "float32" if recipe.adapter.method == "none" and model.dtype == "auto" else model.dtype,
        "attention": model.attention,
    }
    return load_model(
        pretrained, auto_class=task.spec.auto_class, device=device, **(options | changes), **task.model_kwargs()
    )


def precision_of(recipe: Recipe, device: str) -> str:
    """``no``, ``bf16`` or ``fp16``, as Accelerate calls the autocast dtypes."""
    import torch

    dtype = resolve_precision(recipe.train.precision, device)
    if dtype == torch.float16 and device == "cpu":
        raise RecipeError("float16 needs a GPU; use bfloat16 or float32 on a CPU", key="train.precision")
    return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def data_seed(recipe: Recipe) -> int:
    """Seed of the split and of sampled rows."""
    return recipe.run.seed if recipe.data.seed is None else recipe.data.seed


def load_data(recipe: Recipe, *, transfer: bool = False) -> DataParts:
    """Reads the rows and makes the split. Raises: DataError, RecipeError.

    Args: transfer: whether training is on the rows of distill.transfer, where the recipe has them.
    """
    data = recipe.data
    seed = data_seed(recipe)
    read = functools.partial(
        load_rows,
        format=data.format,
        encoding=data.encoding,
        column_names=data.column_names,
        subset=data.subset,
        seed=seed,
    )
    train = _with_labels(recipe, read(data.train, key="data.train"), all_names_used=True)
    fingerprints = {"train data": train.fingerprint}
    if data.eval is not None:
        held_out = _with_labels(
            recipe, read(data.eval, key="data.eval", default_split="validation"), all_names_used=False
        )
        fingerprints |= {"eval data": held_out.fingerprint}
        parts = DataParts(_without_excluded(recipe, train), held_out, fingerprints, train)
        return _with_transfer(recipe, parts, read) if transfer else parts
    labels = read_class_labels(recipe, train) if recipe.spec.classifies or "label" in data.columns else None
    if recipe.spec.classifies:
        class_names(labels or [])
    kept, held = split_rows(train, fraction=data.eval_fraction, num_rows=data.eval_rows, seed=seed, labels=labels)
    labelled = train.select(kept)
    parts = DataParts(_without_excluded(recipe, labelled), train.select(held), fingerprints, labelled)
    return _with_transfer(recipe, parts, read) if transfer else parts


def _with_transfer(recipe: Recipe, parts: DataParts, read: Callable[..., Rows]) -> DataParts:
    if recipe.distill is None or recipe.distill.transfer is None:
        return parts
    rows = read(recipe.distill.transfer, key="distill.transfer")
    fingerprints = parts.fingerprints | {"transfer data": rows.fingerprint}
    return dataclasses.replace(parts, train=rows, fingerprints=fingerprints, has_labels=False)


def _without_excluded(recipe: Recipe, rows: Rows) -> Rows:
    """The rows that data.exclude leaves. Raises: DataError for a value that no row has, or when nothing is left."""
    kept = np.ones(len(rows), dtype=bool)
    for column, values in recipe.data.exclude.items():
        key = f"data.exclude.{column}"
        found = [str(v).lower() if isinstance(v, bool) else str(v).strip() for v in rows.column(column, key=key)]
        if missing := sorted(set(values) - set(found)):
            raise DataError(f"no row of {rows.name} has {missing[0]!r} in the column {column!r}", key=key)
        kept &= ~np.isin(found, values)
    if not kept.any():
        raise DataError(f"all rows of {rows.name} are excluded: nothing is left to train on", key="data.exclude")
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def read_class_labels(recipe: Recipe, rows: Rows) -> list[str]:
    """Class name of each row, by the recipe's label column, names and bins."""
    data = recipe.data
    bins = (data.bins.edges, data.bins.names) if data.bins else None
    if not recipe.spec.classifies:  # the column holds the names already
        return [str(v) for v in rows.column("label")]
    return read_labels(rows, data.columns.get("label", "label"), label_names=data.label_names, bins=bins)


def _with_labels(recipe: Recipe, rows: Rows, *, all_names_used: bool) -> Rows:
    """causal_lm: puts the class names into a column ``label`` that templates can use."""
    column = recipe.data.columns.get("label")
    if recipe.spec.classifies or column is None:
        return rows
    labels = read_labels(rows, column, label_names=recipe.data.label_names, all_names_used=all_names_used)
    return dataclasses.replace(rows, columns={**rows.columns, "label": labels})


def build_task(recipe: Recipe, tokenizer: Any, rows: Rows | None, *, classes: list[str] | None = None) -> Task:
    """The task object.

    Args:
        rows: training rows; their labels are the classes unless ``classes`` are given.
    """
    data = recipe.data
    if recipe.spec.classes_from == "eval.choices":
        classes = recipe.eval.choices
    elif recipe.spec.classifies and classes is None:
        assert rows is not None
        classes = class_names(read_class_labels(recipe, rows))
    if rows is not None:
        for part, name in data.columns.items():
            if part != "label":
                _require_column(rows, part, name)
    parts = TaskParts(
        tokenizer,
        columns=data.columns,
        available=[] if rows is None else list(rows.columns),
        classes=classes,
        label_names=data.label_names,
        bins=(data.bins.edges, data.bins.names) if data.bins else None,
        class_weights=recipe.train.class_weights,
        template=data.template.model_dump(exclude_none=True) if data.template else None,
        head_loss=HeadLoss(recipe.run.kernels),
        pooling=recipe.model.pooling,
        sentences=lambda: sentence_files(pretrained_of(recipe)),
    )
    return task_class(recipe.task).make(parts)


def _require_column(rows: Rows, part: str, name: str) -> None:
    try:
        rows.column(name)
    except DataError as error:
        raise DataError(str(error), key=f"data.columns.{part}") from None


def limit_of(recipe: Recipe, pretrained: Pretrained, tokenizer: Any, task: Task | None = None) -> int:
    """Longest row in tokens: data.max_length, at most what the model allows. Raises: RecipeError beyond that."""
    if recipe.spec.reader == "image processor":
        return int(tokenizer.length)
    allowed = model_max_length(pretrained, tokenizer)
    wanted = recipe.data.max_length
    if wanted is None:
        usual = None if recipe.spec.predicts != "vectors" else sentence_files(pretrained).max_length
        return min(allowed, usual or allowed)
    if wanted > allowed:
        raise RecipeError(
            f"{recipe.model.name} reads at most {allowed:,} tokens, found {wanted:,}", key="data.max_length"
        )
    return wanted


def encode(recipe: Recipe, task: Task, rows: Rows, *, limit: int, training: bool, labelled: bool = True) -> Encoded:
    """The examples of ``rows``. Raises: DataError with all that the ledger refuses."""
    encoded = task.encode(rows, max_length=limit, too_long=recipe.data.too_long, training=training, labelled=labelled)
    require(encoded.ledger, allow=recipe.data.allow, training=training)
    return encoded


def fingerprints_of(pretrained: Pretrained, tokenizer: Any, data: DataParts) -> dict[str, str]:
    return {"model": pretrained.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer), **data.fingerprints}
