"""The loss of object detection: transformers' own, for one image at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftlab.errors import RecipeError

# By transformers' model type: the rule that matches objects with queries and compares them. ``set``: softmax over the
# categories and "no object" (DETR). ``focal``: a sigmoid per category. ``varifocal``: the same, weighted by overlap (RT-DETR).
RULES = {
    "detr": "set",
    "table-transformer": "set",
    "yolos": "set",
    "conditional_detr": "focal",
    "deformable_detr": "focal",
    "dab-detr": "focal",
    "rt_detr": "varifocal",
    "rt_detr_v2": "varifocal",
}
_PARTS = ("labels", "boxes")


class DetectionLoss:
    """The loss of the last layer. Each image is divided by its own number of objects, so that the loss of a step is the mean
    over its images, however they are batched; transformers divides by the objects of the batch.

    Args: config: of the model. Raises: RecipeError for a family with another loss.
    """

    def __init__(self, config: Any, num_classes: int) -> None:
        kind = config.model_type
        if kind not in RULES:
            raise RecipeError(
                f"object_detection does not train {kind}, whose loss needs more than classes and boxes; use one of "
                f"{', '.join(RULES)}",
                key="model.name",
            )
        self.rule = RULES[kind]
        self.num_queries = int(getattr(config, "num_detection_tokens", None) or config.num_queries)
        # The classes of a query: with "no object" as the last one, or without.
        self.width = num_classes + (self.rule == "set")
        config = copy.deepcopy(config)
        config.num_labels = num_classes
        self._criterion, self._weights, self._parts = _criterion(self.rule, config)

    def __call__(self, logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        """[] the loss of one image. Args: logits: [Q, width]. boxes: [Q, 4] center, width and height, as shares of the image.
        classes: [M] int64. targets: [M, 4] like boxes."""
        outputs = {"logits": logits[None], "pred_boxes": boxes[None]}
        wanted = [{"class_labels": classes, "boxes": targets.to(boxes.dtype)}]
        criterion = self._criterion.to(device=logits.device, dtype=logits.dtype)
        indices = criterion.matcher(outputs, wanted)
        count = max(len(classes), 1)
        parts: dict[str, Tensor] = {}
        for name in self._parts:
            parts |= criterion.get_loss(name, outputs, wanted, indices, count)
        return torch.stack(
            [self._weights[name] * value for name, value in parts.items() if name in self._weights]
        ).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., num_classes] the probability of each class for each query."""
        return logits.softmax(-1)[..., :-1] if self.rule == "set" else logits.sigmoid()

    def found(self, logits: Tensor, boxes: Tensor, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``most`` likeliest objects of one image, likeliest first: scores, classes, and boxes [n, 4] as left, top, right
        and bottom shares of the image, cut at its edges. As the models' own processors: a query gives one object with a softmax,
        and one per class with sigmoids."""
        scores = self.probabilities(logits)
        if self.rule == "set":
            scores, classes = scores.max(-1)
            queries = torch.arange(len(scores), device=scores.device)
        else:
            count = scores.shape[-1]
            scores, places = scores.flatten(), torch.arange(scores.numel(), device=scores.device)
            queries, classes = places // count, places % count
        order = scores.sort(descending=True, stable=True).indices[:most]
        center, size = boxes[queries[order], :2], boxes[queries[order], 2:]
        corners = torch.cat([center - size / 2, center + size / 2], -1).clamp(0, 1)
        return scores[order], classes[order], corners


def _criterion(rule: str, config: Any) -> tuple[Any, dict[str, float], Sequence[str]]:
    """Transformers' module for a rule, the weights of its losses by name, and the parts to compute."""
    if rule == "varifocal":
        from transformers.loss.loss_rt_detr import RTDetrLoss

        criterion = RTDetrLoss(config)
        return criterion, criterion.weight_dict, criterion.losses
    costs = {"class_cost": config.class_cost, "bbox_cost": config.bbox_cost, "giou_cost": config.giou_cost}
    weights = {"loss_ce": 1.0, "loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
    if rule == "focal":
        from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

        # As transformers' own loss function, which leaves the weight of the classes at 1.
        matcher = DeformableDetrHungarianMatcher(**costs)
        return DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, _PARTS), weights, _PARTS
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    return ImageLoss(HungarianMatcher(**costs), config.num_labels, config.eos_coefficient, _PARTS), weights, _PARTS
