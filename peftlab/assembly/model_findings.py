"""What a model's config and its tokenizer say about each other, found without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftlab.adapters import (
    check_adapter,
    experts_text,
    fitting_sizes,
    is_grouped,
    owners,
    planned_modules,
    planned_parameters,
    reach_notes,
    try_injection,
)
from peftlab.assembly.adapter import mixed_of
from peftlab.assembly.families import check_layers, check_storage, reads_ids
from peftlab.assembly.mixed import check_mixed
from peftlab.data import Finding
from peftlab.errors import RecipeError, listed
from peftlab.models import (
    UNLIMITED,
    end_ids,
    length_limit,
    load_config,
    reconciled_ids,
)
from peftlab.specs.methods import METHODS

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly

_PADDING = {
    "left": "pads rows on the left, because the head of this family reads the last position",
    "none": "runs only rows of the same length together, because this family reads padding; that is slower",
}


def model_findings(assembly: Assembly) -> list[Finding]:
    """Notes on how the weights are stored, on what the adapter leaves out, and for texts on padding, ids, ends of text and the
    limit. Raises: RecipeError if the adapter's targets match nothing."""
    texts = _of_texts(assembly) if assembly.spec.reader == "tokenizer" else ()
    return [*_of_weights(assembly), *texts]


def _of_weights(assembly: Assembly) -> Iterator[Finding]:
    if (stored := assembly.stored) != "none":
        yield Finding(
            "stored",
            f"the weights are stored in {stored} by bitsandbytes; they stay so, and a merge writes their dequantized values",
            "model.name",
        )
    check_storage(assembly)
    if not assembly.method.adapts:
        return
    adapter, skeleton, method = assembly.recipe.adapter, assembly.skeleton(), assembly.method.name
    if (start := assembly.start) is not None:
        start.check_model(assembly)  # first: another model has other layers
    config = check_adapter(skeleton, method, **assembly.adapter_places, **assembly.adapter_options)
    check_mixed(mixed_of(assembly.recipe), assembly)
    planned = planned_modules(skeleton, method=method, **assembly.adapter_places)
    check_layers(skeleton, planned, method)
    if not (assembly.method.own_options or adapter.tokens or mixed_of(assembly.recipe)):
        # Which modules of a head are new, and so no targets, is known with the weights; without a type none is a target.
        places = (
            assembly.adapter_places
            | {"modules_to_save": ()}
            | ({"peft_type": None} if assembly.spec.reads_whole_rows else {})
        )
        try_injection(assembly.skeleton(), method, **places, **assembly.adapter_options)
    if start is not None:
        start.check(config, assembly)
        going_on = f"continues the adapter in {start.folder}"
        yield Finding("start", f"{going_on}. {start.as_plain}".rstrip(". "), "adapter.start")
    quantized = assembly.storage != "none"
    for name in (method, *(other.method for other in adapter.beside)) if quantized else ():
        if METHODS[name].storages is None:
            text = f"{METHODS[name].label} was not tried on {assembly.storage} weights"
            yield Finding(
                "untried", f"{text}; the run compares its layers with dequantized ones first", "adapter.method"
            )
    if not assembly.method.has_targets:
        return
    given = {assembly.method.keys.get(k, k): v for k, v in assembly.adapter_options.items() if v is not None}
    if assembly.spec.predicts == "vectors" and planned and all("pooler" in name.split(".") for name in planned):
        raise RecipeError(
            f"adapter.targets reaches {listed(planned)} only, which has no part in a vector; name other layers",
            key="adapter.targets",
        )
    for line in fitting_sizes(skeleton, assembly.method, planned, given)[1]:
        yield Finding("sizes", line, "adapter.method")
    if grouped := [name for name in planned if is_grouped(skeleton.get_submodule(name))]:
        found = f"{len(grouped)} of the {len(planned)} adapted layers are grouped convolutions ({grouped[0]})"
        if assembly.recipe.run.merge != "none":
            raise RecipeError(
                f"{found}, which PEFT cannot merge; leave them out of adapter.targets, or set run.merge=none",
                key="run.merge",
            )
        yield Finding("reach", f"{found}, which PEFT cannot merge", "adapter.targets")
    if parameters := planned_parameters(skeleton, given.get("target_parameters"), **assembly.adapter_places):
        planned += owners(parameters)
        shapes = [(name, skeleton.get_parameter(name).shape) for name in parameters]
        if text := experts_text(shapes, quantized=quantized):
            yield Finding("reach", f"the adapter changes {text}", "adapter.target_parameters")
    everywhere = planned_modules(skeleton, method=method, **assembly.adapter_places | {"layers": None, "freeze": []})
    for note in reach_notes(skeleton, planned, targets=adapter.targets, quantized=quantized, everywhere=everywhere):
        yield Finding("reach", note, "adapter.targets")


def _of_texts(assembly: Assembly) -> Iterator[Finding]:
    config, tokenizer = load_config(assembly.pretrained), assembly.reader
    if tokenizer.padding_note is not None:
        yield Finding("padding_token", tokenizer.padding_note, "model.name")
    if reads_ids(config, assembly.spec):
        for name, (now, then) in reconciled_ids(config, tokenizer).items():
            has = f"is {now}" if now is not None else "is not set"
            yield Finding(
                "config_ids",
                f"{name} of the model's config {has}; peftlab sets it to {then}, the tokenizer's. To open the adapter with PEFT "
                f"alone, set model.config.{name} = {then} first",
                "model.name",
            )
    if (way := assembly.task.padding) != "right":
        yield Finding("padding", f"{config.model_type}: peftlab {_PADDING[way]}", "model.name")
    if assembly.spec.generates and (ordinary := end_ids(assembly.pretrained, tokenizer)[1]):
        names = [tokenizer.convert_ids_to_tokens(i) for i in ordinary[:3]]
        found = f"no special token of the tokenizer but {', '.join(map(repr, filter(None, names)))}"
        yield Finding(
            "config_ids",
            f"eos_token_id of the model's config ({', '.join(map(str, ordinary[:3]))}) is "
            f"{found if any(names) else 'no token of the tokenizer'}, so it does not end an answer; {tokenizer.eos_token!r} does",
            "model.name",
        )
    limit = length_limit(assembly.pretrained, tokenizer)
    if limit.note is not None and assembly.recipe.data.max_length is None:
        longest = f"at most {limit.tokens:,} tokens" if limit.tokens < UNLIMITED else "texts of any length"
        yield Finding("length_limit", f"the model reads {longest}: {limit.note}", "data.max_length")
