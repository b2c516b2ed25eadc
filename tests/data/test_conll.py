"""CoNLL files: sentences, columns, comments, lines in messages, and what is recognized as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftlab.data import load_rows
from peftlab.errors import DataError

NEWS = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\nBlackburn NNP I-PER\n"


def rows_of(folder: Path, text: str, name: str = "a.conll", **options: str) -> dict[str, object]:
    (folder / name).write_text(text, encoding="utf-8")
    return load_rows(str(folder / name), **options).columns


@pytest.mark.parametrize("name", ["a.conll", "a.iob", "a.bio", "a.txt", "a.tsv", "train"])
def test_sentences_and_their_columns(tmp_path: Path, name: str) -> None:
    assert rows_of(tmp_path, NEWS, name) == {
        "tokens": [["EU", "rejects"], ["Peter", "Blackburn"]],
        "column_2": [["NNP", "VBZ"], ["NNP", "NNP"]],
        "tags": [["B-ORG", "O"], ["B-PER", "I-PER"]],
    }
    rows = load_rows(str(tmp_path / name))
    assert [rows.where(i) for i in range(2)] == [f"{tmp_path / name}:3", f"{tmp_path / name}:7"]


def test_tabs_windows_line_ends_and_words_with_spaces(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "New York\tB-LOC\r\n#\tO\r\n\r\n# id 1 x=y\r\n# mentions\tO\r\n") == {
        "tokens": [["New York", "#"], ["# mentions"]],
        "tags": [["B-LOC", "O"], ["O"]],
    }


def test_comments_of_multiconer_and_universal_dependencies(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "# id 5239 domain=en\nits _ _ O\nhq _ _ B-LOC\n")["tokens"] == [["its", "hq"]]
    lines = ["# sent_id = 1", "# text = Vamos al mar"]
    words = [("1", "Vamos", "VERB"), ("2-3", "al", "_"), ("2", "a", "ADP"), ("3", "el", "DET"), ("3.1", "x", "X")]
    lines += ["\t".join([i, form, "_", tag, *["_"] * 6]) for i, form, tag in words]
    columns = rows_of(tmp_path, "\n".join(lines) + "\n", "a.conllu")
    assert columns["tokens"] == [["Vamos", "a", "el"]]
    assert columns["upos"] == [["VERB", "ADP", "DET"]]


def test_words_alone_have_no_tags(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "EU\nrejects\n\nPeter\n") == {"tokens": [["EU", "rejects"], ["Peter"]]}


def test_a_line_with_other_columns_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.conll:4: found 1 columns, expected 2 as in line 1: .* spaces or tabs"):
        rows_of(tmp_path, "EU B-ORG\n\nPeter B-PER\nBlackburn\n")


def test_other_text_is_not_taken_for_conll(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "O B-side\n\nMy A O\nis fine\n", "a.txt") == {"text": ["O B-side", "My A O\nis fine"]}
    assert rows_of(tmp_path, NEWS, "a.txt", format="text")["text"][0].startswith("-DOCSTART-")  # type: ignore[index]


def test_a_file_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        rows_of(tmp_path, "-DOCSTART- O\n\n\n")
