"""The verbs that need a model, with fake functions behind them."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftlab.cli.app import run
from peftlab.runs import Run

LONG = "A sentence that is repeated until it is far too long for one line of any terminal. " * 12
LABELS = [
    {"label": "spam", "probability": 0.9, "probabilities": {"ham": 0.1, "spam": 0.9}},
    {"label": "ham", "probability": 0.75, "probabilities": {"ham": 0.75, "spam": 0.25}},
]


def _metrics(loss: Any, share: float, classes: list[str]) -> dict[str, Any]:
    flat = {"loss": loss, "accuracy": share, "precision_macro": share, "recall_macro": share, "f1_macro": share}
    return flat | {f"{family}_{name}": share for family in ("precision", "recall", "f1") for name in classes}


def _summary(classes: list[str]) -> dict[str, Any]:
    target = {
        "dtype": "float32",
        "bytes": 91582912,
        "layers": {"relative": 2e-6, "by_formula": 12, "by_probes": 2, "unchecked": 0},
        "logits": {"kl_mean": 4e-15, "top1": 1.0},
    }
    return {
        "name": "x",
        "task": "seq_cls",
        "eval_rows": 1234,
        "adapter": {"num_trained": 16384, "num_total": 107072},
        "before": _metrics("nan", 0.25, classes),
        "after": _metrics(0.37, 0.875, classes),
        "samples": [{"prompt": LONG, "before": "", "after": LONG}, {"prompt": "[b]?", "before": "\x1b[31mred"}],
        "training": {
            "steps": 1200, "seconds": 3723.0, "rows": 384, "tokens": 9587, "trained_tokens": 512.0, "rows_per_s": 3.01,
            "tokens_per_s": 12345.6, "peak_memory_bytes": 1056432128, "best_step": 40, "stopped_early": True,
        },
        "merge": {
            "target": "dequantized", "output": "runs/x/merged", "model_class": "AutoModelForCausalLM",
            "dtype": "auto", "verified": True,
            "targets": {"original": target, "dequantized": target},
        },
    }  # fmt: skip


@pytest.fixture
def train_result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    calls: dict[str, Any] = {"classes": ["ham", "spam"]}

    def train(recipe: str, overrides: list[str], **options: Any) -> Run:
        print("a library greets")
        calls.update(recipe=recipe, overrides=overrides, **options)
        return Run(Path("runs/x"), _summary(calls["classes"]))

    monkeypatch.setattr("peftlab.api.train.train", train)
    return calls


def test_train_passes_its_arguments_and_ends_with_tables(
    train_result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "smoke", "train.lr=1", "--replace", "eval.choices=[a, b]"]) == 0
    assert train_result["recipe"] == "smoke"
    assert train_result["overrides"] == ["train.lr=1", "eval.choices=[a, b]"]
    assert train_result["replace"] and not train_result["resume"]
    shown = capsys.readouterr()
    assert "library" in shown.err and "library" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "\x1b" not in shown.out
    for text in (
        "1,234 held-out rows",
        "+0.6250",
        "\nspam       0.8750",
        "[b]?",
        "(empty)",
        "1,200 steps in 1 h 02 min (stopped early)",
        "peak memory 1.06 GB",
        "dequantized",
        "verified",
        "runs/x/merged",
        'peftlab predict runs/x "',
    ):
        assert text in shown.out
    assert shown.out.count("A sentence") <= 6 + 3
    assert "peftlab chat" not in shown.out


def test_train_with_many_classes_stays_short(train_result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train_result["classes"] = [f"a rather long class name number {i}".replace(" ", "_") for i in range(77)]
    run(["train", "smoke"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 80
    assert "more" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_train_json_prints_the_metrics(train_result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "smoke", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] == "runs/x"
    assert document["before"]["loss"] == "nan"


def test_eval_shows_classes_and_confusions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = _metrics(float("inf"), 0.5, ["ham", "spam"])
    metrics |= {f"confusion_{a}_as_{b}": 1000.0 for a in ("ham", "spam") for b in ("ham", "spam")}
    report = {"target": "runs/x", "kind": "run", "rows": 4000, "metrics": metrics}
    monkeypatch.setattr("peftlab.api.evaluate.evaluate", lambda *_, **__: report)
    assert run(["eval", "runs/x", "data.eval=o.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["class", "precision", "recall", "f1"] for line in lines)
    assert any(line.split() == ["ham", "0.5000", "0.5000", "0.5000"] for line in lines)
    assert any(line.split() == ["ham", "1,000", "1,000"] for line in lines)
    assert run(["eval", "runs/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["loss"] == "inf"


def test_eval_shows_na_for_a_class_without_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = _metrics(0.5, 0.5, ["ham", "spam"]) | dict.fromkeys(("precision_spam", "recall_spam", "f1_spam"))
    report = {"target": "runs/x", "kind": "run", "rows": 4000, "metrics": metrics}
    monkeypatch.setattr("peftlab.api.evaluate.evaluate", lambda *_, **__: report)
    assert run(["eval", "runs/x"]) == 0
    assert any(line.split() == ["spam", "n/a", "n/a", "n/a"] for line in capsys.readouterr().out.splitlines())
    assert run(["eval", "runs/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["f1_spam"] is None


def test_merge_passes_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: dict[str, Any] = {}

    def merge(target: str, **options: Any) -> dict[str, Any]:
        calls.update(options, target=target)
        merged: dict[str, Any] = _summary([])["merge"]
        return merged

    monkeypatch.setattr("peftlab.api.merge.merge", merge)
    assert run(["merge", "runs/x", "--base", "original", "--max-kl", "0.1", "--dtype", "bfloat16"]) == 0
    assert calls == {
        "target": "runs/x", "recipe": None, "overrides": [], "base": "original", "output": None, "dtype": "bfloat16", "max_kl": 0.1,
        "min_top1": None, "replace": False,
    }  # fmt: skip
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_doctor_puts_problems_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = [
        {"name": "torch", "value": "missing", "status": "problem", "detail": "[bold] nothing works"},
        {"name": "Python", "value": "3.12", "status": "ok", "detail": "/usr/bin/python"},
    ]
    report = {"sections": [{"title": "software", "facts": facts}], "problems": 1}
    monkeypatch.setattr("peftlab.api.doctor.doctor", lambda: report)
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 problem" in lines[-2]
    assert "torch" in lines[-1] and "[bold] nothing works" in lines[-1]
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    calls: dict[str, Any] = {"results": LABELS}

    def predict(target: str, inputs: Any, **options: Any) -> Iterator[dict[str, Any]]:
        calls.update(options, inputs=inputs)
        print("a library greets")
        yield from calls["results"]

    monkeypatch.setattr("peftlab.api.predict.predict", predict)
    return calls


def _stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_predict_prints_label_and_probability_of_one_text(
    predicted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    predicted["results"] = LABELS[:1]
    assert run(["predict", "runs/x", "a text with a.b=c", "eval.batch_tokens=9", "--temperature", "0.5"]) == 0
    assert capsys.readouterr().out == "spam\t0.900000\n"
    assert predicted["inputs"] == ["a text with a.b=c"]
    assert predicted["overrides"] == ["eval.batch_tokens=9"]
    assert predicted["temperature"] == 0.5


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_predict_reads_lines_from_stdin(
    argument: list[str],
    predicted: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _stdin(monkeypatch, b"\xef\xbb\xbfone\r\n\ntwo")
    assert run(["predict", "runs/x", *argument]) == 0
    assert predicted["inputs"] == ["one", "two"]
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["spam\t0.900000", "ham\t0.750000"]
    assert "skipped 1 blank line of standard input" in shown.err


@pytest.mark.parametrize("content", [b"", b"\n \n", b"ok\n\xff\n"])
def test_predict_refuses_bad_stdin(
    content: bytes,
    predicted: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _stdin(monkeypatch, content)
    assert run(["predict", "runs/x"]) == 3
    assert "standard input" in capsys.readouterr().err


def test_predict_prints_each_generated_text_on_one_line(
    predicted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    predicted["results"] = [{"text": "a\nb"}, {"text": "[red]c[/red]"}]
    run(["predict", "runs/x", "one", "two"])
    assert capsys.readouterr().out == "a\\nb\n[red]c[/red]\n"
    predicted["results"] = [{"text": "a\nb"}]
    run(["predict", "runs/x", "one"])
    assert capsys.readouterr().out == "a\nb\n"


def test_predict_json_prints_inputs_and_labels(predicted: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", "runs/x", "one", "two", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["predictions"] == [{"input": "one"} | LABELS[0], {"input": "two"} | LABELS[1]]


def test_predict_writes_jsonl_and_csv(
    predicted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("out.jsonl", "out.csv"):
        assert run(["predict", "runs/x", "--file", "in.csv", "--output", str(tmp_path / name)]) == 0
        assert "2 predictions in" in capsys.readouterr().out
    assert predicted["inputs"] == Path("in.csv")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"row": 1} | LABELS[0], {"row": 2} | LABELS[1]]
    with (tmp_path / "out.csv").open() as file:
        assert list(csv.DictReader(file))[1] == {
            "row": "2", "label": "ham", "probability": "0.75", "probability_ham": "0.75", "probability_spam": "0.25",
        }  # fmt: skip
    assert run(["predict", "runs/x", "a", "--output", str(tmp_path / "out.csv")]) == 2
    assert "--replace" in capsys.readouterr().err
    assert run(["predict", "runs/x", "a", "b", "--output", str(tmp_path / "out.csv"), "--replace"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.jsonl"]


def test_predict_keeps_a_line_per_input_and_writes_notes(
    predicted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"label": None, "probability": None, "probabilities": {"ham": None, "spam": None}}
    long = {"meta": {"a": [1]}, "body": "line one\nline two, " + "x" * 200_000}
    predicted["results"] = [long | LABELS[0], long | nothing | {"note": "the text is empty"}, long | LABELS[1]]
    assert run(["predict", "runs/x", "--file", "in.csv", "--output", str(tmp_path / "out.csv")]) == 0
    assert predicted["columns"] is True
    assert "3 predictions in" in (shown := capsys.readouterr().out) and "spam 1,  ham 1" in shown
    before = csv.field_size_limit(1 << 20)
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert csv.field_size_limit(before) == 1 << 20
    own = ["label", "probability", "probability_ham", "probability_spam", "note"]
    assert list(lines[0]) == ["row", "meta", "body", *own]
    assert [line["note"] for line in lines] == ["", "the text is empty", ""]
    assert [line["label"] for line in lines] == ["spam", "", "ham"]
    assert lines[1]["probability_ham"] == "" and lines[1]["body"] == long["body"]
    assert json.loads(lines[2]["meta"]) == {"a": [1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv"]
    predicted["results"] = [LABELS[0], nothing | {"note": "the text is empty"}, {"text": None, "note": "x"}, LABELS[1]]
    assert run(["predict", "runs/x", "--file", "in.csv"]) == 0
    assert predicted["columns"] is False
    assert capsys.readouterr().out == "spam\t0.900000\n\n\nham\t0.750000\n"


def test_predict_interrupted_leaves_no_partial_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield LABELS[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("peftlab.api.predict.predict", predict)
    assert run(["predict", "runs/x", "a", "b", "--output", str(tmp_path / "out.csv")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_eval_prints_names_without_emoji_and_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = {"target": "tiny:llama: [b]", "kind": "base", "rows": 4, "metrics": {"loss": 1.0, "f1_:llama:": 0.5}}
    monkeypatch.setattr("peftlab.api.evaluate.evaluate", lambda *_, **__: report)
    assert run(["eval", "x"]) == 0
    shown = capsys.readouterr().out
    assert "tiny:llama: [b] (base)" in shown
    assert ":llama:" in shown.split("(base)")[1]
    assert "\x1b[1m" in shown
