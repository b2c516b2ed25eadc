"""The modes of ``run.kernels``: how an adapted layer is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelMode:
    """Properties of a kernel mode.

    Attributes:
        label: its name in a table; ``long_label``: in the key of a picture.
        benched: whether ``peftlab bench --kernels`` offers it.
        operands: the type that the processor's units round operands to; None: no rounding.
        storage: the only weight storage that it supports; None: any.
    """

    name: str
    label: str
    long_label: str
    benched: bool = True
    operands: str | None = None
    storage: str | None = None


KERNEL_MODES: dict[str, KernelMode] = {
    mode.name: mode
    for mode in (
        KernelMode("auto", "fused", "fused path"),
        KernelMode("triton", "Triton", "fused path, Triton", benched=False),
        KernelMode("cpu-bf16", "fused bf16", "fused, bfloat16 operands", operands="bfloat16"),
        KernelMode("cpu-int8", "fused int8", "fused, int8 operands", operands="int8", storage="int8"),
        KernelMode("reference", "PEFT", "PEFT's path"),
    )
}
