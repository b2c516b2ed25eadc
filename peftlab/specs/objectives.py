"""The losses of vectors that are trained from pairs, triplets and scores (``train.objective``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveSpec:
    """Properties of an objective.

    Attributes:
        summary: what it compares.
        keys: the keys of the section train that it uses among those that not all objectives use.
        whole_step: whether the loss of a row depends on the other rows of its optimizer step.
    """

    name: str
    summary: str
    keys: tuple[str, ...] = ()
    whole_step: bool = False


OBJECTIVES: dict[str, ObjectiveSpec] = {
    spec.name: spec
    for spec in (
        ObjectiveSpec(
            "in_batch",
            "cross-entropy of finding the own positive of an anchor among all positives and negatives of the optimizer step",
            keys=("embedding_scale",),
            whole_step=True,
        ),
        ObjectiveSpec(
            "triplet",
            "the positive is closer to the anchor than the negative, by train.margin in cosine",
            keys=("margin",),
        ),
        ObjectiveSpec("cosine", "squared difference between cosine and score"),
        ObjectiveSpec(
            "cosent",
            "the cosines of all pairs of the optimizer step are in the order of their scores",
            keys=("embedding_scale",),
            whole_step=True,
        ),
    )
}
