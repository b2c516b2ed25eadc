"""The witness of a training: outputs of the model in memory on a few held-out rows, with the rows (contract C13).

What opens the run's files later compares with it: a reload compared with another reload would not show what was not saved.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftlab.adapters.fused import exact_products
from peftlab.assembly.target import Opened
from peftlab.data import Image, eval_batches
from peftlab.errors import ArtifactError, VerificationError
from peftlab.evaluation.agreement import Agreement, Distributions, agreement, as_logits
from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks import Example, Task
from peftlab.training.progress import Progress

WITNESS_NAME = "witness.safetensors"
# Positions, tokens and bytes of input that are enough to compare two models, and that take seconds.
_POSITIONS, _TOKENS, _INPUT_BYTES = 512, 4096, 8 * 2**20
# Pixels of an image with a mask.
_PIXELS = 128
# The same weights again: only the order of sums may differ.
_SAME = {"kl_mean": 1e-4, "top1": 0.99}
# The same weights in another dtype or on another device.
_ELSEWHERE = {"kl_mean": 1e-2, "top1": 0.95}


@dataclass(frozen=True)
class Witness:
    """examples: the rows, as they were encoded. outputs: the distributions at their positions, row by row."""

    examples: list[Example]
    outputs: Distributions

    @classmethod
    def take(cls, model: Any, task: Task, examples: Sequence[Example], *, batch_tokens: int, device: str) -> Witness:
        """Runs ``model`` on the first of ``examples``; of a language model, at all their positions."""
        chosen = _few(examples, task.spec)
        parts = _logits(model, task, chosen, batch_tokens=batch_tokens, device=device)
        by_row = {index: Distributions.of(logits) for index, logits in parts}
        return cls(chosen, Distributions.joined([by_row[i] for i in range(len(chosen))]))

    def compare(self, model: Any, task: Task, *, batch_tokens: int, device: str) -> Agreement:
        """Runs another model on the same rows."""
        counts = [e.num_scored for e in self.examples]
        ends = np.cumsum(counts).tolist()
        parts = _logits(model, task, self.examples, batch_tokens=batch_tokens, device=device)
        return agreement((self.outputs[ends[i] - counts[i] : ends[i]], logits) for i, logits in parts)

    def check(self, model: Any, task: Task, folder: Path, *, batch_tokens: int, device: str, same: bool) -> Agreement:
        """Compares the model that was opened from the files in ``folder``.

        Args: same: whether it computes in the dtype and on the device of the training.
        Raises: VerificationError if it is another model.
        """
        result = self.compare(model, task, batch_tokens=batch_tokens, device=device)
        if failures := result.failures(**(_SAME if same else _ELSEWHERE)):
            raise VerificationError(
                f"the files in {folder} do not give the outputs of the model that was trained: {'; '.join(failures)}. "
                "Something that training used or changed is not in them"
            )
        return result

    def write(self, path: Path) -> None:
        tensors = {
            "log_p": self.outputs.log_p,
            "classes": self.outputs.classes,
            "rest": self.outputs.rest,
        }
        for index, example in enumerate(self.examples):
            arrays = {"ids": example.ids, **{f"extra.{name}": value for name, value in example.extra.items()}}
            if example.trained is not None:
                arrays["trained"] = example.trained
            if example.scored != 1:
                arrays["scored"] = np.array(example.scored)
            if example.sizes:
                arrays["sizes"] = np.array(example.sizes)
            if example.image is not None:
                arrays["image"] = np.frombuffer(_image_bytes(example.image), dtype=np.uint8)
                arrays["length"] = np.array(example.image.length)
            tensors |= {f"{index}.{name}": torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        save_file(
            {name: t.contiguous() for name, t in tensors.items()}, str(path), metadata={"rows": str(len(self.examples))}
        )


def check_witness(opened: Opened, progress: Progress) -> None:
    """Compares an opened run with its witness, if it has one. Raises: VerificationError."""
    target = opened.target
    if target.kind not in ("run", "adapter"):
        return
    folder = target.adapter or Path(target.loaded.recipe.model.name)
    if (folder / "manifest.json").is_file():  # a checkpoint, from before the end of the training
        return
    if (witness := read_witness(folder)) is not None:
        progress.stage("comparing with the model that was trained")
        batch_tokens = target.loaded.recipe.eval.batch_tokens
        witness.check(opened.model, opened.task, folder, same=False, batch_tokens=batch_tokens, device=opened.device)


def read_witness(folder: Path) -> Witness | None:
    """The witness of the run in ``folder`` or in a folder above it; None without one. Raises: ArtifactError if damaged."""
    path = next(
        (f / WITNESS_NAME for f in [folder, *folder.resolve().parents[:2]] if (f / WITNESS_NAME).is_file()), None
    )
    if path is None:
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            rows = int((file.metadata() or {})["rows"])
        outputs = Distributions(*(stored[name] for name in ("log_p", "classes", "rest")))
        return Witness([_example(stored, index) for index in range(rows)], outputs)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; remove it to go on without the comparison") from error


def _example(stored: dict[str, Tensor], index: int) -> Example:
    own = {n.split(".", 1)[1]: t.numpy() for n, t in stored.items() if n.split(".", 1)[0] == str(index)}
    image = None
    if "image" in own:
        image = Image(own["image"].tobytes(), f"row {index + 1} of the witness", int(own["length"]))
    trained = own.get("trained")
    return Example(
        own["ids"],
        index,
        1.0 if trained is None else float(trained.sum()),
        trained=trained,
        image=image,
        extra={n.removeprefix("extra."): v for n, v in own.items() if n.startswith("extra.")},
        scored=int(own.get("scored", 1)),
        sizes=tuple(own["sizes"].tolist()) if "sizes" in own else (),
    )


def _few(examples: Sequence[Example], spec: TaskSpec) -> list[Example]:
    """The first examples up to the limits, at least one; without their labels. Of a language model with every token's
    prediction, except for a source, of which none is predicted."""
    chosen: list[Example] = []
    positions = tokens = size = 0
    for index, example in enumerate(examples):
        if example.trained is not None and spec.predicts == "tokens" and not spec.reads_source:
            trained = np.ones(len(example), dtype=bool)
            trained[0] = not spec.generates  # a model that writes reads no token before the first
            example = replace(example, trained=trained, weight=float(trained.sum()))
        example = example.unlabelled(most_pixels=_PIXELS)
        positions += example.num_scored
        tokens += len(example)
        size += 0 if example.image is None else len(_image_bytes(example.image))
        if chosen and (positions > _POSITIONS or tokens > _TOKENS or size > _INPUT_BYTES):
            break
        chosen.append(replace(example, row=index))
    return chosen


def _image_bytes(image: Image) -> bytes:
    """The image's file; pixels as PNG, which loses nothing."""
    if isinstance(image.source, bytes):
        return image.source
    if isinstance(image.source, Path):
        return image.source.read_bytes()
    import PIL.Image

    stream = io.BytesIO()
    PIL.Image.fromarray(image.source).save(stream, "PNG")
    return stream.getvalue()


def _logits(
    model: Any, task: Task, examples: Sequence[Example], *, batch_tokens: int, device: str
) -> Iterator[tuple[int, Tensor]]:
    """Yields the index and the [n, C] float32 logits (of vectors: see ``as_logits``) of each example, in any order."""
    with exact_products(model), torch.no_grad():
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            outputs = task.outputs(model, task.collate([examples[i] for i in part], device))
            values = as_logits(outputs.values) if outputs.vectors else outputs.logits().float()
            yield from zip(part.tolist(), values.split(list(outputs.counts)), strict=True)
