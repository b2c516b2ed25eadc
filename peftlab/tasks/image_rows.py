"""Rows that have an image: what the tasks of images share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from peftlab.data import Augmentation, Image, Rows, read_images, size_text
from peftlab.tasks.base import Padding
from peftlab.tasks.example import Example
from peftlab.tasks.inputs import unusable_rows

NO_IDS = np.zeros(0, dtype=np.int32)


class ImageRows:
    """Reads images and prepares them.

    Args: reader: turns PIL images into pixel values, as ``models.images.ImageReader``. augment: changes of training images.
    """

    max_length = None
    padding: Padding = "right"

    def __init__(self, reader: Any, *, image_column: str, augment: Augmentation | None) -> None:
        self.tokenizer = self.files = reader
        self._image_column, self._augment = image_column, augment

    def images(self, rows: Rows) -> Iterator[tuple[Image, int]]:
        """Each row's image, with a hash of its content."""
        return read_images(rows, self._image_column, length=self.tokenizer.length)

    def image(self, rows: Rows, index: int) -> Image:
        ((image, _),) = self.images(rows.select([index]))
        return image

    def given_images(self, rows: Rows) -> list[Example]:
        """The images to predict for."""
        return [Example(NO_IDS, i, 1.0, image=image) for i, (image, _) in enumerate(self.images(rows))]

    def picture(self, example: Example) -> Any:
        """The image as PIL has it, changed if it is."""
        assert example.image is not None
        return example.image.pixels(self.tokenizer.mode)

    def pixels(self, example: Example) -> Tensor:
        """[C, H, W] the pixel values of the image, prepared alone."""
        pixels: Tensor = self.tokenizer([self.picture(example)])[0]
        return pixels

    def redraw(self, example: Example, rng: np.random.Generator) -> Example:
        """``example`` with a newly drawn change of its image."""
        if self._augment is None:
            return example
        assert example.image is not None
        return replace(example, image=replace(example.image, change=self._augment.draw(rng)))

    def described(self, image: Image) -> str:
        """What a preview says about an image: its size and, as an example, a change."""
        if self._augment is None:
            return size_text(image)
        return f"{size_text(image)}; changed on each pass, for example: {self._augment.draw(np.random.default_rng(0))}"

    def probe(self, ids: np.ndarray) -> Example:
        raise TypeError("an image has no tokens")

    def row_from_text(self, text: str) -> dict[str, Any]:
        """The row for a path."""
        return {self._image_column: text}

    def unusable(self, rows: Rows) -> dict[int, str]:
        return unusable_rows(rows, lambda part: list(self.images(part)), column=None)
