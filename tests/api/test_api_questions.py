"""A run of extractive_qa from check to merge: figures that a new process finds again, plain PEFT, resume, NF4, a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import Interrupted, RecipeError, VerificationError
from peftlab.training.progress import SilentProgress
from tests.family_examples import write_family
from tests.run_examples import Stopper, contents

PETS, CITIES = ["cat", "dog", "cow", "hen"], ["Paris", "Rome", "Oslo", "Bern", "Lima"]


def question(i: int) -> dict[str, Any]:
    pet, city = PETS[i % 4], CITIES[i % 5]
    context = f"The {pet} {i} is in {city}." + " So it is." * (i % 3)
    asked = "fox" if i % 5 == 4 else pet
    answers = (
        {"text": [], "answer_start": []} if asked == "fox" else {"text": [city], "answer_start": [context.index(city)]}
    )
    return {"id": str(i), "question": f"Where is the {asked}?", "context": context, "answers": answers}


def recipe(**sections: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "extractive_qa",
        "model": {"name": "model"},
        "data": {"train": "rows.jsonl", "eval_rows": 10, "max_length": 48, "stride": 6},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"max_steps": 6, "batch_size": 8, "lr": 1e-2},
        "run": {"dir": "run"},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return document


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(question(i)) + "\n" for i in range(50)))
    write_family(tmp_path / "model", "BertConfig", "extractive_qa")
    return tmp_path


def train(**sections: Any) -> Any:
    return peftlab.train(recipe(**sections), progress=SilentProgress())


def test_run_is_checked_trained_evaluated_and_merged(here: Path, process: Any) -> None:
    checked = peftlab.check(recipe(), progress=SilentProgress())
    found = checked["train"]["questions"]
    assert checked["ok"] and checked["train"]["rows"] == 40 and found["windows"] > 40
    assert checked["estimate"]["steps"] == 6
    (shown,) = checked["preview"]
    assert [text for text, _, trained in shown["segments"] if trained] in ([c] for c in CITIES) or shown["label"]
    run = train(run={"merge": "original"})
    summary = run.summary
    assert summary["eval_rows"] == 10 and summary["merge"]["verified"]
    names = {f"squad_{kind}{part}" for kind in ("exact", "f1") for part in ("", "_answerable", "_unanswerable")}
    assert summary["after"].keys() == {"loss", *names}
    assert summary["after"]["loss"] < summary["before"]["loss"]
    for target in ("run", "run/merged"):
        done = process.run(["-m", "peftlab", "eval", target, "--json"], cwd=here, check=True)
        again = json.loads(done.stdout)
        assert again["rows"] == 10
        assert again["metrics"]["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
        assert again["metrics"]["squad_f1"] == pytest.approx(summary["after"]["squad_f1"])
    asked = [{k: question(i)[k] for k in ("question", "context")} for i in range(6)]
    results = list(peftlab.predict("run", asked, overrides=["eval.null_threshold=null"], progress=SilentProgress()))
    for row, result in zip(asked, results, strict=True):
        assert row["context"][result["start"] : result["end"]] == result["answer"] != ""


def test_adapter_opens_in_plain_peft_with_equal_logits(here: Path) -> None:
    import transformers
    from peft import PeftModel

    train()
    base = transformers.AutoModelForQuestionAnswering.from_pretrained("model", dtype="float32")
    plain = PeftModel.from_pretrained(base, "run/adapter").eval()
    opened = open_target(find_target("run"), SilentProgress())
    examples = opened.target.assembly(reads_data=True).held_out.examples[:5]
    ours = opened.task.outputs(opened.model, opened.task.collate(examples, "cpu")).values.unflatten(0, (-1, 2))
    for i, example in enumerate(examples):
        allowed = torch.from_numpy(example.extra["can_answer"]).bool()
        # The tokenizer does not say that its model reads types.
        with torch.no_grad():
            found = plain(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None])
        for side, logits in enumerate((found.start_logits[0], found.end_logits[0])):
            assert torch.allclose(ours[i, side, : len(example)][allowed], logits[allowed], atol=1e-5)


def test_resumed_run_has_the_bytes_of_one_that_was_not_stopped(here: Path) -> None:
    train()
    with pytest.raises(Interrupted):
        peftlab.train(recipe(run={"dir": "other", "save_every": 2}), progress=Stopper(at=3))
    peftlab.train("other", resume=True, progress=SilentProgress())
    assert contents(here / "run/adapter") == contents(here / "other/adapter")


def test_quantized_backbone(here: Path) -> None:
    run = train(model={"name": "tiny:bert", "quantize": "nf4"})
    again = peftlab.evaluate("run", progress=SilentProgress())["metrics"]
    assert again["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-5)


def test_a_witness_of_other_weights_is_refused(here: Path) -> None:
    from safetensors.torch import load_file, save_file

    train()
    file = here / "run/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t + (0.5 * torch.randn(t.shape) if "qa_outputs" in n else 0) for n, t in tensors.items()}, file)
    with pytest.raises(VerificationError):
        peftlab.evaluate("run", progress=SilentProgress())


@pytest.mark.usefixtures("short_timing")
@pytest.mark.parametrize("cached", [False, True])
def test_student_learns_from_a_teacher(here: Path, cached: bool) -> None:
    from peftlab.api.distill import distill

    train(adapter={"dropout": 0.0}, run={"dir": "teacher", "merge": "original"})
    changes: dict[str, Any] = {"teacher": "teacher", "student_init": {"layers": [0]}, "seeds": 1, "baseline": False}
    changes |= {"cache": "cache", "targets": {"k": 20}} if cached else {}
    settings = recipe(distill=changes, run={"dir": "student"}, train={"max_steps": 30})
    settings["adapter"] = {"method": "none"}
    settings["model"]["name"] = "teacher/merged"
    card = distill(settings, progress=SilentProgress()).summary["card"]
    rows = {row["name"]: row for row in card["metrics"]}
    assert {"squad_f1", "squad_exact", "kl", "agreement", "loss"} <= rows.keys()
    assert rows["kl"]["student"]["value"] < 0.5 * rows["kl"]["cut"]["value"]
    assert rows["squad_f1"]["teacher"]["value"] is not None


def test_what_cannot_work_is_refused_before_loading(here: Path) -> None:
    for changes, message in (
        ({"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 4}}, "predicts positions of the text"),
        ({"data": {"too_long": "drop"}}, "data.too_long: has no effect for task: extractive_qa"),
        ({"distill": {"teacher": "x", "cache": "c", "targets": {"fill": "hidden"}}}, "no hidden states to store"),
        ({"eval": {"metrics": ["accuracy"]}}, "does not apply to task: extractive_qa"),
    ):
        settings = recipe(**changes)
        if "method" in settings["adapter"]:
            settings["adapter"] = changes["adapter"]
        with pytest.raises(RecipeError, match=message):
            peftlab.check(settings, progress=SilentProgress())
    write_family(here / "gemma", "Gemma2Config", "extractive_qa")
    with pytest.raises(RecipeError, match="transformers has no gemma2 model for task: extractive_qa"):
        peftlab.check(recipe(model={"name": "gemma"}), progress=SilentProgress())


@pytest.mark.parametrize("family", ["BertConfig", "DistilBertConfig"])
def test_base_of_a_classifier_answers_questions(here: Path, family: str) -> None:
    """The config of a classifier names its classes; a head for spans has two outputs."""
    write_family(here / "model", family, "extractive_qa")
    path = here / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    run = train(train={"max_steps": 1}, run={"merge": "original"})
    assert run.summary["merge"]["verified"]
    again = peftlab.evaluate("run/merged", progress=SilentProgress())
    assert again["metrics"]["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-4)
