"""Queries that describe a parameter, and the parameters of the function as the documents to rank."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from peftlab.data.numpydoc import parameters, sections
from peftlab.data.rows import Origin, Rows

_FEWEST_DOCUMENTS, _MOST_DOCUMENTS = 4, 8
# Queries of a docstring, so that functions with many parameters do not outweigh the others.
_MOST_QUERIES = 4
_FEWEST_WORDS, _MOST_WORDS = 4, 40
_SENTENCE_END = re.compile(r"(?<=[.;])\s")


def docstring_parameters(name: str, docstrings: Iterable[tuple[str, int, str]]) -> tuple[Rows, list[bytes]]:
    """Rows with the columns ``query``, ``document`` and ``score``, and the queries as their contents.

    A query is the first sentence that describes a parameter. Its documents are the declarations (``axis : int, optional``) of
    this parameter, with the score 1, and of up to seven others of the function, with the score 0, in their order. Functions
    with fewer than four described parameters are left out; of equal queries the first is kept.

    Args: docstrings: file, line and text of each.
    """
    queries: set[str] = set()
    rows: list[tuple[str, str, int]] = []
    places: list[tuple[str, int]] = []
    for file, line, text in docstrings:
        described = _described(text)
        if len(described) < _FEWEST_DOCUMENTS:
            continue
        declarations = list(described)
        rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
        asked = 0
        for right in rng.permutation(len(declarations)).tolist():
            query = described[declarations[right]]
            if asked == _MOST_QUERIES or not _FEWEST_WORDS <= len(query.split()) <= _MOST_WORDS or query in queries:
                continue
            queries.add(query)
            asked += 1
            others = [i for i in range(len(declarations)) if i != right]
            shown = sorted([right, *rng.permutation(others)[: _MOST_DOCUMENTS - 1].tolist()])
            rows += [(query, declarations[i], int(i == right)) for i in shown]
            places += [(file, line)] * len(shown)
    files = {file: i for i, file in enumerate(dict.fromkeys(file for file, _ in places))}
    content = "\0".join("\0".join(map(str, row)) for row in rows)
    table = Rows(
        name=name,
        columns={column: list[Any](row[i] for row in rows) for i, column in enumerate(("query", "document", "score"))},
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        origins=tuple(Origin(file, "line") for file in files),
        origin_index=np.array([files[file] for file, _ in places], dtype=np.int64),
        positions=np.array([line for _, line in places], dtype=np.int64),
    )
    return table, [query.encode() for query, _, _ in rows]


def _described(text: str) -> dict[str, str]:
    """The declaration of each parameter -> the first sentence of its description."""
    context = inspect.cleandoc(text)
    place = sections(context).get("Parameters")
    if place is None:
        return {}
    found = {}
    for match, end in parameters(context, *place):
        paragraph = " ".join(context[match.end() : end].strip().partition("\n\n")[0].split())
        found.setdefault(" ".join(match[0].split()), _SENTENCE_END.split(paragraph)[0])
    return found
