"""Masks: the class of each pixel of an image, read when needed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from peftlab.data.augment import Change
from peftlab.data.images import Source, bytes_of, content_of, damaged, read_sources
from peftlab.data.rows import Rows
from peftlab.errors import DataError

# The value of a pixel without a label, as in the masks of PASCAL VOC, ADE20K and Cityscapes.
NOT_LABELLED = 255
_KEY, _NAMES_KEY = "data.columns.mask", "data.label_names"
# Pillow's modes of one number per pixel.
_MODES = ("L", "P", "1", "I", "I;16")


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of one image, checked but not kept decoded.

    Attributes:
        source: a file, the bytes of one, or values [H, W] uint8. where: its place in the data, for messages.
        size: height and width, without the change. change: that of its image; None: as it is.
    """

    source: Source
    where: str
    size: tuple[int, int]
    change: Change | None = None

    def values(self) -> npt.NDArray[np.uint8]:
        """[H, W] the value of each pixel after the change; 255: not labelled."""
        values = _decoded(self.source, self.where)
        return values if self.change is None else self.change.apply_to_mask(values, NOT_LABELLED)

    @property
    def name(self) -> str:
        """Its place in the data, with its file."""
        return f"{self.where}: {self.source}" if isinstance(self.source, Path) else self.where

    def grid(self, most: int) -> npt.NDArray[np.bool_]:
        """[H * W] up to ``most`` pixels, spread evenly over the image."""
        step = max(1, math.ceil(math.sqrt(self.size[0] * self.size[1] / most)))
        chosen = np.zeros(self.size, dtype=bool)
        chosen[step // 2 :: step, step // 2 :: step] = True
        return chosen.reshape(-1)

    def content(self) -> bytes:
        """What identifies it, without the change."""
        return content_of(self.source, self.where, what="mask")


def read_masks(rows: Rows, column: str) -> Iterator[tuple[Mask, npt.NDArray[np.uint8]]]:
    """Each row's mask with its values [H, W]. A value is a path, bytes, a record or lists, as of an image: a PNG or another
    file without loss, grey or with a palette, whose pixels are class indices.

    Raises: DataError with file and row for a mask that is missing, damaged, in colours, or stored with loss.
    """
    for source, where in read_sources(rows, column, what="mask"):
        values = _decoded(source, where)
        yield Mask(source, where, (values.shape[0], values.shape[1])), values


@dataclass(frozen=True)
class PixelClasses:
    """Which class a value of a mask stands for.

    Attributes: names: of the classes, in index order. table: [256] class index of each value; -1: no class.
    """

    names: Sequence[str]
    table: npt.NDArray[np.int64]

    @classmethod
    def of(cls, names: Sequence[str], value_names: Mapping[str, str]) -> PixelClasses:
        """Args: names: the classes. value_names: value of a mask -> name of its class; empty: a value is its class index."""
        table = np.full(256, -1, dtype=np.int64)
        if value_names:
            for value, name in _numbered(value_names).items():
                table[value] = names.index(name)
        else:
            table[: len(names)] = np.arange(len(names))
        return cls(names, table)

    def indices(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """The class of each pixel, -1 without a label, in the shape of ``values``."""
        return self.table[values]

    def values(self, indices: np.ndarray) -> npt.NDArray[np.uint8]:
        """The least value that stands for each class."""
        first = np.array([np.flatnonzero(self.table == i)[0] for i in range(len(self.names))], dtype=np.uint8)
        values: npt.NDArray[np.uint8] = first[indices]
        return values

    def check(self, mask: Mask, values: npt.NDArray[np.uint8]) -> None:
        """Raises DataError for a value that no class has."""
        seen = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        unknown = [int(v) for v in seen if v != NOT_LABELLED and self.table[v] < 0]
        if unknown:
            known = ", ".join(map(str, np.flatnonzero(self.table >= 0)[:20].tolist()))
            raise DataError(
                f"{mask.name}: the mask has the value {unknown[0]}, which is no class of the training data; "
                f"the classes are {known}, and {NOT_LABELLED} means not labelled",
                key=_KEY,
            )


def find_pixel_classes(rows: Rows, column: str, value_names: Mapping[str, str]) -> list[str]:
    """The names of the classes of all masks: those of ``value_names`` in the order of their values, or every number up to the
    highest value. Raises: DataError if there are fewer than two."""
    named = _numbered(value_names)
    seen = np.zeros(256, dtype=np.int64)
    for mask, values in read_masks(rows, column):
        here = np.bincount(values.ravel(), minlength=256)
        other = [v for v in np.flatnonzero(here[:NOT_LABELLED]).tolist() if named and v not in named]
        if other:
            raise DataError(
                f"{mask.name}: the mask has the value {other[0]}, which is not among data.label_names: "
                f"{', '.join(map(str, named))}",
                key=_NAMES_KEY,
            )
        seen += here
    present = np.flatnonzero(seen[:NOT_LABELLED]).tolist()
    names = list(dict.fromkeys(named.values())) if named else [str(v) for v in range(max(present, default=-1) + 1)]
    if len(present) < 2 or len(names) < 2:
        found = f"only the value {present[0]}" if present else "none"
        raise DataError(
            f"{rows.name}: expected masks with two classes or more, found {found}; a pixel's value is its class, and "
            f"{NOT_LABELLED} means not labelled",
            key=_KEY,
        )
    return names


def _numbered(value_names: Mapping[str, str]) -> dict[int, str]:
    """Value -> name, by value. Raises: DataError for a key that is no value of a class."""
    for value in value_names:
        if not str(value).isdecimal() or int(value) >= NOT_LABELLED:
            raise DataError(
                f"expected whole numbers from 0 to {NOT_LABELLED - 1}, the values in the masks, as in "
                f"{{0: ground, 1: tree}}; found {value!r}",
                key=_NAMES_KEY,
            )
    return dict(sorted((int(value), name) for value, name in value_names.items()))


def _decoded(source: Source, where: str) -> npt.NDArray[np.uint8]:
    import PIL.Image

    if isinstance(source, np.ndarray):
        return source
    raw = bytes_of(source, where, what="mask")
    if not raw:
        raise DataError(f"{where}: expected a mask, found an empty file: {_name(source)}", key=_KEY)
    with damaged(source, where, what="mask"), PIL.Image.open(io.BytesIO(raw)) as opened:
        kind, mode = opened.format, opened.mode
        opened.load()
        values = np.asarray(opened)
    if kind == "JPEG":
        raise DataError(
            f"{where}: the mask {_name(source)} is a JPEG, which changes class indices; store masks as PNG", key=_KEY
        )
    if mode not in _MODES:
        raise DataError(
            f"{where}: expected one class index per pixel (a grey image, or one with a palette), found the colours {mode}: "
            f"{_name(source)}",
            key=_KEY,
        )
    if values.min() < 0 or values.max() > NOT_LABELLED:
        raise DataError(
            f"{where}: expected class indices from 0 to {NOT_LABELLED - 1}, and {NOT_LABELLED} for no label; found "
            f"{values.min()} to {values.max()}: {_name(source)}",
            key=_KEY,
        )
    return values.astype(np.uint8)


def _name(source: Source) -> str:
    return f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
