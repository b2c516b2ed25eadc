"""The built-in data sets: their content, and parts that are the same everywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peftlab.data import Rows, builtin, load_rows
from peftlab.errors import DataError, PeftlabError


def test_sklearn_digits_are_those_of_sklearn() -> None:
    from sklearn.datasets import load_digits

    rows, wanted = load_rows("sklearn:digits"), load_digits()
    assert np.abs(np.array(rows.columns["image"]) / 255 - wanted.images / 16).max() < 0.5 / 255 + 1e-9
    assert rows.columns["label"] == [str(label) for label in wanted.target]
    assert rows.where(4) == "sklearn:digits, record 5"


def texts_of(rows: Rows) -> set[str]:
    return {str(row) for row in (rows.row(i) for i in range(len(rows)))}


@pytest.mark.parametrize("name", ["sklearn:digits", "docstrings:yaml,accelerate"])
def test_builtin_parts_share_no_row_and_cover_all_rows(name: str) -> None:
    whole, train, test = (load_rows(name + part) for part in ("", ":train", ":test"))
    assert len(train) + len(test) == len(whole)
    assert texts_of(train) | texts_of(test) == texts_of(whole)
    assert not texts_of(train) & texts_of(test)
    assert 0.15 < len(test) / len(whole) < 0.35


def test_builtin_part_of_a_row_is_the_same_in_another_data_set() -> None:
    one = set(load_rows("docstrings:accelerate:test").columns["text"])
    both = load_rows("docstrings:accelerate,peft:train")
    assert not one & set(both.columns["text"])


def made_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def test_docstrings_data_reads_first_paragraphs_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_package(
        tmp_path,
        "firstpack",
        '# a licence\n"""Module text of firstpack in five words or more.\n\nSecond paragraph."""\n\n\n'
        'def f(\n    a,\n):  # a comment\n    r"""Says the\n    same thing in both packages."""\n'
        '    x = """not a docstring at all, this"""\n'
        'class C:\n    """Too short."""\n    """Not the first statement of its class."""\n',
    )
    made_package(
        tmp_path, "otherpack", 'def g():\n    """Says the same thing in both packages."""\n    raise SystemExit\n'
        'def h():\n    """A thing that only the second has."""\n',
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = load_rows("docstrings:firstpack,otherpack")
    assert rows.columns == {
        "text": ["Module text of PACKAGE in five words or more.", "A thing that only the second has."],
        "label": ["firstpack", "otherpack"],
    }
    assert rows.where(0) == f"{tmp_path}/firstpack/__init__.py:2"
    assert rows.where(1) == f"{tmp_path}/otherpack/__init__.py:5"


def test_docstrings_data_searches_a_package_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    paragraphs = builtin._paragraphs

    def watched(folder: Path) -> Iterator[tuple[str, int, str]]:
        searched.append(folder.name)
        return paragraphs(folder)

    monkeypatch.setattr(builtin, "_paragraphs", watched)
    builtin._search.cache_clear()
    parts = [
        load_rows(f"docstrings:accelerate{part}", key=key)
        for part, key in [
            ("", "data.train"),
            (":train", "data.train"),
            (":test", "data.eval"),
            (":train#9", "distill.transfer"),
        ]
    ]
    assert searched == ["accelerate"]
    assert [rows.name for rows in parts] == [f"docstrings:accelerate{p}" for p in ("", ":train", ":test", ":train#9")]
    assert len(parts[0]) == len(parts[1]) + len(parts[2]) and len(parts[3]) == 9


def test_docstrings_data_equals_the_syntax_tree() -> None:
    """Over a real package. A string in other quotes or with escapes may differ, hence 98 %."""
    import accelerate

    wanted = set()
    for file in Path(accelerate.__file__).parent.rglob("*.py"):
        source = file.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split())
                if len(text.split()) >= 5 and '"""' in str(ast.get_source_segment(source, node.body[0])):
                    wanted.add(text.lower().replace("accelerate", "package"))
    texts = {text.lower() for text in load_rows("docstrings:accelerate").columns["text"]}
    assert len(wanted) > 400
    assert len(texts & wanted) >= 0.98 * len(texts | wanted)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sklearn:digit",
            {},
            "unknown built-in data 'sklearn:digit'; expected sklearn:digits, shapes:500, docstrings:",
        ),
        (
            "docstrings:numpyy",
            {},
            "package 'numpyy' is not installed, so it has no docstrings .*; did you mean 'numpy'",
        ),
        ("docstrings:", {}, "package '' is not installed"),
        ("docstrings:os.path", {}, "package 'os.path' is not installed"),
        ("sklearn:digits", {"format": "csv"}, "has no effect on the built-in data"),
        ("sklearn:digits", {"encoding": "latin-1"}, "has no effect on the built-in data"),
        ("sklearn:digits#2000", {}, "asks for 2000 rows, but there are only 1797"),
    ],
)
def test_builtin_data_refuses_bad_names_and_options(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_rows(name, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, PeftlabError) and caught.value.key


def test_docstring_pairs_are_a_summary_and_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_here"
    package.mkdir()
    (package / "__init__.py").write_text("")
    body = " ".join(f"word{i}" for i in range(70))
    (package / "one.py").write_text(
        f'def f():\n    """Return the first of all\n    the numbers.\n\n    {body}\n    """\n\n\n'
        f'def g():\n    """Return the first of all the numbers.\n\n    {body} again\n    """\n\n\n'
        'def h():\n    """Too short.\n\n    This has no fifteen words.\n    """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = load_rows("docstring-pairs:made_here")
    assert rows.columns == {
        "summary": ["Return the first of all the numbers."],
        "body": [" ".join(f"word{i}" for i in range(60))],
    }
    assert rows.where(0).endswith("one.py:2")
    everything = load_rows("docstring-pairs:scipy")
    parts = [load_rows(f"docstring-pairs:scipy:{part}") for part in ("train", "test")]
    assert len(everything) == sum(map(len, parts)) > 2000
    with pytest.raises(DataError, match="no docstring of two paragraphs"):
        load_rows("docstring-pairs:pydoc_data")
