"""``predict``, ``chat``, ``evaluate`` and ``merge`` with inputs, settings and adapters that users bring."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_examples import Notes, recipe, write_data

import peftlab
from peftlab.api.chat import _streamer
from peftlab.errors import DataError, RecipeError
from peftlab.training.progress import SilentProgress, make_progress

# Training rows are cut to 64 tokens; the model reads 512.
SHORT = {"data": {"max_length": 64}, "train": {"max_steps": 2}}
WRITES = {"eval": {"choices": None, "max_new_tokens": 80, "prompts": ["red " * 150, "red"]}}


@pytest.fixture
def writer(trained: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that writes text."""
    folder: Path = trained(recipe(**SHORT, **WRITES), write_data)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def classifier(trained: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder: Path = trained(recipe("seq_cls", **SHORT), write_data)
    monkeypatch.chdir(folder)
    return folder


def predict(inputs: Any, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    progress = Notes()
    return list(peftlab.predict("run", inputs, progress=progress, **options)), progress.lines


def test_predict_gives_an_unreadable_row_a_result_without_values(classifier: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(["red 1", "", " ", None, ["x"], "dog"]))
    )
    results, notes = predict(path)
    assert [r["label"] is None for r in results] == [False, True, True, True, True, False]
    empty = {"label": None, "probability": None, "probabilities": {"animal": None, "colour": None}}
    assert results[1] == empty | {"note": "the text is empty"}
    assert [r.get("note") for r in results[2:5]] == ["the text is empty"] * 2 + ["expected text, found ['x']"]
    assert notes == ["4 of 6 inputs without a result: in.jsonl:2, 3, 4 and 1 more; the first: the text is empty"]
    alone, _ = predict(["red 1", "dog"])
    assert [results[0]["probability"], results[5]["probability"]] == pytest.approx([a["probability"] for a in alone])
    assert predict([""]) == ([empty | {"note": "the text is empty"}], ["no result: the text is empty"])
    assert predict([{"text": "red"}, {"txt": "red"}])[0][1]["note"] == "the text is empty"


def test_predict_refuses_inputs_of_which_none_can_be_read(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input, record 1: expected text, found \[5\]"):
        predict([{"text": [5]}, {"text": [6]}])
    with pytest.raises(DataError, match=r"no column 'text'; found the columns 'body'"):
        predict([{"body": "red"}])


def test_predict_puts_the_columns_of_the_input_first(classifier: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    with path.open("w", newline="") as file:
        rows = [["id", "text", "label", "input_label", "row", "probability_animal"], ["a", "red 1", "x", "y", "9", "z"]]
        csv.writer(file).writerows(rows)
    ((result,), _) = predict(path, columns=True)
    names = ["id", "text", "input_input_label", "input_label", "input_row", "input_probability_animal"]
    assert sorted(list(result)[:6]) == sorted(names)
    assert list(result)[6:] == ["label", "probability", "probabilities"]
    assert (result["id"], result["text"], result["input_row"]) == ("a", "red 1", "9")
    assert {result["input_label"], result["input_input_label"]} == {"x", "y"}
    assert result["label"] in ("animal", "colour")


def test_predict_reads_more_than_a_training_row(classifier: Path) -> None:
    long = "red " * 40
    ((result,), notes) = predict([long])
    assert notes == [] and "note" not in result
    (longer, _), notes = predict(["red " * 400, "dog"])
    assert longer["note"].startswith("cut to 512 of ")
    assert notes == [f"1 of 2 inputs cut: input, record 1; the first: {longer['note']}"]


def test_generation_uses_the_limit_of_the_model(writer: Path) -> None:
    run = peftlab.open_run("run")
    assert [s["prompt"] for s in run.summary["samples"]] == WRITES["eval"]["prompts"]
    (long, short), notes = predict(["red " * 400, "dog"])
    assert long["note"].startswith("cut to the last 432 of ") and "note" not in short
    assert len(notes) == 1 and "1 of 2 inputs cut" in notes[0]
    with pytest.raises(RecipeError, match=r"an answer of 512 tokens") as caught:
        peftlab.check(recipe(**SHORT, eval=WRITES["eval"] | {"max_new_tokens": 512}), progress=SilentProgress())
    assert caught.value.key == "eval.max_new_tokens"
    with pytest.raises(RecipeError, match=r"reads at most 512 tokens.* an answer of 600 tokens") as caught:
        predict(["dog"], max_new_tokens=600)
    assert caught.value.key is None
    assert [r["text"] is None for r in predict(["dog", " "])[0]] == [False, True]


def test_chat_uses_the_limit_of_the_model_and_leaves_out_old_turns(writer: Path) -> None:
    chat = peftlab.Chat("run")
    assert chat.max_new_tokens == 256
    assert isinstance("".join(chat.reply("red")), str)
    assert chat.notes == []
    chat = peftlab.Chat("run", max_new_tokens=8, system="Be brief.")
    for _ in range(3):
        "".join(chat.reply("red " * 60))
    assert len(chat.messages) == 7
    "".join(chat.reply("red " * 60))
    assert any("turns are left out" in note and "at most 504 before an answer of 8" in note for note in chat.notes)
    chat.reset()
    chat.notes.clear()
    "".join(chat.reply("red " * 400))
    assert len(chat.notes) == 1 and chat.notes[0].endswith("its start is cut")


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (
            {"prompt": "Word: {word}\nKind:\n", "completion": "{kind}", "user": None, "assistant": None},
            "Word: sky\nKind:\n",
        ),
        ({"user": "Word: {word}"}, "<|im_start|>user\nWord: sky<|im_end|>\n<|im_start|>assistant\n"),
    ],
    ids=["alone", "conversation"],
)
def test_chat_writes_a_message_as_training_did(
    trained: Any, monkeypatch: pytest.MonkeyPatch, template: dict[str, Any], read: str
) -> None:
    document = recipe(**SHORT)
    document["data"] = {**recipe()["data"], "max_length": 64}
    document["data"]["template"] = {**document["data"]["template"], **template}
    monkeypatch.chdir(trained(document, write_data))
    chat = peftlab.Chat("run")
    seen: list[str] = []
    generate = chat._opened.model.generate
    decode = chat._task.tokenizer.decode

    def watched(**inputs: Any) -> Any:
        seen.append(decode(inputs["input_ids"][0]))
        return generate(**inputs)

    monkeypatch.setattr(chat._opened.model, "generate", watched)
    for text in ("red", "sky"):
        "".join(chat.reply(text))
    assert seen[1].endswith(read) and ("red" in seen[1]) == (template.get("prompt") is None)
    assert [turn["content"] for turn in chat.messages if turn["role"] == "user"] == ["red", "sky"]
    assert any("reads each message alone" in note for note in chat.notes) == (template.get("prompt") is not None)


def test_chat_streams_the_same_text_of_an_answer_as_predict(writer: Path) -> None:
    task = peftlab.Chat("run")._task
    task.tokenizer.add_tokens(["<A>"], special_tokens=True)
    label, end = task.tokenizer.convert_tokens_to_ids("<A>"), task.tokenizer.eos_token_id
    answer = [*task.tokenizer("red ", add_special_tokens=False)["input_ids"], label, end, task.tokenizer.pad_token_id]
    streamer = _streamer(task)
    streamer.put(torch.tensor([[5, label]]))  # the prompt
    for token in answer:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer) == task.text_of(np.array(answer))
    assert "<A>" in task.text_of(np.array(answer))


def test_evaluate_takes_another_file(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("text,kind\nred 9,colour\ndog 9,animal\ncow 9,animal\n")
    progress = Notes()
    report = peftlab.evaluate("run", overrides=[f"data.eval={tmp_path / 'other.csv'}"], progress=progress)
    assert report["rows"] == 3
    assert any(
        line.startswith("data.eval on the command line replaces data.eval_rows (recipe.lock.yaml:")
        for line in progress.lines
    )


def test_evaluate_of_another_file_needs_no_training_rows_and_no_class_of_eval_best(
    classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("text,kind\nred 9,colour\n")
    settings = ["data.train=/gone.csv", "eval.best=f1_animal"]
    report = peftlab.evaluate("run", overrides=[*settings, f"data.eval={tmp_path / 'other.csv'}"])
    assert report["rows"] == 1
    assert report["metrics"]["f1_animal"] is None
    with pytest.raises(DataError, match="no such file"):
        peftlab.evaluate("run", overrides=settings)


def test_evaluate_reads_the_data_before_the_model(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("text\nred 9\n")
    stream = io.StringIO()
    with pytest.raises(DataError, match="no column 'kind'"):
        peftlab.evaluate("run", overrides=[f"data.eval={tmp_path / 'other.csv'}"], progress=make_progress(stream))
    assert stream.getvalue().endswith("reading data ...\n")


def test_adapter_without_its_run_needs_a_recipe(classifier: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree("run/adapter", adapter)
    document = recipe("seq_cls", **SHORT)
    with pytest.raises(RecipeError, match="an adapter without its run; name its recipe with --recipe"):
        peftlab.merge(adapter, progress=SilentProgress())
    report = peftlab.merge(adapter, recipe=document, output=tmp_path / "merged", progress=SilentProgress())
    assert report["verified"]
    expected, _ = predict(["red 1", "dog"])
    for target, options in ((adapter, {"recipe": document}), (tmp_path / "merged", {})):
        results = list(peftlab.predict(target, ["red 1", "dog"], progress=SilentProgress(), **options))
        assert [r["label"] for r in results] == [r["label"] for r in expected]
        assert [r["probability"] for r in results] == pytest.approx([r["probability"] for r in expected], abs=1e-5)
