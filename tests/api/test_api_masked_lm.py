"""A masked language model on plain text: from check to distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlab
from peftlab.errors import Interrupted, PeftlabError, RecipeError
from peftlab.models.tiny import tiny_tokenizer
from peftlab.training.progress import SilentProgress
from tests.masked_examples import make_bert, masked_recipe, masked_tokenizer, write_bert, write_texts
from tests.run_examples import Stopper

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert")
    write_texts(tmp_path / "texts")
    return tmp_path


def train(recipe: Any, **options: Any) -> Any:
    return peftlab.train(recipe, progress=SilentProgress(), **options)


@pytest.mark.usefixtures("here")
def test_run_from_check_to_merge() -> None:
    recipe = masked_recipe()
    report = peftlab.check(recipe, progress=SilentProgress())
    assert report["ok"] and report["train"]["trained"] < 0.2 * report["train"]["tokens"]
    run = train(recipe)
    before, after = run.summary["before"], run.summary["after"]
    assert after["loss"] < before["loss"]
    assert after["perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item())
    assert set(after) == {"loss", "perplexity", "token_accuracy"}
    again = peftlab.evaluate("run", progress=SilentProgress())
    assert again["metrics"]["loss"] == pytest.approx(after["loss"], rel=1e-5)
    (result,) = peftlab.predict("run", ["a [MASK] cat"], progress=SilentProgress())
    assert len(result["masks"]) == 1 and len(result["masks"][0]) == 5
    assert peftlab.merge("run", progress=SilentProgress())["verified"]
    (merged,) = peftlab.predict("run/merged", ["a [MASK] cat"], progress=SilentProgress())
    assert merged["text"] == result["text"]


@pytest.mark.usefixtures("here")
def test_resumed_run_ends_with_the_same_bytes() -> None:
    """Each pass draws fresh masks, also after a resume in the middle of an epoch."""
    whole = train(masked_recipe())
    recipe = masked_recipe(run={"dir": "other", "save_every": 2})
    with pytest.raises(Interrupted):
        peftlab.train(recipe, progress=Stopper(at=3))
    resumed = train("other", resume=True)
    assert (resumed.folder / ADAPTER).read_bytes() == (whole.folder / ADAPTER).read_bytes()


@pytest.mark.usefixtures("here")
def test_masks_are_fresh_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab.tasks.masked_lm import MaskedLM

    seen: dict[int, set[bytes]] = {}
    right = MaskedLM.redraw

    def noted(self: MaskedLM, example: Any, rng: Any) -> Any:
        drawn = right(self, example, rng)
        seen.setdefault(example.row, set()).add(drawn.ids.tobytes())
        return drawn

    monkeypatch.setattr(MaskedLM, "redraw", noted)
    train(masked_recipe(train={"max_steps": 32}))  # four passes
    assert all(len(masks) >= 3 for masks in seen.values())


@pytest.mark.usefixtures("here")
def test_plain_peft_gives_the_same_logits() -> None:
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from peftlab.assembly.target import find_target, open_target

    train(masked_recipe())
    plain = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained("bert"), "run/adapter").eval()
    opened = open_target(find_target("run"), SilentProgress())
    examples = opened.target.assembly(reads_data=True).held_out.examples[:4]
    inputs = AutoTokenizer.from_pretrained("bert")
    with torch.no_grad():
        ours = opened.task.outputs(opened.model, opened.task.collate(examples, "cpu")).logits()
        theirs = torch.cat([
            plain(input_ids=torch.tensor(e.ids[None].astype("int64"))).logits[0][torch.tensor(e.trained)] for e in examples
        ])  # fmt: skip
    assert inputs.mask_token == "<|im_start|>"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_model_trains_and_evaluates_again(storage: str) -> None:
    run = train(masked_recipe(model={"quantize": storage}))
    again = peftlab.evaluate("run", progress=SilentProgress())
    assert again["metrics"]["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-4)


def test_whole_documents_are_trained_in_blocks(here: Path) -> None:
    data = {"format": "document", "too_long": "split", "max_length": 40, "eval_rows": 2}
    report = peftlab.check(masked_recipe(data=data), progress=SilentProgress())
    assert report["train"]["rows"] == 4 and report["train"]["blocks"] > 20
    assert report["preview"][0]["follows"] > 100 and not report["preview"][0]["cut"]
    assert train(masked_recipe(data=data)).summary["after"]["loss"] > 0


@pytest.mark.usefixtures("here", "short_timing")
def test_student_learns_from_a_teacher_with_the_same_masks() -> None:
    from peftlab.api.distill import distill

    teacher = train(masked_recipe(run={"dir": "teacher", "merge": "original"}))
    recipe = masked_recipe(
        adapter={"method": "none"},
        distill={"teacher": str(teacher.merged), "student_init": {"layers": [0], "weights": "copied"}, "seeds": 1},
    )
    recipe["adapter"] = {"method": "none"}
    run = distill(recipe, progress=SilentProgress())
    assert run.summary["card"]["verdict"]["text"]
    names = [row["name"] for row in run.summary["card"]["metrics"]]
    assert {"perplexity", "token_accuracy", "kl", "agreement"} <= set(names)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        ({"distill": {"teacher": "bert", "cache": "cache"}}, "distill.cache", "draws fresh ones in each pass"),
        ({"data": {"columns": {"label": "x"}}}, "data.columns.label", "has no effect for task: masked_lm"),
        ({"data": {"packing": True}}, "data.packing", "has no effect for task: masked_lm"),
        ({"train": {"mask_share": 1.5}}, "train.mask_share", "below 1"),
    ],
)
def test_recipe_that_cannot_work_is_refused(sections: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        peftlab.check(masked_recipe(**sections), progress=SilentProgress())
    assert key in str(error.value) and message in str(error.value)


def test_model_that_fills_no_masks_is_one_line_in_check(here: Path) -> None:
    write_bert(here / "maskless")
    tiny_tokenizer().save_pretrained(here / "maskless")
    for model, message in (("tiny:llama", "has no llama model for task: masked_lm"), ("maskless", "has no mask token")):
        with pytest.raises(PeftlabError, match=message):
            peftlab.check(masked_recipe(model={"name": model}), progress=SilentProgress())


@pytest.mark.usefixtures("here")
def test_tiny_bert_fills_masks() -> None:
    run = train(masked_recipe(model={"name": "tiny:bert"}, train={"max_steps": 2}))
    assert run.summary["after"]["perplexity"] > 1


@pytest.mark.usefixtures("here")
def test_teach_is_refused_because_masks_change() -> None:
    from peftlab.api.teach import teach

    with pytest.raises(RecipeError, match="fresh ones in each pass"):
        teach(masked_recipe(distill={"teacher": "bert", "cache": "c"}), progress=SilentProgress())


def test_command_line_shows_the_masks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peftlab.cli.app import run

    train(masked_recipe(train={"max_steps": 1}))
    assert run(["predict", "run", "a [MASK] cat"]) == 0
    fields = capsys.readouterr().out.rstrip("\n").split("\t")
    assert len(fields) == 10 and 0 < float(fields[1]) <= 1
    assert run(["predict", "run", "a [MASK] cat", "no mask"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run(["predict", "run", "a [MASK] cat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["masks"]


def test_family_without_such_a_head_is_one_line_in_check(here: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(here / "llama")
    masked_tokenizer().save_pretrained(here / "llama")
    with pytest.raises(RecipeError, match="transformers has no llama model for task: masked_lm") as error:
        peftlab.check(masked_recipe(model={"name": "llama"}), progress=SilentProgress())
    assert error.value.key == "model.name" and "another family" in str(error.value)


def test_new_head_is_trained_in_full_and_merged(here: Path) -> None:
    """A model for sentence embeddings has no head; the new one is no longer tied to the embeddings."""
    make_bert().bert.save_pretrained(here / "body")
    masked_tokenizer().save_pretrained(here / "body")
    run = train(masked_recipe(model={"name": "body"}, run={"merge": "original"}))
    assert run.summary["merge"]["verified"]
    for target in ("run", "run/merged"):
        again = peftlab.evaluate(target, progress=SilentProgress())
        assert again["metrics"]["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-4)
