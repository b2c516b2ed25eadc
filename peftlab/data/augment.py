"""Random changes of training images. Pillow alone makes them, so that they are the same with and without torchvision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_COLOURS = ("Brightness", "Contrast", "Color")


@dataclass(frozen=True, slots=True)
class Change:
    """One drawn change of an image.

    Attributes:
        crop: left, top, right and bottom of the part that is kept, as shares of width and height. flip: mirrored left to
            right. angle: degrees counter-clockwise. colours: factors on brightness, contrast and saturation.
    """

    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False
    angle: float = 0.0
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def apply(self, image: Any) -> Any:
        """The changed ``PIL.Image``, of mode L or RGB. Corners that a rotation leaves empty get the image's mean colour."""
        import PIL.Image
        import PIL.ImageEnhance
        import PIL.ImageStat

        if self.crop != (0.0, 0.0, 1.0, 1.0):
            image = image.crop(self.box(*image.size))
        if self.flip:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        if self.angle:
            mean = tuple(round(value) for value in PIL.ImageStat.Stat(image).mean)
            fill = mean if len(mean) > 1 else mean[0]
            image = image.rotate(self.angle, PIL.Image.Resampling.BILINEAR, fillcolor=fill)
        for name, factor in zip(_COLOURS, self.colours, strict=True):
            if factor != 1.0 and (name != "Color" or image.mode == "RGB"):
                image = getattr(PIL.ImageEnhance, name)(image).enhance(factor)
        return image

    def apply_to_mask(self, classes: np.ndarray, empty: int) -> np.ndarray:
        """[H, W] uint8 classes of pixels, changed as the image is. Args: empty: the class of corners that a rotation leaves."""
        import PIL.Image

        left, top, right, bottom = self.box(classes.shape[1], classes.shape[0])
        classes = classes[top:bottom, left:right]
        classes = classes[:, ::-1] if self.flip else classes
        if self.angle:
            image = PIL.Image.fromarray(np.ascontiguousarray(classes))
            classes = np.asarray(image.rotate(self.angle, PIL.Image.Resampling.NEAREST, fillcolor=empty))
        return classes

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part of an image of this size that is kept, in pixels; at least one pixel."""
        left, top = math.floor(self.crop[0] * width), math.floor(self.crop[1] * height)
        right, bottom = math.ceil(self.crop[2] * width), math.ceil(self.crop[3] * height)
        return left, top, max(right, left + 1), max(bottom, top + 1)

    def boxes(self, boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [M, 4] (left, top, right, bottom, in pixels of an image of this size) in the changed image, cut at its
        edges; and the indices of those that keep some of their area. There is no rotation."""
        assert not self.angle
        left, top, right, bottom = self.box(width, height)
        moved = boxes - np.array([left, top, left, top])
        moved[:, 0::2] = moved[:, 0::2].clip(0, right - left)
        moved[:, 1::2] = moved[:, 1::2].clip(0, bottom - top)
        if self.flip:
            moved[:, 0::2] = (right - left) - moved[:, [2, 0]]
        kept = np.flatnonzero((moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1]))
        return moved[kept], kept

    def __str__(self) -> str:
        """``crop to 87 % of the area, mirrored, rotated by -3.2 degrees``."""
        left, top, right, bottom = self.crop
        area = (right - left) * (bottom - top)
        parts = [f"cropped to {100 * area:.0f} % of its area"] if area < 1 else []
        parts += ["mirrored"] if self.flip else []
        parts += [f"rotated by {self.angle:.1f} degrees"] if self.angle else []
        names = ("brightness", "contrast", "saturation")
        parts += [f"{name} x{factor:.2f}" for name, factor in zip(names, self.colours, strict=True) if factor != 1]
        return ", ".join(parts) or "as it is"


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How images are changed at random.

    Attributes:
        flip: probability of mirroring left to right. crop: smallest and largest share of the area that is kept, with the
            image's aspect ratio; None: all. rotate: largest angle in degrees, either way. color: largest relative change
            of brightness, contrast and saturation.
    """

    flip: float = 0.0
    crop: tuple[float, float] | None = None
    rotate: float = 0.0
    color: float = 0.0

    def draw(self, rng: np.random.Generator) -> Change:
        """Draws a change. It uses the same random numbers whatever the settings are."""
        flip, share, x, y, angle, *colours = rng.random(8).tolist()
        low, high = self.crop or (1.0, 1.0)
        side = math.sqrt(low + (high - low) * share)
        left, top = (1 - side) * x, (1 - side) * y
        first, second, third = (1 + self.color * (2 * value - 1) for value in colours)
        return Change(
            (left, top, left + side, top + side) if side < 1 else (0.0, 0.0, 1.0, 1.0),
            flip < self.flip,
            self.rotate * (2 * angle - 1),
            (first, second, third),
        )
