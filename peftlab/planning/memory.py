"""What a plan says about memory: phases, each with its terms in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PhasePlan:
    """The memory of one phase of a run at its peak. Attributes: terms: bytes by what they hold."""

    name: str
    terms: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.terms.values())

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.num_bytes, "terms": {k: v for k, v in self.terms.items() if v}}


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run.

    Attributes: rows, tokens: of the largest micro-batch, padding included; ``tokens`` of one row. checkpointed: number of layers that
        are recomputed in backward.
    """

    phases: list[PhasePlan] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    checkpointed: int = 0

    @property
    def peak(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.num_bytes)

    def phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)


def optimizer_bytes(name: str, sizes: list[int]) -> tuple[int, int]:
    """Bytes of an optimizer's state on the device and in CPU memory. AdamW keeps two float32 values per trained parameter.

    In 8 bits bitsandbytes keeps two bytes, and two float32 scales per 256 values; tensors of fewer than 4,096 elements stay in
    float32 (bitsandbytes 0.50, optim/optimizer.py). A paged state moves to CPU memory when the device is full.

    Args: sizes: elements of each trained parameter.
    """
    eight = "8bit" in name
    state = sum(2 * size + 8 * -(-size // 256) if eight and size >= 4096 else 8 * size for size in sizes)
    return (0, state) if name.startswith("paged") else (state, 0)
