"""Objects in images: their boxes and categories, checked against the image."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftlab.data.labels import label_text
from peftlab.data.rows import Rows
from peftlab.errors import DataError

_KEY = "data.columns.objects"
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = ("category", "categories", "label", "labels", "category_id", "class")
# Annotations are rounded: a box may be this many pixels outside of its image, and is cut there.
_ROUNDING = 1.0


@dataclass(frozen=True)
class Objects:
    """The objects of an image. boxes: [M, 4] float64 left, top, width and height in pixels, as given. categories: a name
    each. ids: of the annotations, for messages."""

    boxes: np.ndarray
    categories: list[str]
    ids: list[Any]

    def corners(self, width: int, height: int, where: str) -> np.ndarray:
        """[M, 4] left, top, right and bottom in an image of this size. Raises: DataError for a box outside the image."""
        corners = self.boxes.copy()
        corners[:, 2:] += corners[:, :2]
        low, high = np.zeros(4), np.array([width, height, width, height], dtype=np.float64)
        for box, given, name in zip(corners, self.boxes, self.ids, strict=True):
            if (box < low - _ROUNDING).any() or (box > high + _ROUNDING).any():
                raise DataError(
                    f"{where}, object {name}: the box {_numbers(given)} is outside of its image of {width} x {height} pixels; "
                    "expected [left, top, width, height] in pixels",
                    key=_KEY,
                )
        cut = corners.clip(low, high)
        for box, given, name in zip(cut, self.boxes, self.ids, strict=True):
            if not (box[2] > box[0] and box[3] > box[1]):
                raise DataError(
                    f"{where}, object {name}: nothing of the box {_numbers(given)} is inside of its image of {width} x {height} "
                    "pixels",
                    key=_KEY,
                )
        return cut


def read_objects(rows: Rows, column: str, *, names: Mapping[str, str]) -> list[Objects]:
    """The objects of each row. A value is a record of lists, ``{"bbox": [...], "category": [...]}``, or a list of records,
    also as JSON text; an image without objects has empty lists. A box is [left, top, width, height] in pixels.

    Args: names: category as it is in the file -> its name; if not empty, every category must be in it.
    Raises: DataError with row and object: a value of another form, or a box that is no rectangle.
    """
    return [_objects(value, rows.where(i), names) for i, value in enumerate(rows.column(column, key=_KEY))]


def _objects(value: Any, where: str, names: Mapping[str, str]) -> Objects:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: expected objects, found the text {value[:40]!r}", key=_KEY) from None
    if hasattr(value, "tolist"):
        value = value.tolist()
    records = _records(value, where)
    boxes, categories, ids = [], [], []
    for number, record in enumerate(records, 1):
        name = record.get("id", number)
        boxes.append(_box(_value(record, _BOXES, where, name), f"{where}, object {name}"))
        categories.append(_category(_value(record, _CATEGORIES, where, name), f"{where}, object {name}", names))
        ids.append(name)
    return Objects(np.array(boxes, dtype=np.float64).reshape(-1, 4), categories, ids)


def _records(value: Any, where: str) -> list[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        lists = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in value.items() if v is not None}
        lists = {k: v for k, v in lists.items() if isinstance(v, list)}
        lengths = {k: len(v) for k, v in lists.items()}
        if lists and len(set(lengths.values())) == 1:
            return [dict(zip(lists, one, strict=True)) for one in zip(*lists.values(), strict=True)]
        found = ", ".join(f"{k} has {n}" for k, n in lengths.items()) or f"the keys {', '.join(map(str, value))}"
        raise DataError(f"{where}: expected lists of equal length for each box and category, found {found}", key=_KEY)
    if isinstance(value, Sequence) and not isinstance(value, bytes) and all(isinstance(v, Mapping) for v in value):
        return list(value)
    remedy = "; an image without objects has an empty list" if value is None else ""
    raise DataError(
        f'{where}: expected objects such as {{"bbox": [[10, 20, 30, 40]], "category": ["cat"]}}, found '
        f"{type(value).__name__}{remedy}",
        key=_KEY,
    )


def _value(record: Mapping[str, Any], keys: Sequence[str], where: str, name: Any) -> Any:
    for key in keys:
        if key in record:
            return record[key]
    raise DataError(f"{where}, object {name}: no {keys[0]}; found {', '.join(map(str, record))}", key=_KEY)


def _box(value: Any, where: str) -> list[float]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    numbers = isinstance(value, Sequence) and len(value) == 4
    if not numbers or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        raise DataError(f"{where}: expected a box of 4 numbers [left, top, width, height], found {value!r}", key=_KEY)
    box = [float(v) for v in value]
    if not all(map(math.isfinite, box)):
        raise DataError(f"{where}: expected finite numbers in the box, found {_numbers(box)}", key=_KEY)
    if box[2] <= 0 or box[3] <= 0:
        what = "is empty" if min(box[2:]) == 0 else "has a negative size"
        raise DataError(
            f"{where}: the box {_numbers(box)} {what}; expected [left, top, width, height] in pixels", key=_KEY
        )
    return box


def _category(value: Any, where: str, names: Mapping[str, str]) -> str:
    text = "" if isinstance(value, list | dict | bytes) else label_text(value)
    if not text:
        raise DataError(f"{where}: expected a category, found {value!r}", key=_KEY)
    if not names:
        return text
    if text not in names:
        raise DataError(f"{where}: the category {text!r} is not among data.label_names: {', '.join(names)}", key=_KEY)
    return names[text]


def _numbers(box: Sequence[float] | np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
