"""The optimizers and learning-rate schedules. ``peftlab/training/optimizers.py`` and ``schedules.py`` implement them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerSpec:
    """Properties of an optimizer.

    Attributes: keys: the keys of ``train`` that it uses, in addition to ``lr``.
    """

    name: str
    summary: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScheduleSpec:
    """Properties of a schedule. Attributes: keys: the keys of ``train`` that it uses, in addition to ``warmup``."""

    name: str
    summary: str
    keys: tuple[str, ...] = ()


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec for spec in (OptimizerSpec("adamw", "AdamW, fused", keys=("betas", "weight_decay")),)
}

SCHEDULES: dict[str, ScheduleSpec] = {
    spec.name: spec
    for spec in (
        ScheduleSpec("linear", "falls linearly to 0"),
        ScheduleSpec("cosine", "falls along half a cosine to 0"),
        ScheduleSpec("constant", "stays"),
    )
}
