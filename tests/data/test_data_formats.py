"""Files are read by their content, whatever their ending is; splits, class names and notes come with them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from peftlab.data import Rows, load_rows
from peftlab.errors import DataError

RECORDS = [{"text": f"sample {i}", "label": ("no", "yes")[i % 2]} for i in range(6)]
COLUMNS = {"text": [r["text"] for r in RECORDS], "label": [r["label"] for r in RECORDS]}
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
PRETTY = "".join(json.dumps(record, indent=1) + "\n" for record in RECORDS)
BY_NUMBER = {name: {str(i): value for i, value in enumerate(values)} for name, values in COLUMNS.items()}


def load(tmp_path: Path, file: str, content: str | bytes, **options: Any) -> Rows:
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_rows(str(path), **options)


def error(tmp_path: Path, file: str, content: str | bytes, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(DataError) as info:
        load(tmp_path, file, content, **options)
    return str(info.value).replace(f"{tmp_path}/", ""), info.value.key


def notes_of(rows: Rows, folder: Path) -> list[str]:
    return [note.message.replace(f"{folder}/", "") for note in rows.notes]


# JSON


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("lines.json", LINES),
        ("array.jsonl", json.dumps(RECORDS)),
        ("array_pretty.jsonl", json.dumps(RECORDS, indent=2)),
        ("concatenated.json", PRETTY),
        ("concatenated.jsonl", PRETTY),
        ("one_line.jsonl", PRETTY.replace("\n", "")),
        ("mixed.jsonl", json.dumps(RECORDS[0]) + "\n" + "".join(json.dumps(r, indent=1) for r in RECORDS[1:])),
        ("data.json", json.dumps({"version": "1", "data": RECORDS})),
        ("data.jsonl", json.dumps({"version": "1", "data": RECORDS}, indent=1)),
        ("beside_lists.json", json.dumps({"version": "1", "authors": ["a", "b"], "data": RECORDS})),
        ("equal_lists.json", json.dumps({"authors": ["a"] * 6, "rows": RECORDS})),
        ("column_lists.json", json.dumps(COLUMNS)),
        ("column_lists_beside.json", json.dumps({"version": 1, **COLUMNS})),
        ("pandas_columns.json", json.dumps(BY_NUMBER)),
        ("pandas_index.json", json.dumps({str(i): record for i, record in enumerate(RECORDS)})),
        (
            "pandas_split.json",
            json.dumps(
                {"columns": list(COLUMNS), "index": list(range(6)), "data": [list(r.values()) for r in RECORDS]}
            ),
        ),
        ("lines.txt", LINES),
        ("lines.csv", LINES),
        ("lines", LINES),
        ("array.dat", json.dumps(RECORDS)),
        ("table.json", "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in RECORDS)),
    ],
)
def test_json_is_read_by_content(tmp_path: Path, file: str, content: str) -> None:
    assert load(tmp_path, "x" if file == "lines" else file, content, format="auto").columns == COLUMNS


def test_json_objects_one_after_the_other_have_lines(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.json", PRETTY)
    assert [rows.where(i).rpartition(":")[2] for i in range(3)] == ["1", "5", "9"]


def test_json_conversation_is_one_row_and_no_table(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for file in ("a.json", "a.jsonl"):
        assert load(tmp_path, file, json.dumps(record)).columns == {"messages": [record["messages"]]}


def test_jsonl_object_with_a_list_is_one_row(tmp_path: Path) -> None:
    assert load(tmp_path, "a.jsonl", '{"text": "x", "tags": ["a", "b"]}').columns == {
        "text": ["x"],
        "tags": [["a", "b"]],
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1},\n]', "a.json:2: broken JSON at column 1: Expecting value; remove the comma before it"),
        ('[{"a": 1,}]', "a.json:1: broken JSON at column 10: "),
        (
            '{"a": 1},\n{"a": 2},',
            "a.json:1: broken JSON at column 9: Expecting value; objects that follow each other have",
        ),
        ("[{'a': 1}]", "a.json:1: broken JSON at column 3: "),
        ('[{"a": None}]', "a.json:1: broken JSON at column 8: Expecting value; JSON has null, true and false"),
        ('[\n{"a": 1}\n// no\n]', "a.json:3: broken JSON at column 1: "),
        ('[{"a": 1}]\n[{"a": 2}]', "a.json:2: broken JSON at column 1: Extra data; expected one array, or objects"),
        ('[{"a": 1},\n {"a": 2, "b": {"c": "a", "c": 3}}]', "a.json:2: one object gives the key 'c' twice; keep one"),
        ('{"a": "{\\"b\\""}\n{"a": 1,\n "a": 2}', "a.json:3: one object gives the key 'a' twice; keep one"),
        ('{"p": {"x": 1}, "q": {"y": 2}}', "a.json: an object of objects ('p', 'q' with 'x') can hold rows or columns"),
        ('{"p": [{"a": 1}], "q": [{"a": 2}]}', "a.json holds several tables: 'p', 'q'; name one, such as a.json:p"),
        ('{"a": [1, 2], "b": [1]}', "a.json: the lists have different lengths ('a' 2, 'b' 1); expected equally many"),
        ("{}", "a.json: expected an array of objects, an object with a list of objects, or one list per column; found"),
    ],
)
def test_json_that_is_unclear_names_the_place_and_the_remedy(tmp_path: Path, content: str, expected: str) -> None:
    assert error(tmp_path, "a.json", content)[0].startswith(expected)


def test_jsonl_key_given_twice_names_its_line(tmp_path: Path) -> None:
    message, _ = error(tmp_path, "a.jsonl", '{"a": "a"}\n{"a": 1, "b": 2, "a": 3}\n')
    assert message == "a.jsonl:2: one object gives the key 'a' twice; keep one"


# csv


TABLE = [["text", "label"], ["Gr\u00fc\u00dfe, k\u00f6ln", "gut"], ["b\u00f6se", "schlecht"], ["5,5", "gut"]]
OF_TABLE = {"text": [row[0] for row in TABLE[1:]], "label": [row[1] for row in TABLE[1:]]}


def table_text(delimiter: str, end: str = "\r\n") -> str:
    return "".join(delimiter.join(row) + end for row in TABLE)


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolon"), ("|", "pipe"), ("\t", "tab")])
@pytest.mark.parametrize("file", ["a.csv", "a.txt", "a.dat"])
def test_delimiter_is_taken_from_the_file(tmp_path: Path, delimiter: str, name: str, file: str) -> None:
    rows = load(tmp_path, file, table_text(delimiter))
    assert rows.columns == OF_TABLE
    assert f"{file} separates fields by {name}" in notes_of(rows, tmp_path)


def test_delimiter_of_a_sep_line_is_used_and_lines_are_counted_with_it(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.csv", b"\xef\xbb\xbfsep=;\r\n" + table_text(";").encode())
    assert rows.columns == OF_TABLE
    assert rows.where(0) == f"{tmp_path}/a.csv:3"
    assert load(tmp_path, "b.csv", "sep=~\na~b\n1~2\n").columns == {"a": ["1"], "b": ["2"]}


def test_delimiter_that_is_given_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", "a,x;b\n1,x;2\n", delimiter=";").columns == {"a,x": ["1,x"], "b": ["2"]}
    assert load(tmp_path, "a.tsv", "a;b\n1;2\n", delimiter=";").columns == {"a": ["1"], "b": ["2"]}
    message, key = error(tmp_path, "a.jsonl", LINES, delimiter=";")
    assert (message, key) == ("a.jsonl is read as jsonl; a delimiter applies to csv only", "data.delimiter")


def test_delimiter_stays_a_comma_for_texts_of_one_column(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", "text\na; b\nc\n").columns == {"text": ["a; b", "c"]}
    assert load(tmp_path, "a.csv", "a;b\n1;2\n", column_names=["text"]).columns == {"text": ["a;b", "1;2"]}
    assert load(tmp_path, "a.csv", "x;1\ny;2\n", column_names=["t", "n"]).columns == {"t": ["x", "y"], "n": ["1", "2"]}


def test_delimiter_error_names_the_record_and_the_key(tmp_path: Path) -> None:
    message, _ = error(tmp_path, "a.csv", "a;b\n1;2\n3\n")
    assert message.startswith("a.csv:3: expected 2 fields as in a.csv:1 ('a', 'b'), found 1; ")
    assert "a semicolon, quoted; data.delimiter sets another separator" in message


def test_columns_at_the_end_without_name_and_value_are_left_out(tmp_path: Path) -> None:
    assert load(tmp_path, "a.csv", "text,label,,\na,x,,\nb,y, ,\n").columns == {"text": ["a", "b"], "label": ["x", "y"]}
    assert "'' appears more than once; rename one of them" in error(tmp_path, "b.csv", "text,,\na,x,y\n")[0]
    assert load(tmp_path, "c.csv", ",text\n0,a\n").columns == {"": ["0"], "text": ["a"]}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_lines_of_white_space_are_no_records(tmp_path: Path, name: str) -> None:
    text = "text,label\na,x\n  \nb,y\n \n".replace(",", "\t" if name == "a.tsv" else ",")
    rows = load(tmp_path, name, text)
    assert (rows.columns["text"], rows.positions.tolist()) == (["a", "b"], [2, 4])
    assert load(tmp_path, "b.csv", "text\na\n \n").columns == {"text": ["a", " "]}


def test_quote_inside_a_quoted_field_names_the_line_and_the_remedy(tmp_path: Path) -> None:
    message, _ = error(tmp_path, "a.csv", 'text,label\n"a \\"b\\" c",x\n')
    assert message.startswith(
        "a.csv:2: broken csv record: a field goes on after its closing quote; write a quote inside"
    )


def test_text_files_of_prose_stay_text(tmp_path: Path) -> None:
    for prose in ("Roses are red, violets\nare blue, sugar\n", "one\n\ntwo\n", "[1] a note\n{x}\n", "a,b\n"):
        assert list(load(tmp_path, "a.txt", prose).columns) == ["text"]
    assert list(load(tmp_path, "a.md", "a\tb\n1\t2\n").columns) == ["text"]


def test_csv_of_many_columns_names_few_of_them(tmp_path: Path) -> None:
    header = ",".join(f"column{i}" for i in range(3000))
    assert len(error(tmp_path, "a.csv", f"{header}\n1,2\n")[0]) < 500
    with pytest.raises(DataError) as info:
        load(tmp_path, "b.csv", f"{header}\n{','.join('1' * 3000)}\n").column("text")
    assert (
        str(info.value).endswith("'column7' and 2,992 more; did you mean 'column2999'?") or len(str(info.value)) < 400
    )


# containers


def write_columnar(folder: Path, kind: str, features: datasets.Features | None = None) -> Path:
    data = datasets.Dataset.from_list(RECORDS)
    if features is not None:
        data = data.cast(features)
    path = folder / f"a.{kind}"
    table = data.data.table
    if kind == "parquet":
        data.to_parquet(path)
    elif kind == "stream":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    else:
        data.save_to_disk(path)
    return path


NAMED = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "maybe"])}
)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "feather", "saved"])
def test_columnar_files_are_read_with_their_class_names(tmp_path: Path, kind: str) -> None:
    plain = load_rows(str(write_columnar(tmp_path, kind)))
    assert plain.columns == COLUMNS
    assert not plain.class_names
    (tmp_path / "named").mkdir()
    rows = load_rows(str(write_columnar(tmp_path / "named", kind, NAMED)))
    assert rows.columns == COLUMNS
    assert rows.class_names == {"label": ("no", "yes", "maybe")}
    assert rows.select([1]).class_names == rows.class_names


def test_columnar_class_number_that_is_no_class_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"label": [0, -1, None, 7]})
    about = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    with pytest.raises(DataError, match=r"record 4: class number 7, but the file names 2 classes: 'a', 'b'"):
        load_rows(str(path))
    fewer = table.slice(0, 3).replace_schema_metadata({"huggingface": json.dumps(about)})
    pyarrow.parquet.write_table(fewer, path)
    assert load_rows(str(path)).columns == {"label": ["a", None, None]}


def test_columnar_float32_has_the_decimals_of_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"x": pyarrow.array([0.1, None], pyarrow.float32())}), tmp_path / "a.parquet"
    )
    assert load_rows(str(tmp_path / "a.parquet")).columns == {"x": [0.1, None]}


def test_archives_hold_one_file(tmp_path: Path) -> None:
    for file, content in (("a.jsonl.bz2", bz2.compress(LINES.encode())), ("a.json.xz", lzma.compress(LINES.encode()))):
        assert load(tmp_path, file, content).columns == COLUMNS
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("__MACOSX/._train.csv", "x")
        archive.writestr("data/train.csv", table_text(";"))
    assert load_rows(str(tmp_path / "a.zip")).columns == OF_TABLE
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("train.jsonl", LINES)
        archive.writestr("test.jsonl", LINES.split("\n")[0])
        archive.writestr("other.jsonl", '{"a": 1}')
    assert load_rows(f"{tmp_path}/b.zip").columns == COLUMNS
    assert len(load_rows(f"{tmp_path}/b.zip:test")) == 1
    assert load_rows(f"{tmp_path}/b.zip:other.jsonl").columns == {"a": [1]}
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("README.md", "about")
        archive.writestr("messages.csv", table_text(";"))
    assert load_rows(str(tmp_path / "d.zip")).columns == OF_TABLE
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("messages.csv.gz", gzip.compress(table_text(";").encode()))
    assert load_rows(str(tmp_path / "e.zip")).columns == OF_TABLE
    for file, members, says in (
        (
            "f.zip",
            {"e.zip": (tmp_path / "e.zip").read_bytes()},
            "f.zip holds an archive or a workbook, 'e.zip'; unpack it",
        ),
        ("g.zip", {"a/1.txt": b"x", "b/1.txt": b"y"}, "g.zip holds 2 text files; unpack it and name the folder"),
    ):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        assert error(tmp_path, file, (tmp_path / file).read_bytes())[0] == says
    assert error(tmp_path, "c.zip", b"PK\x03\x04 no archive")[0].startswith("c.zip cannot be unpacked: ")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("a.pkl", b"\x80\x04\x95", "a.pkl is a pickle, which can run code"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1", "a.xls is an old Excel or Word file; save the sheet as csv"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a.csv is a pointer of Git LFS"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\n", "a.parquet is a pointer of Git LFS"),
        ("a.json", b"\n<!DOCTYPE HTML><html>404</html>", "a.json is a web page, such as that of a failed download"),
        ("a.tar", b"\0" * 257 + b"ustar" + b"\0" * 300, "a.tar is a tar archive; unpack it"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path: Path, file: str, content: bytes, expected: str) -> None:
    assert error(tmp_path, file, content)[0].startswith(expected)


# splits

SPLITS = {"train": RECORDS[:4], "test": RECORDS[4:]}


def write_splits(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "a.json":
        path.write_text(json.dumps(SPLITS))
    elif kind == "nested.json":
        path.write_text(json.dumps({"version": 1, "data": SPLITS}))
    elif kind == "columns.json":
        path.write_text(json.dumps({s: {k: [r[k] for r in rows] for k in COLUMNS} for s, rows in SPLITS.items()}))
    elif kind == "saved":
        datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s, rows in SPLITS.items()}).save_to_disk(path)
    else:
        path.mkdir()
        (path / "README.md").write_text("About\n")
        for split, rows in SPLITS.items():
            place = path / split / "0.jsonl" if kind == "folders" else path / f"{split}-00000-of-00001.jsonl"
            place.parent.mkdir(exist_ok=True)
            place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["a.json", "nested.json", "columns.json", "saved", "folders", "files"])
def test_splits_are_named_or_noted(tmp_path: Path, kind: str) -> None:
    path = write_splits(tmp_path, kind)
    rows = load_rows(str(path))
    assert rows.column("text") == [r["text"] for r in SPLITS["train"]]
    names = "'test', 'train'" if kind in ("folders", "files") else "'train', 'test'"
    note = f"{kind} holds {names}; data.train reads 'train'; data.eval={kind}:test evaluates on another"
    assert notes_of(rows, tmp_path) == [note]
    # The remedies of the note and of the errors work.
    named = load_rows(f"{path}:test", key="data.eval")
    assert (named.column("text"), named.notes) == ([r["text"] for r in SPLITS["test"]], ())
    assert len(load_rows(str(path), key="data.eval", default_split="validation")) == 2
    assert len(load_rows(f"{path}:train#3")) == 3
    with pytest.raises(DataError, match="no split 'dev'; found '"):
        load_rows(f"{path}:dev")
    with pytest.raises(DataError, match=r"holds several tables: .* name one, such as"):
        load_rows(str(path), default_split=None)


def test_split_of_a_file_without_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"holds one table without a name; remove ':test'"):
        load_rows(f"{tmp_path}/a.jsonl:test")
    with pytest.raises(DataError, match="no such file in the folder"):
        load_rows(f"{tmp_path}/b.jsonl:test")


def test_saved_data_set_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    path = write_columnar(tmp_path, "saved")
    (path / "cache-1.arrow").write_bytes(b"left over")
    assert load_rows(str(path)).columns == COLUMNS
    next(path.glob("data-*.arrow")).unlink()
    with pytest.raises(
        DataError, match=r"is an incomplete saved data set: the file 'data-00000-of-00001\.arrow' of it is"
    ):
        load_rows(str(path))


# folders of texts and images


def write_classes(folder: Path) -> None:
    for name, text in (
        ("pos/1.txt", "good\n\nfilm\n"),
        ("neg/1.txt", "bad\n"),
        ("unsup/1.txt", "?"),
        ("urls.txt", "x"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_folder_notes_files_that_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.csv", "b.xlsx", "README.md", ".hidden", "dataset_infos.json"):
        (folder / name).write_text("text\nx\n")
    assert notes_of(load_rows(str(folder)), tmp_path) == ["data: 1 other file is not read: 'b.xlsx'"]
    (folder / "c.jsonl").write_text('{"text": "y"}')
    rows = load_rows(str(folder), format="csv")
    assert rows.columns == {"text": ["x"]}
    assert notes_of(rows, tmp_path) == ["data: 2 other files are not read: 'b.xlsx', 'c.jsonl'"]


def test_folder_of_texts_per_class_has_one_row_per_file(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    rows = load_rows(str(tmp_path / "train"), classes_from_folders=True)
    assert rows.columns == {"text": ["bad", "good\n\nfilm"], "label": ["neg", "pos"]}
    assert rows.where(1) == f"{tmp_path}/train/pos/1.txt:1"
    assert notes_of(rows, tmp_path) == ["train: 2 files are in no class folder, and not read"]
    write_classes(tmp_path / "test")
    both = load_rows(str(tmp_path), classes_from_folders=True)
    assert both.columns == rows.columns
    assert load_rows(f"{tmp_path}:test", classes_from_folders=True).where(0).endswith("test/neg/1.txt:1")
    # Without classes a text file holds paragraphs.
    assert load_rows(str(tmp_path / "train")).column("text") == ["bad", "good", "film", "?", "x"]


def test_folder_of_texts_without_classes_has_one_row_per_file_for_prediction(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one\n\ntwo\n")
    assert load_rows(str(tmp_path), classes_from_folders=True).columns == {"text": ["one\n\ntwo"]}


def test_folder_of_images_in_splits_has_classes_below_them(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert load_rows(str(tmp_path)).column("label") == ["cat", "dog"]
    assert load_rows(f"{tmp_path}:test").column("label") == ["cat"]


# encodings

EURO = "text,label\r\nCosts 5 \u20ac \u2013 \u201cgreat\u201d,good\r\n"


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
def test_encoding_of_a_byte_order_mark_is_used(tmp_path: Path, codec: str) -> None:
    rows = load(tmp_path, "a.csv", EURO.encode(codec))
    assert rows.column("text") == ["Costs 5 \u20ac \u2013 \u201cgreat\u201d"]
    assert notes_of(rows, tmp_path) == [f"a.csv is read as {codec}, as its byte order mark says"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (EURO.encode("cp1252"), "Costs 5 \u20ac \u2013 \u201cgreat\u201d"),
        (b"\xef\xbb\xbf" + EURO.encode("cp1252"), "Costs 5 \u20ac \u2013 \u201cgreat\u201d"),
        ("text,label\nM\u00fcller,x\n".encode("latin-1"), "M\u00fcller"),
        ("text,label\nab,x\n".encode("utf-16-le"), "ab"),
        ("text,label\nab,x\n".encode("utf-16-be"), "ab"),
        ("text,label\nM\u00fcller,x\n".encode("utf-16-le"), "M\u00fcller"),
        ("text,label\n\u3053\u3093\u306b\u3061\u306f,x\n".encode("shift_jis"), "\u3053\u3093\u306b\u3061\u306f"),
    ],
)
def test_encoding_remedy_works_when_it_is_followed(tmp_path: Path, content: bytes, text: str) -> None:
    message, key = error(tmp_path, "a.csv", content)
    assert key == "data.encoding"
    assert "latin-1" not in message
    encoding = message.partition("data.encoding=")[2].split()[0].rstrip(";")
    assert load(tmp_path, "a.csv", content, encoding=encoding).column("text") == [text]


def test_encoding_that_is_wrong_for_a_utf_8_file_says_so(tmp_path: Path) -> None:
    message, _ = error(tmp_path, "a.csv", "text\nM\u00fcller\n", encoding="ascii")
    assert message.endswith("; set data.encoding=utf-8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_encoding_of_two_bytes_is_refused_for_a_utf_8_file(tmp_path: Path, encoding: str) -> None:
    message, key = error(tmp_path, "a.txt", "even", encoding=encoding)
    assert message == (
        f"a.txt: not {encoding}, in which each line break has a NUL byte: it is valid utf-8; remove data.encoding"
    )
    assert key == "data.encoding"


def test_encoding_that_misreads_a_utf_8_file_is_noted(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.csv", "text\nM\u00fcller\n", encoding="cp1252")
    assert rows.column("text") == ["M\u00c3\u00bcller"]
    assert notes_of(rows, tmp_path) == [
        "a.csv is read as cp1252, but its 1 character is valid utf-8; remove data.encoding if the text looks wrong"
    ]
    assert load(tmp_path, "a.csv", b"text\nM\xfcller\n", encoding="cp1252").notes == ()
    assert load(tmp_path, "a.csv", b"text\nMiller\n", encoding="cp1252").notes == ()


def test_encoding_that_is_offered_shows_what_it_makes_of_a_mixed_file(tmp_path: Path) -> None:
    message, _ = error(tmp_path, "a.csv", "text\nM\u00fcller\n".encode() + b"K\xf6hler\nK\xf6nig\n")
    assert message.startswith("a.csv:3: not utf-8")
    assert (
        "reads this line as 'K\u00f6hler', but line 2 as 'M\u00c3\u00bcller', which is 'M\u00fcller' in utf-8"
        in message
    )


def test_encoding_of_a_mixed_or_cut_file_offers_no_encoding(tmp_path: Path) -> None:
    mixed = "text\nM\u00fcller \u20ac\n".encode() + b"M\xfcller\n"
    message, _ = error(tmp_path, "a.csv", mixed)
    assert message.startswith("a.csv:3: not utf-8")
    assert "mixes encodings; correct these lines" in message
    assert "it is cut off" in error(tmp_path, "a.csv", "text\na \u20ac".encode()[:-1])[0]


def test_odd_characters_are_counted_with_the_first_place(tmp_path: Path) -> None:
    rows = load(tmp_path, "a.csv", b"text,n\nok,1\nCosts \x80,2\n\x93x\x94,3\n", encoding="latin-1")
    assert notes_of(rows, tmp_path) == [
        "2 rows contain characters from U+0080 to U+009F, which are cp1252 bytes read as latin-1 (first in a.csv:3, column "
        "'text': U+0080); set data.encoding=cp1252"
    ]
    fixed = load(tmp_path, "a.csv", b"text,n\nok,1\nCosts \x80,2\n\x93x\x94,3\n", encoding="cp1252")
    assert (fixed.column("text")[1], fixed.notes) == ("Costs \u20ac", ())
    record = {"messages": [{"role": "user", "content": "a\u0007b \ufffd"}]}
    notes = notes_of(load(tmp_path, "b.jsonl", json.dumps(record)), tmp_path)
    assert [note.partition(" (")[0] for note in notes] == [
        "1 row contains U+FFFD, which an earlier conversion wrote for characters that it lost",
        "1 row contains control characters",
    ]
