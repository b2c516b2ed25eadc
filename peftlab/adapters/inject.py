"""Injects any adapter method of ``specs.methods`` through PEFT, and reports what is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlab.adapters import initial, mixture
from peftlab.adapters.beside import (
    PLAIN_TYPE,
    Beside,
    add_beside,
    check_apart,
    check_methods,
    claimed_modules,
    errors_beside,
    keep_bottlenecks,
)
from peftlab.adapters.parameters import check_settings, experts_text, planned_parameters
from peftlab.adapters.patterns import Pattern, assigned, pattern_values, set_dropout
from peftlab.adapters.places import (
    chosen_blocks,
    peft_errors,
    place_config,
    planned_modules,
    target_names,
    trained_in_full,
    whole_modules,
)
from peftlab.adapters.quantized_check import check_untried
from peftlab.adapters.schedule import check_steps
from peftlab.adapters.sizes import check_rank, fitting_sizes
from peftlab.adapters.target_modules import check_modules_to_save
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS, TARGET_NAMES
from peftlab.specs.peft_methods import peft_method


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
    claimed = _claimed(model, beside, places)
    configs = _configs_beside(model, beside, claimed, places)
    places["freeze"] = [*freeze, *_layers_of(claimed)]
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
    return add_bottlenecks(model, _bottleneck_config(options, chosen), modules_to_save=whole, task_type=peft_type)


def _bottleneck_config(options: Mapping[str, Any], layers: tuple[int, ...] | None = None) -> Any:
    from peftlab.adapters.bottleneck import BottleneckConfig

    return BottleneckConfig(**{name: value for name, value in options.items() if value is not None}, layers=layers)


def check_adapter(
    model: Any,
    method: str,
    *,
    peft_type: str | None,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    new: Collection[str] = (),
    layers: Sequence[int] | str | None = None,
    freeze: Sequence[str] = (),
    num_steps: int | None = None,
    patterns: Sequence[Pattern] = (),
    beside: Sequence[Beside] = (),
    **options: Any,
) -> Any:
    """The configuration of an adapter, PEFT's or ours, for a model that may have no weights yet. Args and errors: see ``inject``."""
    import peft

    check_modules_to_save(model, modules_to_save)
    spec = METHODS[method]
    if spec.own_options:
        return _bottleneck_config(options)
    assert spec.peft is not None
    given = {key: value for key, value in options.items() if value is not None or key in spec.options}
    values = {spec.keys.get(key, key): value for key, value in given.items()}
    alpha = options.get("alpha")
    if alpha is not None and float(alpha).is_integer():
        values[spec.keys["alpha"]] = int(alpha)  # as in PEFT's own files
    values = {k: v for k, v in spec.defaults.items() if k not in spec.keys} | values | dict(spec.fixed)
    where: dict[str, Any] = {
        "peft_type": peft_type,
        "targets": targets,
        "modules_to_save": modules_to_save,
        "new": new,
        "layers": layers,
        "freeze": freeze,
    }
    if beside:
        check_methods(method, beside)
        claimed = _claimed(model, beside, where)
        _configs_beside(model, beside, claimed, where)
        where["freeze"] = [*freeze, *_layers_of(claimed)]
        check_apart(planned_modules(model, method=method, **where), claimed)
    if values.get("init_lora_weights") == "loftq":  # PEFT reads a mapping with all settings
        values["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1} | (values.get("loftq_config") or {})
    if values.get("layer_replication"):
        _check_replication(targets, {"layers": layers, "freeze": freeze, "patterns": patterns})
    names = planned_modules(model, method=method, **where) if spec.name == "lora" or patterns or spec.divisors else []
    if spec.name == "lora":
        check_rank(model, names, options.get("rank"))
    values |= fitting_sizes(model, spec, names, values)[0]
    if patterns:
        of_module = assigned(model, names, patterns)
        for index, pattern in enumerate(patterns):
            if spec.name == "lora":
                matched = [name for name, its in of_module.items() if its is pattern]
                check_rank(model, matched, pattern.rank, key=f"adapter.patterns.{index}.rank")
        for name, chosen in pattern_values(spec, patterns, of_module).items():
            # PEFT takes the first that matches, and a module's full name is more precise than what the recipe gives.
            values[name] = {**chosen, **{n: v for n, v in (values.get(name) or {}).items() if n not in chosen}}
    if spec.name == "lora":
        parameters = planned_parameters(model, values.pop("target_parameters", None), **where)
        if parameters:
            check_settings(options.get("dropout"), options.get("dora"))
        placed = place_config(model, **where, **values)
        placed.target_parameters = [*parameters, *(placed.target_parameters or [])] or None
        return placed
    fields = peft_method(spec.peft).options
    if spec.has_targets:
        # Full names: most configurations have no way to leave out the head.
        values["target_modules"] = target_names(model, method, **where)
    values["modules_to_save"] = whole_modules(model, peft_type, modules_to_save, new) or None
    if "modules_to_save" not in fields and (whole := trained_in_full(model, peft_type, modules_to_save, new)):
        raise RecipeError(
            f"{spec.name} has no place for modules that are trained in full, and this model needs that for {', '.join(whole)}; use "
            f"another method{', such as lora with trainable_token_indices' if spec.targets == 'embeddings' else ''}",
            key="adapter.method",
        )
    if spec.name == "adalora":
        check_steps(num_steps, values.get("tfinal", 0))
    if spec.name == "xlora":
        values["adapters"] = mixture.numbered(model, values["adapters"])
    values |= {k: v for k, v in _set_by_run(model, num_steps).items() if k in fields and k not in values}
    with peft_errors(method):
        config_class = getattr(peft, peft_method(spec.peft).config)
        return config_class(task_type=peft_type, **{k: v for k, v in values.items() if k in fields})


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


def _claimed(model: nn.Module, beside: Sequence[Beside], places: Mapping[str, Any]) -> dict[str, list[str]]:
    """The modules of the adapters ``beside``, by method."""
    from peftlab.adapters.bottleneck import bottleneck_places

    def planned(other: Beside) -> Sequence[str]:
        if other.is_bottleneck:
            return list(bottleneck_places(model, _bottleneck_of(model, other)))
        where = {"peft_type": places["peft_type"], "targets": other.targets, "layers": other.layers}
        return planned_modules(model, method=other.method, **where)

    return claimed_modules(model, beside, planned)


def _layers_of(claimed: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules that are left out of the main adapter; a bottleneck stands behind one, and does not replace its layers."""
    return [name for method, names in claimed.items() if method != "bottleneck" for name in names]


def _bottleneck_of(model: nn.Module, other: Beside) -> Any:
    from peftlab.adapters.bottleneck import find_blocks

    layers = None if other.layers is None else tuple(sorted(chosen_blocks(other.layers, len(find_blocks(model)))))
    return _bottleneck_config(other.options, layers)


def _configs_beside(
    model: nn.Module, beside: Sequence[Beside], claimed: Mapping[str, Sequence[str]], places: Mapping[str, Any]
) -> dict[str, Any]:
    """The configurations of the adapters ``beside``, by method."""
    configs = {}
    for index, other in enumerate(beside):
        key = f"adapter.beside.{index}"
        if other.is_bottleneck:
            configs[other.method] = _bottleneck_of(model, other)
            continue
        # Without a task type the head would be trained too.
        kind, targets = places["peft_type"] or PLAIN_TYPE, claimed[other.method]
        with errors_beside(index):
            config = check_adapter(model, other.method, peft_type=kind, targets=targets, **other.options)
        kind = getattr(config, "init_lora_weights", None)
        if initial.changes_weights(kind) or initial.needs_rows(config):
            raise RecipeError(
                f"{kind} looks at training rows or changes the weights, which only the main adapter can",
                key=f"{key}.init_lora_weights",
            )
        if getattr(config, "target_parameters", None):
            raise RecipeError(
                "parameters of experts are for the main adapter; remove it", key=f"{key}.target_parameters"
            )
        config.task_type = places["peft_type"]
        configs[other.method] = config
    return configs


def _check_replication(targets: str | Sequence[str], places: Mapping[str, Any]) -> None:
    """Raises RecipeError for settings that find modules by their full names: replicated layers have other names."""
    for name, value in places.items():
        if value:
            raise RecipeError(
                "reaches none of the layers that adapter.layer_replication makes; remove one of the two",
                key=f"adapter.{name}",
            )
    if targets in TARGET_NAMES:
        raise RecipeError(
            f"adapter.targets: {targets} reaches none of the layers that it makes; name the endings of the modules, such as "
            "[q_proj, v_proj]",
            key="adapter.layer_replication",
        )


def _set_by_run(model: Any, num_steps: int | None) -> dict[str, Any]:
    """Values that depend on the run. ``check`` does not know the number of steps yet."""
    return {
        "total_step": num_steps or 1,
        "hidden_size": getattr(model.config.get_text_config(), "hidden_size", None),
    }
