"""Caches the teachers' outputs for the training examples, to be reused by any number of distillations."""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peftlab.assembly import Assembly
from peftlab.assembly.estimate import forward_seconds
from peftlab.assembly.process import pick_device
from peftlab.data import Rows, eval_batches
from peftlab.distillation.cache import SHARD_BYTES, CacheWriter, Fill, TeacherCache, open_cache
from peftlab.distillation.cache.manifest import MANIFEST
from peftlab.errors import RecipeError, ResourceError
from peftlab.measuring.memory import release_memory
from peftlab.models import resolve_dtype, resolve_precision
from peftlab.paths import existing_folder
from peftlab.tasks import Encoded, Example, Outputs, lengths_of
from peftlab.teaching.alignment import check_ids
from peftlab.teaching.caches import (
    REASONS,
    cache_folder,
    check_begun_cache,
    check_cache_folder,
    examples_identity,
    fill_of,
    key_of,
    open_stored,
    planned_fill,
)
from peftlab.teaching.teacher import NamedTeacher, TeacherModel, named_teachers
from peftlab.training.progress import Progress

# Examples computed before the first of them is written: enough to batch those of similar length.
_WINDOW = 512
# Positions whose logits exist at once: 256 x 128,256 float32 values are 131 MB.
_CHUNK = 256
_INDEX_BYTES = 20  # per example, in addition to its record
_INDEX_HEADER_BYTES = 384


@dataclass(frozen=True)
class TaughtExamples:
    """The training examples for the teachers, and their identity. No model is loaded.

    Attributes: rows: the rows of the examples.
    """

    assembly: Assembly
    rows: Rows
    train: Encoded
    identity: dict[str, Any]


def taught_examples(assembly: Assembly) -> TaughtExamples:
    """The training examples of ``assembly``. Raises: DataError, RecipeError."""
    rows = assembly.data.train
    return TaughtExamples(assembly, rows, assembly.train, examples_identity(assembly, rows))


def capture_all(taught: TaughtExamples, progress: Progress, *, replace: bool = False) -> list[dict[str, Any]]:
    """Caches the outputs of every teacher, one teacher at a time in memory."""
    assembly, captured = taught.assembly, []
    for teacher in named_teachers(assembly):
        identity = taught.identity | teacher.identity()
        folder = cache_folder(assembly, teacher)
        if (folder / MANIFEST).is_file() and not replace:
            cache = open_stored(taught.identity, assembly, teacher)
            progress.note(f"{folder} is already complete")
            captured.append(_described(cache, teacher.name, seconds=0.0))
            continue
        check_cache_folder(folder)
        if not replace:
            check_begun_cache(taught.identity, assembly, teacher)
        model = teacher.open(progress)
        for note in model.notes:
            progress.note(note)
        captured.append(_capture(taught, teacher, model, identity, progress, replace=replace))
        del model
        release_memory()
    return captured


def _examples_of(taught: TaughtExamples, teacher: NamedTeacher) -> list[Example]:
    """The examples of a teacher: all, or those of its own rows."""
    taken = teacher.takes(taught.rows)
    return [e for e in taught.train.examples if taken[e.row]]


def _capture(
    taught: TaughtExamples,
    teacher: NamedTeacher,
    model: TeacherModel,
    identity: dict[str, Any],
    progress: Progress,
    *,
    replace: bool,
) -> dict[str, Any]:
    assembly, started = taught.assembly, time.perf_counter()
    folder = cache_folder(assembly, teacher)
    own = model.read(taught.rows, taught.train.examples) if model.own_texts else None
    examples = _examples_of(taught, teacher)
    runner = _TeacherRunner(model, assembly.recipe.eval.batch_tokens)
    if own is None and model.columns.count is not None:
        check_ids(assembly.task.tokenizer, taught.rows, taught.train, model.columns.count)
    one = examples[:1] if own is None else [own[examples[0].key]]
    num_classes, hidden_size, head = runner.shape(one)
    transform = runner.transform(one)
    fill = fill_of(assembly, num_classes=num_classes, hidden_size=hidden_size)
    if fill.kind == "hidden" and transform and not head:
        raise RecipeError(
            "the head of this teacher is quantized or adapted, so stored hidden states cannot be run through it again; merge the "
            "teacher first, or store classes (fill: topk)",
            key="distill.targets.fill",
        )
    _check_room(folder, _stored_bytes(fill, _num_positions(examples)))
    with _storing(folder), CacheWriter(folder, fill, identity, replace=replace, reasons=REASONS) as writer:
        split = writer.split("train", len(examples))
        if split.done:
            progress.note(f"{folder}: resuming, {split.done:,} of {len(examples):,} examples are already stored")
        if fill.kind == "hidden" and head:
            writer.save_tensors(head)
        progress.stage(f"storing the teacher's outputs for {len(examples):,} examples")
        progress.start(len(examples), split.done)
        while split.done < len(examples):
            window = examples[split.done : split.done + _WINDOW]
            inputs = window if own is None else [own[e.key] for e in window]
            for example, target in zip(window, runner.targets(inputs, fill, first=split.done), strict=True):
                split.add(key_of(example), target)
            progress.step(split.done, {})
        progress.stop()
        writer.finish({"name": model.name, "num_classes": num_classes, "head": transform})
    return _described(open_cache(folder), model.name, seconds=time.perf_counter() - started)


@contextlib.contextmanager
def _storing(folder: Path) -> Iterator[None]:
    """Turns disk errors into errors about the recipe's cache."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: {error}; free some space and run the same command again to resume",
                key="distill.cache",
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise RecipeError(
                f"cannot write a cache to {folder}: {error}; choose another folder", key="distill.cache"
            ) from error
        raise


def _described(cache: TeacherCache, name: str, *, seconds: float) -> dict[str, Any]:
    split = cache.manifest["splits"]["train"]
    return {
        "teacher": name,
        "folder": str(cache.folder),
        "fill": cache.fill.settings(),
        **{key: split[key] for key in ("examples", "positions", "bytes", "bytes_per_position")},
        "seconds": seconds,
    }


class _TeacherRunner:
    """Runs a teacher over examples, batched by length, and computes the targets to store."""

    def __init__(self, model: TeacherModel, batch_tokens: int) -> None:
        self._model, self._batch_tokens = model, batch_tokens

    def shape(self, examples: Sequence[Example]) -> tuple[int | None, int, dict[str, Tensor]]:
        """The number of classes, the width that ``hidden`` stores, and the tensors of its head."""
        outputs = self._ask(examples)
        if outputs.head is None:
            width = outputs.values.shape[1]
            return (None if outputs.vectors else width), width, {}
        module = outputs.head.module
        count = self._model.columns.count or int(cast(Tensor, module.weight).shape[0])
        tensors = {}
        if type(module) is nn.Linear:
            tensors = {"weight": module.weight[:count]}
            tensors |= {} if module.bias is None else {"bias": module.bias[:count]}
        return count, outputs.values.shape[1], tensors

    def transform(self, examples: Sequence[Example]) -> dict[str, float | None]:
        """The soft-cap and scale of the head."""
        head = self._ask(examples).head
        return {} if head is None else {"softcap": head.softcap, "scale": head.scale}

    def targets(self, examples: Sequence[Example], fill: Fill, *, first: int) -> list[Any]:
        """The stored target of each example; ``first`` is the number of the first example."""
        targets: dict[int, Any] = {}
        for part in eval_batches([len(e) for e in examples], self._batch_tokens):
            outputs = self._ask([examples[i] for i in part])
            end = np.cumsum(outputs.counts)
            for i, stop, count in zip(part.tolist(), end.tolist(), outputs.counts, strict=True):
                targets[i] = _on_cpu(fill.target(self._parts(outputs, stop - count, stop, fill), first + i))
        return [targets[i] for i in range(len(examples))]

    def _parts(self, outputs: Outputs, start: int, stop: int, fill: Fill) -> Iterator[Tensor]:
        if fill.kind == "hidden" and (outputs.head is not None or outputs.vectors):
            yield outputs.values[start:stop]
            return
        for at in range(start, max(stop, start + 1), _CHUNK):
            yield self._model.columns.of(outputs.logits(slice(at, min(stop, at + _CHUNK))))

    @torch.no_grad()
    def _ask(self, examples: Sequence[Example]) -> Outputs:
        t = self._model
        return t.task.outputs(t.model, t.task.collate(list(examples), t.device))


def _on_cpu(target: Any) -> Any:
    return target.to("cpu")


def plan_capture(taught: TaughtExamples, teacher: NamedTeacher) -> dict[str, Any]:
    """The disk space and time of a capture, from the teacher's configuration only."""
    assembly, recipe = taught.assembly, teacher.target.loaded.recipe
    skeleton = teacher.skeleton()
    head = skeleton.get_output_embeddings() if assembly.spec.predicts == "tokens" else None
    fill = planned_fill(assembly, skeleton)
    examples = _examples_of(taught, teacher)
    lengths = lengths_of(examples)
    counts = _num_positions(examples)
    positions, size = int(counts.sum()), _stored_bytes(fill, counts)
    if fill.kind == "hidden" and head is not None:
        size += head.weight.numel() * resolve_dtype(recipe.model.dtype, "cpu").itemsize
    device = pick_device(recipe.run.device)
    seconds = forward_seconds(
        skeleton,
        tokens=int(lengths.sum()),
        squares=float((lengths.astype(np.float64) ** 2).sum()),
        scored=positions if head is not None else 0,
        dtype=resolve_precision(assembly.recipe.train.precision, device),
        device=device,
        storage=assembly.storage,
    )
    folder = cache_folder(assembly, teacher)
    return {
        "teacher": teacher.name,
        "folder": str(folder),
        "fill": fill.settings(),
        "examples": len(lengths),
        "positions": positions,
        "tokens": int(lengths.sum()),
        "bytes": int(size),
        "bytes_per_position": fill.bytes_per_position(),
        "seconds": seconds,
        "free_bytes": shutil.disk_usage(existing_folder(folder)).free,
    }


def _num_positions(examples: Sequence[Example]) -> NDArray[np.float64]:
    """[N] number of scored positions of each example."""
    return np.array([float(e.num_scored) for e in examples])


def _stored_bytes(fill: Fill, counts: NDArray[np.float64]) -> int:
    """Stored size of examples with these numbers of positions; an upper bound if classes are drawn."""
    records = np.ceil(fill.bytes_per_position() * counts) + (2 if fill.draws else 0)  # parts begin at whole bytes
    num_shards: int = max(1, round(records.sum() / SHARD_BYTES))
    return int(records.sum()) + _INDEX_BYTES * len(counts) + _INDEX_HEADER_BYTES * num_shards


def _check_room(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < needed:
        raise ResourceError(
            f"the targets need about {needed / 2**20:,.0f} MiB in {folder}, but only {free / 2**20:,.0f} MiB are free; free some "
            "space, choose another folder, or store less: distill.targets.k, or fill: sampled",
            key="distill.cache",
        )
