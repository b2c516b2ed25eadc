"""The optimizers and learning-rate schedules. ``peftlab/training/optimizers.py`` and ``schedules.py`` implement them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerSpec:
    """Properties of an optimizer.

    Attributes: keys: the keys of ``train`` that it uses, in addition to ``lr``. paged: its state moves between the memory of
        the GPU and that of the machine, so it needs a GPU.
    """

    name: str
    summary: str
    keys: tuple[str, ...] = ()
    paged: bool = False


@dataclass(frozen=True)
class ScheduleSpec:
    """Properties of a schedule. Attributes: keys: the keys of ``train`` that it uses, in addition to ``warmup``."""

    name: str
    summary: str
    keys: tuple[str, ...] = ()


_ADAMW_KEYS = ("betas", "weight_decay")

OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec("adamw", "AdamW, fused", keys=_ADAMW_KEYS),
        OptimizerSpec("adamw_8bit", "AdamW of bitsandbytes with its state in 8 bits", keys=_ADAMW_KEYS),
        OptimizerSpec(
            "paged_adamw",
            "AdamW of bitsandbytes, whose state moves to CPU memory when the GPU is full",
            keys=_ADAMW_KEYS,
            paged=True,
        ),
        OptimizerSpec("paged_adamw_8bit", "both", keys=_ADAMW_KEYS, paged=True),
    )
}

SCHEDULES: dict[str, ScheduleSpec] = {
    spec.name: spec
    for spec in (
        ScheduleSpec("linear", "falls linearly to 0"),
        ScheduleSpec("cosine", "falls along half a cosine to 0"),
        ScheduleSpec("constant", "stays"),
    )
}
