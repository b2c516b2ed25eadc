"""Object detection: the boxes and categories of the objects in an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.data import Augmentation, Image, Ledger, Objects, Rows, eval_batches, read_objects
from peftlab.errors import DataError, RecipeError
from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Padding, TaskParts
from peftlab.tasks.batch import Batch, example_weights, stacked_labels
from peftlab.tasks.classification import class_config
from peftlab.tasks.detection_loss import DetectionLoss
from peftlab.tasks.example import Encoded, Example
from peftlab.tasks.image_rows import NO_IDS, ImageRows
from peftlab.tasks.inputs import NO_IMAGE, blank_values
from peftlab.tasks.outputs import Outputs, at_least_float32, weighted_sum
from peftlab.tasks.pixels import as_weights, by_size, padded_pixels
from peftlab.tasks.preview import Preview

# COCO's metric looks at so many objects of an image.
_MOST_FOUND = 100
_MOST_SHOWN = 5


class ObjectDetection(ImageRows):
    """See ``base.Task``.

    The scored positions are the queries of an image; each has a vector of its class logits and its box (center, width and
    height as shares of the image). The label of an example is [M, 5]: class and box of its objects.

    Args: reader, augment: see ``ImageRows``. min_score: the least score of an object in a prediction.
    """

    spec = TASKS["object_detection"]
    # Images of different size run separately: some families see the padding, and others get other boxes from it.
    padding: Padding = "none"

    def __init__(
        self,
        reader: Any,
        *,
        names: list[str],
        loss: DetectionLoss,
        image_column: str = "image",
        objects_column: str = "objects",
        label_names: Any = None,
        augment: Augmentation | None = None,
        min_score: float = 0.5,
    ) -> None:
        super().__init__(reader, image_column=image_column, augment=augment)
        self.class_names, self._loss = names, loss
        self._objects_column, self._label_names = objects_column, dict(label_names or {})
        self._min_score = min_score

    @classmethod
    def make(cls, parts: TaskParts) -> ObjectDetection:
        assert parts.classes is not None
        _require_coco()
        return cls(
            parts.reader,
            names=parts.classes,
            loss=DetectionLoss(parts.config, len(parts.classes)),
            image_column=parts.column("image"),
            objects_column=parts.column("objects"),
            label_names=parts.label_names,
            augment=parts.augmentation,
            min_score=parts.settings["eval.min_score"],
        )

    @classmethod
    def find_classes(cls, parts: TaskParts, rows: Rows) -> list[str]:
        found = read_objects(rows, parts.column("objects"), names=parts.label_names)
        names = sorted({name for objects in found for name in objects.categories})
        if not names:
            raise DataError(f"{rows.name}: no image has an object, so there is nothing to learn", key="data.train")
        return names

    @property
    def read_columns(self) -> set[str]:
        return {self._image_column, self._objects_column}

    @classmethod
    def blank_rows(cls, parts: TaskParts, rows: Rows, *, labelled: bool) -> dict[int, str]:
        return blank_values(rows, {parts.column("image"): NO_IMAGE})

    def model_kwargs(self) -> dict[str, Any]:
        return class_config(self.class_names)

    def encode(
        self, rows: Rows, *, max_length: int, too_long: str, training: bool, keep: bool = True, labelled: bool = True
    ) -> Encoded:
        ledger = Ledger(rows, None, max_length=max_length, too_long=too_long, style="images")
        objects = self._objects(rows) if labelled else None
        examples, hashes = [], np.zeros(len(rows), dtype=np.int64)
        for i, (image, digest) in enumerate(self.images(rows)):
            hashes[i] = digest
            label = None if objects is None else self._label(objects[i], image)
            if keep:
                examples.append(Example(NO_IDS, i, 1.0, label=label, image=image, scored=self._loss.num_queries))
        ledger.add_whole(hashes, np.full(len(rows), self.tokenizer.length))
        return Encoded(examples, ledger)

    def _objects(self, rows: Rows) -> list[Objects]:
        found = read_objects(rows, self._objects_column, names=self._label_names)
        for i, objects in enumerate(found):
            if unknown := next((name for name in objects.categories if name not in self.class_names), None):
                raise DataError(
                    f"{rows.where(i)}: the category {unknown!r} does not occur in the training data, whose categories are "
                    f"{', '.join(self.class_names)}",
                    key="data.columns.objects",
                )
            if len(objects.boxes) > self._loss.num_queries:
                raise DataError(
                    f"{rows.where(i)}: {len(objects.boxes)} objects, but the model finds at most {self._loss.num_queries} in an "
                    "image",
                    key="data.columns.objects",
                )
        return found

    def _label(self, objects: Objects, image: Image) -> np.ndarray:
        """[M, 5] float64."""
        width, height = image.size()
        classes = np.array([self.class_names.index(name) for name in objects.categories], dtype=np.float64)
        return _relative(classes, objects.corners(width, height, image.where), width, height)

    def preview(self, rows: Rows, index: int, *, max_length: int, labelled: bool = True) -> Preview:
        row = rows.select([index])
        segments = [(self.described(self.image(rows, index)), "image", False)]
        if labelled:
            (objects,) = self._objects(row)
            shown = zip(objects.categories[:_MOST_SHOWN], objects.boxes, strict=False)
            text = ", ".join(f"{name} at [{', '.join(f'{v:g}' for v in box)}]" for name, box in shown)
            more = len(objects.categories) - _MOST_SHOWN
            text = f"{text} and {more} more" if more > 0 else text or "no objects"
            segments.append((f"; {text}", "objects", True))
        return Preview(rows.where(index), segments)

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        changed = super().redraw(example, rng)
        if changed is example:
            return example
        assert example.image is not None and changed.image is not None and isinstance(example.label, np.ndarray)
        (width, height), change, label = example.image.size(), changed.image.change, example.label
        assert change is not None
        moved, kept = change.boxes(_corners(label, width, height), width, height)
        left, top, right, bottom = change.box(width, height)
        label = _relative(label[kept, 0], moved, right - left, bottom - top)
        return dataclasses.replace(changed, label=label)

    def collate(self, examples: list[Example], device: Any) -> Batch:
        """Images of one size are one tensor [B, C, H, W]; others are padded at their ends, with a mask [B, H, W]."""
        inputs = padded_pixels([self.pixels(e) for e in examples])
        return Batch(
            inputs={name: tensor.to(device) for name, tensor in inputs.items()},
            weights=example_weights(examples, device),
            examples=tuple(examples),
            labels=stacked_labels(examples, device),
        )

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        return weighted_sum(self.losses(outputs), outputs.weights)

    def losses(self, outputs: Outputs) -> Tensor:
        """[N] at each query the loss of its image, whose weight is spread over its queries."""
        assert outputs.targets is not None
        losses = []
        for values, targets in zip(
            _of_images(outputs.values, outputs), _of_images(outputs.targets, outputs), strict=True
        ):
            objects = targets[0][targets[0][:, 0] >= 0]
            loss = self._loss(*self._split(values), objects[:, 0].long(), objects[:, 1:])
            losses.append(loss.expand(len(values)))
        return torch.cat(losses)

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of [..., width + 4] values."""
        return values[..., : self._loss.width], values[..., self._loss.width :]

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        values = torch.stack(by_size(lambda pixels: self._values(model, pixels), batch.inputs))
        return self._outputs(values, batch.labels, batch.weights)

    def _values(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """[B, Q, width + 4]"""
        found = model(**as_weights(model, {"pixel_values": pixels}))
        return torch.cat([at_least_float32(found.logits), at_least_float32(found.pred_boxes)], -1)

    def _outputs(self, values: Tensor, labels: Tensor | None, weights: Tensor) -> Outputs:
        count, queries = values.shape[:2]
        return Outputs(
            values.flatten(0, 1),
            [queries] * count,
            vectors=True,
            targets=None if labels is None else labels.repeat_interleave(queries, dim=0),
            weights=(weights / queries).repeat_interleave(queries),
        )

    def reference_outputs(self, model: nn.Module, examples: list[Example], device: Any) -> Outputs:
        """The outputs, with each image prepared separately, and those of one size run together, smallest first: in the order
        in which ``outputs`` draws dropout masks."""
        prepared: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for i, example in enumerate(examples):
            assert example.image is not None
            pixels = self.tokenizer([example.image.pixels(self.tokenizer.mode)]).to(device)
            prepared.setdefault(tuple(pixels.shape[2:]), {})[i] = pixels
        values: dict[int, Tensor] = {}
        for _, group in sorted(prepared.items()):
            found = model(**as_weights(model, {"pixel_values": torch.cat(list(group.values()))}))
            joined = torch.cat([found.logits, found.pred_boxes], -1).to(_wide(found.logits.dtype))
            values |= dict(zip(group, joined, strict=True))
        stacked = torch.stack([values[i] for i in range(len(examples))])
        return self._outputs(stacked, stacked_labels(examples, device), example_weights(examples, device))

    def score(self, model: nn.Module, batch: Batch) -> Columns:
        outputs = self.outputs(model, batch)
        found, wanted = [], []
        for example, (scores, classes, corners) in zip(batch.examples, self._found(outputs), strict=True):
            label = example.label
            assert example.image is not None and isinstance(label, np.ndarray)
            width, height = example.image.size()
            corners *= np.array([width, height, width, height])
            found.append(np.column_stack([classes, scores, corners]).tolist())
            wanted.append(np.column_stack([label[:, 0], _corners(label, width, height)]).tolist())
        return {
            "nll_sum": float(weighted_sum(self.losses(outputs), outputs.weights)),
            "num_scored": len(batch.examples),
            "found": found,
            "objects": wanted,
        }

    def _found(self, outputs: Outputs) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Scores, classes and corners of the likeliest objects of each image."""
        for values in _of_images(outputs.values, outputs):
            found = self._loss.found(*self._split(values), most=_MOST_FOUND)
            scores, classes, corners = (part.double().cpu().numpy() for part in found)
            yield scores, classes, corners

    @property
    def most_objects(self) -> int:
        """The most objects that the model finds in an image."""
        return self._loss.num_queries

    def image_of(self, rows: Rows) -> Any:
        """The ``PIL.Image`` of the first of ``rows``."""
        return self.image(rows, 0).pixels(self.tokenizer.mode)

    def no_result(self) -> dict[str, Any]:
        return {"objects": None}

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows, *, batch_tokens: int, **_: Any) -> Iterator[dict[str, Any]]:
        """Yields ``{"objects": [{"label", "score", "box"}]}`` per row, likeliest first: those with at least the least score. A
        box is left, top, right and bottom in pixels of the given image."""
        examples = self.given_images(rows)
        device = next(model.parameters()).device
        for part in eval_batches([len(e) for e in examples], batch_tokens):
            chosen = [examples[i] for i in part]
            for example, found in zip(
                chosen, self._found(self.outputs(model, self.collate(chosen, device))), strict=True
            ):
                assert example.image is not None
                yield {"objects": self._shown(*found, example.image.size())}

    def _shown(
        self, scores: np.ndarray, classes: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> list[dict[str, Any]]:
        boxes = (corners * np.array([*size, *size])).round(1).tolist()
        return [
            {"label": self.class_names[int(c)], "score": float(s), "box": box}
            for s, c, box in zip(scores, classes, boxes, strict=True)
            if s >= self._min_score
        ]


def _of_images(values: Tensor, outputs: Outputs) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = values.split(list(outputs.counts))
    return parts


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _relative(classes: np.ndarray, corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """[M, 5] class, and center, width and height of the box as shares of an image of this size."""
    size = np.array([width, height], dtype=np.float64)
    first, last = corners[:, :2] / size, corners[:, 2:] / size
    return np.concatenate([classes[:, None], (first + last) / 2, last - first], axis=1)


def _corners(label: np.ndarray, width: int, height: int) -> np.ndarray:
    """[M, 4] left, top, right and bottom in pixels, of [M, 5] class and relative box."""
    center, half = label[:, 1:3], label[:, 3:5] / 2
    shares = np.concatenate([center - half, center + half], axis=1)
    return np.asarray(shares * np.array([width, height, width, height]))


def _require_coco() -> None:
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise RecipeError(
            "object_detection measures with pycocotools, which is not installed: pip install 'peftlab[detection]'",
            key="task",
        ) from None
