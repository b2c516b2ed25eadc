"""Reads CoNLL files: one word per line with its tags, sentences between blank lines."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from peftlab.data.entities import OUTSIDE, has_prefix
from peftlab.data.table import Options, Table
from peftlab.errors import DataError

_DOCUMENT = "-DOCSTART-"
_COMMENT = re.compile(r"# ?(?:(?:id|newdoc|newpar|sent_id|text)\b|[^\t]+ = )")
# Universal Dependencies: ten columns, the first a number. 1-2 is a contraction whose words follow; 1.1 is not in the text.
_UNIVERSAL = ("id", "tokens", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_NUMBERED = re.compile(r"[0-9]+(?:[-.][0-9]+)?")
_SAMPLE_LINES = 200


def read_conll(text: str, path: Path, options: Options) -> Table:
    """One row per sentence, at the line of its first word: ``tokens``, and ``tags`` from the last column if there are two
    or more. Columns between become ``column_2``, ``column_3``, ... Those of a CoNLL-U file have the names of that format.

    Tabs separate the columns if the first line has one, else white space. ``-DOCSTART-`` and comments are skipped.

    Raises: DataError: a line with more or fewer columns than the first.
    """
    sentences: list[list[list[str]]] = []
    lines: list[int] = []
    width, first, tabs, inside = 0, 0, False, False
    for number, line in enumerate(text.split("\n"), 1):
        content = line.removesuffix("\r")
        if not content.strip():
            inside = False
            continue
        if content.startswith(_DOCUMENT) or (not inside and _COMMENT.match(content)):
            continue
        if not width:
            tabs = "\t" in content
        fields = content.split("\t") if tabs else content.split()
        if not width:
            width, first = len(fields), number
        if len(fields) != width:
            raise DataError(
                f"{path}:{number}: found {len(fields)} columns, expected {width} as in line {first}: a word and its tags, "
                f"separated by {'tabs' if tabs else 'spaces or tabs'}, with a blank line between sentences",
                key=options.key,
            )
        if not inside:
            sentences.append([])
            lines.append(number)
            inside = True
        sentences[-1].append(fields)
    names = _names(sentences, width, tabs)
    if names == _UNIVERSAL:
        sentences = [[word for word in words if word[0].isdigit()] for words in sentences]
    columns = {name: [[word[i] for word in words] for words in sentences] for i, name in enumerate(names)}
    return Table(columns, np.array(lines, dtype=np.int64), "line")


def looks_like_conll(text: str) -> bool:
    """Whether the first lines have the same columns, the last of them O or a tag such as B-PER, and a sentence ends."""
    sample = text.split("\n", _SAMPLE_LINES)[:_SAMPLE_LINES]
    words = [line.split() for line in sample if line.strip() and not line.startswith((_DOCUMENT, "# "))]
    tags = {fields[-1] for fields in words}
    return (
        any(not line.strip() for line in sample[:-1])
        and len({len(fields) for fields in words}) == 1
        and len(words[0]) > 1
        and OUTSIDE in tags
        and all(tag == OUTSIDE or has_prefix(tag) for tag in tags)
    )


def _names(sentences: list[list[list[str]]], width: int, tabs: bool) -> tuple[str, ...]:
    if width == len(_UNIVERSAL) and tabs and all(_NUMBERED.fullmatch(word[0]) for words in sentences for word in words):
        return _UNIVERSAL
    between = [f"column_{i}" for i in range(2, width)]
    return ("tokens", *between, *(["tags"] if width > 1 else []))
