"""Semantic segmentation: the class of each pixel of an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.data import (
    Augmentation,
    Image,
    Mask,
    MaskLedger,
    PixelClasses,
    Rows,
    eval_batches,
    find_pixel_classes,
    read_masks,
)
from peftlab.errors import DataError
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, example_weights
from peftlab.tasks.classification import class_config
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.image_rows import NO_IDS, ImageRows
from peftlab.tasks.inputs import NO_IMAGE, NO_MASK, blank_values
from peftlab.tasks.outputs import Outputs, at_least_float32, cross_entropy, weighted_sum
from peftlab.tasks.pixels import as_weights, by_size, padded_pixels
from peftlab.tasks.preview import Preview

# In a batch's map of pixels: no label, and beyond the image.
_UNKNOWN, _BEYOND = -1, -100


class ImageSegmentation(ImageRows):
    """See ``base.Task``.

    The scored positions are the labelled pixels of a mask, row by row, at the mask's resolution: a model's logits are
    interpolated to it, as transformers' losses and processors do. The weight of an image is the number of its labelled pixels,
    so that the loss of a step is the mean over all labelled pixels of the step. Without a mask all pixels of the image are scored,
    or those of ``Example.trained`` [H * W].

    Args: reader, augment: see ``ImageRows``. classes: what the values of a mask mean.
    """

    spec = TASKS["image_segmentation"]
    # Images of different size run separately.
    padding: Padding = "none"

    def __init__(
        self,
        reader: Any,
        *,
        classes: PixelClasses,
        image_column: str = "image",
        mask_column: str = "mask",
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__(reader, image_column=image_column, augment=augment)
        self.class_names, self._classes, self._mask_column = list(classes.names), classes, mask_column

    @classmethod
    def make(cls, parts: TaskParts) -> ImageSegmentation:
        assert parts.classes is not None
        return cls(
            parts.reader,
            classes=PixelClasses.of(parts.classes, parts.label_names),
            image_column=parts.column("image"),
            mask_column=parts.column("mask"),
            augment=parts.augmentation,
        )

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        return find_pixel_classes(rows, parts.column("mask"), parts.label_names)

    @property
    def read_columns(self) -> set[str]:
        return {self._image_column, self._mask_column}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        mask = {parts.column("mask"): NO_MASK} if labelled else {}
        return blank_values(rows, {parts.column("image"): NO_IMAGE} | mask)

    def model_kwargs(self) -> dict[str, Any]:
        return class_config(self.class_names)

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        length = self.tokenizer.length
        ledger = MaskLedger(rows, length=length, class_names=self.class_names if labelled else None)
        examples, hashes = [], np.zeros(len(rows), dtype=np.int64)
        pixels = np.zeros((len(rows), len(self.class_names)), dtype=np.int64) if labelled else None
        masks = self._masks(rows) if labelled else None
        for i, (image, digest) in enumerate(self.images(rows)):
            hashes[i] = digest
            if masks is None or pixels is None:
                width, height = image.size()
                example = Example(NO_IDS, i, float(width * height), image=image, scored=width * height)
            else:
                mask, pixels[i] = next(masks)
                _require_one_size(image, mask)
                count = int(pixels[i].sum())
                example = Example(NO_IDS, i, float(count), label=mask, image=image, scored=count)
            if keep and example.scored:
                examples.append(example)
        ledger.add_masks(hashes, np.full(len(rows), length), pixels)
        return Encoded(examples, ledger)

    def _masks(self, rows: Rows) -> Iterator[tuple[Mask, np.ndarray]]:
        """Each row's mask, with [C] its labelled pixels of each class. Raises: DataError for a value that is no class."""
        for mask, values in read_masks(rows, self._mask_column):
            self._classes.check(mask, values)
            indices = self._classes.indices(values)
            yield mask, np.bincount(indices[indices >= 0], minlength=len(self.class_names))

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        row = rows.select([index])
        segments = [(self.described(self.image(rows, index)), "image", False)]
        if labelled:
            ((_, counts),) = self._masks(row)
            total = max(int(counts.sum()), 1)
            shares = [f"{name} {n / total:.1%}" for name, n in zip(self.class_names, counts, strict=True) if n]
            segments.append((f"; {', '.join(shares) or 'no labelled pixel'}", "mask", True))
        return Preview(rows.where(index), segments)

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        changed = super().redraw(example, rng)
        if changed is example or not isinstance(example.label, Mask):
            return changed
        assert changed.image is not None
        return dataclasses.replace(changed, label=dataclasses.replace(example.label, change=changed.image.change))

    def collate(self, examples: list[Example], device: Any) -> Batch:
        """``labels`` [B, H, W]: the class of each pixel, -1 without a label, -100 beyond the image; without masks 0 and -1 say
        which are scored."""
        inputs = padded_pixels([self.pixels(e) for e in examples])
        maps = [self._map(e) for e in examples]
        labels = np.full((len(maps), *(max(m.shape[axis] for m in maps) for axis in (0, 1))), _BEYOND, dtype=np.int64)
        for padded, own in zip(labels, maps, strict=True):
            padded[: own.shape[0], : own.shape[1]] = own
        return Batch(
            inputs={name: tensor.to(device) for name, tensor in inputs.items()},
            weights=example_weights(examples, device),
            examples=tuple(examples),
            labels=torch.from_numpy(labels).to(device),
        )

    def _map(self, example: Example) -> np.ndarray:
        """[H, W] the class of each pixel, or without a mask 0; -1 where nothing is scored."""
        if isinstance(example.label, Mask):
            return self._classes.indices(example.label.values())
        assert example.image is not None
        width, height = example.image.size()
        if example.trained is None:
            return np.zeros((height, width), dtype=np.int64)
        return np.where(example.trained.reshape(height, width), 0, _UNKNOWN)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        return weighted_sum(cross_entropy(outputs), outputs.weights)

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        assert batch.labels is not None
        found = by_size(lambda pixels: model(**as_weights(model, {"pixel_values": pixels})).logits, batch.inputs)
        values, targets = [], []
        for logits, padded in zip(found, batch.labels, strict=True):
            inside = padded != _BEYOND
            own = padded[: int(inside[:, 0].sum()), : int(inside[0].sum())]
            values.append(at_resolution(logits, own.shape[0], own.shape[1])[own >= 0])
            targets.append(own[own >= 0])
        return self._outputs(values, targets, batch.examples)

    def _outputs(self, values: Sequence[Tensor], targets: Sequence[Tensor], examples: Sequence[Example]) -> Outputs:
        counts = [len(v) for v in values]
        weights = None
        # A crop has fewer labelled pixels than its image, whose weight they share.
        if any(e.weight != count for e, count in zip(examples, counts, strict=True)):
            factors = torch.tensor(
                [e.weight / max(n, 1) for e, n in zip(examples, counts, strict=True)], dtype=torch.float64
            )
            weights = factors.repeat_interleave(torch.tensor(counts)).to(values[0].device)
        labelled = all(e.label is not None for e in examples)
        return Outputs(
            torch.cat(list(values)), counts, targets=torch.cat(list(targets)) if labelled else None, weights=weights
        )

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The outputs, with each image prepared and interpolated separately, and those of one size run together, smallest first:
        in the order in which ``outputs`` draws dropout masks."""
        prepared: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for i, example in enumerate(examples):
            assert example.image is not None
            pixels = self.tokenizer([example.image.pixels(self.tokenizer.mode)]).to(device)
            prepared.setdefault(tuple(pixels.shape[2:]), {})[i] = pixels
        logits: dict[int, Tensor] = {}
        for _, group in sorted(prepared.items()):
            found = model(**as_weights(model, {"pixel_values": torch.cat(list(group.values()))})).logits
            logits |= dict(zip(group, at_least_float32(found), strict=True))
        values, targets = [], []
        for i, example in enumerate(examples):
            known = torch.from_numpy(self._map(example)).to(device)
            size = (known.shape[0], known.shape[1])
            whole = F.interpolate(logits[i][None], size=size, mode="bilinear", align_corners=False)[0]
            rows, cols = torch.nonzero(known >= 0, as_tuple=True)
            values.append(torch.stack([one[rows, cols] for one in whole], dim=1))
            targets.append(known[rows, cols])
        return self._outputs(values, targets, examples)

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        outputs = self.outputs(model, batch)
        assert outputs.targets is not None
        nll = weighted_sum(cross_entropy(outputs), None)
        counts = [
            self._counts(found, true)
            for found, true in zip(
                outputs.values.argmax(-1).split(list(outputs.counts)),
                outputs.targets.split(list(outputs.counts)),
                strict=True,
            )
        ]
        names = ("pixels_right", "pixels_predicted", "pixels_true")
        columns = {name: [count[i].tolist() for count in counts] for i, name in enumerate(names)}
        return {"nll_sum": float(nll), "num_scored": len(outputs), **columns}

    def _counts(self, found: Tensor, true: Tensor) -> Tensor:
        """[3, C] the pixels of each class in one image that are right, predicted, and true."""
        size = len(self.class_names)
        return torch.stack([torch.bincount(x, minlength=size) for x in (true[found == true], found, true)])

    def file_of(self, rows: Rows, index: int) -> Path | None:
        """The file of a row's image; None if the row holds it."""
        source = self.image(rows, index).source
        return source if isinstance(source, Path) else None

    def no_result(self) -> dict[str, Any]:
        return {"shares": None, "mask": None}

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **_: Any) -> Iterator[dict[str, Any]]:
        """Yields ``{"shares": [{"label", "share"}], "mask"}`` per row: the share of the pixels of each class that is found,
        largest first, and [H, W] uint8 the values of a mask in the size of the given image."""
        examples = self.given_images(rows)
        device = next(model.parameters()).device
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            chosen = [examples[i] for i in part]
            inputs = padded_pixels([self.pixels(e) for e in chosen])
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            found = by_size(lambda pixels: model(**as_weights(model, {"pixel_values": pixels})).logits, inputs)
            for example, logits in zip(chosen, found, strict=True):
                assert example.image is not None
                width, height = example.image.size()
                yield self._result(at_resolution(logits, height, width).argmax(-1).cpu().numpy())

    def _result(self, indices: np.ndarray) -> dict[str, Any]:
        counts = np.bincount(indices.ravel(), minlength=len(self.class_names))
        order = np.argsort(-counts, kind="stable").tolist()
        shares = [{"label": self.class_names[i], "share": counts[i] / indices.size} for i in order if counts[i]]
        return {"shares": shares, "mask": self._classes.values(indices)}


def at_resolution(logits: Tensor, height: int, width: int) -> Tensor:
    """[height, width, C] float32 (float64 stays) logits [C, h, w], interpolated as transformers' losses and processors do."""
    whole = F.interpolate(at_least_float32(logits)[None], size=(height, width), mode="bilinear", align_corners=False)
    return whole[0].permute(1, 2, 0)


def _require_one_size(image: Image, mask: Mask) -> None:
    width, height = image.size()
    if (height, width) != mask.size:
        raise DataError(
            f"{mask.name}: the mask has {mask.size[1]} x {mask.size[0]} pixels, but its image {width} x {height}; both need "
            "one size",
            key="data.columns.mask",
        )
