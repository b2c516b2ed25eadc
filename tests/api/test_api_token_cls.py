"""Named entities from recipe to predictions: check, train, evaluate, predict, resume, merge, PEFT alone, NF4, distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import DataError, Interrupted, RecipeError
from peftlab.training.progress import SilentProgress
from tests.family_examples import write_family
from tests.run_examples import Stopper

PEOPLE, PLACES = ["Ann Lee", "Bob", "Carla Diaz", "Dan O'Neil"], ["Paris", "New York", "Rome"]


def write_rows(folder: Path) -> None:
    """The same sentences as texts with spans, and as a CoNLL file."""
    spans, conll = [], ["-DOCSTART- X O", ""]
    for i in range(24):
        person, place = PEOPLE[i % 4], PLACES[i % 3]
        text = f"{person} went to {place} on day {i}."
        start = text.index(place)
        spans.append({"text": text, "spans": [[0, len(person), "PER"], [start, start + len(place), "LOC"]]})
        for words, label in ((person, "PER"), ("went to", None), (place, "LOC"), (f"on day {i} .", None)):
            for k, word in enumerate(words.split()):
                conll.append(f"{word} X {'O' if label is None else ('I-' if k else 'B-') + label}")
        conll.append("")
    (folder / "spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spans))
    (folder / "rows.conll").write_text("\n".join(conll) + "\n")


def recipe(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "token_cls",
        "model": {"name": "tiny:bert"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": "spans.jsonl", "eval_rows": 6},
        "train": {"max_steps": 6, "batch_size": 6, "lr": 1e-2},
        "run": {"dir": "run"},
    }
    return {**base, **{name: {**base.get(name, {}), **values} for name, values in sections.items()}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    return tmp_path


def train(**sections: Any) -> Any:
    return peftlab.train(recipe(**sections), progress=SilentProgress())


def plain_outputs(base: Any, run: str, examples: list[Any]) -> list[torch.Tensor]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, f"{run}/adapter").eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor(e.ids[None].astype("int64"))).logits[0, e.trained] for e in examples]


def our_outputs(run: str) -> tuple[Any, list[Any], list[torch.Tensor]]:
    opened = open_target(find_target(run), SilentProgress())
    examples = opened.target.assembly(reads_data=True).held_out.examples
    with torch.no_grad():
        ours = [opened.task.outputs(opened.model, opened.task.collate([e], "cpu")).logits() for e in examples]
    return opened, examples, ours


def test_from_recipe_to_predictions() -> None:
    checked = peftlab.check(recipe(), progress=SilentProgress())
    assert checked["ok"] and checked["train"]["trained"] > 0
    assert [(e["label"], e["spans"]) for e in checked["train"]["labels"]] == [("LOC", 18), ("PER", 18)]
    assert "(PER)" in checked["preview"][0]["label"]
    run = train(train={"max_steps": 40}, run={"merge": "original"})
    after = run.summary["after"]
    assert after["entity_f1"] > 0.9 and set(after) >= {"accuracy", "entity_recall_PER", "entity_precision_LOC"}
    assert run.summary["merge"]["verified"]
    again = peftlab.evaluate("run", progress=SilentProgress())["metrics"]
    assert {k: v for k, v in again.items() if k in after} == pytest.approx(after)
    text = "Ann Lee went to Rome on day 7."
    for target in ("run", "run/merged"):
        (result,) = peftlab.predict(target, [text], progress=SilentProgress())
        found = [(s["text"], s["label"], text[s["start"] : s["end"]]) for s in result["spans"]]
        assert found == [("Ann Lee", "PER", "Ann Lee"), ("Rome", "LOC", "Rome")]
        assert all(0.5 < s["score"] <= 1 for s in result["spans"])
    config = json.loads(Path("run/merged/config.json").read_text())
    assert config["id2label"] == {"0": "O", "1": "B-LOC", "2": "I-LOC", "3": "B-PER", "4": "I-PER"}


def test_plain_peft_gives_the_same_logits() -> None:
    import transformers

    from peftlab.models.tiny import tiny_config

    tiny = transformers.AutoModel.from_config(tiny_config("tiny:bert"))
    tiny.save_pretrained("base")
    from peftlab.models.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained("base")
    train(model={"name": "base"})
    opened, examples, ours = our_outputs("run")
    auto = transformers.AutoModelForTokenClassification
    base = auto.from_pretrained("base", dtype="float32", num_labels=len(opened.task.class_names))
    for a, b in zip(ours, plain_outputs(base, "run", examples), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_resume_ends_with_the_same_bytes() -> None:
    train(run={"dir": "whole", "save_every": 2})
    with pytest.raises(Interrupted):
        peftlab.train(recipe(run={"dir": "cut", "save_every": 2}), progress=Stopper(at=3))
    peftlab.train("cut", resume=True, progress=SilentProgress())
    name = "adapter/adapter_model.safetensors"
    assert (Path("whole") / name).read_bytes() == (Path("cut") / name).read_bytes()


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_weights_train_and_open_again(storage: str) -> None:
    run = train(model={"quantize": storage})
    again = peftlab.evaluate("run", progress=SilentProgress())["metrics"]
    assert again["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-4)


def test_decoders_read_conll_files_and_predict_lists_of_words() -> None:
    train(model={"name": "tiny:llama"}, data={"train": "rows.conll"}, train={"max_steps": 30})
    (result,) = peftlab.predict("run", [{"tokens": ["Bob", "went", "to", "Paris"]}], progress=SilentProgress())
    assert {"start", "end", "label", "text", "score", "tokens"} == set(result["spans"][0])
    (text,) = peftlab.predict("run", ["Bob went to Paris"], progress=SilentProgress())
    assert [s["text"] for s in text["spans"]] == [s["text"] for s in result["spans"]]


def test_a_tag_for_each_word() -> None:
    run = train(data={"train": "rows.conll", "columns": {"word_tags": "tags"}})
    assert set(run.summary["after"]) >= {"accuracy", "f1_macro", "f1_B-PER"} and "entity_f1" not in run.summary["after"]
    (result,) = peftlab.predict("run", ["Bob went"], progress=SilentProgress())
    assert [w["text"] for w in result["words"]] == ["Bob", "went"]


@pytest.mark.usefixtures("short_timing")
def test_a_teacher_run_is_distilled_into_a_smaller_student() -> None:
    train(train={"max_steps": 40}, run={"dir": "teacher"})
    student = recipe(run={"dir": "student"}, train={"max_steps": 20})
    student |= {"distill": {"teacher": "teacher", "student_init": {"layers": [0]}, "seeds": 1}}
    card = peftlab.distill(student, progress=SilentProgress()).summary["card"]
    assert card["headline"] == "entity_f1"
    metrics = {row["name"]: row for row in card["metrics"]}
    assert {"entity_f1", "entity_precision", "entity_recall", "accuracy", "loss", "agreement", "kl"} <= set(metrics)
    assert metrics["entity_f1"]["teacher"]["value"] > 0.9
    assert 0 <= metrics["entity_f1"]["student"]["value"] <= 1
    (result,) = peftlab.predict("student", ["Bob went to Rome"], progress=SilentProgress())
    assert isinstance(result["spans"], list)


def test_the_best_label_must_be_held_out() -> None:
    rows = [json.loads(line) for line in Path("spans.jsonl").read_text().splitlines()]
    for row in rows[6:]:
        row["spans"] = row["spans"][:1]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    data = {"eval": "held.jsonl", "eval_rows": None}
    with pytest.raises(RecipeError, match="no held-out row has the class 'LOC', so entity_f1_LOC cannot be measured"):
        peftlab.check(recipe(data=data, eval={"best": "entity_f1_LOC"}), progress=SilentProgress())
    checked = peftlab.check(recipe(data=data), progress=SilentProgress())
    assert any(f["kind"] == "absent_label" for f in checked["findings"])


def test_rows_that_lack_something_are_refused_or_dropped() -> None:
    with Path("spans.jsonl").open("a") as file:
        file.write('{"text": "", "spans": []}\n{"text": "no spans", "spans": null}\n')
    with pytest.raises(DataError, match=r"spans\.jsonl:25: the text is empty"):
        peftlab.check(recipe(), progress=SilentProgress())
    checked = peftlab.check(recipe(data={"empty": "drop"}), progress=SilentProgress())
    left = checked["train"]["left_out"]
    assert {(entry["reason"], entry["rows"]) for entry in left} == {
        ("dropped: there are no words", 1),
        ("dropped: there are no spans", 1),
    }


def test_a_family_without_such_a_head_is_refused() -> None:
    import transformers

    from peftlab.models.tiny import tiny_tokenizer

    config = transformers.BartConfig(vocab_size=260, d_model=32, encoder_layers=1, decoder_layers=1)
    transformers.AutoModel.from_config(config).save_pretrained("bart")
    tiny_tokenizer().save_pretrained("bart")
    message = r"transformers has no bart model for task: token_cls \(AutoModelForTokenClassification\)"
    with pytest.raises(RecipeError, match=message):
        peftlab.check(recipe(model={"name": "bart"}), progress=SilentProgress())


def test_prompts_before_the_rows_are_refused() -> None:
    adapter = {"method": "prompt_tuning", "rank": 8, "alpha": 16, "dropout": 0.0, "num_virtual_tokens": 4}
    with pytest.raises(RecipeError, match="PEFT has no prompt_tuning for task: token_cls; use lora"):
        peftlab.check(recipe(adapter=adapter), progress=SilentProgress())


@pytest.mark.parametrize("adapter", [{"method": "none"}, {}])
def test_encoder_of_an_encoder_decoder_reads_the_same_tokens_again(folder: Path, adapter: dict[str, Any]) -> None:
    """T5's class writes a config that says it is no encoder-decoder; the labels stay on the first tokens of the words."""
    write_family(folder / "t5", "T5Config", "token_cls")
    document = {**recipe(model={"name": "t5"}, train={"max_steps": 1}), "adapter": adapter}
    run = peftlab.train(document, progress=SilentProgress())
    target = "run"
    if not adapter:
        peftlab.merge("run", progress=SilentProgress())
        target = "run/merged"
    loss = run.summary["after"]["loss"]
    assert peftlab.evaluate(target, progress=SilentProgress())["metrics"]["loss"] == pytest.approx(loss, rel=1e-4)
