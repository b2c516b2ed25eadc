"""Image classification: one label per image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Augmentation, Ledger, Rows, eval_batches, read_images, size_text
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, example_weights, stacked_labels
from peftlab.tasks.classification import Labels
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.inputs import NO_IMAGE, NO_LABEL, blank_values, unusable_rows
from peftlab.tasks.outputs import Outputs, weighted_sum
from peftlab.tasks.preview import Preview

_NO_IDS = np.zeros(0, dtype=np.int32)


class ImageClassification:
    """See ``base.Task``.

    Args: reader: turns PIL images into pixel values, as ``models.images.ImageReader``.
    """

    spec = TASKS["image_cls"]
    max_length = None
    padding: Padding = "right"

    def __init__(
        self, reader: Any, *, labels: Labels, image_column: str = "image", augment: Augmentation | None = None
    ) -> None:
        self.tokenizer = self.files = reader
        self.class_names = labels.names
        self._labels, self._image_column, self._augment = labels, image_column, augment

    @classmethod
    def make(cls, parts: TaskParts) -> ImageClassification:
        return cls(
            parts.reader, labels=Labels.make(parts), image_column=parts.column("image"), augment=parts.augmentation
        )

    @property
    def read_columns(self) -> set[str]:
        return {self._image_column, self._labels.column}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        label = {parts.column("label"): NO_LABEL} if labelled else {}
        return blank_values(rows, {parts.column("image"): NO_IMAGE} | label)

    def model_kwargs(self) -> dict[str, Any]:
        return self._labels.model_kwargs

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        labels = self._labels.values(rows) if labelled else None
        weights = self._labels.weights(labels, len(rows), training=training)
        ledger = Ledger(
            rows, None, max_length=max_length, too_long=too_long, class_names=self.class_names, style="images"
        )
        examples, hashes = [], np.zeros(len(rows), dtype=np.int64)
        for i, (image, digest) in enumerate(read_images(rows, self._image_column, length=self.tokenizer.length)):
            hashes[i] = digest
            if keep:
                label = None if labels is None else int(labels[i])
                examples.append(Example(_NO_IDS, i, weights[i], label=label, image=image))
        ledger.add_whole(hashes, np.full(len(rows), self.tokenizer.length), labels)
        return Encoded(examples, ledger)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        row = rows.select([index])
        ((image, _),) = read_images(row, self._image_column, length=self.tokenizer.length)
        label = self._labels.texts(row)[0] if labelled else None
        return Preview(rows.where(index), [(size_text(image) + augmented_text(self._augment), "image", False)], label)

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        return redrawn(example, self._augment, rng)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return Batch(
            inputs={"pixel_values": self.tokenizer([self._pixels(e) for e in examples]).to(device)},
            weights=example_weights(examples, device),
            examples=tuple(examples),
            labels=stacked_labels(examples, device),
        )

    def _pixels(self, example: Example) -> Any:
        assert example.image is not None
        return example.image.pixels(self.tokenizer.mode)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        return weighted_sum(self.losses(outputs), outputs.weights)

    def probe(self, ids: np.ndarray) -> Example:
        raise TypeError("an image has no tokens")

    def losses(self, outputs: Outputs) -> Tensor:
        return self._labels.losses(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        return self._labels.outputs(model(**as_weights(model, batch.inputs)).logits, batch.labels, batch.weights)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The outputs, with each image prepared separately."""
        pixels = torch.cat([self.tokenizer([self._pixels(e)]) for e in examples]).to(device)
        logits = model(**as_weights(model, {"pixel_values": pixels})).logits
        return self._labels.reference(logits, examples, device)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        assert batch.labels is not None
        return self._labels.columns(self.outputs(model, batch), batch.labels)

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row for a path."""
        return {self._image_column: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        length = self.tokenizer.length
        return unusable_rows(rows, lambda part: list(read_images(part, self._image_column, length=length)), column=None)

    def no_result(self) -> dict[str, Any]:
        return self._labels.no_result()

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **_: Any) -> Iterator[dict[str, Any]]:
        """Yields ``{"label", "probability", "probabilities": {name: p}}`` per row."""
        images = read_images(rows, self._image_column, length=self.tokenizer.length)
        examples = [Example(_NO_IDS, i, 1.0, image=image) for i, (image, _) in enumerate(images)]
        device = next(model.parameters()).device
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            batch = self.collate([examples[i] for i in part], device)
            yield from self._labels.results(self.outputs(model, batch))


def redrawn(example: Example, augment: Augmentation | None, rng: np.random.Generator) -> Example:
    """``example`` with a newly drawn change of its image."""
    if augment is None:
        return example
    assert example.image is not None
    return replace(example, image=replace(example.image, change=augment.draw(rng)))


def augmented_text(augment: Augmentation | None) -> str:
    """What a preview says about the changes; empty without any."""
    if augment is None:
        return ""
    return f"; changed on each pass, for example: {augment.draw(np.random.default_rng(0))}"


def as_weights(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixel values in the dtype of the model's weights, which convolutions require."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) for name, value in inputs.items()}
