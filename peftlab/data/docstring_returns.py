"""Questions what a function returns, and sentences of its docstring as the documents to rank."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from peftlab.data.numpydoc import descriptions, sections
from peftlab.data.rows import Origin, Rows

QUESTION = "What is returned?"
_FEWEST_DOCUMENTS, _MOST_DOCUMENTS = 4, 6
_FEWEST_WORDS, _MOST_WORDS = 4, 30
_SENTENCE_END = re.compile(r"(?<=[.;])\s")


def docstring_returns(name: str, docstrings: Iterable[tuple[str, int, str]]) -> tuple[Rows, list[bytes]]:
    """Rows with the columns ``query``, ``document`` and ``score``, and the queries as their contents.

    A query is the first paragraph of a docstring with a question after it. Its documents are the first sentence about what is
    returned, with the score 1, and those about up to five parameters, with the score 0, in the order of the text. Names and
    types are not in them. Docstrings with fewer than three such parameters are left out, as are queries and answers of others
    that occur again.

    Args: docstrings: file, line and text of each.
    """
    seen: set[str] = set()
    rows: list[tuple[str, str, int]] = []
    places: list[tuple[str, int]] = []
    for file, line, text in docstrings:
        context = inspect.cleandoc(text)
        parts = sections(context)
        summary = " ".join(context.partition("\n\n")[0].split())
        if not {"Parameters", "Returns"} <= parts.keys() or not _fits(summary):
            continue
        described = (_sentences(context, parts[section]) for section in ("Parameters", "Returns"))
        parameters, returned = described
        answer, query = next(iter(returned), ""), f"{summary} {QUESTION}"
        others = [sentence for sentence in parameters if sentence not in returned]
        if not answer or len(others) < _FEWEST_DOCUMENTS - 1 or {query, answer} & seen:
            continue
        seen |= {query, answer}
        rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
        chosen = sorted(rng.permutation(len(others))[: _MOST_DOCUMENTS - 1].tolist())
        rows += [*((query, others[i], 0) for i in chosen), (query, answer, 1)]
        places += [(file, line)] * (len(chosen) + 1)
    files = {file: i for i, file in enumerate(dict.fromkeys(file for file, _ in places))}
    content = "\0".join("\0".join(map(str, row)) for row in rows)
    columns = {column: list[Any](row[i] for row in rows) for i, column in enumerate(("query", "document", "score"))}
    table = Rows(
        name=name,
        columns=columns,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        origins=tuple(Origin(file, "line") for file in files),
        origin_index=np.array([files[file] for file, _ in places], dtype=np.int64),
        positions=np.array([line for _, line in places], dtype=np.int64),
    )
    return table, [query.encode() for query, _, _ in rows]


def _fits(text: str) -> bool:
    return _FEWEST_WORDS <= len(text.split()) <= _MOST_WORDS


def _sentences(context: str, place: tuple[int, int]) -> list[str]:
    """The first sentence of each description, each once; too short and too long ones are left out."""
    firsts = (_SENTENCE_END.split(text)[0] for text in descriptions(context, *place))
    return list(dict.fromkeys(filter(_fits, firsts)))
