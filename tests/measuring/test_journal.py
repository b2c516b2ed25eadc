"""The journal under several writers and after kills. tests/bench/test_benchmark.py uses it in a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftlab.errors import ArtifactError, RecipeError
from peftlab.measuring.journal import Journal, begin, read_records, resume_journal

HEADER = {
    "machine": {"name": "one"},
    "versions": {"torch": "2"},
    "clocks": {"sm": 1.0},
    "date": "today",
    "command": "a",
}
WRITER = """
import sys
from pathlib import Path
from peftlab.measuring.journal import Journal
journal = Journal(Path(sys.argv[1]), [])
for number in range(100):
    journal.write({"kind": "row", "writer": sys.argv[2], "number": number, "long": "x" * 10_000})
"""


def test_journal_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    begin(path, HEADER).close()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(i)]) for i in range(3)]
    assert [w.wait() for w in writers] == [0, 0, 0]
    records = read_records(path)
    assert records[0]["kind"] == "header"
    for writer in "012":  # none is lost, and each writer keeps its order
        assert [r["number"] for r in records[1:] if r["writer"] == writer] == list(range(100))


def test_journal_drops_the_half_line_of_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal = begin(path, HEADER)
    with path.open("ab") as killed:
        killed.write(b'{"kind": "row", "half')
    assert [r["kind"] for r in read_records(path)] == ["header"]
    journal.write({"kind": "row", "number": 1})
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["header", "row"]


def test_go_on_needs_the_same_machine_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RecipeError, match="no benchmark in"):
        resume_journal(path, HEADER)
    begin(path, HEADER).close()
    later = HEADER | {"clocks": {"sm": 2.0}, "date": "tomorrow", "command": "a --resume"}
    assert resume_journal(path, later).records == [{"kind": "header", **HEADER}]
    with pytest.raises(ArtifactError, match=r'versions.torch: "2" there, "3" now'):
        resume_journal(path, later | {"versions": {"torch": "3"}})
    lines = path.read_text()
    path.write_text(lines + "{broken\n" + '{"kind": "row"}\n')
    with pytest.raises(ArtifactError, match=r"line 2 is damaged.*start over with another run"):
        resume_journal(path, HEADER, restart="another run")
    with pytest.raises(ArtifactError, match="line 2 is damaged"):
        read_records(path)


def test_begin_overwrites_the_journal_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = begin(path, HEADER)
    first.write({"kind": "row"})
    assert isinstance(begin(path, HEADER), Journal)
    assert len(read_records(path)) == 1
