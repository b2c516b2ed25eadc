"""The file formats: rows, their lines, and files that are refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.data import Rows, load_rows
from peftlab.data.readers import read_table
from peftlab.data.table import Options
from peftlab.errors import DataError

# Half surrogates cannot be written as utf-8, and NUL is refused.
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
AWKWARD = st.text(st.sampled_from('a,"\n\r\t \ufeff\u2028\x0b'), max_size=8)


def load(tmp_path: Path, file: str, content: str | bytes, **options: Any) -> Rows:
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_rows(str(path), **options)


def error(tmp_path: Path, file: str, content: str | bytes, **options: Any) -> tuple[str, str | None]:
    """(message without the folder, key) of the DataError that loading gives."""
    with pytest.raises(DataError) as info:
        load(tmp_path, file, content, **options)
    return str(info.value).replace(f"{tmp_path}/", ""), info.value.key


def lines_of(rows: Rows) -> list[int]:
    return [int(rows.where(i).rpartition(":")[2]) for i in range(len(rows))]


def test_csv_with_quoted_line_breaks(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.csv", 'text,label\n"one\ntwo, ""three""\n",1\r\n\nplain,0\n')
    assert rows.columns == {"text": ['one\ntwo, "three"\n', "plain"], "label": ["1", "0"]}
    assert [rows.where(0), rows.where(1)] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:6"]


@settings(max_examples=200, deadline=None)
@given(
    records=st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(CELL | AWKWARD, min_size=width, max_size=width), min_size=1, max_size=8)
    ),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_round_trip(records: list[list[str]], quoting: int) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=quoting)
    writer.writerow([f"column {i}" for i in range(len(records[0]))])
    lines = []
    for record in records:
        lines.append(1 + buffer.getvalue().count("\n"))
        writer.writerow(record)
    table = read_table(buffer.getvalue().encode(), Path("a.csv"), Options("data.train"))
    assert [list(record) for record in zip(*table.columns.values(), strict=True)] == records
    assert table.positions.tolist() == lines


def test_csv_keeps_an_unnamed_first_column(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", ",text\n0,a\n").columns == {"": ["0"], "text": ["a"]}


def test_column_names_make_the_first_line_data(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.csv", "a,1\nb,2\n", column_names=["text", "label"])
    assert rows.columns == {"text": ["a", "b"], "label": ["1", "2"]}
    assert rows.where(0).endswith("a.csv:1")
    message, key = error(tmp_path, "a.csv", "a,1,x\n", column_names=["text", "label"])
    assert message.startswith("a.csv:1: expected 2 fields as in data.column_names ('text', 'label'), found 3;")
    assert key == "data.column_names"
    message, key = error(tmp_path, "a.csv", "a,1\n", column_names=["text", "text"])
    assert (message, key) == (
        "data.column_names: the column name 'text' appears more than once; rename one of them",
        "data.column_names",
    )
    message, key = error(tmp_path, "a.jsonl", "{}", column_names=["text"])
    assert message == "a.jsonl is read as jsonl; column names apply to csv and tsv only"
    assert key == "data.column_names"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b,a\n1,2,3\n", "a.csv:1: the column name 'a' appears more than once"),
        ('a,b\n"1\n",2\n3\n', "a.csv:4: expected 2 fields as in a.csv:1 ('a', 'b'), found 1;"),
        ("a,b\n1,2,3\n", "a.csv:2: expected 2 fields as in a.csv:1 ('a', 'b'), found 3;"),
        ('a,b\n1,2\n3,"4\n5,6\n', "a.csv:3: broken csv record: the quote that opens in this record is never closed"),
        ('a,b\n1,"2"3\n', "a.csv:2: broken csv record: a field goes on after its closing quote; write a quote"),
        ("a,b\n1,2\r3,4\n", "a.csv:2: broken csv record: carriage return outside quotes"),
        ("", "a.csv has no rows"),
        ("\n\n", "a.csv has no rows"),
        ("a,b\n", "a.csv has no rows"),
    ],
)
def test_csv_that_is_broken_names_the_line(tmp_path: Path, content: str, expected: str) -> None:
    message, key = error(tmp_path, "a.csv", content, key="data.eval")
    assert message.startswith(expected)
    assert key == "data.eval"


def test_csv_reads_a_very_large_field_and_restores_the_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert load(tmp_path, "a.csv", "text\n" + "x" * (limit + 1) + "\n").column("text") == ["x" * (limit + 1)]
    error(tmp_path, "a.csv", 'text\n"')
    assert csv.field_size_limit() == limit


def test_csv_of_old_macs_ends_lines_with_carriage_returns(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.csv", "a,b\r1,2\r3,4\r")
    assert rows.columns == {"a": ["1", "3"], "b": ["2", "4"]}
    assert lines_of(rows) == [2, 3]


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.tsv", 'text\tlabel\r\n"open\t1\r\n\r\na "b", c\t\r\n')
    assert rows.columns == {"text": ['"open', 'a "b", c'], "label": ["1", ""]}
    assert lines_of(rows) == [2, 4]
    assert error(tmp_path, "a.tsv", "a\tb\n1\n")[0].startswith("a.tsv:2: expected 2 fields as in a.tsv:1 ('a', 'b')")
    assert error(tmp_path, "a.tsv", "a\ta\n1\t2\n")[0] == (
        "a.tsv:1: the column name 'a' appears more than once; rename one of them"
    )


@pytest.mark.parametrize("file", ["a.jsonl", "a.ndjson"])
def test_jsonl_fills_missing_keys_with_none(tmp_path: Path, file: str) -> None:
    rows = load(tmp_path, file, '{"a": 1, "b": "x"}\r\n\n{"c": [true], "a": null}\n')
    assert rows.columns == {"a": [1, None], "b": ["x", None], "c": [None, [True]]}
    assert lines_of(rows) == [1, 3]


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(
        st.fixed_dictionaries(
            {"a": CELL | AWKWARD},
            optional={"b": st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False), "c": st.lists(CELL)},
        ),
        min_size=1,
        max_size=8,
    ),
    ascii_only=st.booleans(),
)
def test_jsonl_round_trip(records: list[dict[str, Any]], ascii_only: bool) -> None:
    raw = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records).encode()
    table = read_table(raw, Path("a.jsonl"), Options("data.train"))
    names = {name for record in records for name in record}
    assert table.columns == {name: [record.get(name) for record in records] for name in names}
    assert table.positions.tolist() == list(range(1, len(records) + 1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1}\n{"a": }\n', "a.jsonl:2: broken JSON at column 7: Expecting value"),
        ('{"a": 1}\n\n[1]\n', "a.jsonl:3: expected an object, found list"),
        ('{"a": "\\ud83d"}\n', "a.jsonl:1: \\ud83d is half of a surrogate pair, not a character"),
        ("[" * 100_000, "a.jsonl:1: cannot read this JSON: "),
        ("\n", "a.jsonl has no rows"),
        ("{}\n{}\n", "a.jsonl has no columns: its records are empty"),
    ],
)
def test_jsonl_that_is_broken_names_the_line(tmp_path: Path, content: str, expected: str) -> None:
    assert error(tmp_path, "a.jsonl", content)[0].startswith(expected)


def test_jsonl_reads_an_escaped_surrogate_pair_as_a_character(tmp_path: Path) -> None:
    assert load(tmp_path, "a.jsonl", '{"a": "\\ud83d\\ude00"}').column("a") == ["\U0001f600"]


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '{"version": "1", "data": [{"a": 1}, {"a": 2}]}'])
def test_json_reads_an_array_or_the_only_list(tmp_path: Path, content: str) -> None:
    rows = load(tmp_path, "a.json", content)
    assert rows.columns == {"a": [1, 2]}
    assert rows.where(1) == f"{tmp_path}/a.json, record 2"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1},\n {"a" 2}]', "a.json:2: broken JSON at column 7: Expecting ':' delimiter"),
        ('[{"a": 1}, 2]', "a.json, record 2: expected an object, found int"),
        ("3", "a.json: expected an array of objects, found int"),
        ('{"a": [1], "b": [2, 3]}', "a.json: the lists have different lengths ('a' 1, 'b' 2); "),
        ('[{"a": "x"}, {"a": "\\uDC00"}]', "a.json, record 2: \\udc00 is half of a surrogate pair"),
        ("[]", "a.json has no rows"),
        (" ", "a.json has no rows"),
    ],
)
def test_json_that_is_broken_names_the_place(tmp_path: Path, content: str, expected: str) -> None:
    assert error(tmp_path, "a.json", content)[0].startswith(expected)


@pytest.mark.parametrize("file", ["a.txt", "a.text", "a.md", "a.py", "A.TXT"])
def test_text_is_one_row_per_paragraph(tmp_path: Path, file: str) -> None:
    rows = load(tmp_path, file, "\n\none\r\n  two \n\n \t\nthree\n")
    assert rows.columns == {"text": ["one\n  two ", "three"]}
    assert lines_of(rows) == [3, 7]
    assert error(tmp_path, file, " \n\n")[0] == f"{file} has no rows"


def test_parquet_reads_rows_and_refuses_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1, None]}), path)
    rows = load_rows(str(path))
    assert rows.columns == {"text": ["a", "b"], "label": [1, None]}
    assert rows.where(1) == f"{path}, record 2"
    with pytest.raises(DataError, match="is parquet, whose text is always utf-8") as info:
        load_rows(str(path), encoding="latin-1")
    assert info.value.key == "data.encoding"
    assert error(tmp_path, "b.parquet", "no parquet")[0].startswith("b.parquet is not a readable parquet file: ")
    pyarrow.parquet.write_table(pyarrow.table({"text": []}), path)
    with pytest.raises(DataError, match=r"has no rows$"):
        load_rows(str(path))


def test_parquet_refuses_a_duplicate_column_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns have the same name: 'a', 'a'"):
        load_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("file", "content"), [("a.csv.gz", "a\n1\n"), ("a.jsonl.gz", '{"a": "1"}'), ("A.TSV.GZ", "a\n1\n")]
)
def test_gzip_files_are_decompressed(tmp_path: Path, file: str, content: str) -> None:
    assert load(tmp_path, file, gzip.compress(content.encode())).columns == {"a": ["1"]}


@pytest.mark.parametrize("content", [b"a\n1\n", gzip.compress(b"a\n1\n")[:-9]], ids=["plain", "cut"])
def test_gzip_that_is_broken_is_refused(tmp_path: Path, content: bytes) -> None:
    message, _ = error(tmp_path, "a.csv.gz", content)
    assert message.startswith("a.csv.gz ends with .gz but cannot be decompressed: ")


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"\xef\xbb\xbfa\n\xc3\xa4\n", "utf-8"),
        (b"\xef\xbb\xbfa\n\xc3\xa4\n", "utf-8-sig"),
        (b"a\n\xe4\n", "latin-1"),
        (b"a\n\xe4\n", "cp1252"),
        ("a\n\u00e4\n".encode("utf-16"), "utf-16"),
    ],
)
def test_encoding_decodes_the_file(tmp_path: Path, content: bytes, encoding: str) -> None:
    assert load(tmp_path, "a.csv", content, encoding=encoding).columns == {"a": ["\u00e4"]}


def test_encoding_error_locates_the_wrong_byte(tmp_path: Path) -> None:
    message, key = error(tmp_path, "a.csv", b"\xef\xbb\xbfa\nok\nM\xfcller\n")
    assert message == (
        "a.csv:3: not utf-8: byte 0xfc at byte offset 9 (invalid start byte); data.encoding=cp1252 reads this line as "
        "'M\u00fcller'; set it if that is right, or convert the file to utf-8"
    )
    assert key == "data.encoding"


@pytest.mark.parametrize("name", ["utf-9", "hex", "rot13", "undefined", "a\0b", ""])
def test_encoding_that_is_unknown_is_refused(tmp_path: Path, name: str) -> None:
    message, key = error(tmp_path, "a.csv", "a\n1\n", encoding=name)
    assert message.startswith(f"unknown text encoding {name!r}; examples are utf-8")
    assert key == "data.encoding"


def test_binary_files_are_refused(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    assert error(tmp_path, "a.txt", png)[0] == "a.txt is not a text file: it is binary (it contains NUL bytes)"
    assert error(tmp_path, "a.txt", png, encoding="latin-1")[0].startswith("a.txt:3: NUL character at offset 8; ")
    assert error(tmp_path, "a.txt", "a\nb".encode("utf-16-le"))[0].startswith("a.txt:1: NUL character at offset 1; ")
