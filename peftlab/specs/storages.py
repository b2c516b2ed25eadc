"""How the frozen linear weights are stored: ``model.quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageSpec:
    """Properties of a weight storage.

    Attributes:
        label: its name in a table; ``long_label`` and ``colour``: in a picture.
        keys: the keys of ``model`` that it uses.
        split_cost: cost of one more micro-batch in padded tokens, by kind of device: launches and weight traffic that do
            not depend on its size, and dequantization. Measured with bench/peers.py --split-cost on 2 cores; a GPU needs
            thousands of tokens to be busy.
        overhead: time of a training step relative to its matmuls alone: norms, activations, optimizer, dequantization.
            Measured on 2 CPU cores with the shipped recipes (1.8 to 2.5; NF4 1.1 to 3.5 as the machine's speed varied).
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


# Colours of Okabe and Ito (2008), which are safe for colour-blind readers.
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
