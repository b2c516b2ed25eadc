"""Writes the masks that a model finds, as PNG files with a palette."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peftlab.errors import ResourceError


class MaskFiles:
    """One PNG per image in ``folder``, which it makes: a pixel is a class index, shown in the class's colour."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._names = folder, set[str]()

    def add(self, mask: np.ndarray, index: int, source: Path | None) -> Path:
        """Writes [H, W] uint8 classes, and returns the file. Its name is that of the image, or its number from 1.

        Raises: ResourceError if it cannot be written.
        """
        import PIL.Image

        name = f"{index + 1:06}" if source is None else source.stem
        name = name if name not in self._names else f"{name}-{index + 1:06}"
        self._names.add(name)
        path = self._folder / f"{name}.png"
        image = PIL.Image.fromarray(mask)
        image.putpalette(palette().tobytes())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            image.save(path)
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error
        return path


def palette() -> np.ndarray:
    """[256, 3] uint8 colours of class indices, far apart for the first: those of PASCAL VOC, which spread the bits of the index
    over the high bits of the colours. Index 0 is black."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for level in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * level + channel)) & 1) << (7 - level)).astype(np.uint8)
    return colours
