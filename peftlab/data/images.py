"""Images: turns the value of a row (a path, the bytes of a file, or numbers) into pixels, read when needed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peftlab.data.augment import Change
from peftlab.data.rows import Rows
from peftlab.errors import DataError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# What a row holds: pixels to read, or the classes of pixels.
What = Literal["image", "mask"]
Source = Path | bytes | npt.NDArray[np.uint8]
# Bytes at the end of a JPEG in which its end marker is, unless it was cut off.
_JPEG_END = 1024
# The EXIF tag of a camera's orientation, and the first value that exchanges width and height.
_ORIENTATION, _FIRST_TURNED = 0x0112, 5


@dataclass(frozen=True, slots=True)
class Image:
    """One image, checked but not yet decoded.

    Attributes:
        source: a file, the bytes of one, or pixels [H, W] or [H, W, 3] uint8.
        where: its place in the data, for messages. length: number of positions it takes in the model.
        change: a random change in training; None: the image as it is.
    """

    source: Source
    where: str
    length: int
    change: Change | None = None

    def pixels(self, mode: str) -> Any:
        """The decoded ``PIL.Image`` in PIL's ``mode``, RGB or L, after the change. Raises: DataError for a damaged file."""
        import PIL.Image

        if isinstance(self.source, np.ndarray):
            image = PIL.Image.fromarray(self.source).convert(mode)
        else:
            raw = bytes_of(self.source, self.where)
            with damaged(self.source, self.where), PIL.Image.open(io.BytesIO(raw)) as opened:
                image = _converted(opened, mode)
        return image if self.change is None else self.change.apply(image)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, without the change; the pixels of a file are not decoded."""
        import PIL.Image

        if isinstance(self.source, np.ndarray):
            return int(self.source.shape[1]), int(self.source.shape[0])
        raw = bytes_of(self.source, self.where)
        with damaged(self.source, self.where), PIL.Image.open(io.BytesIO(raw)) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED
            return (opened.height, opened.width) if turned else (opened.width, opened.height)


def read_images(rows: Rows, column: str, *, length: int) -> Iterator[tuple[Image, int]]:
    """Each row's image, checked, with a 64-bit hash of its content.

    A value is a path (relative to the folder of the file that the row came from), the bytes of an image file, a record
    ``{"bytes", "path"}`` as ``datasets`` writes it, or pixels as nested lists or an array: [H, W] or [H, W, 3] whole
    numbers from 0 to 255.

    Raises: DataError with file and row if an image is missing, in an unknown format, or damaged in its header.
    """
    for source, where in read_sources(rows, column, what="image"):
        content = content_of(source, where)
        if not isinstance(source, np.ndarray):
            _check(content, source, where)
        digest = hashlib.sha256(content).digest()[:8]
        yield Image(source, where, length), int.from_bytes(digest, "little", signed=True)


def read_sources(rows: Rows, column: str, *, what: What) -> Iterator[tuple[Source, str]]:
    """Each row's file, bytes or pixels, with its place in the data. Raises: DataError for another value."""
    for index, value in enumerate(rows.column(column, key=_key(what))):
        where = rows.where(index)
        folder = Path(rows.origins[rows.origin_index[index]].path).parent
        yield _source(value, where, folder, what), where


def content_of(source: Source, where: str, *, what: What = "image") -> bytes:
    """What identifies a source: the bytes of its file, or its shape and pixels. Raises: DataError if it cannot be read."""
    if isinstance(source, np.ndarray):
        return str(source.shape).encode() + source.tobytes()
    return bytes_of(source, where, what=what)


def size_text(image: Image) -> str:
    """``28 x 28 pixels, cats/1.png`` for a person."""
    width, height = image.pixels("RGB").size
    name = f", {image.source}" if isinstance(image.source, Path) else ""
    return f"{width} x {height} pixels{name}"


def _key(what: What) -> str:
    return f"data.columns.{what}"


def _named_kind(what: What) -> str:
    return "an image" if what == "image" else "a mask"


def _source(value: Any, where: str, folder: Path, what: What) -> Source:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        return folder / Path(value).expanduser()
    if isinstance(value, bytes):
        return value
    if isinstance(value, list | np.ndarray):
        return _pixels(value, where, what)
    shown, remedy = repr(value), ""
    if value is None or value == "":
        remedy = "; data.empty=drop leaves such rows out"
    raise DataError(
        f"{where}: expected {_named_kind(what)} (a path, the bytes of a file, or lists of pixels), found "
        f"{shown[:60]}{remedy}",
        key=_key(what),
    )


def _pixels(value: Any, where: str, what: What) -> npt.NDArray[np.uint8]:
    try:
        pixels = np.asarray(value)
    except ValueError:
        pixels = np.zeros(0, dtype=object)
    numbers = pixels.dtype.kind in "uif" and pixels.size > 0
    colours = what == "image"
    fits = pixels.ndim == 2 or (colours and pixels.ndim == 3 and pixels.shape[2] == 3)
    if not (numbers and fits and pixels.min() >= 0 and pixels.max() <= 255 and np.array_equal(pixels, np.rint(pixels))):
        raise DataError(
            f"{where}: expected {'pixels' if colours else 'a mask'} [height, width]"
            f"{' or [height, width, 3]' if colours else ''} of whole numbers from 0 to 255, found "
            f"shape {list(pixels.shape)}"
            + (f" with values from {pixels.min()} to {pixels.max()}" if numbers else f" of {pixels.dtype}"),
            key=_key(what),
        )
    return pixels.astype(np.uint8)


def bytes_of(source: Path | bytes, where: str, *, what: What = "image") -> bytes:
    """The bytes of a file. Raises: DataError if it cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: the {what} {source} cannot be read: {error.strerror}", key=_key(what)) from None


def _converted(opened: Any, mode: str) -> Any:
    """The first frame of an opened file in ``mode``, upright as its camera says. Pixels of 16 bits keep their upper 8, and
    transparent ones show white: Pillow alone would make the former white and the latter whatever is beneath."""
    import PIL.Image
    import PIL.ImageOps

    opened.load()
    image = PIL.ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are fractions; store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _check(content: bytes, source: Path | bytes, where: str) -> None:
    """Checks that the file is complete: by the checksums of a PNG or the end of a JPEG, which is ten times faster than
    decoding it."""
    import PIL.Image

    if not content:
        raise DataError(f"{where}: expected an image, found an empty file{_named(source)}", key=_key("image"))
    with damaged(source, where), PIL.Image.open(io.BytesIO(content)) as opened:
        if opened.format == "PNG":
            opened.verify()
        elif opened.format != "JPEG" or b"\xff\xd9" not in content[-_JPEG_END:]:
            opened.load()


def _named(source: Path | bytes) -> str:
    return f": {source}" if isinstance(source, Path) else ""


@contextlib.contextmanager
def damaged(source: Path | bytes, where: str, *, what: What = "image") -> Iterator[None]:
    """Turns Pillow's errors for an unreadable file into a DataError."""
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata, which changes no pixel
            yield
    except PIL.Image.DecompressionBombError as error:
        size = str(error).removeprefix("Image size ").partition(" pixels")[0].strip("(")
        raise DataError(
            f"{where}: the {what} has {size} pixels, more than Pillow opens; make it smaller{_named(source)}",
            key=_key(what),
        ) from error
    # Its plugins raise many types: an unknown format or a truncated file is an OSError, other faults are not.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError) as error:
        name = str(source) if isinstance(source, Path) else f"{len(source):,} bytes"
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # its text shows an object in memory
        reason = "" if unknown else f" ({error})"
        raise DataError(
            f"{where}: expected {_named_kind(what)}, found a damaged file or another format: {name}{reason}",
            key=_key(what),
        ) from error
