"""Built-in data sets, available on every machine: ``sklearn:digits``, ``shapes:N``, and ``docstrings:PACKAGE,PACKAGE`` of installed
packages."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.rows import Origin, Rows
from peftlab.data.shapes import draw_shapes
from peftlab.errors import DataError

DIGITS, DOCSTRINGS, SHAPES = "sklearn:digits", "docstrings:", "shapes:"
_MOST_SHAPES = 100_000
_PARTS = ("train", "test")
# A row is a test row if the first byte of its content hash is below this: about a quarter of the rows.
_TEST_BYTES = 64
# The end of a signature and the string alone on the next line, or the string at the start of a file. Parsing syntax trees
# of torch and transformers would take half a minute instead of a second.
_DOCSTRING = re.compile(
    r'(?:\A(?:[ \t]*#[^\n]*\n|[ \t]*\n)*|:[ \t]*(?:#[^\n]*)?\n[ \t]+)[rRuU]{0,2}"""(.+?)"""', re.DOTALL
)
_FEWEST_WORDS = 5
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
    return name.startswith(("sklearn:", DOCSTRINGS, SHAPES))


def load_builtin(name: str, *, key: str) -> Rows:
    """The rows of a built-in data set.

    ``sklearn:digits``: 1,797 images of handwritten digits, columns ``image`` (8 lists of 8 integers, 0 to 255) and ``label``
    ("0" to "9"). ``docstrings:numpy,scipy``: the first paragraph of each docstring in three double quotes in these
    installed packages (not imported). Texts have five words or more; duplicates are removed, and texts that occur in two
    packages too. Columns ``text`` and ``label`` (the package). PACKAGE replaces the packages' names in the text.

    ``shapes:500``: 500 drawn images, see ``draw_shapes``.

    The suffixes ``:train`` and ``:test`` select about three quarters and one quarter of the rows. The split depends on a
    row's content, so a row is on the same side wherever it appears.

    Raises: DataError at ``key`` for an unknown name or a package that is not installed.
    """
    base, part = name, None
    head, _, tail = name.rpartition(":")
    if tail in _PARTS and head.rstrip(":") != "docstrings":
        base, part = head, tail
    if base == DIGITS:
        rows, contents = _digits(name)
    elif base.startswith(DOCSTRINGS):
        rows, contents = _docstrings(name, tuple(base.removeprefix(DOCSTRINGS).split(",")), key)
    elif base.startswith(SHAPES):
        rows, contents = _shapes(name, base.removeprefix(SHAPES), key)
    else:
        raise DataError(
            f"unknown built-in data {name!r}; expected {DIGITS}, {SHAPES}500 or {DOCSTRINGS}PACKAGE,PACKAGE, optionally followed by :train "
            "or :test",
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


def _docstrings(name: str, packages: tuple[str, ...], key: str) -> tuple[Rows, list[bytes]]:
    rows, contents = _search(tuple((package, _folder(package, key)) for package in packages))
    if not contents:
        raise DataError(f"{name!r}: no docstring of {_FEWEST_WORDS} words or more in these packages", key=key)
    return dataclasses.replace(rows, name=name), contents


# Distillation loads its rows a dozen times, in parts and under several keys; reading 100 MB of sources takes five seconds.
@functools.lru_cache(maxsize=2)
def _search(folders: tuple[tuple[str, Path], ...]) -> tuple[Rows, list[bytes]]:
    """Rows in the order of the packages, of their files' paths, and of the lines."""
    mask = _masking(tuple(package for package, _ in folders))
    places: dict[str, tuple[str, str, int]] = {}
    elsewhere: set[str] = set()
    for package, folder in folders:
        for file, line, text in _paragraphs(folder):
            masked = mask(text)
            if places.setdefault(masked, (package, file, line))[0] != package:
                elsewhere.add(masked)
    texts = [text for text in places if text not in elsewhere]
    files = {file: i for i, file in enumerate(dict.fromkeys(places[text][1] for text in texts))}
    rows = Rows(
        name=DOCSTRINGS,
        columns={"text": list[Any](texts), "label": [places[text][0] for text in texts]},
        fingerprint=hashlib.sha256("\0".join(f"{places[t][0]}\0{t}" for t in texts).encode()).hexdigest(),
        origins=tuple(Origin(file, "line") for file in files),
        origin_index=np.array([files[places[text][1]] for text in texts]),
        positions=np.array([places[text][2] for text in texts]),
    )
    return rows, [text.encode() for text in texts]


def _folder(package: str, key: str) -> Path:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        near = difflib.get_close_matches(package, _ALIASES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"package {package!r} is not installed, so it has no docstrings (expected {DOCSTRINGS}PACKAGE,PACKAGE){hint}",
            key=key,
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _paragraphs(folder: Path) -> Iterator[tuple[str, int, str]]:
    """``(file, line, text)`` of each docstring's first paragraph."""
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        line, counted = 1, 0
        for match in _DOCSTRING.finditer(source) if '"""' in source else ():
            line, counted = line + source.count("\n", counted, match.start(1)), match.start(1)
            first = match[1].replace("\\\n", "\n").strip().split("\n\n")[0]
            text = " ".join(first.split())
            if len(text.split()) >= _FEWEST_WORDS:
                yield str(file), line, text


def _masking(packages: tuple[str, ...]) -> Callable[[str], str]:
    """A function that replaces the packages' names and abbreviations, so that the text does not contain the label."""
    names = sorted({alias for package in packages for alias in (package, *_ALIASES.get(package, ()))}, key=len)
    long = "|".join(re.escape(name) for name in reversed(names) if len(name) > 2)
    short = "|".join(rf"\b{re.escape(name)}\b" for name in names if len(name) <= 2)
    pattern = re.compile("|".join(part for part in (long, short) if part), re.IGNORECASE)
    return lambda text: pattern.sub("PACKAGE", text)
