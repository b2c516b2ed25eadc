"""What a task is made from: how the model's family reads and writes texts, and the recipe's values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from peftlab.adapters import HeadLoss
from peftlab.data import Augmentation, Rows
from peftlab.errors import RecipeError
from peftlab.models import (
    Pretrained,
    decoder_start,
    end_ids,
    is_causal,
    load_config,
    model_max_length,
    padding_of,
    target_limit,
    token_types,
    vocabulary_rows,
)
from peftlab.recipe import Recipe
from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks import Padding, TaskParts


class Reading(NamedTuple):
    """How a model's family reads and writes texts.

    Attributes: padding, causal, num_embeddings, token_types, decoder_start, hidden_size, most_tokens: see ``TaskParts``.
        end_ids: the ids that end its texts.
        target_limit: the longest target in tokens; None for a task without targets.
    """

    padding: Padding = "right"
    causal: bool = False
    end_ids: Sequence[int] = ()
    num_embeddings: int | None = None
    token_types: int = 0
    decoder_start: int | None = None
    target_limit: int | None = None
    hidden_size: int | None = None
    most_tokens: int = 2**31


def read_family(pretrained: Pretrained, reader: Any, spec: TaskSpec, *, adds_tokens: bool) -> Reading:
    """How a model reads and writes texts with this tokenizer. Args: adds_tokens: whether the recipe adds tokens to it."""
    config = load_config(pretrained)
    rows = vocabulary_rows(config)
    if adds_tokens and rows is not None:
        rows = max(rows, len(reader))
    reading = Reading(
        padding_of(config, whole_rows=spec.reads_whole_rows),
        is_causal(config),
        end_ids(pretrained, reader)[0] if spec.generates else [],
        rows,
        token_types(config, reader),
        hidden_size=getattr(config.get_text_config(), "hidden_size", None),
        most_tokens=model_max_length(pretrained, reader),
    )
    if not spec.reads_source:
        return reading
    return reading._replace(decoder_start=decoder_start(config), target_limit=target_limit(pretrained, reader))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values of ``TaskSpec.settings``, by key; sections as mappings."""
    values: dict[str, Any] = {}
    for key in recipe.spec.settings:
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        values[key] = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
    return values


def task_parts(
    recipe: Recipe,
    reader: Any,
    reading: Reading,
    *,
    rows: Rows | None,
    classes: list[str] | None,
    config: Any,
    sentences: Callable[[], Any],
    found: Mapping[str, Any],
) -> TaskParts:
    """See ``TaskParts``. Args: rows: define the columns; None: unknown. Raises: RecipeError."""
    data = recipe.data
    return TaskParts(
        reader,
        columns=data.columns,
        available=list(rows.columns) if rows else (),
        sample=rows.sample() if rows else {},
        classes=classes,
        label_names=data.label_names,
        bins=(data.bins.edges, data.bins.names) if data.bins else None,
        class_weights=recipe.train.class_weights,
        template=data.template.model_dump(exclude_none=True) if data.template else None,
        head_loss=HeadLoss(recipe.run.kernels),
        pooling=recipe.model.pooling,
        sentences=sentences,
        style=((recipe.lock or {}).get("environment") or {}).get("style"),
        control_tokens=data.control_tokens,
        padding=reading.padding,
        causal=reading.causal,
        end_ids=reading.end_ids,
        num_embeddings=reading.num_embeddings,
        token_types=reading.token_types,
        decoder_start=reading.decoder_start,
        max_target_length=_max_target_length(recipe, reading),
        hidden_size=reading.hidden_size,
        most_tokens=reading.most_tokens,
        settings=settings_of(recipe),
        config=config,
        augmentation=Augmentation(**data.augment.model_dump()) if data.augment else None,
        found=found,
    )


def _max_target_length(recipe: Recipe, reading: Reading) -> int | None:
    wanted, allowed = recipe.data.max_target_length, reading.target_limit
    if allowed is None:
        return None
    if wanted is not None and wanted > allowed:
        raise RecipeError(
            f"the decoder of {recipe.model.name} writes at most {allowed:,} tokens, found {wanted:,}",
            key="data.max_target_length",
        )
    return allowed if wanted is None else wanted
