"""How the frozen linear weights are stored: ``model.quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageSpec:
    """What everyone else asks about a storage of weights.

    Attributes:
        label: in a table, ``long_label`` in the key of a picture; colour: there.
        keys: of the section ``model`` that it uses.
        split_cost: what one more micro-batch costs in padded tokens, by kind of device: launches and weight traffic that do
            not depend on its size, and dequantization. Measured with bench/peers.py --split-cost on 2 cores; a GPU needs
            thousands of tokens to fill.
        overhead: time of a training step over that of its matmuls alone. Measured on 2 CPU cores with the shipped recipes
            (1.8 to 2.5, NF4 1.1 to 3.5 as the machine's speed moved): norms, activations, optimizer, dequantizing.
    """

    name: str
    label: str
    long_label: str
    colour: str
    split_cost: Mapping[str, int]
    overhead: float
    keys: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        return self.name != "none"


# Colours of Okabe and Ito (2008), which the colour-blind tell apart too.
STORAGES: dict[str, StorageSpec] = {
    spec.name: spec
    for spec in (
        StorageSpec("none", "dense", "dense weights", "#0072B2", {"cpu": 64, "cuda": 2048}, 2.0),
        StorageSpec(
            "nf4",
            "nf4",
            "NF4 weights",
            "#D55E00",
            {"cpu": 128, "cuda": 2048},
            2.4,
            keys=("double_quant", "compute_dtype"),
        ),
        StorageSpec("int8", "int8", "int8 weights", "#009E73", {"cpu": 128, "cuda": 2048}, 2.4),
    )
}
