"""Pairs of texts from docstrings: the first paragraph, and what follows it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from peftlab.data.rows import Origin, Rows

_FEWEST_WORDS = {"summary": 5, "body": 15}
_MOST_WORDS = 60


def docstring_pairs(name: str, docstrings: Iterable[tuple[str, int, str]]) -> tuple[Rows, list[bytes]]:
    """Rows with the columns ``summary`` and ``body`` (its first 60 words), and their contents; of equal summaries or bodies only
    the first is kept.

    Args: docstrings: file, line and text of each.
    """
    found: dict[str, tuple[str, str, int]] = {}
    bodies: set[str] = set()
    for file, line, text in docstrings:
        first, _, rest = text.strip().partition("\n\n")
        summary, words = " ".join(first.split()), rest.split()
        if len(summary.split()) < _FEWEST_WORDS["summary"] or len(words) < _FEWEST_WORDS["body"]:
            continue
        body = " ".join(words[:_MOST_WORDS])
        if summary not in found and body not in bodies:
            found[summary] = (body, file, line)
            bodies.add(body)
    files = {file: i for i, file in enumerate(dict.fromkeys(file for _, file, _ in found.values()))}
    contents = [f"{summary}\0{body}".encode() for summary, (body, _, _) in found.items()]
    rows = Rows(
        name=name,
        columns={"summary": list[Any](found), "body": [body for body, _, _ in found.values()]},
        fingerprint=hashlib.sha256(b"\0".join(contents)).hexdigest(),
        origins=tuple(Origin(file, "line") for file in files),
        origin_index=np.array([files[file] for _, file, _ in found.values()], dtype=np.int64),
        positions=np.array([line for _, _, line in found.values()], dtype=np.int64),
    )
    return rows, contents
