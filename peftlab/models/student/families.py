"""The architectures whose width can be cut: their linears, their possible sizes, and which module reads which."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peftlab.errors import RecipeError
from peftlab.models.student.rebuild import rebuilt
from peftlab.models.student.stack import find_stack

_SECTION = "distill.student_init"


@dataclass(frozen=True)
class _Names:
    """Module paths inside a layer, and those of the norms outside the layers inside the base model."""

    query: str
    key: str
    value: str
    attention_out: str
    into_mlp: tuple[str, ...]
    down: str
    norms: tuple[str, ...]
    outer_norm: str
    eps: str


_DECODER = _Names(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    into_mlp=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    outer_norm="norm",
    eps="rms_norm_eps",
)
_ENCODER = _Names(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    into_mlp=("intermediate.dense",),
    down="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    outer_norm="embeddings.LayerNorm",
    eps="layer_norm_eps",
)
_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _DECODER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _ENCODER),
}
# Head layers with their own output channels: (the dense layer, the module whose output is read, the readers).
_PRIVATE_HEADS = (
    ("pooler.dense", "pooler", ("classifier", "cls.seq_relationship")),
    ("classifier.dense", "classifier.dense", ("classifier.out_proj",)),
)
# Masked-LM heads end in the word embeddings, so their channels are the hidden channels.
_TIED_TRANSFORMS = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    ("lm_head.dense", "lm_head.layer_norm"),
)


@dataclass(frozen=True)
class Widths:
    """The requested widths; None keeps the source's."""

    hidden_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class Sizes:
    """All widths of a model. ``norm_eps`` is the epsilon of its norms."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int
    norm_eps: float

    @classmethod
    def of(cls, config: Any) -> Sizes:
        heads = config.num_attention_heads
        return cls(
            config.hidden_size,
            heads,
            getattr(config, "num_key_value_heads", heads),
            config.intermediate_size,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            getattr(config, _FAMILIES[config.model_type].eps),
        )

    def write(self, config: Any) -> None:
        """Sets the config's entries; ``head_dim`` only if the architecture reads it."""
        config.hidden_size = self.hidden_size
        config.num_attention_heads = self.num_heads
        config.intermediate_size = self.intermediate_size
        setattr(config, _FAMILIES[config.model_type].eps, self.norm_eps)
        if _FAMILIES[config.model_type] is _DECODER:
            config.num_key_value_heads = self.num_key_value_heads
            config.head_dim = self.head_dim


@dataclass(frozen=True)
class LayerParts:
    """The linears of one layer."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_out: nn.Module
    into_mlp: tuple[nn.Module, ...]
    down: nn.Module


@dataclass(frozen=True)
class PrivateHead:
    """A head layer with its own output channels; ``activated`` is the module that outputs them."""

    dense: nn.Module
    activated: nn.Module
    readers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Parts:
    """Every part of a model that depends on one of its widths.

    Attributes:
        norms: over the hidden channels, in the base model. head_norms: the same in a masked-LM head.
        readers: output layers that read the hidden channels (``lm_head``, ``score``, a token classifier).
        tied_transforms: from hidden channels to hidden channels.
    """

    hidden_size: int
    layers: tuple[LayerParts, ...]
    norms: tuple[nn.Module, ...]
    head_norms: tuple[nn.Module, ...]
    embeddings: tuple[nn.Module, ...]
    readers: tuple[nn.Module, ...]
    tied_transforms: tuple[nn.Module, ...]
    private: tuple[PrivateHead, ...]


def find_parts(model: nn.Module) -> Parts:
    """The parts of ``model``, which must be of one of the families."""
    config: Any = model.config
    names = _FAMILIES[config.model_type]
    sizes = Sizes.of(config)
    base: Any = model.base_model
    stack = find_stack(model)
    modules = dict(model.named_modules())
    layers = tuple(
        LayerParts(
            layer.get_submodule(names.query),
            layer.get_submodule(names.key),
            layer.get_submodule(names.value),
            layer.get_submodule(names.attention_out),
            tuple(layer.get_submodule(n) for n in names.into_mlp),
            layer.get_submodule(names.down),
        )
        for layer in stack.layers
    )
    norms = [layer.get_submodule(n) for layer in stack.layers for n in names.norms] + [
        base.get_submodule(names.outer_norm)
    ]
    transforms = [(modules[d], modules[n]) for d, n in _TIED_TRANSFORMS if d in modules]
    private = [part for head in _PRIVATE_HEADS if (part := _private(modules, head))]
    known = {id(m) for dense, norm in transforms for m in (dense, norm)}
    known |= {id(m) for head in private for m in (head.dense, *head.readers)}
    known |= {id(m) for m in stack.layers.modules()}
    outside = [m for m in modules.values() if id(m) not in known]
    return Parts(
        sizes.hidden_size,
        layers,
        tuple(norms),
        tuple(norm for _, norm in transforms),
        tuple(m for m in outside if isinstance(m, nn.Embedding) and m.embedding_dim == sizes.hidden_size),
        tuple(m for m in outside if isinstance(m, nn.Linear) and m.in_features == sizes.hidden_size),
        tuple(dense for dense, _ in transforms),
        tuple(private),
    )


def _private(modules: dict[str, nn.Module], head: tuple[str, str, tuple[str, ...]]) -> PrivateHead | None:
    dense, activated, readers = head
    path = next((name for name in modules if name == dense or name.endswith(f".{dense}")), None)
    if path is None:
        return None
    prefix = path.removesuffix(dense)
    linears = tuple(modules[name] for name in readers if isinstance(modules.get(name), nn.Linear))
    return PrivateHead(modules[path], modules[prefix + activated], linears)


def resolve_sizes(model: nn.Module, widths: Widths) -> tuple[Sizes, Sizes]:
    """The sizes before and after the cut.

    Raises: RecipeError (unsupported architecture, larger than the source, not divisible).
    """
    config: Any = model.config
    if config.model_type not in _FAMILIES:
        raise RecipeError(
            f"expected an architecture whose width can be cut ({', '.join(_FAMILIES)}), found {config.model_type}; cut "
            "layers instead",
            key=_first_key(widths),
        )
    before = Sizes.of(config)
    for name in ("hidden_size", "num_heads", "num_key_value_heads", "intermediate_size"):
        wanted, has = getattr(widths, name), getattr(before, name)
        if wanted is not None and not 1 <= wanted <= has:
            raise RecipeError(f"expected {name} from 1 to the model's {has}, found {wanted}", key=f"{_SECTION}.{name}")
    is_decoder = _FAMILIES[config.model_type] is _DECODER
    heads, groups = _decoder_heads(before, widths) if is_decoder else _encoder_heads(config, before, widths)
    hidden = widths.hidden_size or before.hidden_size
    after = replace(
        before,
        hidden_size=hidden,
        num_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=widths.intermediate_size or before.intermediate_size,
        norm_eps=before.norm_eps * before.hidden_size / hidden,
    )
    # Some configs have their own rules, such as Llama's hidden_size % num_heads == 0.
    smaller = copy.deepcopy(config)
    after.write(smaller)
    rebuilt(model, smaller, key=_first_key(widths))
    return before, after


def _decoder_heads(before: Sizes, widths: Widths) -> tuple[int, int]:
    """(query heads, key/value heads) after the cut."""
    per_group = before.num_heads // before.num_key_value_heads
    heads, groups = widths.num_heads, widths.num_key_value_heads
    if heads is None:
        groups = groups or before.num_key_value_heads
        heads = groups * per_group
    elif groups is None:
        groups = heads if per_group == 1 else before.num_key_value_heads
    if heads % groups:
        raise RecipeError(
            f"expected num_heads to be a multiple of the {groups} key/value heads, found {heads}: each keeps equally many "
            "query heads; set num_key_value_heads as well to remove whole groups",
            key=f"{_SECTION}.num_heads",
        )
    if heads // groups > per_group:
        raise RecipeError(
            f"expected at most {per_group} query heads per key/value head as in the model, found {heads} for {groups}",
            key=f"{_SECTION}.num_heads",
        )
    return heads, groups


def _encoder_heads(config: Any, before: Sizes, widths: Widths) -> tuple[int, int]:
    if widths.num_key_value_heads is not None:
        raise RecipeError(
            f"{config.model_type} has one key and one value per head; set num_heads",
            key=f"{_SECTION}.num_key_value_heads",
        )
    heads = widths.num_heads or before.num_heads
    hidden = widths.hidden_size or before.hidden_size
    if hidden != heads * before.head_dim:
        if widths.hidden_size is None or widths.num_heads is not None:
            fitting = f"with num_heads={heads} set hidden_size={heads * before.head_dim}"
        elif hidden % before.head_dim == 0:
            fitting = f"set num_heads={hidden // before.head_dim} as well"
        else:
            fitting = f"choose a multiple of {before.head_dim} and the num_heads for it"
        raise RecipeError(
            f"expected hidden_size = num_heads x {before.head_dim}, found {hidden} and {heads}: the config of "
            f"{config.model_type} has no head size, so it is hidden_size / num_heads, and heads keep their "
            f"{before.head_dim} channels; {fitting}",
            key=f"{_SECTION}.{'hidden_size' if widths.hidden_size is not None else 'num_heads'}",
        )
    return heads, heads


def _first_key(widths: Widths) -> str:
    names = ("hidden_size", "num_heads", "num_key_value_heads", "intermediate_size")
    return f"{_SECTION}.{next((name for name in names if getattr(widths, name) is not None), 'hidden_size')}"
