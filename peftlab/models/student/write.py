"""Writes students as plain transformers folders, with notes on the cut in ``student.json``."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peftlab.errors import ArtifactError, RecipeError, ResourceError
from peftlab.models.config import load_skeleton
from peftlab.models.load import load_model
from peftlab.models.load_errors import quiet
from peftlab.models.pretrained import Pretrained
from peftlab.models.student.cut import StudentCut, check_cut, chosen_layers
from peftlab.models.student.families import Widths
from peftlab.models.student.fresh import fresh_student
from peftlab.models.student.importance import Distance, Outputs, kl_divergence, layers_by_importance
from peftlab.models.student.stack import cut_layers, find_stack
from peftlab.models.student.width import cut_width

NOTES_NAME = "student.json"
# Part of the request: increased when the same cut gives other weights, so that older folders are not reused.
_VERSION = 1


def make_student(
    pretrained: Pretrained,
    cut: StudentCut,
    folder: Path,
    *,
    auto_class: str,
    tokenizer: Any,
    outputs: Outputs | None = None,
    sample: str = "",
    distance: Distance = kl_divergence,
    device: str = "cpu",
    on_round: Callable[[int, int], None] = lambda done, total: None,
    random_seed: int | None = None,
    **model_kwargs: Any,
) -> dict[str, Any]:
    """The notes of the student in ``folder``, cut from ``pretrained``; an existing student is reused.

    The source is loaded once, in its stored dtype; everything that can be checked without its weights is checked first.

    Args:
        auto_class: transformers auto class of the student; its head is cut too.
        tokenizer: a tokenizer or image processor to write into the folder; None: none.
        outputs: runs a model over a sample; needed for a choice by importance and for widths.
        sample: identifies the sample, such as by a hash; another sample is another student.
        distance: how outputs are compared.
        device: where the outputs are computed.
        random_seed: take only the architecture, cut or uncut, with fresh weights from this seed.
        model_kwargs: for the config, as in ``load_model``.
    Raises: RecipeError (impossible cut, folder in use), ArtifactError, ResourceError.
    """
    assert outputs is not None or not cut.is_measured or random_seed is not None
    request: dict[str, Any] = {
        "version": _VERSION,
        "source": pretrained.fingerprint,
        "cut": asdict(cut),
        "auto_class": auto_class,
        "sample": sample if cut.is_measured else "",
        "distance": getattr(distance, "__name__", str(distance)) if cut.by == "importance" else "",
        "model_kwargs": model_kwargs,
        **({} if random_seed is None else {"random_seed": random_seed}),
    }
    request = json.loads(json.dumps(request, default=str))
    if folder.exists():
        return _existing(folder, request)
    skeleton = load_skeleton(pretrained, auto_class=auto_class, **model_kwargs)
    if random_seed is not None:
        model, figures = fresh_student(skeleton, cut, auto_class=auto_class, seed=random_seed)
        return _written(model, tokenizer, folder, {"request": request, "name": pretrained.source.name, **figures})
    check_cut(cut, skeleton)
    dtype = _stored_dtype(skeleton)
    del skeleton
    model = load_model(
        pretrained, auto_class=auto_class, device=device, dtype=str(dtype).removeprefix("torch."), **model_kwargs
    )
    notes = {"request": request, "name": pretrained.source.name, **_cut(model, cut, outputs, distance, on_round)}
    return _written(model, tokenizer, folder, notes)


def _written(model: Any, tokenizer: Any, folder: Path, notes: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(notes))  # as they read back
    write_student(model.cpu(), tokenizer, folder, notes=written)
    return written


def _cut(
    model: Any, cut: StudentCut, outputs: Outputs | None, distance: Distance, on_round: Callable[[int, int], None]
) -> dict[str, Any]:
    """Cuts layers, then widths, measured on the remaining layers; returns notes."""
    start = time.perf_counter()
    notes: dict[str, Any] = {"parameters_before": _num_parameters(model)}
    if cut.layers is not None or cut.num_layers is not None:
        total = len(find_stack(model, cut.part))
        if cut.by == "importance" and cut.num_layers is not None and cut.num_layers < total:
            assert outputs is not None
            importance = layers_by_importance(
                model, cut.num_layers, outputs=outputs, distance=distance, search=cut.search, part=cut.part, on_round=on_round
            )  # fmt: skip
            notes["importance"] = asdict(importance)
            layers = importance.kept
        else:
            layers = tuple(range(total)) if cut.by == "importance" else chosen_layers(cut, total)
        notes |= {"num_layers_before": total, "layers": layers, "remarks": cut_layers(model, layers, part=cut.part)}
    if cut.widths != Widths():
        assert outputs is not None
        notes["widths"] = asdict(cut_width(model, **asdict(cut.widths), sample=outputs))
    return {**notes, "parameters": _num_parameters(model), "seconds": time.perf_counter() - start}


def write_student(model: Any, tokenizer: Any, folder: Path, *, notes: dict[str, Any]) -> None:
    """Writes a plain transformers folder with ``student.json``, published by one rename.

    Raises: RecipeError if ``folder`` exists, ResourceError if the disk is full or not writable.
    """
    if folder.exists():
        raise RecipeError(f"{folder} already exists; remove it or choose another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        model.config.name_or_path = ""
        with quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        (partial / NOTES_NAME).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        raise ResourceError(f"the student cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _existing(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The notes of the student in ``folder``, if it is the requested one."""
    path = folder / NOTES_NAME
    if not path.is_file():
        raise RecipeError(f"{folder} already exists and contains no student; choose another folder")
    try:
        notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored = notes["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); remove {folder} and run again") from error
    if stored != request:
        differing = [name for name in request if stored.get(name) != request[name]]
        raise RecipeError(
            f"{folder} contains a student with another cut ({', '.join(differing)} differ); remove it or choose another "
            "folder"
        )
    if not list(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        raise ArtifactError(f"config.json or weights are missing in {folder}; remove it and run again")
    return notes


def _stored_dtype(skeleton: Any) -> torch.dtype:
    dtype = skeleton.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
