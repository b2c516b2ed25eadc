"""Object detection: reading boxes, the loss against transformers' own, batches of mixed sizes, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import peftlab
from peftlab.api.check import check
from peftlab.api.evaluate import evaluate
from peftlab.api.predict import predict
from peftlab.api.train import train
from peftlab.assembly import Assembly
from peftlab.data import Augmentation, Rows, load_rows
from peftlab.errors import ArtifactError, DataError, Interrupted, RecipeError, VerificationError
from peftlab.experiments.found_objects import found_examples
from peftlab.models import find_pretrained, load_image_reader
from peftlab.recipe import load_recipe
from peftlab.tasks.detection_loss import RULES, DetectionLoss
from peftlab.tasks.object_detection import ObjectDetection
from peftlab.training.parity import check_parity
from peftlab.training.progress import SilentProgress
from tests.family_examples import FINDERS_OF_OBJECTS, make_config, make_model
from tests.run_examples import Stopper

NAMES = ["circle", "square", "triangle"]
OPTIONS = {"max_length": 65, "too_long": "error", "training": True}


class Pixels:
    """A reader that keeps the size of an image, as processors that resize to a shortest edge do."""

    mode, length = "RGB", 17

    def __call__(self, images: Any) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images]) / 127.5 - 1


def made(name: str, **values: Any) -> tuple[Any, ObjectDetection]:
    config = make_config(name, FINDERS_OF_OBJECTS, num_labels=3, **values)
    model = make_model(config, "AutoModelForObjectDetection")
    return model, ObjectDetection(Pixels(), names=NAMES, loss=DetectionLoss(model.config, 3))


def mixed_rows(count: int = 5) -> Rows:
    """Drawn images, cut to different sizes; the last has no objects."""
    import io

    source, rows = load_rows(f"shapes:{count}"), []
    for i in range(count):
        with PIL.Image.open(io.BytesIO(source.columns["image"][i])) as image:
            pixels = np.asarray(image)
        boxes = source.columns["objects"][i]
        width = 64 if i % 2 == 0 else 32
        kept = [k for k, b in enumerate(boxes["bbox"]) if b[0] + b[2] <= width and i < count - 1]
        objects = {key: [values[k] for k in kept] for key, values in boxes.items()}
        rows.append({"image": pixels[:, :width], "objects": objects})
    return Rows.from_dicts(rows, name="rows.jsonl")


# The loss


@pytest.mark.parametrize("name", list(FINDERS_OF_OBJECTS))
def test_loss_and_gradient_of_an_image_equal_transformers(name: str) -> None:
    """With one image transformers divides by its objects too. Ours is the loss of the last layer."""
    model, task = made(name, auxiliary_loss=False)
    for example in task.encode(mixed_rows(), **OPTIONS).examples:
        assert isinstance(example.label, np.ndarray)
        classes, boxes = torch.from_numpy(example.label[:, 0]).long(), torch.from_numpy(example.label[:, 1:]).float()
        pixels = task.pixels(example)[None]
        theirs = model(pixel_values=pixels, labels=[{"class_labels": classes, "boxes": boxes}]).loss
        ours = task.loss_sum(model, task.collate([example], "cpu"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        weights = [p for n, p in model.named_parameters() if "bbox" in n and p.requires_grad]
        wanted = torch.autograd.grad(theirs, weights, allow_unused=True)
        found = torch.autograd.grad(ours, weights, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["YolosConfig", "DetrConfig"])
def test_loss_is_the_mean_over_images_for_any_split(name: str) -> None:
    model, task = made(name)
    model = model.double().requires_grad_()
    examples = task.encode(mixed_rows(), **OPTIONS).examples
    weight = next(p for n, p in model.named_parameters() if n.endswith("bbox_predictor.layers.0.weight"))
    wanted = slope = None
    for split in ([5], [1, 4], [2, 2, 1], [1] * 5):
        parts = torch.arange(5).split(split)
        loss = sum(task.loss_sum(model, task.collate([examples[i] for i in part], "cpu")) for part in parts)
        gradient = torch.autograd.grad(loss, weight)[0]
        wanted, slope = (loss, gradient) if wanted is None else (wanted, slope)
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)
    assert sum(e.weight for e in examples) == 5


def test_transformers_own_loss_of_a_batch_is_not_that_mean() -> None:
    """The deliberate fault: divided by the objects of the batch, images with many objects count more."""
    model, task = made("DetrConfig")
    examples = task.encode(load_rows("shapes:8"), **OPTIONS).examples
    labels = [e.label for e in examples if isinstance(e.label, np.ndarray)]
    wanted = [
        {"class_labels": torch.from_numpy(x[:, 0]).long(), "boxes": torch.from_numpy(x[:, 1:]).float()} for x in labels
    ]
    batch = task.collate(examples, "cpu")
    theirs = float(model(**batch.inputs, labels=wanted).loss)
    assert abs(theirs - float(task.loss_sum(model, batch)) / 8) > 1e-3


# Batches


@pytest.mark.parametrize("name", list(FINDERS_OF_OBJECTS))
def test_image_gets_the_same_boxes_in_a_batch_and_alone(name: str) -> None:
    model, task = made(name)
    examples = task.encode(mixed_rows(), **OPTIONS).examples
    batch = task.collate(examples, "cpu")
    assert batch.inputs["pixel_values"].shape == (5, 3, 64, 64) and "pixel_mask" in batch.inputs
    with torch.no_grad():
        together = task.outputs(model, batch)
        reference = task.reference_outputs(model, examples, "cpu")
        alone = torch.cat([task.outputs(model, task.collate([e], "cpu")).values for e in examples])
    torch.testing.assert_close(together.values, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference.values, alone, rtol=1e-4, atol=1e-5)
    assert together.counts == [6] * 5 and torch.equal(together.weights, reference.weights)


def test_boxes_follow_the_changes_of_their_image() -> None:
    _, task = made("YolosConfig")
    task._augment = Augmentation(flip=0.5, crop=(0.4, 0.9))
    pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    pixels[20:40, 10:30] = 250
    rows = Rows.from_dicts(
        [{"image": pixels, "objects": {"bbox": [[10, 20, 20, 20]], "category": ["square"]}}], name="r"
    )
    (example,) = task.encode(rows, **OPTIONS).examples
    for step in range(20):
        changed = task.redraw(example, np.random.default_rng(step))
        assert changed.image is not None and isinstance(changed.label, np.ndarray)
        bright = np.argwhere(np.asarray(changed.image.pixels("L")) > 200)
        if not len(changed.label):
            assert not len(bright)
            continue
        height, width = np.asarray(changed.image.pixels("L")).shape
        _, x, y, w, h = changed.label[0]
        top, left = bright.min(0)
        bottom, right = bright.max(0) + 1
        box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        assert box == pytest.approx([left, top, right, bottom])


def test_parity_gate_finds_boxes_that_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: x and y of the boxes exchanged."""
    from peftlab.adapters import inject, planned_modules

    model, task = made("YolosConfig")
    planned = planned_modules(model, peft_type=None, targets="all-linear")
    adapted = inject(model, "lora", peft_type=None, rank=4, alpha=8.0)
    examples = task.encode(load_rows("shapes:4"), **OPTIONS).examples
    options: dict[str, Any] = {"planned": planned, "kernels": "auto", "device": "cpu", "where": str}
    assert check_parity(adapted, task, examples, **options).num_adapted == len(planned)
    right = ObjectDetection._values

    def turned(self: Any, model: Any, pixels: Any) -> Any:
        values = right(self, model, pixels)
        return values[..., [0, 1, 2, 3, 5, 4, 7, 6]]

    monkeypatch.setattr(ObjectDetection, "_values", turned)
    with pytest.raises(VerificationError, match="the training path"):
        check_parity(adapted, task, examples, **options)


# Finding objects


@pytest.mark.parametrize(
    ("name", "processor"),
    [("DetrConfig", "DetrImageProcessorPil"), ("DeformableDetrConfig", "DeformableDetrImageProcessorPil")],
)
def test_found_objects_equal_those_of_the_processors(name: str, processor: str) -> None:
    import transformers

    model, task = made(name)
    rows = load_rows("shapes:3")
    examples = task.encode(rows, **OPTIONS).examples
    with torch.no_grad():
        outputs = model(pixel_values=task.collate(examples, "cpu").inputs["pixel_values"])
    reader = getattr(transformers, processor)()
    wanted = reader.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 64)] * 3)
    task._min_score = 0.0
    for one, found in zip(wanted, predict_all(model, task, rows), strict=True):
        scores, order = one["scores"].sort(descending=True)
        assert [o["score"] for o in found["objects"]] == pytest.approx(scores.tolist(), abs=1e-5)
        boxes = one["boxes"][order].clamp(0, 64).tolist()
        assert np.allclose([o["box"] for o in found["objects"]], boxes, atol=0.06)
        assert [NAMES.index(o["label"]) for o in found["objects"]] == one["labels"][order].tolist()


def predict_all(model: Any, task: ObjectDetection, rows: Rows) -> list[dict[str, Any]]:
    return list(task.predict(model, rows, batch_tokens=100))


def test_other_families_and_too_many_objects_are_refused() -> None:
    from transformers import DFineConfig

    with pytest.raises(RecipeError, match=r"does not train d_fine, whose loss needs more .* use one of detr"):
        DetectionLoss(DFineConfig(), 3)
    assert set(RULES.values()) == {"set", "focal", "varifocal"}
    _, task = made("YolosConfig")
    objects = {"bbox": [[1, 1, 5, 5]] * 7, "category": ["square"] * 7}
    rows = Rows.from_dicts([{"image": np.zeros((64, 64), np.uint8), "objects": objects}], name="rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl, record 1: 7 objects, but the model finds at most 6"):
        task.encode(rows, **OPTIONS)


# Whole runs


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "object_detection",
        "model": {"name": "tiny:yolos"},
        "data": {"train": "shapes:40", "eval": "shapes:60:test"},
        "train": {"max_steps": 4, "batch_size": 8, "lr": 1e-3},
        "run": {"dir": str(folder / "run"), "device": "cpu"},
    }
    return {**document, **{name: {**document.get(name, {}), **values} for name, values in more.items()}}


@pytest.mark.parametrize("method", ["lora", "none"])
def test_run_is_saved_merged_and_predicts(tmp_path: Path, method: str) -> None:
    run = train(
        recipe(tmp_path, adapter={"method": method}, run={"merge": "original" if method == "lora" else "none"}),
        progress=SilentProgress(),
    )
    after = run.summary["after"]
    assert after["loss"] < run.summary["before"]["loss"] and {"map", "map_50"} <= after.keys()
    assert evaluate(tmp_path / "run", progress=SilentProgress())["metrics"] == pytest.approx(after, abs=1e-6)
    assert run.summary["reopened"]["kl_max"] < 1e-9
    assert run.summary["merge"]["verified"] if method == "lora" else True
    file = tmp_path / "one.png"
    file.write_bytes(load_rows("shapes:1").columns["image"][0])
    options: dict[str, Any] = {"overrides": ["eval.min_score=0"], "progress": SilentProgress()}
    (found,) = predict(tmp_path / "run", [str(file)], **options)
    assert len(found["objects"]) == 10 and {"label", "score", "box"} == found["objects"][0].keys()
    folder = tmp_path / "run" / ("merged" if method == "lora" else "model")
    from transformers import AutoModelForObjectDetection

    plain = AutoModelForObjectDetection.from_pretrained(folder)
    assert plain.config.id2label == dict(enumerate(NAMES))
    with PIL.Image.open(file) as image, torch.no_grad():
        pixels = load_image_reader(find_pretrained(str(folder)))([image.convert("RGB")])
        scores = plain(pixel_values=pixels).logits.softmax(-1)[0, :, :-1].amax(-1)
    assert found["objects"][0]["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_changed_images_resume_to_the_byte(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"augment": {"flip": 0.5, "crop": [0.6, 1.0]}}, "eval": {"before": False}}
    whole = recipe(tmp_path, **changes, run={"dir": str(tmp_path / "whole"), "save_every": 2})
    cut = recipe(tmp_path, **changes, run={"dir": str(tmp_path / "cut"), "save_every": 2})
    train(whole, progress=SilentProgress())
    with pytest.raises(Interrupted):
        train(cut, progress=Stopper(at=3))
    train(tmp_path / "cut", resume=True, progress=SilentProgress())
    names = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": {"name": "tiny:vit"}}, "object_detection does not train vit"),
        ({"model": {"name": "tiny:bert"}}, "reads texts"),
        ({"distill": {"teacher": "tiny:yolos"}}, "no order relates their boxes.*set distill.answers: teacher"),
        (
            {"distill": {"teacher": "tiny:yolos", "answers": "teacher", "losses": ["forward_kl"]}},
            "distill.losses.*has no effect with answers: teacher",
        ),
        (
            {"distill": {"teacher": "tiny:yolos", "answers": "teacher", "hard_weight": 0.5}},
            "distill.hard_weight.*has no effect for task: object_detection",
        ),
        ({"data": {"augment": {"rotate": 10}}}, "data.augment.rotate.*has no effect for task: object_detection"),
        ({"eval": {"metrics": ["accuracy"]}}, "'accuracy' does not apply to task: object_detection"),
        ({"data": {"eval": "rows.jsonl"}}, "the category 'star' does not occur in the training data"),
        ({"data": {"columns": {"objects": "boxes"}}}, "no column 'boxes'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"image": np.zeros((8, 8), int).tolist(), "objects": [{"bbox": [1, 1, 2, 2], "category": "star"}]}
    Path("rows.jsonl").write_text(json.dumps(row))
    with pytest.raises((RecipeError, DataError), match=message):
        check(recipe(tmp_path, **more), progress=SilentProgress())


def test_coco_folder_is_trained_and_evaluated(tmp_path: Path) -> None:
    source = load_rows("shapes:24")
    for name, chosen in (("train2017", range(16)), ("val2017", range(16, 24))):
        (tmp_path / name).mkdir()
        document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        document["categories"] = [{"id": 7 * i, "name": n} for i, n in enumerate(NAMES)]
        for i in chosen:
            (tmp_path / name / f"{i}.png").write_bytes(source.columns["image"][i])
            document["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
            objects = source.columns["objects"][i]
            for box, kind in zip(objects["bbox"], objects["category"], strict=True):
                number = len(document["annotations"]) + 1
                about = {"id": number, "image_id": i, "category_id": 7 * NAMES.index(kind)}
                document["annotations"].append({**about, "bbox": box, "area": 1, "iscrowd": 0})
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))
    data = {
        name: str(tmp_path / f"annotations/instances_{part}.json")
        for name, part in (("train", "train2017"), ("eval", "val2017"))
    }
    both = load_rows(str(tmp_path))
    assert len(both) == 16 and "holds 'train', 'val'; data.train reads 'train'" in both.notes[0].message
    assert len(load_rows(f"{tmp_path}:val")) == 8
    run = peftlab.train(recipe(tmp_path, data=data), progress=SilentProgress())
    assert run.summary["train_rows"] == 16 and run.summary["eval_rows"] == 8


def test_found_objects_are_drawn_and_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab.cli.answers import answer_line, whole_answer

    monkeypatch.chdir(tmp_path)
    train(recipe(tmp_path, eval={"before": False}), progress=SilentProgress())
    Path("one.png").write_bytes(load_rows("shapes:1").columns["image"][0])
    options: dict[str, Any] = {"overrides": ["eval.min_score=0"], "progress": SilentProgress()}
    list(predict("run", ["one.png", "one.png"], picture="found.png", **options))
    with PIL.Image.open("found.png") as image:
        assert image.size == (1005, 1005)
    with pytest.raises(RecipeError, match=r"ends in .png or .svg"):
        list(predict("run", ["one.png"], picture="found.jpg", **options))
    first, second = predict("run", ["missing.png", "one.png"], **options)
    assert first["objects"] is None and "cannot be read" in first["note"] and len(second["objects"]) == 10
    record = {"input": "one.png", "objects": [{"label": "circle", "score": 0.982, "box": [1.0, 2.5, 3.0, 4.0]}]}
    assert whole_answer(record, styled=True) == "circle  98.2 %  at 1, 2.5 to 3, 4"
    assert whole_answer({"objects": []}, styled=True) == "nothing found"
    assert json.loads(whole_answer(record, styled=False)) == record["objects"]
    assert answer_line(record, styled=True, width=100) == "one.png: circle 98.2 % at 1, 2.5 to 3, 4"


def test_pictures_of_other_tasks_are_refused(tmp_path: Path) -> None:
    document = {"task": "image_cls", "model": {"name": "tiny:vit"}, "data": {"train": "sklearn:digits"}}
    with pytest.raises(RecipeError, match="task: image_cls finds no objects"):
        list(predict("tiny:vit", ["one.png"], recipe=document, picture="a.png", progress=SilentProgress()))


# Distillation


@pytest.mark.usefixtures("short_timing")
def test_student_learns_from_the_boxes_of_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain: dict[str, Any] = {"eval": {"before": False, "min_score": 0.15}}
    train(recipe(tmp_path, **plain, run={"dir": "teacher"}), progress=SilentProgress())
    about = {"teacher": "teacher", "answers": "teacher", "baseline": False}
    # The student's own labels are of no use: every image has the same box.
    source = load_rows("shapes:16")
    for i, raw in enumerate(source.columns["image"]):
        Path(f"{i}.png").write_bytes(raw)
    wrong = {"bbox": [[1, 1, 9, 9]], "category": ["circle"]}
    right = [{"bbox": [[1, 1, 9, 9]] * 3, "category": NAMES}]
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"image": f"{i}.png", "objects": o}) + "\n" for i, o in enumerate(right + [wrong] * 15))
    )
    document = recipe(tmp_path, **plain, data={"train": "rows.jsonl"}, distill=about, run={"dir": "student"})
    assert check(document, progress=SilentProgress())["ok"]
    run = peftlab.distill(document, progress=SilentProgress())
    lines = [json.loads(line) for line in Path("student/answers/rows.jsonl").read_text().splitlines()]
    found = list(predict("teacher", Path("rows.jsonl"), overrides=["eval.min_score=0.15"], progress=SilentProgress()))
    assert len(lines) == 16 and sum(len(line["scores"]) for line in lines) > 0
    for line, one in zip(lines, found, strict=True):
        assert line["objects"]["category"] == [o["label"] for o in one["objects"]]
        ours, theirs = np.array(line["objects"]["bbox"]), np.array([o["box"] for o in one["objects"]])
        assert not len(ours) or np.allclose(ours[:, :2] + ours[:, 2:], theirs[:, 2:])
    trained = json.loads(Path("student/seed-0/student/run.json").read_text())
    assert trained["training"]["steps"] == 4 and trained["train_rows"] == 16
    values = {row["name"]: row for row in run.summary["card"]["metrics"]}
    assert set(values) == {"map", "map_50"} and run.summary["card"]["headline"] == "map"
    theirs = evaluate("teacher", overrides=["data.eval=shapes:60:test"], progress=SilentProgress())["metrics"]
    assert values["map"]["teacher"]["value"] == pytest.approx(theirs["map"], abs=1e-6)
    assert values["map_50"]["student"]["n"] == 11
    # A search that is killed inside a line goes on to the same file, and another threshold is another search.
    text, about_answers = (Path("student/answers", name).read_text() for name in ("rows.jsonl", "answers.json"))
    Path("part").mkdir()
    Path("part/answers.json").write_text(about_answers)
    Path("part/rows.jsonl").write_text(text[: len(text) // 2])
    found_examples(Assembly(load_recipe(document), transfer=True), Path("part"), SilentProgress())
    assert Path("part/rows.jsonl").read_text() == text
    document["eval"]["min_score"] = 0.2
    with pytest.raises(
        ArtifactError, match="the boxes in part come from another teacher, other rows or other settings"
    ):
        found_examples(Assembly(load_recipe(document), transfer=True), Path("part"), SilentProgress())
    document["eval"]["min_score"] = 0.9
    with pytest.raises(DataError, match=r"found no object with a score of 0.9 in 16 images; lower eval.min_score"):
        peftlab.distill({**document, "run": {"dir": "other", "device": "cpu"}}, progress=SilentProgress())
