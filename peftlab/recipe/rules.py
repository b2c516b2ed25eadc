"""Rules across the sections of a recipe: one small function per rule.

A rule yields ``(keys, message)`` for each problem. A key without effect is a problem, because nothing in a recipe is ever
ignored (contract C1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from peftlab.recipe.distillation import SELF, DistillSection
from peftlab.recipe.method_options import option_problems
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.losses import LOSSES
from peftlab.specs.methods import METHODS, VARIANTS, variant_of
from peftlab.specs.objectives import OBJECTIVES
from peftlab.specs.optimizers import OPTIMIZERS, SCHEDULES
from peftlab.specs.tasks import KEYS_OF_TASKS, NEEDS

if TYPE_CHECKING:
    from peftlab.recipe.schema import Recipe

Problems = Iterator[tuple[tuple[str, ...], str]]


class BrokenRules(ValueError):
    """All problems that the rules found. Attributes: problems: keys and message of each."""

    def __init__(self, problems: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(f"{', '.join(keys)}: {message}" for keys, message in problems))
        self.problems = problems


def check_rules(recipe: Recipe) -> None:
    """Raises BrokenRules with every conflict between the sections of ``recipe``."""
    problems = [problem for rule in RULES for problem in rule(recipe)]
    if problems:
        raise BrokenRules(problems)


def is_set(recipe: Recipe, key: str) -> bool:
    """Whether the dotted ``key`` has another value than its default; False if its section is missing."""
    *parents, name = key.split(".")
    section: Any = recipe
    for parent in parents:
        section = getattr(section, parent)
        if section is None:
            return False
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(section, name) != default)


def _no_effect(recipe: Recipe, keys: Iterable[str], reason: str) -> Problems:
    idle = tuple(key for key in keys if is_set(recipe, key))
    if idle:
        yield idle, f"has no effect {reason}; remove it"


def keys_of_other_tasks(recipe: Recipe) -> Problems:
    spec = recipe.spec
    for key in KEYS_OF_TASKS:
        if key not in spec.keys:
            lacks = f", which has no {NEEDS[key]}" if key in NEEDS else ""
            yield from _no_effect(recipe, [key], f"for {spec.what}{lacks}")
    for part in recipe.data.columns:
        if part not in spec.columns:
            chosen = f", which has the columns {', '.join(spec.columns)}" if spec.chosen_by else ""
            yield (f"data.columns.{part}",), f"has no effect for {spec.what}{chosen}; remove it"


def keys_of_other_methods(recipe: Recipe) -> Problems:
    spec = METHODS[recipe.adapter.method]
    every = dict.fromkeys(key for other in METHODS.values() for key in other.keys)
    every |= dict.fromkeys(key for other in METHODS.values() for key in other.places)
    for key in every:
        if key not in spec.keys and key not in spec.places:
            reason = f"for adapter.method: {spec.name}"
            if not spec.adapts:
                reason = "without an adapter"
            yield from _no_effect(recipe, [f"adapter.{key}"], reason)
    if not spec.adapts:
        yield from _no_effect(recipe, ["adapter.start"], "without an adapter")


def options_of_the_method(recipe: Recipe) -> Problems:
    spec, options = METHODS[recipe.adapter.method], recipe.adapter.options
    if spec.refused:
        yield ("adapter.method",), f"no recipe can use {spec.name}: {spec.refused}"
        return
    for name, message in option_problems(spec.name, options):
        yield (f"adapter.{name}",), message
    for name in spec.required:
        if name not in options:
            text = spec.options[name].help
            yield ("adapter.method",), f"{spec.name} needs adapter.{name}{f': {text}' if text else ''}"
    allowed = ("none", "all", "lora_only" if spec.name == "lora" else f"{spec.name}_only")
    if "bias" in spec.keys and recipe.adapter.bias not in allowed:
        yield ("adapter.bias",), f"expected one of {', '.join(allowed)}, found {recipe.adapter.bias!r}"


def methods_beside(recipe: Recipe) -> Problems:
    """Whether each adapter beside the main one has the keys and options of its method, and the main one can have others."""
    adapter = recipe.adapter
    if not adapter.beside:
        return
    main = METHODS[adapter.method]
    if not main.adapts or main.own_options:
        yield ("adapter.beside",), f"is not for adapter.method: {main.name}; make another method of PEFT the main one"
        return
    for key in ("start", "tokens"):
        if getattr(adapter, key):
            yield (f"adapter.{key}",), "is not for an adapter with others beside it; remove one of the two"
    for index, other in enumerate(adapter.beside):
        at, spec = f"adapter.beside.{index}", METHODS[other.method]
        if not spec.beside:
            fits = ", ".join(name for name, each in METHODS.items() if each.beside)
            yield (f"{at}.method",), f"{spec.name} cannot be trained beside another method; expected one of {fits}"
            continue
        if spec.has_targets and other.targets is None:
            yield (f"{at}.targets",), "missing: it says which modules this adapter changes"
        for key in ("targets", "rank", "alpha", "dropout", "rslora", "dora"):
            default = type(other).model_fields[key].default
            if getattr(other, key) != default and key not in spec.keys:
                yield (f"{at}.{key}",), f"has no effect for {spec.name}; remove it"
        for name, message in option_problems(spec.name, other.options):
            yield (f"{at}.{name}",), message
        for name in spec.required:
            if name not in other.options:
                yield (f"{at}.method",), f"{spec.name} needs {name}"


def loraplus_needs_b_matrices(recipe: Recipe) -> Problems:
    if all("dora" not in METHODS[name].keys for name in recipe.adapter.methods):
        yield from _no_effect(recipe, ["train.loraplus_lr_ratio"], "without the matrices A and B of LoRA")


def prompts_stand_before_each_row(recipe: Recipe) -> Problems:
    spec = METHODS[recipe.adapter.method]
    if not spec.prompts:
        return
    if recipe.spec.reader != "tokenizer":
        yield ("adapter.method",), f"{spec.name} puts tokens before a text, and task: {recipe.task} has none; use lora"
    elif recipe.spec.predicts == "spans":
        yield (
            ("adapter.method",),
            f"{spec.name} puts tokens before a text, and task: {recipe.task} predicts positions of the text; use lora",
        )
    elif recipe.spec.peft_type is None:
        yield ("adapter.method",), f"PEFT has no {spec.name} for task: {recipe.task}; use lora"
    if recipe.data.packing:
        yield (
            ("data.packing",),
            f"{spec.name} puts its tokens before a sequence, and packed rows after the first would have none; remove it",
        )
    if recipe.train.gradient_checkpointing:
        yield (
            ("train.gradient_checkpointing",),
            f"{spec.name} gives the layers keys and values, which transformers drops when it recomputes them; remove it",
        )


def mixtures_run_the_model_twice(recipe: Recipe) -> Problems:
    if recipe.adapter.method != "xlora":
        return
    if recipe.train.gradient_checkpointing:
        yield (
            ("train.gradient_checkpointing",),
            "X-LoRA gives its layers the mixture of each forward, which is gone when they are computed again; remove it",
        )
    if recipe.adapter.beside:
        yield (
            ("adapter.beside",),
            "X-LoRA trains its classifier and no layer; remove it, or mix adapters that are trained before",
        )


def keys_of_other_optimizers(recipe: Recipe) -> Problems:
    for kind, rows in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        chosen = rows[getattr(recipe.train, kind)]
        for key in dict.fromkeys(key for row in rows.values() for key in row.keys):
            if key not in chosen.keys:
                yield from _no_effect(recipe, [f"train.{key}"], f"for train.{kind}: {chosen.name}")


def objective_fits_the_columns(recipe: Recipe) -> Problems:
    spec, given = recipe.spec, recipe.train.objective
    if not spec.objectives:
        return
    if given is not None and given not in spec.objectives:
        fits = " or ".join(spec.objectives)
        yield ("train.objective",), f"expected {fits} for rows with {', '.join(spec.columns)}; found {given!r}"
        return
    name = recipe.objective
    assert name is not None
    chosen = OBJECTIVES[name]
    for key in dict.fromkeys(key for row in OBJECTIVES.values() for key in row.keys):
        if key not in chosen.keys and f"train.{key}" in spec.keys:
            yield from _no_effect(recipe, [f"train.{key}"], f"for train.objective: {name}")
    if chosen.whole_step and recipe.train.batch_size == 1 and recipe.train.accumulate == 1:
        text = "one row per step has no other row to be compared with; set train.batch_size to 2 or more, 16 or more is better"
        yield ("train.batch_size",), text


def label_names_name_a_column(recipe: Recipe) -> Problems:
    has_column = recipe.spec.names_classes or "label" in recipe.data.columns
    if recipe.data.label_names and "data.label_names" in recipe.spec.keys and not has_column:
        yield ("data.label_names",), "names the values of a label column; set data.columns.label"


def balance_knows_the_classes(recipe: Recipe) -> Problems:
    has_column = recipe.spec.classifies or {"label", "rank"} & set(recipe.data.columns)
    if recipe.data.balance and "data.balance" in recipe.spec.keys and not has_column:
        yield ("data.balance",), "draws rows by their class; set data.columns.label"
    if recipe.data.balance and recipe.distill is not None and recipe.distill.transfer is not None:
        yield ("data.balance",), "has no effect with distill.transfer, whose rows are trained on; remove it"


def boxes_are_not_compared(recipe: Recipe) -> Problems:
    distill = recipe.distill
    if distill is None or recipe.spec.compares_outputs:
        return
    if distill.answers != "teacher":
        yield (
            ("distill",),
            f"task: {recipe.task} does not compare the outputs of two models: no order relates their boxes, not even if the student "
            "is cut from the teacher; set distill.answers: teacher, and the student learns from the boxes that the teacher finds",
        )
    reason = "with answers: teacher, whose boxes are the labels of the student"
    yield from _no_effect(recipe, ["distill.losses", "distill.cache"], reason)


def adapters_keep_statistics(recipe: Recipe) -> Problems:
    if recipe.method.adapts:
        yield from _no_effect(recipe, ["train.batch_norm"], "with an adapter, whose files have no place for statistics")


def changed_images_are_not_cached(recipe: Recipe) -> Problems:
    if recipe.data.augment is not None and recipe.distill is not None and recipe.distill.cache is not None:
        yield (
            ("data.augment",),
            "the cache stores a teacher's outputs for the images as they are; remove distill.cache, or this key",
        )


def only_plain_text_is_split(recipe: Recipe) -> Problems:
    if recipe.data.too_long != "split":
        return
    if not recipe.spec.splits:
        yield ("data.too_long",), f"split cuts plain text into blocks; task: {recipe.task} takes truncate or drop"
    elif recipe.distill is not None and recipe.distill.cross_tokenizer is not None:
        yield (
            ("data.too_long",),
            "split needs a teacher with the student's tokenizer, whose blocks would differ otherwise",
        )


def redrawn_rows_have_no_cache(recipe: Recipe) -> Problems:
    redrawn = recipe.spec.redraws and recipe.spec.reader == "tokenizer"  # images change only with data.augment
    if redrawn and recipe.distill is not None and recipe.distill.cache is not None:
        yield (
            ("distill.cache",),
            f"a cache has the teacher's outputs for one set of masks, and {recipe.task} draws fresh ones in each pass; remove it, "
            "and the teacher answers while the student trains",
        )


def packed_rows_have_no_groups(recipe: Recipe) -> Problems:
    if recipe.data.packing:
        yield from _no_effect(recipe, ["train.grouping"], "with data.packing")


def merge_has_something_to_merge(recipe: Recipe) -> Problems:
    if recipe.run.merge == "dequantized" and recipe.model.quantize == "none":
        yield ("run.merge",), "dequantized needs a quantized model; set run.merge: original"
    if recipe.distill is not None:
        yield from _no_effect(recipe, ["run.merge"], "in a distillation, which writes the student as a complete model")
    elif not METHODS[recipe.adapter.method].adapts:
        yield from _no_effect(recipe, ["run.merge"], "without an adapter: the run's model/ is the trained model")
    elif recipe.run.merge != "none":
        for name in recipe.adapter.methods:
            if reason := METHODS[name].unmergeable:
                yield ("run.merge",), f"{METHODS[name].label} cannot be merged: {reason}; remove it"


def quantized_weights_are_not_trained(recipe: Recipe) -> Problems:
    method = METHODS[recipe.adapter.method]
    for index, other in enumerate(recipe.adapter.beside):
        if not (spec := METHODS[other.method]).trains_on(recipe.model.quantize):
            text = f"{spec.label} does not work on {recipe.model.quantize} weights; set model.quantize to none, or remove it"
            yield (f"adapter.beside.{index}.method",), text
    if method.trains_on(recipe.model.quantize):
        return
    if not method.adapts:
        yield (
            ("adapter.method",),
            f"none trains the weights themselves, and {recipe.model.quantize} weights cannot be trained; set model.quantize: none, "
            "or train an adapter",
        )
    else:
        others = f", or to {' or '.join(method.storages)}" if method.storages else ""
        yield (
            ("adapter.method",),
            f"{method.label} does not work on {recipe.model.quantize} weights; set model.quantize to none{others}",
        )


def rounded_operands_have_a_path(recipe: Recipe) -> Problems:
    mode = KERNEL_MODES[recipe.run.kernels]
    if mode.operands is None or METHODS[recipe.adapter.method].refused:
        return
    _, variant = VARIANTS[variant_of(recipe.adapter.method, recipe.adapter.model_dump())]
    if not variant.fused:
        label = "DoRA" if recipe.adapter.dora else METHODS[recipe.adapter.method].label
        why = f"{label} does not run fused" if recipe.method.adapts else "without an adapter no weight is frozen"
        yield ("run.kernels",), f"{mode.name} rounds products with frozen weights under LoRA, and {why}; set auto"
    elif recipe.train.precision not in ("auto", "float32") or recipe.model.dtype not in ("auto", "float32"):
        yield ("run.kernels",), f"{mode.name} is for float32; remove train.precision and model.dtype"
    elif mode.storage not in (None, recipe.model.quantize):
        yield (
            ("run.kernels",),
            f"{mode.name} multiplies weights stored in {mode.storage}; set model.quantize: {mode.storage}",
        )


def self_is_a_backbone(recipe: Recipe) -> Problems:
    distill = recipe.distill
    if distill is None or all(teacher.name != SELF for teacher in distill.all_teachers):
        return
    if not METHODS[recipe.adapter.method].adapts:
        yield (
            ("distill.teacher",),
            "self is the backbone without its adapter, but adapter.method: none trains the backbone; train an adapter, or set "
            "the teacher to the model's name",
        )
    if distill.student_init is not None:
        yield (
            ("distill.student_init",),
            "cuts the backbone that teacher: self uses; set the teacher to the whole model's name",
        )


def losses_compare_what_there_is(recipe: Recipe) -> Problems:
    distill, spec = recipe.distill, recipe.spec
    if distill is None:
        return
    for loss in distill.losses:
        if loss.compares_layers(spec.predicts):
            yield from _one_live_teacher(distill, loss.kind)
        elif spec.predicts == "numbers":
            if loss.kind != "hidden_mse":
                yield ("distill.losses",), f"{loss.kind} does not compare numbers; use hidden_mse, or leave it out"
        elif spec.predicts == "vectors" and "vectors" not in LOSSES[loss.kind].compares:
            yield (
                ("distill.losses",),
                f"{loss.kind} compares probabilities, and task: {recipe.task} has none; use hidden_cosine, or similarity_kl if "
                "the widths differ",
            )
        elif spec.predicts != "vectors" and "probabilities" not in LOSSES[loss.kind].compares:
            yield (
                ("distill.losses",),
                f"{loss.kind} compares vectors, and task: {recipe.task} has none; use forward_kl",
            )
    if spec.predicts == "spans" and distill.targets.fill == "hidden":
        yield (
            ("distill.targets.fill",),
            f"task: {recipe.task} predicts positions of a window, and there are no hidden states to store; use topk",
        )
    if spec.predicts in ("vectors", "numbers"):
        if distill.teachers:
            yield ("distill.teachers",), f"{spec.predicts} of several teachers cannot be mixed; set distill.teacher"
        if distill.cache is not None and distill.targets.fill != "hidden":
            yield ("distill.targets",), f"a cache of {spec.predicts} stores them whole; set fill: hidden"


def _one_live_teacher(distill: DistillSection, kind: str) -> Problems:
    if distill.cache is not None:
        yield (
            ("distill.losses",),
            f"{kind} compares the teacher's layers, but the cache stores only its outputs; remove distill.cache",
        )
    elif len(distill.all_teachers) > 1:
        yield ("distill.losses",), f"{kind} compares the layers of one teacher; set distill.teacher"


def self_training_is_no_distillation(recipe: Recipe) -> Problems:
    if recipe.distill is not None:
        yield from _no_effect(recipe, ["train.self_training"], "in a distillation; name the rows in distill.transfer")


def thresholds_are_tuned_in_training(recipe: Recipe) -> Problems:
    if recipe.eval.threshold == "tuned" and recipe.distill is not None:
        yield ("eval.threshold",), "is tuned by `peftlab train` only; set a number for a distillation"


def answers_are_free_texts(recipe: Recipe) -> Problems:
    if recipe.distill is not None and recipe.distill.answers == "teacher" and recipe.eval.choices is not None:
        yield ("distill.answers",), "the teacher writes free text, not one of eval.choices; remove one of the two"


def on_policy_knows_its_steps(recipe: Recipe) -> Problems:
    if recipe.distill is None or recipe.distill.on_policy is None:
        return
    t, phases = recipe.train, recipe.distill.on_policy.phases
    if t.max_steps is not None and t.max_steps < phases:
        yield (
            ("distill.on_policy.phases",),
            f"{phases} phases need as many steps, found train.max_steps: {t.max_steps}",
        )
    if t.max_steps is None and (t.batch_tokens is not None or recipe.data.packing):
        key = "data.packing" if recipe.data.packing else "train.batch_tokens"
        yield (
            ("distill.on_policy",),
            f"the length of the student's answers is not known in advance, so {key} needs train.max_steps",
        )
    if recipe.eval.choices is not None:
        yield (
            ("distill.on_policy",),
            "the student writes free text, not one of eval.choices; remove one of the two",
        )


RULES: tuple[Callable[[Recipe], Problems], ...] = (
    answers_are_free_texts,
    keys_of_other_tasks,
    keys_of_other_methods,
    options_of_the_method,
    methods_beside,
    loraplus_needs_b_matrices,
    prompts_stand_before_each_row,
    mixtures_run_the_model_twice,
    keys_of_other_optimizers,
    objective_fits_the_columns,
    label_names_name_a_column,
    balance_knows_the_classes,
    boxes_are_not_compared,
    adapters_keep_statistics,
    changed_images_are_not_cached,
    only_plain_text_is_split,
    redrawn_rows_have_no_cache,
    packed_rows_have_no_groups,
    merge_has_something_to_merge,
    quantized_weights_are_not_trained,
    rounded_operands_have_a_path,
    self_is_a_backbone,
    losses_compare_what_there_is,
    self_training_is_no_distillation,
    thresholds_are_tuned_in_training,
    on_policy_knows_its_steps,
)
