"""The adapter methods: PEFT's, and full fine-tuning.

Methods and their options come from the installed PEFT. A row in ``_ROWS`` adds what PEFT's source does not say: a label, the
paper, what was measured of it, keys of ours, settings that it needs. A method without a row works too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftlab.specs.method_spec import Divisor, MethodSpec, Variant
from peftlab.specs.peft_methods import PeftOption, peft_method, peft_method_names

# Words for the key ``targets`` that stand for modules found by their kind.
TARGET_NAMES = ("all-linear", "all-norms", "embeddings")


# Methods all of whose values are in the layers that they adapt; others share some between layers.
_IN_LAYERS = (
    *("lora", "loha", "lokr", "oft", "boft", "hra", "ia3", "miss", "c3a", "fourierft", "gralora", "hira", "ln_tuning"),
    *("road", "deft", "delora"),
)


def _of_peft(name: str, label: str, summary: str, paper: str = "", **more: Any) -> MethodSpec:
    return MethodSpec(name, label, summary, peft=name, paper=paper, beside=name in _IN_LAYERS, **more)


# Where PEFT uses the outputs of a quantized layer, and not its stored bytes as if they were the weight.
_QUANTIZED = ("nf4", "int8")
_NO_WEIGHT = "its virtual tokens change no weight"
_QALORA = "PEFT uses it on GPTQ weights only, which peftlab does not load"
_UNREAD = (
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
        "use_bdlora",
    ),
    *("arrow_config", "kasa_config", "use_qalora", "qalora_group_size", "lora_bias", "alora_invocation_tokens"),
    *("alpha_pattern", "rank_pattern", "target_parameters", "runtime_config"),
)
_TASK_IDS = "it needs the number of a task with each row, which no task here has"

_BOTTLENECK = (
    PeftOption(
        "style",
        "str",
        "pfeiffer",
        "houlsby: after attention and feed-forward; pfeiffer: after the feed-forward sublayer; parallel: beside it",
    ),
    PeftOption("reduction_factor", "float", 16.0, "width of the block / width of the bottleneck"),
    PeftOption("non_linearity", "str", "relu", "a name of transformers' activations, such as gelu or silu"),
    PeftOption("scaling", "Union[float, str]", 1.0, "factor on the output, or learned: one trained number per adapter"),
    PeftOption("dropout", "float", 0.0, "dropout on the adapter's output"),
    PeftOption("modules_to_save", "list[str]", [], "modules that are trained in full"),
)

_ROWS: tuple[MethodSpec, ...] = (
    _of_peft(
        "lora",
        "LoRA",
        "adds a low-rank product B A to each weight",
        "2106.09685",
        defaults={"rank": 8, "alpha": 16.0},
        storages=_QUANTIZED,
        several=True,
        evidence="98 % of published adapters; every engine serves it; the default",
        needed={
            "eva_config": ("init_lora_weights", "eva"),
            "corda_config": ("init_lora_weights", "corda"),
            "lora_ga_config": ("init_lora_weights", "lora_ga"),
            "loftq_config": ("init_lora_weights", "loftq"),
        },
        refused_options={
            "use_qalora": _QALORA,
            "qalora_group_size": _QALORA,
            "arrow_config": "it chooses between adapters that exist, and trains nothing",
            "monteclora_config": "its random draws differ between two forwards, so its gradients cannot be verified",
            "runtime_config": "it is a setting of the process and not of the adapter",
        },
        variants={
            "lora": Variant(fused=True, several=True),
            "rslora": Variant({"rslora": True}, fused=True, several=True),
            "dora": Variant({"dora": True}),
        },
    ),
    MethodSpec(
        "none",
        "full fine-tuning",
        "trains the model's own weights",
        own_keys={"freeze": "freeze"},
        unmergeable="the run's model/ is the trained model",
        storages=(),
        evidence="what every adapter is compared with; many times the memory",
        variants={"full": Variant()},
    ),
    MethodSpec(
        "bottleneck",
        "bottleneck adapters",
        "small networks after or beside the sublayers of each block (Houlsby, Pfeiffer, parallel)",
        own_options=_BOTTLENECK,
        paper="1902.00751",
        own_keys={"dropout": "dropout", "modules_to_save": "modules_to_save"},
        unmergeable="a non-linearity stands between its matrices",
        storages=("nf4", "int8"),
        evidence="the first adapters; slower than LoRA at inference, because they cannot be merged",
        beside=True,
    ),
    _of_peft(
        "adalora",
        "AdaLoRA",
        "LoRA as a singular value decomposition; the loop moves rank to the modules that need it",
        "2303.10512",
        own_keys={"rank": "target_r"},
        fixed={"r": 8},
        files_lack="they have only the ranks that were kept, and a new schedule begins with all",
        refused_options=dict.fromkeys(_UNREAD, "AdaLoRA takes it from LoRA's options, and does not read it"),
        evidence="37.3 on GSM8K where LoRA has 47.8 (PEFT's table); rank chosen by gradients gains nothing (arXiv 2605.16800)",
        storages=_QUANTIZED,
    ),
    _of_peft(
        "adamss", "AdaMSS", "trains subspaces of each weight, found by clustering its singular vectors", storages=()
    ),
    _of_peft(
        "adaption_prompt",
        "LLaMA-Adapter",
        "trained prompts in the attention of the last layers, behind a gate that starts at 0",
        "2303.16199",
        without=("targets",),
        required=("adapter_len", "adapter_layers"),
        unmergeable="it adds keys and values to the attention, and changes no weight",
        storages=_QUANTIZED,
    ),
    _of_peft("beft", "BEFT", "trains the biases of chosen layers", "2509.15974", storages=_QUANTIZED),
    _of_peft(
        "boft",
        "BOFT",
        "multiplies each weight by butterfly-factorized rotations",
        "2311.06243",
        divisors=(Divisor("boft_block_size", "in", when={"boft_block_num": 0}), Divisor("boft_block_num", "in")),
        storages=_QUANTIZED,
    ),
    _of_peft(
        "c3a",
        "C3A",
        "adds block-circulant matrices, applied by FFT",
        "2407.19342",
        divisors=(Divisor("block_size"),),
        storages=_QUANTIZED,
    ),
    _of_peft(
        "cartridge",
        "Cartridge",
        "trains a key-value cache that stands for a long context",
        "2506.06266",
        unmergeable=_NO_WEIGHT,
        defaults={"num_virtual_tokens": 20, "num_frozen_tokens": 0},
        storages=_QUANTIZED,
    ),
    _of_peft(
        "cpt",
        "CPT",
        "trains the embeddings of a given context",
        "2410.17222",
        refused="its loss and its labels are computed inside PEFT from its own token types, which a loss outside cannot see",
    ),
    _of_peft("deft", "DEFT", "projects a subspace out of each weight and adds a low-rank one", storages=()),
    _of_peft(
        "delora",
        "DeLoRA",
        "LoRA with a normalized update, whose strength is trained apart from its direction",
        "2503.18225",
        storages=(),
    ),
    _of_peft(
        "fourierft",
        "FourierFT",
        "trains a few Fourier coefficients of each update",
        "2405.03003",
        storages=_QUANTIZED,
    ),
    _of_peft(
        "frod",
        "FRoD",
        "trains a sparse rotation of each weight's singular values",
        defaults={"progressbar": False},
        storages=(),
    ),
    _of_peft(
        "glora",
        "GLoRA",
        "scales and shifts weights and biases by low-rank terms",
        "2306.07967",
        storages=(),
        several=True,
    ),
    _of_peft(
        "gralora",
        "GraLoRA",
        "LoRA in blocks of each weight",
        "2505.20355",
        divisors=(Divisor("gralora_k"),),
        storages=_QUANTIZED,
    ),
    _of_peft(
        "hira",
        "HiRA",
        "multiplies each weight by a low-rank matrix, value by value",
        storages=_QUANTIZED,
        several=True,
    ),
    _of_peft("hra", "HRA", "multiplies each weight by Householder reflections", "2405.17484", storages=()),
    _of_peft(
        "ia3",
        "IA3",
        "scales the outputs of each layer",
        "2205.05638",
        # A scaled output of up_proj is the scaled input of down_proj, which the paper trains.
        defaults={"feedforward_modules": []},
        evidence="fewest parameters of the early methods; made for few examples",
        storages=_QUANTIZED,
    ),
    _of_peft(
        "lily",
        "Lily",
        "shares low-rank factors between layers, chosen by a router",
        "2407.09946",
        unmergeable="a router chooses its factors by the input",
        storages=_QUANTIZED,
    ),
    _of_peft(
        "ln_tuning",
        "LayerNorm tuning",
        "trains the weights of the norms",
        "2312.11420",
        targets="all-norms",
        storages=_QUANTIZED,
    ),
    _of_peft(
        "loha",
        "LoHa",
        "adds the value-by-value product of two low-rank matrices",
        "2108.06098",
        evidence="used for image models (3.7 % of imports, with LoKr)",
        storages=("int8",),
    ),
    _of_peft(
        "lokr",
        "LoKr",
        "adds a Kronecker product",
        "2309.14859",
        evidence="used for image models",
        storages=("int8",),
    ),
    _of_peft(
        "miss",
        "MiSS",
        "shares the rows of one small matrix over each weight",
        "2409.15371",
        divisors=(
            Divisor("r", when={"init_weights": "bat"}),
            Divisor("mini_r", "out", when={"init_weights": "mini"}),
        ),
        storages=_QUANTIZED,
    ),
    _of_peft(
        "multitask_prompt_tuning",
        "multitask prompt tuning",
        "prompt tuning with a shared prompt for several tasks",
        "2303.02861",
        refused=_TASK_IDS,
    ),
    _of_peft("oft", "OFT", "multiplies each weight by rotations in blocks", "2306.07280", storages=_QUANTIZED),
    _of_peft(
        "osf",
        "OSF",
        "trains the small singular directions of each weight and keeps the large ones",
        "2504.07097",
        storages=(),
    ),
    _of_peft(
        "p_tuning",
        "P-tuning",
        "virtual tokens made by a small network",
        "2103.10385",
        defaults={"num_virtual_tokens": 20},
        files_lack="they have the virtual tokens, and not the network that makes them",
        evidence="learns little where a classifier reads the first position, as BERT's does: that is a virtual token",
        unmergeable=_NO_WEIGHT,
        storages=_QUANTIZED,
    ),
    _of_peft("peanut", "PEANuT", "a small network of the frozen weight as its update", "2410.01870", storages=()),
    _of_peft("poly", "Poly", "mixes LoRA skills by task", "2202.13914", refused=_TASK_IDS),
    _of_peft(
        "prefix_tuning",
        "prefix tuning",
        "trains keys and values before the text, in every layer",
        "2101.00190",
        defaults={"num_virtual_tokens": 20},
        unmergeable=_NO_WEIGHT,
        storages=_QUANTIZED,
    ),
    _of_peft(
        "prompt_tuning",
        "prompt tuning",
        "trains virtual tokens before the text",
        "2104.08691",
        defaults={"num_virtual_tokens": 20},
        evidence="needs many steps and a large model",
        unmergeable=_NO_WEIGHT,
        storages=_QUANTIZED,
    ),
    _of_peft("psoft", "PSOFT", "rotates the principal subspace of each weight", storages=()),
    _of_peft("pvera", "PVeRA", "VeRA with a distribution over its vectors", "2512.07703", storages=_QUANTIZED),
    _of_peft("randlora", "RandLoRA", "full-rank sums of fixed random products", "2502.00987", storages=_QUANTIZED),
    _of_peft(
        "road",
        "RoAd",
        "rotates pairs of outputs in two dimensions",
        "2409.00119",
        divisors=(Divisor("group_size", "out", even=True),),
        storages=_QUANTIZED,
        several=True,
    ),
    _of_peft(
        "shadow",
        "ShadowPEFT",
        "a small network beside the decoder",
        without=("targets",),
        unmergeable="its update depends on the input",
        storages=_QUANTIZED,
    ),
    _of_peft("shira", "SHiRA", "trains a sparse set of weights", "2406.13175", storages=_QUANTIZED),
    _of_peft("supertuning", "Super-Tuning", "trains the largest values of each weight", "2607.09287", storages=()),
    _of_peft("tinylora", "TinyLoRA", "a few numbers, projected to every layer", "2602.04118", storages=()),
    _of_peft(
        "trainable_tokens",
        "trainable tokens",
        "trains rows of the embeddings",
        targets="embeddings",
        required=("token_indices",),
        evidence="chat tokens in 1 % of the memory of whole embeddings",
        storages=_QUANTIZED,
    ),
    _of_peft("unilora", "Uni-LoRA", "one trained vector, projected to all factors", "2506.00799", storages=()),
    _of_peft(
        "vblora",
        "VB-LoRA",
        "builds the factors from a shared bank of vectors",
        "2405.15179",
        divisors=(Divisor("vector_length"),),
        storages=_QUANTIZED,
    ),
    _of_peft("vera", "VeRA", "trains two vectors around shared random matrices", "2310.11454", storages=_QUANTIZED),
    _of_peft("waveft", "WaveFT", "trains a few wavelet coefficients of each update", "2505.12532", storages=_QUANTIZED),
    _of_peft(
        "xlora",
        "X-LoRA",
        "mixes given LoRA adapters by token",
        "2402.07148",
        fixed={"use_trainable_adapters": False},
        required=("adapters",),
        unmergeable="it mixes its adapters by the input",
        storages=(),
    ),
)


def _methods() -> dict[str, MethodSpec]:
    installed = peft_method_names()
    rows = {row.name: row for row in _ROWS if row.peft is None or row.peft in installed}
    return rows | {name: _unknown(name) for name in installed if name not in rows}


def _unknown(name: str) -> MethodSpec:
    """The row of a method that PEFT registers and that nobody here tried."""
    return MethodSpec(name, name, peft_method(name).summary, peft=name)


METHODS: dict[str, MethodSpec] = _methods()

# Name in the benchmark -> (method, variant), in display order.
VARIANTS: dict[str, tuple[MethodSpec, Variant]] = {
    name: (spec, variant)
    for spec in METHODS.values()
    if not spec.refused
    for name, variant in (spec.variants or {spec.name: Variant(several=spec.several)}).items()
}

# Those that a comparison takes unless it names some: the family of LoRA, and full fine-tuning.
COMPARED = tuple(name for name, (spec, _) in VARIANTS.items() if spec.variants)


def rank_of(variant: str, rank: int | None, recipe_method: str | None) -> int | None:
    """The rank at which a comparison measures a variant; None for a method without one.

    Args: rank: of the comparison. recipe_method: the method that ``rank`` belongs to, because it is the recipe's; other methods
        then use their own. None: the user gave the rank for all.
    """
    spec = VARIANTS[variant][0]
    if not spec.has_rank:
        return None
    return rank if rank is not None and recipe_method in (None, spec.name) else spec.default("rank")


def variant_of(method: str, settings: Mapping[str, Any]) -> str:
    """The benchmark's name for a section ``adapter`` with these ``settings``: the last variant of ``method`` that matches them."""
    names = [name for name, (spec, _) in VARIANTS.items() if spec.name == method]
    fits = [name for name in names if all(settings[k] == v for k, v in VARIANTS[name][1].settings.items())]
    return fits[-1]
