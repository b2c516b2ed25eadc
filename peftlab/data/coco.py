"""Reads annotations in COCO's format: one row per image, with the objects in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data.rows import Note
from peftlab.data.table import Options, Table
from peftlab.errors import DataError

_LISTS = ("images", "annotations", "categories")
# Beginnings of the names of annotation files, whose ends name the folder of the images.
_PREFIXES = ("instances_", "annotations_", "person_keypoints_")


def is_coco(document: Any) -> bool:
    """Whether a JSON document has the lists of COCO's format."""
    return isinstance(document, dict) and all(isinstance(document.get(name), list) for name in _LISTS)


def read_coco(document: Mapping[str, Any], path: Path, options: Options) -> Table:
    """One row per image: ``image``, a path, and ``objects``, a record of lists: ``bbox`` ([left, top, width, height] in
    pixels), ``category`` and ``id`` of each. Regions of crowds (iscrowd: 1) are left out, with a note.

    Raises: DataError with the record and id of an image, annotation or category that is incomplete or names none.
    """

    def wrong(what: str, record: int, name: str) -> DataError:
        return DataError(f"{path}: {name}, record {record}: {what}", key=options.key)

    names: dict[Any, str] = {}
    for record, category in enumerate(document["categories"], 1):
        if not isinstance(category, dict) or "id" not in category or not str(category.get("name", "")).strip():
            raise wrong("expected an id and a name", record, "categories")
        if category["id"] in names:
            raise wrong(f"the id {category['id']} is given twice", record, "categories")
        names[category["id"]] = str(category["name"]).strip()
    images: dict[Any, dict[str, list[Any]]] = {}
    files: list[str] = []
    for record, image in enumerate(document["images"], 1):
        if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
            raise wrong("expected an id and a file_name", record, "images")
        if image["id"] in images:
            raise wrong(f"the id {image['id']} is given twice", record, "images")
        images[image["id"]] = {"bbox": [], "category": [], "id": []}
        files.append(image["file_name"])
    crowds = 0
    for record, annotation in enumerate(document["annotations"], 1):
        if not isinstance(annotation, dict) or "bbox" not in annotation:
            raise wrong("expected an image_id, a category_id and a bbox", record, "annotations")
        about = f"annotation {annotation.get('id', record)}"
        if annotation.get("image_id") not in images:
            raise wrong(
                f"{about} names the image {annotation.get('image_id')!r}, which is not there", record, "annotations"
            )
        if annotation.get("category_id") not in names:
            raise wrong(
                f"{about} names the category {annotation.get('category_id')!r}, which is not there",
                record,
                "annotations",
            )
        if annotation.get("iscrowd"):
            crowds += 1
            continue
        objects = images[annotation["image_id"]]
        objects["bbox"].append(annotation["bbox"])
        objects["category"].append(names[annotation["category_id"]])
        objects["id"].append(annotation.get("id", record))
    folder = _folder_of(files, path)
    notes = [Note("crowds", f"{path}: {crowds:,} regions of crowds are left out", options.key)] if crowds else []
    return Table(
        {"image": [str(folder / name) for name in files], "objects": list(images.values())},
        np.arange(1, len(files) + 1, dtype=np.int64),
        "record",
        notes=tuple(notes),
    )


def _folder_of(files: list[str], path: Path) -> Path:
    """The folder of the images: beside the annotations, or one that COCO's layout names after them."""
    stem = next((path.stem.removeprefix(p) for p in _PREFIXES if path.stem.startswith(p)), path.stem)
    here = path.absolute().parent
    places = [here, here / "images", here.parent, here.parent / "images", here.parent / stem, here / stem]
    places += [here.parent / "images" / stem, here / "images" / stem]
    return next((place for place in places if files and (place / files[0]).is_file()), here)
