"""The adapter methods. A PEFT method needs only a row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One way to use a method, as ``peftlab bench --methods`` names it.

    Attributes:
        settings: keys of the section ``adapter`` that differ from their defaults.
        fused: whether it has a fused path. several: whether PEFT can generate with several such adapters in one batch.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = True
    several: bool = True


@dataclass(frozen=True)
class MethodSpec:
    """Properties of an adapter method.

    Attributes:
        label: its name in a sentence.
        config: PEFT's configuration class; None if no adapter is added.
        keys: keys of the section ``adapter`` that it uses -> their names in PEFT. ``targets`` and ``modules_to_save``
            apply to all methods.
        fixed: other settings that PEFT's configuration needs.
        mergeable: whether the adapter can be merged into the weights.
        quantized: whether it can be trained on quantized weights.
        variants: its names in the benchmark; default: its own name.
    """

    name: str
    label: str
    config: str | None
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    mergeable: bool = True
    quantized: bool = True
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def adapts(self) -> bool:
        """Whether it adds an adapter; otherwise the model's own weights are trained."""
        return self.config is not None

    @property
    def has_rank(self) -> bool:
        return "rank" in self.keys


METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec(
            "lora",
            "LoRA",
            "LoraConfig",
            keys={
                "rank": "r",
                "alpha": "lora_alpha",
                "dropout": "lora_dropout",
                "targets": "target_modules",
                "rslora": "use_rslora",
                "dora": "use_dora",
                "bias": "bias",
                "modules_to_save": "modules_to_save",
            },
            variants={
                "lora": Variant(),
                "rslora": Variant({"rslora": True}),
                "dora": Variant({"dora": True}, fused=False, several=False),
            },
        ),
        MethodSpec(
            "none",
            "full fine-tuning",
            None,
            keys={"freeze": "freeze"},
            mergeable=False,
            quantized=False,
            variants={"full": Variant(fused=False, several=False)},
        ),
    )
}

# Name in the benchmark -> (method, variant), in display order.
VARIANTS: dict[str, tuple[MethodSpec, Variant]] = {
    name: (spec, variant)
    for spec in METHODS.values()
    for name, variant in (spec.variants or {spec.name: Variant(fused=False, several=False)}).items()
}


def variant_of(method: str, settings: Mapping[str, Any]) -> str:
    """The benchmark's name for a section ``adapter`` with these ``settings``: the last variant of ``method`` that matches them."""
    names = [name for name, (spec, _) in VARIANTS.items() if spec.name == method]
    fits = [name for name in names if all(settings[k] == v for k, v in VARIANTS[name][1].settings.items())]
    return fits[-1]
