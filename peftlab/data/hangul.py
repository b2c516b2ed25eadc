"""The syllables of the Korean script, and their names in Latin letters: pairs of texts that are on every machine."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

import numpy as np

from peftlab.data.rows import Origin, Rows

_FIRST, _LAST = 0xAC00, 0xD7A3
_NAME = "HANGUL SYLLABLE "


def hangul(name: str) -> tuple[Rows, list[bytes]]:
    """11,172 rows: ``source``, the two or three letters of a syllable, one character each, and ``target``, the Latin letters
    in its Unicode name (han); and the sources as bytes."""
    syllables = [chr(point) for point in range(_FIRST, _LAST + 1)]
    sources = [unicodedata.normalize("NFD", syllable) for syllable in syllables]
    targets = [unicodedata.name(syllable).removeprefix(_NAME).lower() for syllable in syllables]
    rows = Rows(
        name=name,
        columns={"source": list[Any](sources), "target": list[Any](targets)},
        fingerprint=hashlib.sha256("".join(sources + targets).encode()).hexdigest(),
        origins=(Origin("unicode:hangul", "record"),),
        origin_index=np.zeros(len(sources), dtype=np.int64),
        positions=np.arange(1, len(sources) + 1),
    )
    return rows, [source.encode() for source in sources]
