"""Objects of images: COCO's files, rows of the hub's form, and what is no box."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from peftlab.data import Rows, load_rows, read_objects
from peftlab.data.shapes import NAMES
from peftlab.errors import DataError


def coco(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"id": 11, "image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 4]},
            {"id": 12, "image_id": 2, "category_id": 3, "bbox": [0, 0, 8, 8], "iscrowd": 1},
            {"id": 13, "image_id": 2, "category_id": 3, "bbox": [2, 2, 2, 2]},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "info": {"year": 2020},
    }
    return document | changes


def write(folder: Path, document: dict[str, Any]) -> Path:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "a.png").write_bytes(b"")
    path = folder / "annotations" / "instances_train.json"
    path.write_text(json.dumps(document))
    return path


def test_coco_file_has_a_row_per_image(tmp_path: Path) -> None:
    rows = load_rows(str(write(tmp_path, coco())))
    assert rows.columns["image"] == [str(tmp_path / "train" / name) for name in ("a.png", "b.png")]
    empty, two = read_objects(rows, "objects", names={})
    assert empty.boxes.shape == (0, 4) and empty.categories == []
    assert two.boxes.tolist() == [[1, 2, 3, 4], [2, 2, 2, 2]]
    assert two.categories == ["dog", "cat"] and two.ids == [11, 13]
    assert [note.message for note in rows.notes] == [f"{rows.origins[0].path}: 1 regions of crowds are left out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": [{"id": 3}]}, "categories, record 1: expected an id and a name"),
        (
            {"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]},
            "categories, record 2: the id 3 is given twice",
        ),
        ({"images": [{"id": 1}]}, "images, record 1: expected an id and a file_name"),
        ({"annotations": [{"id": 9, "image_id": 7, "category_id": 3, "bbox": []}]}, "annotation 9 names the image 7"),
        (
            {"annotations": [{"id": 9, "image_id": 1, "category_id": 8, "bbox": []}]},
            "annotation 9 names the category 8",
        ),
        ({"annotations": [{"id": 9, "image_id": 1}]}, "annotations, record 1: expected an image_id"),
    ],
)
def test_incomplete_coco_files_are_one_message(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(write(tmp_path, coco(**changes))))
    assert caught.value.key == "data.train"


FORMS = [
    {"bbox": [[1, 2, 3, 4]], "category": [0]},
    {"boxes": np.array([[1, 2, 3, 4]]), "labels": np.array([0])},
    [{"bbox": [1, 2, 3, 4], "label": "0"}],
    '[{"bbox": [1, 2, 3, 4], "category": 0}]',
]


@pytest.mark.parametrize("value", FORMS, ids=range(len(FORMS)))
def test_forms_of_objects(value: Any) -> None:
    rows = Rows.from_dicts([{"objects": value}], name="rows.jsonl")
    for names, wanted in (({}, ["0"]), ({"0": "cat"}, ["cat"])):
        (objects,) = read_objects(rows, "objects", names=names)
        assert objects.categories == wanted and objects.boxes.tolist() == [[1, 2, 3, 4]]


def one(box: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"bbox": box, "category": "cat", **more}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected objects such as .* found NoneType; an image without objects has an empty list"),
        (3, "expected objects such as"),
        ("a cat", "expected objects, found the text 'a cat'"),
        ({"bbox": [[1, 2, 3, 4]], "category": []}, "lists of equal length .* bbox has 1, category has 0"),
        ([{"category": "cat"}], "object 1: no bbox; found category"),
        ([{"bbox": [1, 2, 3, 4]}], "object 1: no category; found bbox"),
        (one([1, 2, 3, 4], category=None), "object 1: expected a category, found None"),
        (one([1, 2, 3, 4], category="dog"), "the category 'dog' is not among data.label_names: cat"),
        (one([1, 2, 3]), r"expected a box of 4 numbers .* found \[1, 2, 3\]"),
        (one("1 2 3 4"), "expected a box of 4 numbers"),
        (one([1, 2, float("nan"), 4], id=17), "object 17: expected finite numbers"),
        (one([1, 2, 0, 4]), r"the box \[1, 2, 0, 4\] is empty"),
        (one([1, 2, -3, 4]), "has a negative size"),
    ],
)
def test_what_is_no_box_is_one_message(value: Any, message: str) -> None:
    rows = Rows.from_dicts([{"objects": value}], name="rows.jsonl")
    with pytest.raises(DataError, match=f"rows.jsonl, record 1.*{message}") as caught:
        read_objects(rows, "objects", names={"cat": "cat"})
    assert caught.value.key == "data.columns.objects"


def test_boxes_outside_their_image_are_refused_and_rounded_ones_cut() -> None:
    rows = Rows.from_dicts([{"objects": one([5.5, 0, 5, 10.6], id=4)}], name="rows.jsonl")
    (objects,) = read_objects(rows, "objects", names={})
    assert objects.corners(10, 10, "here").tolist() == [[5.5, 0, 10, 10]]
    with pytest.raises(
        DataError, match=r"here, object 4: the box \[5.5, 0, 5, 10.6\] is outside of its image of 8 x 10"
    ):
        objects.corners(8, 10, "here")
    rows = Rows.from_dicts([{"objects": one([10.2, 0, 0.5, 1])}], name="rows.jsonl")
    with pytest.raises(DataError, match=r"nothing of the box \[10.2, 0, 0.5, 1\] is inside"):
        read_objects(rows, "objects", names={})[0].corners(10, 10, "here")


def test_drawn_shapes_are_where_their_boxes_say() -> None:
    rows = load_rows("shapes:30")
    assert rows.columns["image"][:10] == load_rows("shapes:10").columns["image"]
    parts = [load_rows(f"shapes:30:{part}").columns["image"] for part in ("train", "test")]
    assert sorted(parts[0] + parts[1]) == sorted(rows.columns["image"]) and 0 < len(parts[1]) < len(parts[0])
    for objects, stored in zip(rows.columns["objects"], rows.columns["mask"], strict=True):
        with PIL.Image.open(io.BytesIO(stored)) as image:
            mask = np.asarray(image)
        seen = np.zeros_like(mask)
        for box, name in zip(objects["bbox"], objects["category"], strict=True):
            left, top, width, height = map(int, box)
            inside = mask[top : top + height, left : left + width]
            kind = 1 + NAMES.index(name)
            assert set(np.unique(inside)) <= {0, kind}
            assert (inside == kind).any(0).all() and (inside == kind).any(1).all()
            seen[top : top + height, left : left + width] = inside
        assert np.array_equal(seen, mask)


@pytest.mark.parametrize("name", ["shapes:", "shapes:0", "shapes:many", "shapes:999999"])
def test_other_numbers_of_shapes_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="expected shapes: and a number of images, 1 to 100,000"):
        load_rows(name)
