"""Image classification: one label per image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Augmentation, Ledger, Rows, eval_batches
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, TaskParts
from peftlab.tasks.batch import Batch, example_weights, stacked_labels
from peftlab.tasks.classification import Labels
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.image_rows import NO_IDS, ImageRows
from peftlab.tasks.inputs import NO_IMAGE, NO_LABEL, blank_values
from peftlab.tasks.outputs import Outputs, weighted_sum
from peftlab.tasks.pixels import as_weights
from peftlab.tasks.preview import Preview


class ImageClassification(ImageRows):
    """See ``base.Task``."""

    spec = TASKS["image_cls"]

    def __init__(
        self, reader: Any, *, labels: Labels, image_column: str = "image", augment: Augmentation | None = None
    ) -> None:
        super().__init__(reader, image_column=image_column, augment=augment)
        self.class_names, self._labels = labels.names, labels

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
        for i, (image, digest) in enumerate(self.images(rows)):
            hashes[i] = digest
            if keep:
                label = None if labels is None else int(labels[i])
                examples.append(Example(NO_IDS, i, weights[i], label=label, image=image))
        ledger.add_whole(hashes, np.full(len(rows), self.tokenizer.length), labels)
        return Encoded(examples, ledger)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        label = self._labels.texts(rows.select([index]))[0] if labelled else None
        return Preview(rows.where(index), [(self.described(self.image(rows, index)), "image", False)], label)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        return Batch(
            inputs={"pixel_values": self.tokenizer([self.picture(e) for e in examples]).to(device)},
            weights=example_weights(examples, device),
            examples=tuple(examples),
            labels=stacked_labels(examples, device),
        )

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        return weighted_sum(self.losses(outputs), outputs.weights)

    def losses(self, outputs: Outputs) -> Tensor:
        return self._labels.losses(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        return self._labels.outputs(model(**as_weights(model, batch.inputs)).logits, batch.labels, batch.weights)

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The outputs, with each image prepared separately."""
        pixels = torch.cat([self.tokenizer([self.picture(e)]) for e in examples]).to(device)
        logits = model(**as_weights(model, {"pixel_values": pixels})).logits
        return self._labels.reference(logits, examples, device)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        assert batch.labels is not None
        return self._labels.columns(self.outputs(model, batch), batch.labels)

    def no_result(self) -> dict[str, Any]:
        return self._labels.no_result()

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **_: Any) -> Iterator[dict[str, Any]]:
        """Yields ``{"label", "probability", "probabilities": {name: p}}`` per row."""
        examples = self.given_images(rows)
        device = next(model.parameters()).device
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            batch = self.collate([examples[i] for i in part], device)
            yield from self._labels.results(self.outputs(model, batch))
