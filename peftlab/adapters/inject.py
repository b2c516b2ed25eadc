"""Injects any adapter method of ``specs.methods`` through PEFT, and reports what is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlab.adapters import initial, mixture
from peftlab.adapters.adapter_files import lost_tensors
from peftlab.adapters.beside import Beside, add_beside, errors_beside, keep_bottlenecks
from peftlab.adapters.configuration import bottleneck_config, check_adapter, claimed_by, configs_beside, left_out
from peftlab.adapters.parameters import experts_text
from peftlab.adapters.patterns import Pattern, assigned, set_dropout
from peftlab.adapters.places import chosen_blocks, peft_errors, planned_modules, trained_in_full
from peftlab.adapters.quantized_check import check_untried
from peftlab.errors import RecipeError, listed
from peftlab.specs.methods import METHODS


@dataclass(frozen=True)
class AdapterReport:
    """What is adapted and how much is trained (numbers of parameters and modules).

    Attributes:
        kinds: number of adapted modules by the last part of their names; of an adapter that changes no module: what is trained.
        whole: names of the modules that are trained in full, such as a new head.
        experts: which stacked weights of experts are adapted, and of how many; empty without any.
    """

    num_modules: int
    num_trained: int
    num_total: int
    kinds: dict[str, int]
    whole: tuple[str, ...] = ()
    experts: str = ""

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} x{count}" for name, count in sorted(self.kinds.items()))
        share = 100 * self.num_trained / self.num_total
        where = f" in {self.num_modules} modules: {kinds}" if self.num_modules else f": {kinds}"
        text = f"{self.num_trained:,} of {self.num_total:,} parameters trained ({share:.2f} %){where}"
        text = f"{text}; {self.experts}" if self.experts else text
        return f"{text}; in full: {', '.join(self.whole)}" if self.whole else text


def inject(
    model: nn.Module,
    method: str,
    *,
    peft_type: str | None,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    new: Collection[str] = (),
    layers: Sequence[int] | str | None = None,
    freeze: Sequence[str] = (),
    kernels: str = "auto",
    num_steps: int | None = None,
    rows: Callable[[], initial.InitialRows] | None = None,
    patterns: Sequence[Pattern] = (),
    beside: Sequence[Beside] = (),
    **options: Any,
) -> Any:
    """The model with adapters injected by PEFT (a ``PeftModel``); only the adapters require gradients.

    Args:
        method: name in ``specs.methods`` of a method that adds an adapter.
        peft_type: PEFT task type, such as ``CAUSAL_LM``; None if PEFT has none. For a classifier, and without a type, the
            modules outside the body are the head, which is trained in full.
        targets: ``all-linear``, ``all-norms``, ``embeddings``, module name endings, or one regular expression over full names.
        new: names of the parameters that the model's files lack; their modules are trained in full and saved.
        layers: indices of the blocks to adapt, or a range such as ``-6:``; None: all. freeze: endings of the names of modules
            that are left as they are.
        kernels: auto, triton or reference; see ``fused.set_kernels``. No effect for a method without fused layers.
        num_steps: number of optimizer steps, for a method whose schedule needs it.
        patterns: settings for some of the adapted modules. beside: adapters of other methods, on other modules.
        rows: makes training rows for an initialisation that looks at them.
        options: the method's other keys of the section ``adapter``, such as ``rank``, and its options by PEFT's names.
    Raises: RecipeError if a target or a module to save matches nothing, PEFT refuses the adapter, or a method that nobody tried on
        quantized weights computes something else there.
    """
    import peft

    from peftlab.adapters import fused
    from peftlab.adapters.bottleneck import add_bottlenecks

    places: dict[str, Any] = {
        "peft_type": peft_type,
        "targets": targets,
        "modules_to_save": modules_to_save,
        "new": new,
        "layers": layers,
        "freeze": freeze,
    }
    if METHODS[method].own_options:
        return _inject_bottlenecks(model, places, options)
    config = check_adapter(model, method, num_steps=num_steps, patterns=patterns, beside=beside, **places, **options)
    claimed = claimed_by(model, beside, places)
    configs = configs_beside(model, beside, claimed, places)
    places["freeze"] = [*freeze, *left_out(claimed)]
    of_module = assigned(model, planned_modules(model, method=method, **places), patterns) if patterns else {}
    untried = {name: value for name, value in {method: config, **configs}.items() if METHODS[name].storages is None}
    places_of = claimed | ({method: planned_modules(model, method=method, **places)} if method in untried else {})
    checked = check_untried(model, untried, places_of)
    if "bottleneck" in configs:
        configs["bottleneck"] = add_bottlenecks(model, configs["bottleneck"]).peft_config["default"]
    if type(config) is peft.LoraConfig:
        fused.register(config)
    with warnings.catch_warnings(), peft_errors(method):
        # PEFT 0.21 reads an attribute of transformers 5 under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # norms, whose sizes PEFT asks
        given = rows() if rows is not None and initial.needs_rows(config) else None
        initial.before_injection(model, config, given)
        if mixture.is_mixture(config):
            mixture.before_mixing(model)
        peft_model = peft.get_peft_model(model, config)
        initial.after_injection(peft_model, given)
    if mixture.is_mixture(config):
        mixture.after_mixing(peft_model, list(options["adapters"]))
    for index, (other, own) in enumerate(configs.items()):
        if other == "bottleneck":
            keep_bottlenecks(peft_model, own)
        else:
            with errors_beside(index):
                add_beside(peft_model, other, own)
    set_dropout(peft_model, of_module)
    rates = {other.method: other.lr for other in beside}
    of_module |= {n: Pattern([n], lr=rates[m]) for m, names in claimed.items() for n in names if rates[m] is not None}
    peft_model.patterns_of_modules = of_module
    peft_model.quantized_check = checked
    fused.set_kernels(peft_model, kernels)
    return peft_model


def _inject_bottlenecks(model: nn.Module, places: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    from peftlab.adapters.bottleneck import add_bottlenecks, find_blocks

    layers, (peft_type, saved, new) = places["layers"], (places[n] for n in ("peft_type", "modules_to_save", "new"))
    chosen = None if layers is None else tuple(sorted(chosen_blocks(layers, len(find_blocks(model)))))
    whole = trained_in_full(model, peft_type, saved, new)
    return add_bottlenecks(model, bottleneck_config(options, chosen), modules_to_save=whole, task_type=peft_type)


def try_injection(skeleton: nn.Module, method: str, **arguments: Any) -> None:
    """Injects into a model without weights, which it spoils. What needs weights or rows is left out or ignored.

    Args: as ``inject``. Raises: RecipeError if PEFT refuses the adapter on these layers.
    """
    if arguments.get("init_lora_weights") is not None:
        arguments["init_lora_weights"] = True
    try:
        model = inject(skeleton, method, **arguments)
    except (RecipeError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RecipeError) and "meta" not in str(error).lower():
            raise
        return
    if lost := lost_tensors(model):
        layers = sorted({base_name(name).partition(".lora_")[0] for name in lost})
        raise RecipeError(
            f"PEFT renames {len(lost)} tensors of this adapter when it opens it in {type(skeleton).__name__}, and leaves them "
            f"out: those of {listed(layers)}; name other layers",
            key="adapter.targets",
        )


def report(model: Any) -> AdapterReport:
    """Counts over an injected model. Raises: RecipeError if nothing is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds: dict[str, int] = {}
    whole, shapes = [], []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            kind = base_name(name).rsplit(".", 1)[-1]
            if (parameter := getattr(layer, "parameter_name", None)) is not None:
                kind = f"{kind}.{parameter}"
                shapes.append((f"{base_name(name)}.{parameter}", layer.get_param().shape))
            kinds[kind] = kinds.get(kind, 0) + 1
        elif isinstance(module, ModulesToSaveWrapper):
            whole.append(base_name(name))
    trained, total = model.get_nb_trainable_parameters()
    if not trained:
        raise RecipeError("no module was adapted, so nothing would be trained", key="adapter.targets")
    num_modules = sum(kinds.values())
    config = model.peft_config["default"]
    if config.is_prompt_learning:
        kinds["virtual tokens"] = int(config.num_virtual_tokens)
    elif not kinds:  # layers that replace the model's own
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".modules_to_save." not in name:
                kind = name.removeprefix("base_model.model.").rsplit(".", 1)[-1]
                kinds[kind] = kinds.get(kind, 0) + 1
    quantized = bool(getattr(model.get_base_model(), "is_quantized", False))
    experts = experts_text(shapes, quantized=quantized)
    return AdapterReport(num_modules, trained, total, kinds, tuple(whole), experts)


def adapted_modules(model: Any) -> list[str]:
    """Names, in the base model, of the modules of a PEFT model that have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [base_name(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def token_modules(model: Any) -> list[str]:
    """Names, in the base model, of the embeddings and heads of which rows are trained."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return [base_name(name) for name, module in model.named_modules() if isinstance(module, TrainableTokensLayer)]


def base_name(name: str) -> str:
    """The name in the base model of a module in a PEFT model."""
    name = name.removeprefix("base_model.lora_model.model.")  # of X-LoRA
    name = name.removeprefix("base_model.model.").removeprefix("base_model.").replace(".base_layer", "")
    return name.removesuffix(".token_adapter")
