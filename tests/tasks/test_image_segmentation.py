"""Semantic segmentation: masks, the loss against transformers' own, batches, mean IoU, and whole runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import peftlab
from peftlab.api.check import check
from peftlab.api.distill import distill
from peftlab.api.evaluate import evaluate
from peftlab.api.predict import predict
from peftlab.api.teach import teach
from peftlab.api.train import train
from peftlab.data import Augmentation, PixelClasses, Rows, load_rows
from peftlab.errors import DataError, Interrupted, RecipeError, VerificationError
from peftlab.models import find_pretrained, load_image_reader
from peftlab.tasks.image_segmentation import ImageSegmentation
from peftlab.training.parity import check_parity
from peftlab.training.progress import SilentProgress
from tests.family_examples import SEGMENTERS, make_config, make_model
from tests.run_examples import Stopper

NAMES = ["ground", "circle", "square", "triangle"]
LABELS = {str(i): name for i, name in enumerate(NAMES)}
OPTIONS = {"max_length": 17, "too_long": "error", "training": True}


class Pixels:
    """A reader that keeps the size of an image, as processors that resize to a shortest edge do."""

    mode, length = "RGB", 17

    def __call__(self, images: Any) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images]) / 127.5 - 1


def made(name: str = "SegformerConfig", **values: Any) -> tuple[Any, ImageSegmentation]:
    config = make_config(name, SEGMENTERS, num_labels=4, **values)
    model = make_model(config, "AutoModelForSemanticSegmentation")
    return model, ImageSegmentation(Pixels(), classes=PixelClasses.of(NAMES, {}))


def decoded(raw: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image)


def mixed_rows(count: int = 5, *, one_size: bool = False) -> Rows:
    """Drawn images of two sizes, with more and more pixels without a label."""
    source, rows = load_rows(f"shapes:{count}"), []
    for i in range(count):
        image, mask = (decoded(source.columns[name][i]).copy() for name in ("image", "mask"))
        mask[: 10 * i] = 255
        width = 64 if i % 2 == 0 or one_size else 32
        rows.append({"image": image[:, :width], "mask": mask[:, :width]})
    return Rows.from_dicts(rows, name="rows.jsonl")


# The loss


def test_loss_and_gradient_equal_transformers() -> None:
    """Transformers' loss is the mean over the labelled pixels of a batch."""
    model, task = made()
    model = model.double().requires_grad_()
    examples = task.encode(mixed_rows(one_size=True), **OPTIONS).examples
    batch = task.collate(examples, "cpu")
    labels = torch.from_numpy(np.stack([e.label.values() for e in examples])).long()  # type: ignore[union-attr]
    theirs = model(pixel_values=batch.inputs["pixel_values"].double(), labels=labels).loss
    ours = task.loss_sum(model, batch) / sum(e.weight for e in examples)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    # The deliberate fault: the mean of the images' means, in which a pixel of a sparse mask counts more.
    means = [task.loss_sum(model, task.collate([e], "cpu")) / e.weight for e in examples]
    assert abs(float(torch.stack(means).mean() - theirs)) > 1e-3


def test_loss_is_the_mean_over_labelled_pixels_for_any_split() -> None:
    model, task = made()
    model = model.double().requires_grad_()
    examples = task.encode(mixed_rows(), **OPTIONS).examples
    assert [e.weight for e in examples] == [64 * 64, 54 * 32, 44 * 64, 34 * 32, 24 * 64]
    weight = next(p for n, p in model.named_parameters() if n.endswith("classifier.weight"))
    wanted = slope = None
    for split in ([5], [1, 4], [2, 2, 1], [1] * 5):
        parts = torch.arange(5).split(split)
        loss = sum(task.loss_sum(model, task.collate([examples[i] for i in part], "cpu")) for part in parts)
        gradient = torch.autograd.grad(loss, weight)[0]
        wanted, slope = (loss, gradient) if wanted is None else (wanted, slope)
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(SEGMENTERS))
def test_image_gets_the_same_logits_in_a_batch_and_alone(name: str) -> None:
    model, task = made(name)
    model = model.double()
    examples = task.encode(mixed_rows(3, one_size=name in FIXED_SIZE), **OPTIONS).examples
    with torch.no_grad():
        together = task.outputs(model, task.collate(examples, "cpu"))
        reference = task.reference_outputs(model, examples, "cpu")
        alone = [task.outputs(model, task.collate([e], "cpu")) for e in examples]
    torch.testing.assert_close(together.values, torch.cat([o.values for o in alone]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference.values, together.values, rtol=1e-9, atol=1e-9)
    assert together.counts == [e.num_scored for e in examples] and together.weights is None
    assert torch.equal(together.targets, reference.targets)


# Families that read images of one size, or of large ones.
FIXED_SIZE = ("Data2VecVisionConfig", "DPTConfig", "MobileViTV2Config")


def test_masks_follow_the_changes_of_their_image() -> None:
    _, task = made()
    task._augment = Augmentation(flip=0.5, crop=(0.4, 0.9), rotate=20)
    image, mask = np.full((64, 64, 3), 20, dtype=np.uint8), np.zeros((64, 64), dtype=np.uint8)
    image[20:40, 10:30], mask[20:40, 10:30] = 250, 2
    (example,) = task.encode(Rows.from_dicts([{"image": image, "mask": mask}], name="r"), **OPTIONS).examples
    for step in range(20):
        changed = task.redraw(example, np.random.default_rng(step))
        assert changed.image is not None and changed.weight == example.weight == 64 * 64
        bright = np.asarray(changed.image.pixels("L")) > 135
        values = changed.label.values()  # type: ignore[union-attr]
        # Pillow interpolates the image and not the mask, so that they differ at the edge of the square.
        assert bright.shape == values.shape and (bright != (values == 2)).sum() <= 60
        counted = task._outputs([torch.zeros(900, 4)], [torch.zeros(900, dtype=torch.long)], [changed])
        assert float(counted.weights.sum()) == pytest.approx(64 * 64)


def test_parity_gate_finds_masks_that_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: rows and columns of the logits exchanged."""
    from peftlab.adapters import inject, planned_modules
    from peftlab.tasks import image_segmentation

    model, task = made()
    planned = planned_modules(model, peft_type=None, targets="all-linear")
    adapted = inject(model, "lora", peft_type=None, rank=4, alpha=8.0)
    examples = task.encode(load_rows("shapes:4"), **OPTIONS).examples
    options: dict[str, Any] = {"planned": planned, "kernels": "auto", "device": "cpu", "where": str}
    assert check_parity(adapted, task, examples, **options).num_adapted == len(planned)
    right = image_segmentation.at_resolution
    monkeypatch.setattr(image_segmentation, "at_resolution", lambda x, h, w: right(x, h, w).transpose(0, 1))
    with pytest.raises(VerificationError, match="the training path"):
        check_parity(adapted, task, examples, **options)


def test_predicted_masks_equal_those_of_the_processor() -> None:
    from transformers import SegformerImageProcessorPil

    model, task = made()
    rows = mixed_rows(3, one_size=True)
    examples = task.encode(rows, **OPTIONS).examples
    with torch.no_grad():
        outputs = model(pixel_values=task.collate(examples, "cpu").inputs["pixel_values"])
    wanted = SegformerImageProcessorPil().post_process_semantic_segmentation(outputs, target_sizes=[(64, 64)] * 3)
    for one, found in zip(wanted, task.predict(model, rows, batch_tokens=100), strict=True):
        assert np.array_equal(found["mask"], one.numpy())
        shares = {entry["label"]: entry["share"] for entry in found["shares"]}
        assert shares == {NAMES[i]: float((one == i).float().mean()) for i in one.unique().tolist()}


# Whole runs


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "image_segmentation",
        "model": {"name": "tiny:segformer"},
        "data": {"train": "shapes:16", "eval": "shapes:60:test", "label_names": LABELS},
        "train": {"max_steps": 3, "batch_size": 4, "lr": 1e-3},
        "run": {"dir": str(folder / "run"), "device": "cpu"},
    }
    return {**document, **{name: {**document.get(name, {}), **values} for name, values in more.items()}}


def test_run_is_saved_merged_and_predicts(tmp_path: Path) -> None:
    run = train(recipe(tmp_path, run={"merge": "original"}), progress=SilentProgress())
    after = run.summary["after"]
    assert after["loss"] < run.summary["before"]["loss"]
    assert {"iou_macro", "iou_ground", "iou_triangle", "pixel_accuracy"} <= after.keys()
    assert evaluate(tmp_path / "run", progress=SilentProgress())["metrics"] == pytest.approx(after, abs=1e-6)
    assert run.summary["reopened"]["kl_max"] < 1e-9 and run.summary["merge"]["verified"]
    file = tmp_path / "one.png"
    file.write_bytes(load_rows("shapes:1").columns["image"][0])
    found = list(predict(tmp_path / "run", [str(file)] * 2, masks=tmp_path / "masks", progress=SilentProgress()))
    assert [Path(one["mask"]).name for one in found] == ["one.png", "one-000002.png"]
    from transformers import AutoModelForSemanticSegmentation

    plain = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run/merged")
    assert plain.config.id2label == dict(enumerate(NAMES))
    with PIL.Image.open(file) as image, torch.no_grad():
        pixels = load_image_reader(find_pretrained(str(tmp_path / "run/merged")))([image.convert("RGB")])
        logits = plain(pixel_values=pixels).logits
    whole = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1)[0].numpy()
    with PIL.Image.open(found[0]["mask"]) as mask:
        assert mask.mode == "P" and (np.asarray(mask) == whole).mean() > 0.999
    assert sum(one["share"] for one in found[0]["shares"]) == pytest.approx(1)


def test_changed_images_resume_to_the_byte(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"augment": {"flip": 0.5, "crop": [0.6, 1.0], "rotate": 10}},
        "eval": {"before": False, "metrics": ["loss"]},
    }
    whole = recipe(tmp_path, **changes, run={"dir": str(tmp_path / "whole"), "save_every": 1})
    cut = recipe(tmp_path, **changes, run={"dir": str(tmp_path / "cut"), "save_every": 1})
    train(whole, progress=SilentProgress())
    with pytest.raises(Interrupted):
        train(cut, progress=Stopper(at=2))
    train(tmp_path / "cut", resume=True, progress=SilentProgress())
    names = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()


def write_folder(folder: Path, count: int = 6) -> None:
    source = load_rows(f"shapes:{count}")
    for kind, column in (("images", "image"), ("masks", "mask")):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            (folder / kind / f"{i}.png").write_bytes(source.columns[column][i])


def test_folder_of_images_and_masks_is_read_and_checked(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "data/masks/9.png").write_bytes((tmp_path / "data/masks/0.png").read_bytes())
    rows = load_rows(str(tmp_path / "data"))
    assert len(rows) == 6 and set(rows.columns) == {"image", "mask"}
    assert [Path(p).stem for p in rows.columns["image"]] == [Path(p).stem for p in rows.columns["mask"]]
    assert "1 mask has no image, and not read: 'masks/9.png'" in rows.notes[0].message
    document = recipe(tmp_path, data={"train": str(tmp_path / "data"), "eval": "shapes:60:test"})
    report = check(document, progress=SilentProgress())
    masks = [np.asarray(PIL.Image.open(path)) for path in rows.columns["mask"]]
    pixels = np.bincount(np.concatenate(masks, axis=None), minlength=4).tolist()
    assert [entry["spans"] for entry in report["train"]["labels"]] == pixels and sum(pixels) == 6 * 64 * 64
    assert report["ok"] and "ground" in report["preview"][0]["segments"][1][0]
    (tmp_path / "data/masks/3.png").write_bytes((tmp_path / "data/masks/0.png").read_bytes())
    assert load_rows(str(tmp_path / "data")).fingerprint != rows.fingerprint


def _mask(path: Path, values: Any, mode: str | None = None) -> None:
    image = PIL.Image.fromarray(np.asarray(values, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: _mask(p, np.full((64, 64), 7)), r"2.png: the mask has the value 7, which is not among data.label_names"),
        (lambda p: _mask(p, np.zeros((32, 64))), r"2.png: the mask has 64 x 32 pixels, but its image 64 x 64"),
        (lambda p: _mask(p, np.zeros((64, 64)), "RGB"), r"expected one class index per pixel .* found the colours RGB: .*2.png"),
        (lambda p: p.write_bytes(p.read_bytes()[:90]), r"expected a mask, found a damaged file or another format: .*2.png"),
        (lambda p: p.write_bytes(b""), r"expected a mask, found an empty file: .*2.png"),
        (lambda p: p.unlink(), r"images/2.png, record 1: expected a mask .* found None; data.empty=drop"),
        (lambda p: PIL.Image.open(p).save(p, "JPEG"), r"2.png is a JPEG, which changes class indices; store masks as PNG"),
    ],
)  # fmt: skip
def test_spoilt_masks_are_one_line_with_the_file(tmp_path: Path, spoil: Any, message: str) -> None:
    write_folder(tmp_path / "data")
    spoil(tmp_path / "data/masks/2.png")
    with pytest.raises(DataError, match=message) as raised:
        check(recipe(tmp_path, data={"train": str(tmp_path / "data")}), progress=SilentProgress())
    assert "\n" not in str(raised.value)


def test_masks_without_labels_are_left_out_and_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    _mask(tmp_path / "data/masks/2.png", np.full((64, 64), 255))
    names = {**LABELS, "9": "star"}
    document = recipe(tmp_path, data={"train": str(tmp_path / "data"), "label_names": names})
    report = check(document, progress=SilentProgress())
    assert report["train"]["kept"] == 5
    assert report["train"]["left_out"][0]["reason"] == "dropped: no pixel of the mask is labelled"
    assert any("no mask has a pixel of 'star'" in f["message"] for f in report["findings"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": {"name": "tiny:vit"}}, "transformers has no AutoModelForSemanticSegmentation for ViT models"),
        ({"data": {"label_names": {"sky": "a"}}}, "expected whole numbers from 0 to 254, the values in the masks"),
        ({"data": {"label_names": {}, "eval": "rows.jsonl"}}, "the mask has the value 9, which is no class"),
        ({"data": {"train": "rows.jsonl", "label_names": {}}}, "expected masks with two classes or more, found only the value 9"),
        ({"data": {"columns": {"mask": "masks"}}}, "no column 'masks'"),
        ({"eval": {"metrics": ["map"]}}, "'map' does not apply to task: image_segmentation"),
        (
            {"distill": {"teacher": "tiny:segformer", "cache": "c"}, "data": {"augment": {"flip": 0.5}}},
            "data.augment",
        ),
    ],
)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"image": np.zeros((8, 8), int).tolist(), "mask": np.full((8, 8), 9).tolist()}
    Path("rows.jsonl").write_text(json.dumps(row))
    with pytest.raises((RecipeError, DataError), match=message):
        check(recipe(tmp_path, **more), progress=SilentProgress())


@pytest.mark.usefixtures("short_timing")
def test_student_learns_from_cached_pixels_of_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(recipe(tmp_path, run={"dir": "teacher"}, eval={"before": False}), progress=SilentProgress())
    document = recipe(
        tmp_path,
        distill={"teacher": "teacher", "cache": "cache", "seeds": 1, "baseline": False},
        eval={"before": False},
    )
    (stored,) = teach(document, progress=SilentProgress())["teachers"]
    assert stored["positions"] == 16 * 64 * 64
    run = distill(document, progress=SilentProgress())
    values = {row["name"]: row for row in run.summary["card"]["metrics"]}
    assert {"iou_macro", "pixel_accuracy", "kl", "agreement", "loss"} <= values.keys()
    assert run.summary["card"]["headline"] == "iou_macro"
    theirs = peftlab.evaluate("teacher", progress=SilentProgress())["metrics"]
    for name in ("iou_macro", "pixel_accuracy", "loss"):
        assert values[name]["teacher"]["value"] == pytest.approx(theirs[name], abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("short_timing")
def test_teacher_with_another_processor_sees_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", count=8)
    _mask(tmp_path / "data/masks/2.png", np.repeat([[0, 255]], 32, axis=1).repeat(64, axis=0))
    data = {"train": "data", "eval": "shapes:60:test"}
    plain = {"data": data, "eval": {"before": False}, "adapter": {"method": "none"}}
    train(recipe(tmp_path, **plain, run={"dir": "teacher"}), progress=SilentProgress())
    about = Path("teacher/model/preprocessor_config.json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "image_std": [0.25, 0.25, 0.25]}))
    options = {"teacher": "teacher/model", "seeds": 1, "baseline": False}
    (stored,) = teach(recipe(tmp_path, **plain, distill={**options, "cache": "c"}), progress=SilentProgress())[
        "teachers"
    ]
    assert stored["positions"] == 8 * 64 * 64 - 32 * 64
    run = distill(recipe(tmp_path, **plain, distill=options, run={"dir": "student"}), progress=SilentProgress())
    assert run.summary["status"] == "finished"
    changed = {**plain, "data": {**data, "augment": {"flip": 0.5}}}
    with pytest.raises(RecipeError, match="has another image processor and sees the images as they are"):
        distill(recipe(tmp_path, **changed, distill=options, run={"dir": "other"}), progress=SilentProgress())


def test_masks_do_not_overwrite_files(tmp_path: Path) -> None:
    from peftlab.cli.prediction_files import check_folder

    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(RecipeError, match="the folder has files; overwrite those of the same name with --replace"):
        check_folder(str(tmp_path), replace=False)
    with pytest.raises(RecipeError, match="expected a folder, found a file"):
        check_folder(str(tmp_path / "a.png"), replace=True)
    check_folder(str(tmp_path), replace=True)
    check_folder(str(tmp_path / "new"), replace=False)
    document = {"task": "image_cls", "model": {"name": "tiny:vit"}, "data": {"train": "sklearn:digits"}}
    with pytest.raises(RecipeError, match="task: image_cls gives the pixels of an image no classes"):
        list(predict("tiny:vit", ["one.png"], recipe=document, masks=tmp_path, progress=SilentProgress()))


def test_shares_of_pixels_are_printed() -> None:
    from peftlab.cli.answers import answer_line, has_no_result, whole_answer

    shares = [{"label": "ground", "share": 0.9}, {"label": "circle", "share": 0.1}]
    record = {"input": "one.png", "shares": shares, "mask": "masks/one.png"}
    assert whole_answer(record, styled=True) == "ground  90.0 %\ncircle  10.0 %\nin masks/one.png"
    assert answer_line(record, styled=True, width=100) == "one.png: ground 90.0 %, circle 10.0 %, in masks/one.png"
    assert json.loads(whole_answer({"shares": shares}, styled=False)) == shares
    assert has_no_result({"input": "x", "shares": None, "note": "damaged"}) and not has_no_result(record)
