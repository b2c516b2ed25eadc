"""The files that ``predict`` reads: any format and encoding, whatever the run was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftlab.api.predict import _rows_of_file
from peftlab.errors import DataError
from peftlab.recipe import Recipe, load_recipe


def settings_of(**data: object) -> Recipe:
    return load_recipe({"task": "seq_cls", "model": {"name": "tiny:bert"}, "data": {"train": "a.csv", **data}}).recipe


def test_predict_reads_files_unlike_the_training_data(tmp_path: Path) -> None:
    run = settings_of(encoding="cp1252", delimiter="semicolon", format="csv", column_names=["text", "label"])
    (tmp_path / "a.csv").write_bytes("text\nM\u00fcller \u20ac\n".encode())
    assert _rows_of_file(tmp_path / "a.csv", run, ()).columns == {"text": ["M\u00fcller \u20ac"]}
    (tmp_path / "b.csv").write_bytes("text;n\nM\u00fcller \u20ac;1\n".encode("cp1252"))
    assert _rows_of_file(tmp_path / "b.csv", run, ()).columns == {"text": ["M\u00fcller \u20ac"], "n": ["1"]}


def test_predict_follows_settings_of_its_command_and_their_remedies(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text;n\nM\u00fcller \u20ac;1\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"data\.encoding=cp1252 reads this line as") as info:
        _rows_of_file(tmp_path / "a.csv", settings_of(), ())
    assert info.value.key is None
    run = settings_of(encoding="cp1252", delimiter="|")
    rows = _rows_of_file(tmp_path / "a.csv", run, ["data.encoding=cp1252", "data.delimiter=pipe"])
    assert rows.columns == {"text;n": ["M\u00fcller \u20ac;1"]}


def test_predict_of_a_file_with_splits_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"train": [{"text": "a"}], "test": [{"text": "b"}, {"text": "c"}]}')
    with pytest.raises(DataError, match=r"holds several tables: 'train', 'test'; name one, such as .*a\.json:train$"):
        _rows_of_file(path, settings_of(), ())
    assert _rows_of_file(Path(f"{path}:test"), settings_of(), ()).column("text") == ["b", "c"]


def test_predict_reads_a_folder_of_texts_file_by_file(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nsecond paragraph\n")
    assert len(_rows_of_file(tmp_path, settings_of(), ())) == 2
