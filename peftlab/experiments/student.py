"""Makes the initial student: cuts it out of a larger model as the recipe says, measured on the recipe's texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.assembly import Assembly
from peftlab.data import eval_batches
from peftlab.models.student import StudentCut, cosine_distance, kl_divergence, make_student
from peftlab.recipe.distillation import StudentInitSection
from peftlab.training.progress import Progress

# Positions per chunk of logits: 256 x 49,152 float32 values are 48 MiB.
_CHUNK = 256


def cut_student(assembly: Assembly, folder: Path, progress: Progress, *, seed: int) -> dict[str, Any]:
    """Writes the student of ``distill.student_init`` to ``folder`` as a plain model; returns what was cut, as plain values.

    Args: assembly: that of the uncut model. seed: for random weights.

    Reuses a folder that already has the same student. Raises: RecipeError, DataError, ArtifactError.
    """
    init = assembly.distill.student_init
    assert init is not None
    cut, task = student_cut(init), assembly.task
    outputs, sample = None, ""
    is_random = init.weights == "random"
    if cut.is_measured and not is_random:
        rows = assembly.data.train
        rows = rows.select(range(min(init.sample_rows, len(rows))))
        encoded = task.encode(rows, max_length=assembly.limit, too_long="truncate", training=False, labelled=False)
        sample = hashlib.sha256(b"".join(e.ids.tobytes() for e in encoded.examples)).hexdigest()
        outputs = _Outputs(task, encoded.examples, assembly.recipe.eval.batch_tokens)
    progress.stage(f"cutting the student out of {assembly.recipe.model.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(assembly.recipe.run.seed)  # for a head that the model lacks
        notes = make_student(
            assembly.pretrained,
            cut,
            folder,
            auto_class=task.spec.auto_class,
            tokenizer=task.files,
            outputs=outputs,
            sample=sample,
            distance=cosine_distance if task.spec.predicts == "vectors" else kl_divergence,
            device=assembly.device,
            on_round=lambda done, total: progress.stage(f"measuring layers: round {done} of {total}"),
            random_seed=seed if is_random else None,
            **task.model_kwargs(),
        )
    for remark in notes.get("remarks", []):
        progress.note(remark)
    kept = notes.get("layers")
    layers = f", layers {', '.join(map(str, kept))} of {notes['num_layers_before']}" if kept else ""
    fresh = ", random weights" if is_random else ""
    progress.note(f"student: {notes['parameters']:,} of {notes['parameters_before']:,} parameters{layers}{fresh}")
    return notes


def student_cut(init: StudentInitSection) -> StudentCut:
    """Converts the recipe section to a ``StudentCut``."""
    return StudentCut(
        layers=None if init.layers is None else tuple(init.layers),
        num_layers=init.num_layers,
        by=init.choose,
        search=init.search,
        hidden_size=init.hidden_size,
        num_heads=init.num_heads,
        num_key_value_heads=init.num_key_value_heads,
        intermediate_size=init.intermediate_size,
    )


class _Outputs:
    """Runs a model over the sample and yields the outputs of the scored positions, a few hundred at a time."""

    def __init__(self, task: Any, examples: list[Any], batch_tokens: int) -> None:
        self._task = task
        self._batches = [[examples[i] for i in part] for part in eval_batches([len(e) for e in examples], batch_tokens)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Iterator[Tensor]:
        device = next(model.parameters()).device
        for examples in self._batches:
            outputs = self._task.outputs(model, self._task.collate(examples, device))
            for start in range(0, len(outputs), _CHUNK):
                chosen = slice(start, start + _CHUNK)
                yield outputs.values[chosen] if outputs.vectors else outputs.logits(chosen)
