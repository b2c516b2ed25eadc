"""The configuration of an adapter: PEFT's or ours, checked against the model, which may have no weights yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from peftlab.adapters import initial, mixture
from peftlab.adapters.beside import PLAIN_TYPE, Beside, check_apart, check_methods, claimed_modules, errors_beside
from peftlab.adapters.parameters import check_settings, planned_parameters
from peftlab.adapters.patterns import Pattern, assigned, pattern_values
from peftlab.adapters.places import (
    chosen_blocks,
    peft_errors,
    place_config,
    planned_modules,
    target_names,
    trained_in_full,
    whole_modules,
)
from peftlab.adapters.schedule import check_steps
from peftlab.adapters.sizes import check_rank, fitting_sizes
from peftlab.adapters.target_modules import check_modules_to_save
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS, TARGET_NAMES
from peftlab.specs.peft_methods import peft_method


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
        return bottleneck_config(options)
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
        claimed = claimed_by(model, beside, where)
        configs_beside(model, beside, claimed, where)
        where["freeze"] = [*freeze, *left_out(claimed)]
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


def bottleneck_config(options: Mapping[str, Any], layers: tuple[int, ...] | None = None) -> Any:
    from peftlab.adapters.bottleneck import BottleneckConfig

    return BottleneckConfig(**{name: value for name, value in options.items() if value is not None}, layers=layers)


def claimed_by(model: nn.Module, beside: Sequence[Beside], places: Mapping[str, Any]) -> dict[str, list[str]]:
    """The modules of the adapters ``beside``, by method."""
    from peftlab.adapters.bottleneck import bottleneck_places

    def planned(other: Beside) -> Sequence[str]:
        if other.is_bottleneck:
            return list(bottleneck_places(model, _bottleneck_of(model, other)))
        where = {"peft_type": places["peft_type"], "targets": other.targets, "layers": other.layers}
        return planned_modules(model, method=other.method, **where)

    return claimed_modules(model, beside, planned)


def left_out(claimed: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules that are left out of the main adapter; a bottleneck stands behind one, and does not replace its layers."""
    return [name for method, names in claimed.items() if method != "bottleneck" for name in names]


def _bottleneck_of(model: nn.Module, other: Beside) -> Any:
    from peftlab.adapters.bottleneck import find_blocks

    layers = None if other.layers is None else tuple(sorted(chosen_blocks(other.layers, len(find_blocks(model)))))
    return bottleneck_config(other.options, layers)


def configs_beside(
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
