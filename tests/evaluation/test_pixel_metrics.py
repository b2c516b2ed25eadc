"""Mean IoU and pixel accuracy: against scikit-learn and torchmetrics over all pixels, by hand, and with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score

from peftlab.evaluation.comparison import Comparison
from peftlab.evaluation.held_out_scores import HeldOutScores
from peftlab.evaluation.scorer import Scorer
from peftlab.specs.tasks import TASKS

NAMES = ["ground", "circle", "square"]


def images(seed: int, count: int = 9) -> list[tuple[np.ndarray, np.ndarray]]:
    """Found and true classes of the pixels of images of different size; a pixel is often right."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        true = rng.choice(3, int(rng.integers(5, 80)), p=[0.7, 0.2, 0.1])
        guess = rng.choice(3, len(true), p=[0.6, 0.3, 0.1])
        pairs.append((np.where(rng.random(len(true)) < 0.6, true, guess), true))
    return pairs


def columns(pairs: list[tuple[np.ndarray, np.ndarray]], size: int = 3) -> dict[str, Any]:
    chosen = {
        "pixels_right": [true[found == true] for found, true in pairs],
        "pixels_predicted": [found for found, _ in pairs],
        "pixels_true": [true for _, true in pairs],
    }
    return {name: [np.bincount(c, minlength=size).tolist() for c in values] for name, values in chosen.items()}


def scores(pairs: list[tuple[np.ndarray, np.ndarray]], names: list[str] | None = None) -> dict[str, float | None]:
    names = names or NAMES
    scorer = Scorer(["iou", "pixel_accuracy"], class_names=names)
    for first in range(0, len(pairs), 2):
        scorer.add(columns(pairs[first : first + 2], len(names)))
    return scorer.compute()


@pytest.mark.parametrize("seed", range(3))
def test_values_equal_those_over_all_pixels(seed: int) -> None:
    pairs = images(seed)
    found, true = (np.concatenate(part) for part in zip(*pairs, strict=True))
    ours = scores(pairs)
    classes = jaccard_score(true, found, average=None)
    assert [ours[f"iou_{name}"] for name in NAMES] == pytest.approx(classes.tolist())
    assert ours["iou_macro"] == pytest.approx(float(classes.mean()))
    assert ours["pixel_accuracy"] == pytest.approx(accuracy_score(true, found))
    torchmetrics = pytest.importorskip("torchmetrics")
    index = torchmetrics.JaccardIndex(task="multiclass", num_classes=3)(torch.tensor(found), torch.tensor(true))
    assert ours["iou_macro"] == pytest.approx(float(index), abs=1e-6)
    # The deliberate fault: the mean over images of each image's mean IoU.
    of_images = np.mean([scores([pair])["iou_macro"] for pair in pairs])
    assert abs(of_images - ours["iou_macro"]) > 0.005


def test_classes_by_hand() -> None:
    """One class is in no mask but found, one in neither."""
    pair = (np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]))
    values = scores([pair], [*NAMES, "star"])
    assert values["iou_ground"] == 1.0 and values["iou_circle"] == 0.5
    assert values["iou_square"] is None and values["iou_star"] is None
    assert values["iou_macro"] == pytest.approx((1 + 0.5 + 0) / 3) and values["pixel_accuracy"] == 0.75


def test_card_has_the_same_values_with_intervals() -> None:
    pairs = images(7, count=60)
    held_out = HeldOutScores(TASKS["image_segmentation"], len(pairs), "iou_circle", class_names=NAMES)
    comparison = Comparison(len(pairs), predicts="pixels")
    for row, (found, true) in enumerate(pairs):
        logits = torch.nn.functional.one_hot(torch.tensor(found), 3).float()
        for part in torch.arange(len(true)).split(7):
            where = torch.full((len(part),), row)
            held_out.add_logits(logits[part], torch.tensor(true)[part], where)
            comparison.add(logits[part], torch.tensor(true)[part], where)
    wanted, estimates = scores(pairs), held_out.estimates()
    for name in ("iou_macro", "iou_circle", "pixel_accuracy"):
        assert estimates[name].value == pytest.approx(wanted[name])
        interval = estimates[name].interval()
        assert interval.low is not None and interval.high is not None
        assert interval.low < interval.value < interval.high
    counted = columns(pairs)
    assert all(np.array_equal(comparison.columns()[name], counts) for name, counts in counted.items())
