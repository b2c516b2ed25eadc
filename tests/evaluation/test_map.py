"""Average precision: by hand, against pycocotools' own reading of files, and one fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from peftlab.evaluation.box_matches import average_precision, precision_statistic
from peftlab.evaluation.scorer import Scorer

BOX = [10.0, 10.0, 20.0, 20.0]
FAR = [40.0, 40.0, 50.0, 50.0]
WANTED = [[[0, *BOX]], [[0, *FAR]]]


def scored(found: list[list[list[float]]], wanted: list[list[list[float]]]) -> dict[str, float | None]:
    scorer = Scorer(["map", "map_50"], class_names=["a", "b"])
    for one, right in zip(found, wanted, strict=True):
        scorer.add({"found": [one], "objects": [right]})
    return scorer.compute()


def test_right_boxes_are_one_and_none_is_zero() -> None:
    assert scored([[[0, 0.9, *BOX]], [[0, 0.8, *FAR]]], WANTED) == pytest.approx({"map": 1.0, "map_50": 1.0})
    assert scored([[], []], WANTED) == {"map": 0.0, "map_50": 0.0}
    assert scored([[[1, 0.9, *BOX]], [[1, 0.8, *FAR]]], WANTED) == pytest.approx({"map": 0.0, "map_50": 0.0})


def test_a_wrong_box_before_the_second_right_one_by_hand() -> None:
    """Precision 1 up to a recall of 0.5, then 2/3: 51 of COCO's 101 recalls have the first."""
    found = [[[0, 0.9, *BOX], [0, 0.8, *FAR]], [[0, 0.7, *FAR]]]
    assert scored(found, WANTED)["map_50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_overlaps_by_hand() -> None:
    """A box shifted by 2 of 10 overlaps by 2/3: right at 0.5, 0.55, 0.6 and 0.65 of ten."""
    shifted = [12.0, 10.0, 22.0, 20.0]
    values = scored([[[0, 0.9, *shifted]], [[0, 0.9, *FAR]]], WANTED)
    assert values["map_50"] == pytest.approx(1.0)
    alone = average_precision([[[0, 0.9, *shifted]]], WANTED[:1])
    assert alone[0] == pytest.approx(0.4)


def test_values_equal_pycocotools_on_files(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    found, wanted, images, truth, results = [], [], [], [], []
    for image in range(12):
        corners = np.concatenate([rng.uniform(0, 40, (3, 2)), rng.uniform(50, 90, (3, 2))], axis=1)
        kinds = rng.integers(0, 2, 3)
        guesses = corners + rng.normal(0, 3, corners.shape)
        scores = rng.random(3)
        wanted.append(np.column_stack([kinds, corners]).tolist())
        found.append(np.column_stack([kinds, scores, guesses]).tolist())
        images.append({"id": image})
        for k in range(3):
            boxes = [[*c[:2].tolist(), *(c[2:] - c[:2]).tolist()] for c in (corners[k], guesses[k])]
            about = {"image_id": image, "category_id": int(kinds[k])}
            truth.append(
                {**about, "id": len(truth) + 1, "bbox": boxes[0], "area": boxes[0][2] * boxes[0][3], "iscrowd": 0}
            )
            results.append({**about, "bbox": boxes[1], "score": float(scores[k])})
    document = {"images": images, "annotations": truth, "categories": [{"id": 0}, {"id": 1}], "info": {}}
    (tmp_path / "truth.json").write_text(json.dumps(document))
    (tmp_path / "found.json").write_text(json.dumps(results))
    reader = COCO(str(tmp_path / "truth.json"))
    judge = COCOeval(reader, reader.loadRes(str(tmp_path / "found.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    ours = scored(found, wanted)
    assert [ours["map"], ours["map_50"]] == pytest.approx(judge.stats[:2].tolist(), abs=1e-9)
    assert 0 < judge.stats[0] < 1
    turned = [[[k, s, box[1], box[0], box[3], box[2]] for k, s, *box in one] for one in found]
    assert abs((scored(turned, wanted)["map"] or 0) - judge.stats[0]) > 0.05  # the deliberate fault: x and y exchanged


def test_precision_over_drawn_images() -> None:
    """With every image once it is pycocotools' value. An image drawn twice counts as two images with the same boxes."""
    rng = np.random.default_rng(1)
    wanted, found = [], []
    for _ in range(9):
        corners = np.concatenate([rng.uniform(0, 40, (4, 2)), rng.uniform(50, 90, (4, 2))], axis=1)
        kinds = rng.integers(0, 3, 4)
        guesses = np.concatenate([corners + rng.normal(0, 4, corners.shape), corners[:2] + 30])
        # No two scores are equal but those of a repeated image, whose boxes are then neighbours in the order.
        scores = rng.random(6)
        wanted.append(np.column_stack([kinds, corners]).tolist())
        found.append(np.column_stack([[*kinds, 0, 1], scores, guesses]).tolist())
    counts = rng.integers(0, 3, (12, 9)).astype(float)
    for part, which in ((slice(None), 0), (slice(0, 1), 1)):
        statistic = precision_statistic(found, wanted, overlaps=part)
        assert statistic(np.ones((1, 9)))[0] == pytest.approx(average_precision(found, wanted)[which], abs=1e-9)
        for drawn, value in zip(counts, statistic(counts), strict=True):
            chosen = np.repeat(np.arange(9), drawn.astype(int))
            theirs = average_precision([found[i] for i in chosen], [wanted[i] for i in chosen])[which]
            assert value == pytest.approx(theirs, abs=0.02)
    drawn = statistic(counts)
    assert np.ptp(drawn) > 0.02
    # The deliberate fault: the draws ignored.
    assert abs(drawn - statistic(np.ones((1, 9)))[0]).max() > 0.02
    assert precision_statistic([[]], [[[0, 1, 1, 5, 5]]])(np.ones((1, 1))).tolist() == [0.0]
