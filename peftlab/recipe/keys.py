"""The keys of the schema: the type of each, and the nearest key for an unknown name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from peftlab.recipe.schema import Recipe

# Names of a key in transformers, PEFT, bitsandbytes, TRL, Axolotl, LLaMA-Factory, Unsloth and torchtune.
_FOREIGN_NAMES = {
    "task": "task_type task_name",
    "model.name": "model_name_or_path model_name base_model base_model_name_or_path pretrained_model_name_or_path "
    "model_id model_path backbone",
    "model.revision": "model_revision",
    "model.quantize": "quantization quantization_bit quantization_config bnb_4bit_quant_type bits",
    "model.quantize: nf4": "load_in_4bit qlora",
    "model.quantize: int8": "load_in_8bit",
    "model.double_quant": "bnb_4bit_use_double_quant use_double_quant double_quantization",
    "model.compute_dtype": "bnb_4bit_compute_dtype",
    "model.dtype": "torch_dtype model_dtype",
    "model.attention": "attn_implementation flash_attention flash_attn use_flash_attention_2",
    "adapter.method": "peft_type adapter_type finetuning_type peft_method",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target lora_target_modules lora_target_linear lora_attn_modules",
    "adapter.rslora": "use_rslora peft_use_rslora",
    "adapter.dora": "use_dora peft_use_dora",
    "adapter.bias": "lora_bias",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_dataset train_data data_path",
    "data.eval": "validation validation_file eval_dataset eval_file test_file test_datasets val_data",
    "data.eval_fraction": "val_set_size val_size test_size validation_split validation_split_percentage",
    "data.subset": "dataset_config_name dataset_config config_name",
    "data.columns.text": "text_column text_column_name dataset_text_field",
    "data.columns.label": "label_column label_column_name label_field target_column",
    "data.label_names": "id2label label2id class_names",
    "data.max_length": "max_seq_length max_seq_len sequence_len seq_length cutoff_len model_max_length block_size",
    "data.too_long": "truncation",
    "data.packing": "sample_packing neat_packing packed use_packing pack_sequences",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs total_epochs",
    "train.max_steps": "max_train_steps num_train_steps total_steps num_steps max_iters",
    "train.batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_batch_size micro_batch_size "
    "train_micro_batch_size_per_gpu",
    "train.accumulate": "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches",
    "train.grouping": "group_by_length length_grouping",
    "train.lr": "learning_rate peak_lr max_lr base_lr",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "train.warmup": "warmup_steps warmup_ratio num_warmup_steps",
    "train.weight_decay": "wd",
    "train.betas": "adam_beta1 adam_beta2 adam_betas beta1 beta2",
    "train.max_grad_norm": "clip_grad_norm grad_clip gradient_clipping gradient_clip_val",
    "train.precision": "bf16 fp16 mixed_precision amp",
    "train.gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing grad_checkpointing",
    "train.class_weights": "class_weight label_weights",
    "eval.metrics": "compute_metrics",
    "eval.every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval val_check_interval",
    "eval.batch_tokens": "per_device_eval_batch_size eval_batch_size",
    "eval.best": "metric_for_best_model load_best_model_at_end",
    "eval.patience": "early_stopping_patience early_stopping",
    "run.dir": "output_dir out_dir save_dir logging_dir run_dir",
    "run.seed": "random_seed random_state data_seed",
    "run.device": "use_cpu no_cuda device_map",
    "run.deterministic": "full_determinism",
    "run.log": "report_to logger loggers trackers log_with",
    "run.save_every": "save_steps save_strategy saves_per_epoch save_interval checkpoint_every",
    "run.keep": "save_total_limit keep_checkpoints",
}


class Spec(NamedTuple):
    """One key of the schema: its annotation, bounds and description."""

    kind: Any
    bounds: Sequence[Any] = ()
    description: str = ""


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def container(kind: Any) -> Any:
    """The member of a union that has keys or items; any other kind unchanged."""
    if get_origin(kind) in (Union, UnionType):
        inner = [arg for arg in get_args(kind) if is_section(arg) or get_origin(arg) in (dict, list, tuple)]
        return inner[0] if inner else None
    return kind


def spec_at(path: Sequence[str | int]) -> Spec | None:
    """The spec of a key, of a list item or of a value in a free mapping; None if the key does not exist."""
    spec = Spec(Recipe)
    for part in path:
        kind = container(spec.kind)
        if is_section(kind):
            info = kind.model_fields.get(str(part))
            if info is None:
                return None
            spec = Spec(info.annotation, info.metadata, info.description or "")
        elif get_origin(kind) in (list, tuple):
            spec = Spec(get_args(kind)[0])
        elif get_origin(kind) is dict:
            spec = Spec(get_args(kind)[1])
        else:
            return None
    return spec


def default_at(key: str) -> Any:
    """The default of a dotted key of the schema."""
    section, _, name = key.rpartition(".")
    spec = spec_at(section.split("."))
    assert spec is not None
    return container(spec.kind).model_fields[name].get_default(call_default_factory=True)


def names_in(kind: Any) -> list[str]:
    """The names that a mapping of this kind may hold; empty if it has no fixed names."""
    kind = container(kind)
    if is_section(kind):
        return list(kind.model_fields)
    if get_origin(kind) is dict and get_origin(get_args(kind)[0]) is Literal:
        return list(get_args(get_args(kind)[0]))
    return []


def is_free_mapping(kind: Any) -> bool:
    """Whether the user chooses the names in the mapping, such as ``data.label_names``."""
    return get_origin(container(kind)) is dict and not names_in(kind)


@cache
def known_keys() -> dict[str, list[str]]:
    """Dotted name of each section (the recipe itself: empty) and the names in it."""
    keys: dict[str, list[str]] = {}

    def visit(path: tuple[str, ...]) -> None:
        spec = spec_at(path)
        names = names_in(spec.kind) if spec else []
        if names:
            keys[".".join(path)] = names
            for name in names:
                visit((*path, name))

    visit(())
    return keys


@cache
def _foreign() -> dict[str, str]:
    return {name: key for key, names in _FOREIGN_NAMES.items() for name in names.split()}


def foreign_key(name: str) -> str | None:
    """The dotted key for a name of another project."""
    return _foreign().get(name.lower().replace("-", "_"))


def join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def nearest_keys(section: str, name: str) -> list[str]:
    """Dotted keys that ``name`` in ``section`` may stand for; best guess first, may be empty."""
    sections, foreign = known_keys(), _foreign()
    spelt = name.lower().replace("-", "_").replace(" ", "_")
    siblings = _siblings(section)
    if spelt in siblings:
        return [join(section, spelt)]
    if spelt in foreign:
        ours = foreign[spelt].rpartition(".")[2]  # in an item of a list, such as a pattern: its own key of this name
        return [join(section, ours)] if ours in siblings else [foreign[spelt]]
    elsewhere = [join(other, spelt) for other, names in sections.items() if spelt in names]
    if elsewhere:
        return elsewhere
    close = get_close_matches(spelt, siblings, n=1)
    if close:
        return [join(section, close[0])]
    everywhere = foreign | {key: join(other, key) for other, names in sections.items() for key in names}
    return [everywhere[match] for match in get_close_matches(spelt, everywhere, n=1, cutoff=0.8)]


def _siblings(section: str) -> list[str]:
    """The names in a section, also if it is an item of a list: ``distill.teachers.1``."""
    spec = spec_at(section.split(".") if section else [])
    return names_in(spec.kind) if spec else []


def did_you_mean(section: str, name: str) -> str:
    """``"; did you mean `lr`?"``, or empty if no key is near."""
    if any(name == join(other, key) for other, names in known_keys().items() for key in names) and "." in name:
        parent, _, last = name.rpartition(".")
        return f"; sections are nested: write `{last}:` indented under `{parent}:`"
    guesses = nearest_keys(section, name)
    siblings = {join(section, key): key for key in _siblings(section)}
    shown = [siblings.get(guess, guess) for guess in guesses]
    return f"; did you mean {' or '.join(f'`{guess}`' for guess in shown)}?" if shown else ""
