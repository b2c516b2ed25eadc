"""Sentence embeddings: pooling by hand, the files of sentence-transformers, and a whole distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peftlab.adapters import inject, planned_modules
from peftlab.api.distill import distill
from peftlab.api.evaluate import evaluate
from peftlab.api.predict import predict
from peftlab.api.train import train
from peftlab.data import Rows
from peftlab.distillation import VectorObjective
from peftlab.errors import ArtifactError, RecipeError, VerificationError
from peftlab.models import SentenceWriter, find_pretrained, load_model, load_tokenizer, save_plain, sentence_files
from peftlab.tasks.embedding import Embedding
from peftlab.training.distill_loss import DistillLoss, Share
from peftlab.training.parity import check_parity
from peftlab.training.progress import SilentProgress
from peftlab.training.teacher_outputs import ModelTeacher

TEXTS = ["a cat", "the dog barks at night", "sums", "one more text of some length", "x y z", "nothing at all"]
ROWS = Rows.from_dicts([{"text": text} for text in TEXTS], name="made")
OPTIONS: dict[str, Any] = {"max_length": 64, "too_long": "error", "training": True}


def bert(pooling: str = "mean", *, normalize: bool = False, seed: int | None = None) -> tuple[Any, Embedding]:
    pretrained = find_pretrained("tiny:bert")
    task = Embedding(load_tokenizer(pretrained), pooling=pooling, normalize=normalize)
    model = load_model(pretrained, auto_class=task.spec.auto_class, device="cpu")
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * parameter.abs().mean()
    return model, task


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_of_a_padded_batch_equal_those_of_each_text(pooling: str, normalize: bool) -> None:
    model, task = bert(pooling, normalize=normalize)
    model = model.double()
    examples = task.encode(ROWS, **OPTIONS).examples
    outputs = task.outputs(model, task.collate(examples, "cpu"))
    assert outputs.vectors and outputs.targets is None and list(outputs.counts) == [1] * len(TEXTS)
    for text, vector in zip(TEXTS, outputs.values, strict=True):
        hidden = model(torch.tensor([task.tokenizer(text)["input_ids"]])).last_hidden_state[0]
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        wanted = wanted / wanted.norm() if normalize else wanted
        torch.testing.assert_close(vector, wanted, rtol=1e-9, atol=1e-12)
    reference = task.reference_outputs(model, examples, "cpu").values
    torch.testing.assert_close(outputs.values, reference, rtol=1e-9, atol=1e-12)


def test_distillation_gradient_equals_plain_pytorch_for_any_split() -> None:
    teacher, _ = bert(seed=1)
    model, task = bert()
    teacher, model = teacher.double(), model.double().requires_grad_()
    examples = task.encode(ROWS, **OPTIONS).examples
    shares = [Share(ModelTeacher(teacher, task, device="cpu"))]
    loss = DistillLoss(task, [(1.0, VectorObjective("hidden_cosine"))], shares)
    parts = []
    for text in TEXTS:
        ids = torch.tensor([task.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            target = teacher(ids).last_hidden_state[0].mean(0)
        parts.append(1 - F.cosine_similarity(model(ids).last_hidden_state[0].mean(0), target, dim=0))
    wanted, weight = torch.stack(parts).sum(), model.encoder.layer[0].attention.self.query.weight
    (slope,) = torch.autograd.grad(wanted, weight)
    for split in ([6], [1, 5], [2, 3, 1]):
        chosen = torch.arange(6).split(split)
        total = sum(loss(model, task.collate([examples[i] for i in part], "cpu")) for part in chosen)
        torch.testing.assert_close(total, wanted, rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.autograd.grad(total, weight)[0], slope, rtol=1e-7, atol=1e-12)


def test_parity_gate_finds_a_mean_over_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: padding counts as text."""
    import peftlab.tasks.embedding as module

    teacher, _ = bert(seed=1)
    model, task = bert()
    planned = planned_modules(model, peft_type=task.spec.peft_type, targets="all-linear")
    adapted = inject(model, "lora", peft_type=task.spec.peft_type, rank=4, alpha=8.0)
    examples = task.encode(ROWS, **OPTIONS).examples
    loss = DistillLoss(
        task, [(1.0, VectorObjective("hidden_cosine"))], [Share(ModelTeacher(teacher, task, device="cpu"))]
    )
    options: dict[str, Any] = {"planned": planned, "kernels": "auto", "device": "cpu", "where": str}
    options |= {"loss_sum": loss, "reference_loss_sum": loss.reference}
    assert check_parity(adapted, task, examples, **options).num_adapted == len(planned)
    monkeypatch.setattr(module, "_masked_mean", lambda hidden, mask: hidden.mean(1))
    with pytest.raises(VerificationError, match="the training path"):
        check_parity(adapted, task, examples, **options)


# Files of sentence-transformers


def sentence_folder(
    folder: Path, pooling: dict[str, Any], *, extra: str | None = None, seed: int | None = None
) -> Path:
    model, task = bert(seed=seed)
    save_plain(model, task.tokenizer, folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    kinds += [("3_Extra", extra)] if extra else []
    modules = [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 1, **pooling}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    return folder


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls + mean"),
    ],
)
def test_pooling_is_read_and_written(tmp_path: Path, config: dict[str, Any], pooling: str) -> None:
    pretrained = find_pretrained(str(sentence_folder(tmp_path / "model", config)))
    files = sentence_files(pretrained)
    assert (files.pooling, files.normalize, files.max_length) == (pooling, True, 48)
    target = tmp_path / "written"
    save_plain(load_model(pretrained, auto_class="AutoModel", device="cpu"), load_tokenizer(pretrained), target)
    SentenceWriter(load_tokenizer(pretrained), files, pooling="mean").save_pretrained(target)
    again = sentence_files(find_pretrained(str(target)))
    assert (again.pooling, again.normalize, again.max_length) == ("mean", True, 48)
    assert json.loads((target / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 64


def test_sentence_files_without_support_are_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "dense", {"pooling_mode": "mean"}, extra="Dense")
    with pytest.raises(RecipeError, match="ends with a module 'Dense'"):
        sentence_files(find_pretrained(str(folder)))
    folder = sentence_folder(tmp_path / "damaged", {"pooling_mode": "mean"})
    (folder / "modules.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"modules\.json cannot be read"):
        sentence_files(find_pretrained(str(folder)))
    assert sentence_files(find_pretrained("tiny:bert")).pooling is None


# Whole runs


def settings(folder: Path, model: str = "tiny:bert", **distill: Any) -> dict[str, Any]:
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{t} {i}"}) + "\n" for i in range(8) for t in TEXTS)
    )
    return {
        "task": "embedding",
        "model": {"name": model},
        "data": {"train": str(folder / "texts.jsonl"), "eval_rows": 12},
        "train": {"max_steps": 12, "batch_size": 16, "lr": 3e-3},
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "distill": {"teacher": model, **distill},
    }


@pytest.mark.parametrize("method", ["lora", "none"])
def test_distill_a_student_with_fewer_layers(tmp_path: Path, method: str) -> None:
    source = sentence_folder(tmp_path / "source", {"pooling_mode": "cls"})
    teacher = sentence_folder(tmp_path / "teacher", {"pooling_mode": "cls"}, seed=1)
    recipe = settings(tmp_path, str(source), student_init={"layers": [0]}) | {"train": {"max_steps": 40, "lr": 1e-2}}
    recipe["distill"]["teacher"] = str(teacher)
    recipe["adapter"] = {"method": method}
    run = distill(recipe, progress=SilentProgress())
    card = run.summary["card"]
    assert card["headline"] == "spearman" and card["verdict"]["outcome"] == "not_compared"
    assert "no labels" in card["verdict"]["text"]
    cosine = next(row for row in card["metrics"] if row["name"] == "cosine")
    assert 1 - cosine["student"]["value"] < 0.6 * (1 - cosine["cut"]["value"])
    assert cosine["baseline"] is None
    student = tmp_path / "run" / "student"
    assert sentence_files(find_pretrained(str(student))).pooling == "cls"
    (prediction,) = predict(student, ["the dog barks"], progress=SilentProgress())
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    with torch.no_grad():
        hidden = model(**tokenizer("the dog barks", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(
        torch.tensor(prediction["vector"]), F.normalize(hidden[0, 0], dim=0), rtol=1e-4, atol=1e-6
    )


def test_distill_from_random_weights_scores_no_cut_student(tmp_path: Path) -> None:
    init = {"weights": "random", "num_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    run = distill(settings(tmp_path, student_init=init, seeds=2), progress=SilentProgress())
    row = run.summary["card"]["metrics"][0]
    assert row["cut"] is None
    weights = [(tmp_path / "run" / f"seed-{i}" / "init" / "model.safetensors").read_bytes() for i in (0, 1)]
    assert weights[0] != weights[1]
    # If the widths differ, losses between vectors compare similarities.
    assert not any(row["name"] == "cosine" for row in run.summary["card"]["metrics"])


def test_embedding_without_a_teacher_cannot_train_or_evaluate(tmp_path: Path) -> None:
    recipe = settings(tmp_path)
    del recipe["distill"]
    with pytest.raises(RecipeError, match=r"data\.columns={anchor: COLUMN, positive: COLUMN}"):
        train(recipe, progress=SilentProgress())
    with pytest.raises(RecipeError, match="no labels to score"):
        evaluate("tiny:bert", recipe=recipe, progress=SilentProgress())
    (prediction,) = predict("tiny:bert", ["a"], recipe=recipe, progress=SilentProgress())
    assert len(prediction["vector"]) == 64


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("distill", "temperature", 2.0, "no softmax"),
        ("distill", "hard_weight", 0.5, "no labels"),
        ("distill", "baseline", False, "no labels"),
        ("distill", "losses", ["forward_kl"], "compares probabilities, and task: embedding has none"),
        ("eval", "every", 5, "no labels"),
        ("train", "class_weights", "balanced", "class_weights"),
        ("distill", "headline", "accuracy", "expected a metric of the report card"),
        ("model", "pooling", "max", "pooling"),
    ],
)
def test_keys_without_effect_are_errors(tmp_path: Path, section: str, key: str, value: Any, message: str) -> None:
    recipe = settings(tmp_path)
    recipe[section] = {**recipe.get(section, {}), key: value}
    with pytest.raises(RecipeError, match=message):
        distill(recipe, progress=SilentProgress())
