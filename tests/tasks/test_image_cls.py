"""Image classification: reading images, batches, the loss, LoRA on a vision transformer, and a whole run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional as F

from peftlab.adapters import inject, planned_modules
from peftlab.api.check import check
from peftlab.api.evaluate import evaluate
from peftlab.api.predict import predict
from peftlab.api.train import train
from peftlab.data import Augmentation, Rows, load_rows, read_images
from peftlab.errors import DataError, RecipeError
from peftlab.models import find_pretrained, load_image_reader, load_model
from peftlab.tasks.classification import Labels
from peftlab.tasks.image_cls import ImageClassification
from peftlab.training.parity import check_parity
from peftlab.training.progress import SilentProgress

NAMES = [str(i) for i in range(10)]
OPTIONS = {"max_length": 9, "too_long": "error", "training": True}


def vit() -> tuple[Any, ImageClassification]:
    pretrained = find_pretrained("tiny:vit")
    task = ImageClassification(load_image_reader(pretrained), labels=Labels(NAMES))
    model = load_model(pretrained, auto_class=task.spec.auto_class, device="cpu", **task.model_kwargs())
    return model, task


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


# Reading


def test_read_images_gives_the_same_pixels_for_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(PIXELS))
    forms = ["a.png", str(tmp_path / "a.png"), png(PIXELS), {"bytes": png(PIXELS), "path": None}, {"path": "a.png"},
             PIXELS, PIXELS.tolist()]  # fmt: skip
    rows = Rows.from_dicts([{"image": form} for form in forms], name=str(tmp_path / "rows.csv"))
    for image, _ in read_images(rows, "image", length=5):
        assert np.array_equal(np.asarray(image.pixels("L")), PIXELS)
        assert np.array_equal(np.asarray(image.pixels("RGB"))[..., 1], PIXELS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.png", "rows.csv, record 1: the image .*no.png cannot be read: No such file"),
        ("text.png", "expected an image, found a damaged file or another format: [^ ]*text.png$"),
        ("cut.png", "expected an image, found a damaged file or another format: .*cut.png"),
        (b"GIF89", "found a damaged file or another format: 5 bytes$"),
        (None, r"expected an image \(a path, .*\), found None; data\.empty=drop leaves"),
        ([[1, 2], [3]], "expected pixels"),
        ([[0, 256]], r"shape \[1, 2\] with values from 0 to 256"),
        ([[0.5, 1.0]], "whole numbers from 0 to 255"),
        (np.zeros((2, 2, 4)), r"shape \[2, 2, 4\]"),
    ],
)
def test_read_images_refuses_what_is_no_image(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(png(np.tile(PIXELS, (8, 8)))[:80])
    rows = Rows.from_dicts([{"image": value}], name=str(tmp_path / "rows.csv"))
    with pytest.raises(DataError, match=message) as caught:
        list(read_images(rows, "image", length=5))
    assert caught.value.key == "data.columns.image"


def test_load_rows_reads_a_folder_per_class(tmp_path: Path) -> None:
    for label, level in (("cat", 10), ("dog", 200)):
        for i in range(3):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.png").write_bytes(png(np.full((8, 8), level + i, dtype=np.uint8)))
    (tmp_path / "README.md").write_text("about the pictures")
    rows = load_rows(str(tmp_path))
    assert rows.columns["label"] == ["cat"] * 3 + ["dog"] * 3
    assert [np.asarray(i.pixels("L"))[0, 0] for i, _ in read_images(rows, "image", length=5)] == [
        10, 11, 12, 200, 201, 202,
    ]  # fmt: skip
    before = rows.fingerprint
    (tmp_path / "cat" / "0.png").write_bytes(png(PIXELS))
    assert load_rows(str(tmp_path)).fingerprint != before


# Batches and the loss


def test_pixel_values_by_hand_and_order_of_the_batch() -> None:
    _, task = vit()
    rows = load_rows("sklearn:digits#5")
    encoded = task.encode(rows, **OPTIONS)
    assert encoded.lengths.tolist() == [2] * 5  # one patch and the class token
    batch = task.collate(encoded.examples[::-1], "cpu")
    wanted = torch.tensor(rows.columns["image"][::-1], dtype=torch.float64)[:, None] / 255 * 2 - 1
    torch.testing.assert_close(batch.inputs["pixel_values"], wanted.float(), rtol=0, atol=1e-6)
    assert batch.labels is not None and batch.labels.tolist() == [int(x) for x in rows.columns["label"][::-1]]


def test_loss_and_gradient_equal_plain_pytorch_for_any_split() -> None:
    model, _ = vit()
    task = ImageClassification(
        load_image_reader(find_pretrained("tiny:vit")), labels=Labels(NAMES, class_weights="balanced")
    )
    model = model.double().requires_grad_()
    rows = load_rows("sklearn:digits#6")
    examples = task.encode(rows, **OPTIONS).examples
    labels = torch.tensor([int(x) for x in rows.columns["label"]])
    counts = torch.bincount(labels, minlength=10)
    weights = 6 / (10 * counts.double())[labels]
    images = torch.tensor(np.array(rows.columns["image"]), dtype=torch.float32)
    pixels = ((images[:, None] * np.float32(1 / 255) - 0.5) / 0.5).double()
    wanted = (F.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="none") * weights).sum()
    slope = torch.autograd.grad(wanted, model.classifier.weight)[0]
    for split in ([6], [1, 5], [2, 2, 2]):
        parts = torch.arange(6).split(split)
        loss = sum(task.loss_sum(model, task.collate([examples[i] for i in part], "cpu")) for part in parts)
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)  # pixel values are made in float32
        # Tiny entries of the slope are sums of larger ones and have their float32 error.
        torch.testing.assert_close(torch.autograd.grad(loss, model.classifier.weight)[0], slope, rtol=1e-5, atol=1e-7)


def test_ledger_finds_repeated_and_contradicting_images() -> None:
    _, task = vit()
    other = 255 - PIXELS
    rows = Rows.from_dicts(
        [{"image": PIXELS, "label": "1"}, {"image": other, "label": "2"}, {"image": PIXELS.tolist(), "label": "3"}],
        name="made",
    )
    ledger = task.encode(rows, **OPTIONS, keep=False).ledger
    assert ledger.repeated_rows().tolist() == [2]
    assert ledger.contradicting_rows().tolist() == [0, 2]
    report = ledger.report()
    assert report["tokens"] is None and report["kept"] == 3
    assert {e["label"]: e["rows"] for e in report["labels"]}["1"] == 1


# Adapters


def test_lora_trains_the_head_in_full() -> None:
    model, task = vit()
    planned = planned_modules(model, peft_type=None, targets="all-linear")
    adapted = inject(model, "lora", peft_type=None, rank=4, alpha=8.0)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert planned and not any("classifier" in name for name in planned)
    assert sorted(n for n in trained if "lora_" not in n) == [
        "base_model.model.classifier.modules_to_save.default.bias",
        "base_model.model.classifier.modules_to_save.default.weight",
    ]
    examples = task.encode(load_rows("sklearn:digits#8"), **OPTIONS).examples
    report = check_parity(adapted, task, examples, planned=planned, kernels="auto", device="cpu", where=str)
    assert report.num_adapted == len(planned) == report.num_fused


def test_parity_gate_finds_images_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: labels keep their order."""
    from peftlab.errors import VerificationError

    model, task = vit()
    adapted = inject(model, "lora", peft_type=None, rank=4, alpha=8.0)
    planned = planned_modules(vit()[0], peft_type=None, targets="all-linear")
    examples = task.encode(load_rows("sklearn:digits#8"), **OPTIONS).examples
    right = task.tokenizer.__class__.__call__
    monkeypatch.setattr(task.tokenizer.__class__, "__call__", lambda self, images: right(self, images).flip(0))
    with pytest.raises(VerificationError, match="the training path"):
        check_parity(adapted, task, examples, planned=planned, kernels="auto", device="cpu", where=str)


# Whole runs


def digits(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "task": "image_cls",
        "model": {"name": "tiny:vit"},
        "data": {"train": "sklearn:digits:train#200", "eval": "sklearn:digits:test#60"},
        "train": {"max_steps": 20, "batch_size": 32, "lr": 5e-3},
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        **more,
    }


@pytest.mark.parametrize("method", ["lora", "none"])
def test_train_learns_predicts_and_loads_in_plain_transformers(tmp_path: Path, method: str) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    more: dict[str, Any] = {"adapter": {"method": method}}
    settings = digits(tmp_path, **more)
    if method == "lora":
        settings["run"]["merge"] = "original"
    run = train(settings, progress=SilentProgress())
    before, after = run.summary["before"], run.summary["after"]
    assert after["loss"] < before["loss"] - 0.3
    again = evaluate(tmp_path / "run", progress=SilentProgress())["metrics"]
    assert again["accuracy"] == pytest.approx(after["accuracy"])
    folder = tmp_path / "run" / ("model" if method == "none" else "merged")
    (tmp_path / "digit.png").write_bytes(png(np.array(load_rows("sklearn:digits").columns["image"][3], dtype=np.uint8)))
    (prediction,) = predict(folder, [str(tmp_path / "digit.png")], progress=SilentProgress())
    processor, model = (
        AutoImageProcessor.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
    )
    with PIL.Image.open(tmp_path / "digit.png") as image, torch.no_grad():
        probs = model(**processor(images=image, return_tensors="pt")).logits.softmax(-1)[0]
    assert prediction["probabilities"]["3"] == pytest.approx(float(probs[3]), abs=1e-5)
    assert model.config.id2label[3] == "3"


def test_check_of_a_recipe_with_images(tmp_path: Path) -> None:
    report = check(digits(tmp_path, data={"train": "sklearn:digits#100"}), progress=SilentProgress())
    assert report["ok"] and report["train"]["tokens"] is None and report["train"]["kept"] == 90
    assert report["preview"][0]["segments"][0][0] == "8 x 8 pixels"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "tiny:bert"}}, "tiny:bert reads texts; tiny:vit reads images"),
        ({"data": {"train": "sklearn:digits", "max_length": 8}}, "max_length"),
        ({"data": {"train": "sklearn:digits", "columns": {"text": "image"}}}, "has no effect for task: image_cls"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(digits(tmp_path, **change), progress=SilentProgress())


# Random changes


AUGMENT = {"flip": 0.5, "crop": [0.6, 1.0], "rotate": 15, "color": 0.3}


def changed_digits(folder: Path, **more: Any) -> dict[str, Any]:
    document = digits(folder, adapter={"method": "none"}, **more)
    document["data"] = document["data"] | {"augment": AUGMENT}
    return document


def test_only_training_images_change_and_differ_on_each_pass() -> None:
    _, plain = vit()
    task = ImageClassification(plain.tokenizer, labels=Labels(NAMES), augment=Augmentation(crop=(0.5, 0.8)))
    (example,) = task.encode(load_rows("sklearn:digits#1"), **OPTIONS).examples
    passes = [task.redraw(example, np.random.default_rng([0, step, 0])) for step in (0, 1, 0)]
    first, second, again = (task.collate([e], "cpu").inputs["pixel_values"] for e in passes)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert example.image is not None and example.image.change is None
    assert plain.redraw(example, np.random.default_rng(0)) is example


def test_changed_images_resume_to_the_byte(tmp_path: Path) -> None:
    from peftlab.errors import Interrupted
    from tests.run_examples import Stopper

    run = {"device": "cpu", "save_every": 2}
    train(
        changed_digits(tmp_path, run=run | {"dir": str(tmp_path / "whole")}, train={"max_steps": 5}),
        progress=SilentProgress(),
    )
    with pytest.raises(Interrupted):
        train(
            changed_digits(tmp_path, run=run | {"dir": str(tmp_path / "cut")}, train={"max_steps": 5}),
            progress=Stopper(at=3),
        )
    train(tmp_path / "cut", resume=True, progress=SilentProgress())
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    document = digits(
        tmp_path, adapter={"method": "none"}, run=run | {"dir": str(tmp_path / "plain")}, train={"max_steps": 5}
    )
    train(document, progress=SilentProgress())
    assert (tmp_path / "plain/model/model.safetensors").read_bytes() != weights[0]


def test_check_shows_the_changes(tmp_path: Path) -> None:
    report = check(changed_digits(tmp_path), progress=SilentProgress())
    assert "changed on each pass, for example: cropped to" in report["preview"][0]["segments"][0][0]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": "sklearn:digits", "augment": {"crop": [0.9, 0.5]}}}, "expected two shares of the area"),
        ({"data": {"train": "sklearn:digits", "augment": {}}}, "changes nothing"),
        ({"data": {"train": "sklearn:digits", "augment": {"mirror": 0.5}}}, "mirror"),
        ({"data": {"train": "sklearn:digits"}, "train": {"batch_norm": "trained"}}, "has no effect with an adapter"),
        (
            {
                "data": {"train": "sklearn:digits", "augment": {"flip": 0.5}},
                "distill": {"teacher": "tiny:vit", "cache": "c"},
            },
            "the cache stores a teacher's outputs for the images as they are",
        ),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(digits(tmp_path, **sections), progress=SilentProgress())


def test_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    train(digits(tmp_path, train={"max_steps": 2}, eval={"before": False}), progress=SilentProgress())
    report = evaluate(tmp_path / "run", picture=tmp_path / "confusion.png", progress=SilentProgress())
    assert report["picture"] == str(tmp_path / "confusion.png")
    counts = [v for name, v in report["metrics"].items() if name.startswith("confusion_")]
    assert len(counts) == 100 and sum(counts) == 60
    with PIL.Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 500
    with pytest.raises(RecipeError, match=r"ends in .png or .svg"):
        evaluate(tmp_path / "run", picture="confusion.pdf", progress=SilentProgress())


def test_model_of_timm_says_what_to_install(tmp_path: Path) -> None:
    """timm is not installed here. Its config names an architecture of timm and no type of transformers."""
    import importlib.util
    import json

    if importlib.util.find_spec("timm"):
        pytest.skip("timm is installed")
    (tmp_path / "model").mkdir()
    config = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="is a model of timm, which is not installed: pip install timm torchvision"):
        check(digits(tmp_path, model={"name": str(tmp_path / "model")}), progress=SilentProgress())
