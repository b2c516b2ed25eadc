"""Common mistakes on the command line give an exit code and one helpful message, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftlab.cli.app import run as cli


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [("free prize now", "spam"), ("see you at home", "ham")] * 12
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"{t} {i},{k}\n" for i, (t, k) in enumerate(rows)))
    return tmp_path


def write(folder: Path, task: str = "seq_cls", **sections: dict[str, Any]) -> str:
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name": "tiny:bert" if task == "seq_cls" else "tiny:llama"},
        "data": {"train": "data.csv"},
        "train": {"max_steps": 2, "batch_size": 4},
    }
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return "r.yaml"


CHAT = {"template": {"user": "{text}", "assistant": "{label}"}}
RAW = {"template": {"prompt": "{text}", "completion": "{label}"}}

CASES: dict[str, tuple[str, dict[str, Any], str | None, int, list[str]]] = {
    # name: task, recipe sections, contents of data.csv (None: the valid file), exit code, parts of the message
    "misspelt key": ("seq_cls", {"train": {"lrr": 1}}, None, 2, ["r.yaml", "line", "train.lrr", "did you mean `lr`"]),
    "wrong type": ("seq_cls", {"train": {"lr": "fast"}}, None, 2, ["line", "train.lr", "fast"]),
    "unknown task": ("seq_clss", {}, None, 2, ["task", "seq_cls"]),
    "unknown model": ("seq_cls", {"model": {"name": "./nope"}}, None, 2, ["model.name", "r.yaml:3", "./nope"]),
    "unknown package": ("seq_cls", {"model": {"name": "package:nope/x"}}, None, 2, ["nope", "pip"]),
    "missing file": (
        "seq_cls",
        {"data": {"train": "dat.csv"}},
        None,
        3,
        ["data.train", "r.yaml", "dat.csv", "data.csv"],
    ),
    "empty file": ("seq_cls", {}, "", 3, ["data.csv"]),
    "header only": ("seq_cls", {}, "text,label\n", 3, ["data.csv", "no rows"]),
    "wrong column": ("seq_cls", {"data": {"columns": {"text": "txt"}}}, None, 3, ["'txt'", "'text'", "r.yaml"]),
    "missing label": ("seq_cls", {}, "text,label\na,x\nb,\nc,y\nd,x\n", 3, ["data.csv:3"]),
    "one class": ("seq_cls", {}, "text,label\na,x\nb,x\nc,x\n", 3, ["'x'", "two"]),
    "ragged row": ("seq_cls", {}, "text,label\na,x\nb,y,z\n", 3, ["data.csv:3"]),
    "too long": ("seq_cls", {"data": {"max_length": 8}}, None, 3, ["data.csv:2", "too_long"]),
    "longer than the model": ("seq_cls", {"data": {"max_length": 9999}}, None, 2, ["data.max_length", "512"]),
    "100,000 tokens": (
        "seq_cls",
        {},
        "text,label\nb,ham\na,spam\n" + "x" * 100_000 + ",ham\nc,spam\n",
        3,
        ["data.csv:4"],
    ),
    "empty text": ("seq_cls", {}, "text,label\na,x\n,y\nb,x\nc,y\n", 3, ["data.csv:3", "empty"]),
    "no chat template": (
        "causal_lm",
        {"model": {"chat_template": "none.jinja"}, "data": CHAT},
        None,
        2,
        ["none.jinja", "model.chat_template"],
    ),
    "zero trained tokens": (
        "causal_lm",
        {"data": {**RAW, "max_length": 4, "too_long": "truncate"}},
        None,
        3,
        ["zero trained"],
    ),
    "template column": (
        "causal_lm",
        {"data": {"template": {"prompt": "{body}", "completion": "x"}}},
        None,
        3,
        ["{body}", "text"],
    ),
    "no adapter target": ("seq_cls", {"adapter": {"targets": ["qeury"]}}, None, 2, ["qeury", "query", "r.yaml"]),
    "label not a choice": (
        "causal_lm",
        {"data": CHAT, "eval": {"choices": ["a", "b"]}},
        None,
        3,
        ["data.csv:", "eval.choices"],
    ),
    "unknown metric": ("seq_cls", {"eval": {"metrics": ["acuracy"]}}, None, 2, ["acuracy", "accuracy"]),
    "key without effect": ("seq_cls", {"model": {"compute_dtype": "float32"}}, None, 2, ["compute_dtype", "nf4"]),
    "tracker not installed": ("seq_cls", {"run": {"log": ["trackio"]}}, None, 2, ["trackio", "pip install"]),
    "NaN loss": ("seq_cls", {"train": {"lr": 1e38, "max_steps": 4}}, None, 6, ["data.csv:", "not updated"]),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line_mistake_gives_one_message(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    task, sections, content, code, parts = CASES[name]
    if content is not None:
        (here / "data.csv").write_text(content)
    before = {p.name for p in here.iterdir()} | {"r.yaml"}
    assert cli(["train", write(here, task, **sections)]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    message = " ".join(err[err.index("error:") :].split())
    for part in parts:
        assert part in message
    assert message.count("error:") == 1
    left = {p.name for p in here.iterdir()}
    assert left == before | ({"runs"} if name == "NaN loss" else set())  # the steps before the bad one are kept


def test_command_line_reports_a_byte_that_is_not_utf8(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "data.csv").write_bytes(b"text,label\nok,x\ncaf\xe9,y\n")
    assert cli(["train", write(here)]) == 3
    message = " ".join(capsys.readouterr().err.split())
    for part in ("data.csv:3", "0xe9", "data.encoding"):
        assert part in message, message


def test_command_line_keeps_the_folder_of_another_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(here, run={"dir": "mine"}, eval={"before": False})
    assert cli(["train", recipe]) == 0
    kept = {p: p.read_bytes() for p in (here / "mine").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert cli(["train", recipe]) == 2
    assert "--replace" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (here / "mine").rglob("*") if p.is_file()} == kept
    (here / "papers").mkdir()
    (here / "papers/thesis.txt").write_text("years of work")
    assert cli(["train", recipe, "run.dir=papers", "--replace"]) == 2
    assert (here / "papers/thesis.txt").read_text() == "years of work"


def test_command_line_refuses_adapters_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", write(here, run={"dir": "mine"}, eval={"before": False})]) == 0
    other = write(here, "causal_lm", data=CHAT)
    capsys.readouterr()
    assert cli(["eval", "mine/adapter", "--recipe", other]) == 5
    assert "another model" in " ".join(capsys.readouterr().err.split())
    weights = here / "mine/adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert cli(["predict", "mine", "hello"]) == 5
    assert "damaged" in " ".join(capsys.readouterr().err.split())
    weights.unlink()
    (here / "mine/adapter/adapter_model.bin").write_bytes(b"\x80\x04")
    assert cli(["merge", "mine"]) == 5
    assert "pickle" in " ".join(capsys.readouterr().err.split())


def test_command_line_ctrl_c_saves_and_says_how_to_resume(process: Any, here: Path) -> None:
    recipe = write(here, train={"max_steps": 100_000}, run={"dir": "mine"}, eval={"before": False})
    log = here / "mine/metrics.jsonl"
    with process.start(["-m", "peftlab", "train", recipe]) as training:
        training.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
        training.send_signal(signal.SIGINT)
        done = training.wait(60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "peftlab train mine --resume" in " ".join(done.stderr.split())
    (step,) = [int(p.name.removeprefix("step-")) for p in (here / "mine/checkpoints").iterdir()]
    assert json.loads((here / "mine/run.json").read_text())["status"] == "interrupted"
    assert step >= 3


def test_command_line_on_a_full_disk_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert cli(["train", write(here, run={"dir": "mine"})]) == 4
    assert "free" in capsys.readouterr().err
    assert not (here / "mine").exists()


def test_command_line_reports_a_run_dir_that_cannot_be_created(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", write(here, run={"dir": "data.csv/mine"}, eval={"before": False})]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "data.csv/mine" in message
    assert "run.dir" in message
