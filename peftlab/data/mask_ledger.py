"""The ledger of images with masks: rows, and the labelled pixels of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftlab.data.ledger import Indices, Ledger
from peftlab.data.rows import Rows


class MaskLedger(Ledger):
    """``Ledger`` of images with masks. A row whose mask labels no pixel is left out.

    Args: length: positions of an image in the model. class_names: of the pixels; None: the rows have no masks.
    """

    def __init__(self, rows: Rows, *, length: int, class_names: Sequence[str] | None) -> None:
        super().__init__(rows, None, max_length=length, too_long="error", style="masks")
        self._pixel_names = class_names
        self._pixels: Indices | None = None

    def add_masks(self, hashes: Indices, lengths: Indices, pixels: Indices | None) -> None:
        """Adds all rows. Args: hashes, lengths: as for ``add_whole``. pixels: [N, C] labelled pixels of each class."""
        if pixels is not None:
            empty = pixels.sum(1) == 0
            lengths = np.where(empty, 0, lengths)
            if empty.any():
                self._left_out["dropped: no pixel of the mask is labelled"] = [np.flatnonzero(empty)]
        self.add_whole(hashes, lengths)
        self._pixels = pixels

    @property
    def has_labels(self) -> bool:
        return self._pixels is not None

    def label_counts(self) -> list[dict[str, Any]] | None:
        """Of each class the kept rows with such a pixel (``rows``) and the pixels (``spans``); None without masks."""
        if self._pixels is None or self._pixel_names is None:
            return None
        rows, pixels = (self._pixels > 0).sum(0).tolist(), self._pixels.sum(0).tolist()
        return [
            {"label": name, "rows": of_rows, "spans": of_pixels}
            for name, of_rows, of_pixels in zip(self._pixel_names, rows, pixels, strict=True)
        ]
