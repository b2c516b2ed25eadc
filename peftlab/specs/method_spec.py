"""``MethodSpec``: what is known of an adapter method, and which keys and options of a recipe it has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftlab.specs.peft_methods import PeftMethod, PeftOption, peft_method

# Keys of the section ``adapter`` -> PEFT's names for them, which end in the method's name in some classes.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha", "{}_alpha"),
    "dropout": ("lora_dropout", "{}_dropout"),
    "targets": ("target_modules",),
    "rslora": ("use_rslora",),
    "dora": ("use_dora",),
    "bias": ("bias",),
    "modules_to_save": ("modules_to_save",),
}
# Options that the run itself sets: the modules to adapt, the layout of a weight, the model's sizes, the number of steps.
_SET_BY_RUN = frozenset(
    (
        *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "token_dim", "hidden_size"),
        *("num_transformer_submodules", "num_attention_heads", "num_layers", "tokenizer_name_or_path", "total_step"),
        *("megatron_config", "megatron_core"),
    )
)


@dataclass(frozen=True)
class Variant:
    """One way to use a method, as ``peftlab bench --methods`` names it.

    Attributes:
        settings: keys of the section ``adapter`` that differ from their defaults.
        fused: whether it has a fused path. several: whether PEFT can generate with several such adapters in one batch.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    several: bool = False


@dataclass(frozen=True)
class Divisor:
    """An option that has to divide the widths of the adapted linear layers.

    Attributes: option: PEFT's name. of: ``in``, ``out`` or ``both``. even: whether it also has to be even. when: values of other
        options with which this holds.
    """

    option: str
    of: str = "both"
    even: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSpec:
    """Properties of an adapter method.

    Attributes:
        label: its name in a sentence. summary: one line. paper: arXiv number, or another address; empty if unknown.
        peft: its name in PEFT; None for full fine-tuning and for a method of ours.
        own_options: the options of a method of ours.
        own_keys: keys of the section ``adapter`` -> their names in PEFT, where the general rule would not find them.
        without: keys of the section that it does not use although PEFT has the option, which then goes by PEFT's name.
        defaults: settings that differ from PEFT's defaults; a recipe may change them. fixed: those that it may not.
        required: options that a recipe has to set, because nothing sensible can be assumed.
        divisors: options that have to divide the widths of its layers.
        needed: options that do nothing unless another one has a value: (its name, the value).
        refused_options: why no recipe can set an option.
        refused: why no recipe can use it; empty if one can.
        targets: the default of ``targets``.
        unmergeable: why the adapter cannot be merged into the weights; empty if it can, or if nobody tried it here.
        storages: the quantized storages that it can be trained on; None if nobody tried it here.
        files_lack: what its files do not have, so that training cannot go on from them; empty if they have all.
        several: whether PEFT can generate with several such adapters in one batch.
        beside: whether it can be trained beside an adapter of another method: all that it has is in its layers.
        evidence: what is known of its quality, for ``peftlab adapters``.
        variants: its names in the benchmark; default: its own name.
    """

    name: str
    label: str
    summary: str = ""
    peft: str | None = None
    own_options: tuple[PeftOption, ...] = ()
    paper: str = ""
    own_keys: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    divisors: tuple[Divisor, ...] = ()
    needed: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    refused_options: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    targets: str = "all-linear"
    unmergeable: str = ""
    storages: tuple[str, ...] | None = None
    files_lack: str = ""
    several: bool = False
    beside: bool = False
    evidence: str = ""
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def adapts(self) -> bool:
        """Whether it adds an adapter; otherwise the model's own weights are trained."""
        return self.peft is not None or bool(self.own_options)

    @property
    def has_rank(self) -> bool:
        return "rank" in self.keys

    def trains_on(self, storage: str) -> bool:
        """Whether it can be trained on weights in this storage; True if nobody tried."""
        return storage == "none" or self.storages is None or storage in self.storages

    @property
    def prompts(self) -> bool:
        """Whether it adds virtual tokens to the input, and leaves every layer as it is."""
        return self.peft is not None and self._in_peft.prompts

    @property
    def keys(self) -> Mapping[str, str]:
        """The keys of the section ``adapter`` that it uses -> their names in PEFT."""
        found = _keys(self.peft, tuple(self.own_keys.items()), self.name)
        return {key: name for key, name in found.items() if key not in self.without}

    @property
    def places(self) -> tuple[str, ...]:
        """The keys that choose modules of the model, and have no name in PEFT."""
        if self.own_options:
            return ("layers",)
        tokens = ("tokens",) if not self.adapts or "trainable_token_indices" in self.options else ()
        return ("layers", "freeze", "patterns", *tokens) if "targets" in self.keys else tokens

    @property
    def has_targets(self) -> bool:
        """Whether a recipe chooses the modules that it changes."""
        return "targets" in self.keys

    @property
    def options(self) -> Mapping[str, PeftOption]:
        """The options that a recipe gives by PEFT's own name: all that no key of ours stands for."""
        if self.peft is None:
            return {option.name: option for option in self.own_options if option.name not in self.keys.values()}
        taken = {*self.keys.values(), *_SET_BY_RUN, *self.fixed}
        return {name: option for name, option in self._in_peft.options.items() if name not in taken}

    def default(self, key: str) -> Any:
        """The default of a key of ours that depends on the method, such as ``rank``; None if PEFT has none."""
        if key in self.defaults:
            return self.defaults[key]
        name = self.keys.get(key)
        value = None if name is None or self.peft is None else self._in_peft.options[name].default
        return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None

    def value_of(self, option: str) -> Any:
        """The value of an option that the recipe does not set, by PEFT's name."""
        assert self.peft is not None
        return self.defaults[option] if option in self.defaults else self._in_peft.options[option].default

    @property
    def _in_peft(self) -> PeftMethod:
        assert self.peft is not None
        return peft_method(self.peft)


@functools.cache
def _keys(peft: str | None, own: tuple[tuple[str, str], ...], name: str) -> Mapping[str, str]:
    if peft is None:
        return dict(own)
    options = peft_method(peft).options
    found = {}
    for key, names in _NAMES.items():
        chosen = next((n for n in (n.format(name) for n in names) if n in options), None)
        if chosen is not None:
            found[key] = chosen
    return found | dict(own)
