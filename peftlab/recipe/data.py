"""The sections of a recipe about its rows: where they come from, how they are read, drawn and labelled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from peftlab.recipe.section import Section
from peftlab.specs.tasks import COLUMNS

if TYPE_CHECKING:
    Column = str
else:
    Column = Literal[COLUMNS]

DELIMITER_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "space": " "}


class BinsSection(Section):
    edges: list[float] = Field(
        min_length=1, description="ascending cut points; a value above an edge falls into the next bin"
    )
    names: list[str] = Field(description="one class name per bin, len(edges) + 1")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.names) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges make {len(self.edges) + 1} bins, found {len(self.names)} names")
        if sorted(set(self.edges)) != self.edges:
            raise ValueError("edges must be ascending and distinct")
        return self


class TemplateSection(Section):
    """Text with ``{column}`` fields: either prompt + completion, or system / user / assistant turns."""

    prompt: str | None = Field(None, description="raw text before the completion")
    completion: str | None = Field(None, description="raw text that is trained")
    system: str | None = Field(None, description="system message")
    user: str | None = Field(None, description="user message")
    assistant: str | None = Field(None, description="assistant message, trained")

    @model_validator(mode="after")
    def _one_style(self) -> Self:
        raw = self.prompt is not None and self.completion is not None
        chat = self.user is not None and self.assistant is not None
        some_raw = self.prompt is not None or self.completion is not None
        some_chat = self.user is not None or self.assistant is not None or self.system is not None
        if not ((raw and not some_chat) or (chat and not some_raw)):
            raise ValueError("set either prompt and completion, or user and assistant (and optionally system)")
        return self


class AugmentSection(Section):
    """Random changes of training images, drawn anew on each pass."""

    flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring an image left to right")
    crop: tuple[float, float] | None = Field(
        None, description="smallest and largest share of the area that is kept, such as [0.8, 1.0]; default: all"
    )
    rotate: float = Field(0.0, ge=0, le=180, description="largest angle in degrees, either way")
    color: float = Field(0.0, ge=0, le=1, description="largest relative change of brightness, contrast and saturation")

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop: expected two shares of the area, 0 < low <= high <= 1, found {list(self.crop)}")
        if not (self.flip or self.crop or self.rotate or self.color):
            raise ValueError("changes nothing; set flip, crop, rotate or color, or remove it")
        return self


class DataSection(Section):
    train: str = Field(
        description="file, folder, package:IMPORT/PATH, built-in data such as docstrings:PACKAGE,PACKAGE, or hub data set; "
        "NAME:SPLIT reads one of its splits, NAME#500 samples 500 rows, NAME#8-per-class samples 8 training rows of each class "
        "after rows are held out"
    )
    eval: str | None = Field(
        None, description="held-out data, in the same forms as train; default: a part of train is held out"
    )
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows to hold out when data.eval is not set"
    )
    eval_rows: int | None = Field(None, ge=1, description="number of rows to hold out, instead of eval_fraction")
    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "arrow", "text", "document", "conll", "po"] = (
        Field(
            "auto",
            description="file format; auto uses the content, and the file ending where that leaves a choice; text: a row per "
            "paragraph of a text file; document: a row per text file",
        )
    )
    encoding: str = Field("utf-8", description="text encoding of the files")
    delimiter: str | None = Field(
        None,
        description="field separator of csv files: one character, or comma, semicolon, tab, pipe or space; default: found "
        "from the file",
    )
    column_names: list[str] | None = Field(None, description="column names of a csv or tsv file without a header")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    columns: dict[Column, str] = Field(
        default_factory=dict, description="which column plays which part, such as {text: body, label: is_spam}"
    )
    exclude: dict[str, list[str]] = Field(
        default_factory=dict,
        description="leave rows with one of these values in this column out of training, such as {label: [spam]}; "
        "their classes remain classes, and held-out rows keep them",
    )
    balance: bool | dict[str, float] = Field(
        False,
        description="train on as many rows of each class as the rarest has, or on a share of each class, such as "
        "{spam: 2, ham: 1}; drawn with data.seed, before rows are dropped as too long; held-out rows stay as they are",
    )
    template: TemplateSection | None = Field(None, description="builds the texts from the columns (causal_lm)")
    label_names: dict[str, str] = Field(
        default_factory=dict,
        description="class name for each value in the label column or in the masks, or for each tag or entity label",
    )
    bins: BinsSection | None = Field(None, description="cut a numeric label column into classes")
    score_range: tuple[float, float] | None = Field(
        None,
        description="the lowest and the highest score of the data, such as [0, 5], which become 0 and 1; default: scores are "
        "used as they are",
    )
    order: list[str] = Field(
        default_factory=list, description="the classes of columns.rank, lowest first; default: as numbers (seq_cls)"
    )
    separator: str | None = Field(
        None,
        min_length=1,
        description="what stands between the labels of columns.labels in a text, such as ';'; lists need none (seq_cls)",
    )
    seed: int | None = Field(None, ge=0, description="seed of the split and of sampled rows; default: run.seed")
    max_length: int | None = Field(None, ge=2, description="longest row in tokens; default: the model's limit")
    too_long: Literal["error", "truncate", "split", "drop"] = Field(
        "error",
        description="what to do with rows longer than max_length; split: cut plain text into blocks, so that all of it is "
        "trained (causal_lm, masked_lm)",
    )
    stride: int | None = Field(
        None,
        ge=0,
        description="tokens that neighbouring windows of a long context share; default: a third of the window, which is "
        "max_length (extractive_qa)",
    )
    empty: Literal["error", "drop"] = Field(
        "error",
        description="what to do with rows that have no text, label or image, or null in another column that the texts are "
        "made of; rows whose answer is empty are always left out",
    )
    prefix: str = Field(
        "", description="text before each source, such as 'translate English to German: ' for T5 (seq2seq)"
    )
    source_language: str | None = Field(
        None, description="language of the sources, for tokenizers of several, such as en_XX or eng_Latn (seq2seq)"
    )
    target_language: str | None = Field(
        None, description="language of the targets, which is also the one that is written (seq2seq)"
    )
    max_target_length: int | None = Field(
        None,
        ge=2,
        description="longest target in tokens, as max_length is that of the sources; too_long is for both (seq2seq)",
    )
    packing: bool = Field(
        False,
        description="put several rows into one sequence of up to max_length tokens; attention stays within each row, "
        "and train.batch_size counts sequences (causal_lm)",
    )

    augment: AugmentSection | None = Field(
        None, description="random changes of the training images; held-out images stay as they are"
    )
    control_tokens: Literal["auto", "text", "keep"] = Field(
        "auto",
        description="control tokens such as <|im_end|> inside the values of the data; text: encode them as plain text; "
        "keep: as the tokens; auto: as text in messages and in fields of a template, as the tokens in the columns text, "
        "prompt and completion (causal_lm)",
    )
    allow: list[Literal["untrained_terminator", "wrong_mask", "pad_is_eos", "template_family"]] = Field(
        default_factory=list, description="errors of `peftlab check` to accept (causal_lm)"
    )

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        character = None if value is None else DELIMITER_NAMES.get(value.lower(), value)
        if character is not None and (len(character) != 1 or character in '\r\n"'):
            raise ValueError(f"expected one character, or {', '.join(DELIMITER_NAMES)}; found {value!r}")
        return character

    @field_validator("balance")
    @classmethod
    def _shares_are_positive(cls, value: bool | dict[str, float]) -> bool | dict[str, float]:
        if isinstance(value, dict):
            if wrong := next((name for name, share in value.items() if not 0 < share < math.inf), None):
                raise ValueError(
                    f"the share of {wrong!r} is {value[wrong]:g}; data.exclude leaves a class out of training"
                )
            if not value:
                raise ValueError("an empty mapping has no share of any class; write true")
        return value

    @field_validator("exclude", mode="before")
    @classmethod
    def _excluded_values_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        lists = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
        return {k: [str(v).lower() if isinstance(v, bool) else str(v) for v in values] for k, values in lists.items()}

    @field_validator("order", mode="before")
    @classmethod
    def _order_is_text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [str(v).lower() if isinstance(v, bool) else str(v) for v in value]

    @field_validator("label_names", mode="before")
    @classmethod
    def _label_keys_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # Labels are compared as text, with lower-case booleans.
        return {str(k).lower() if isinstance(k, bool) else str(k): v for k, v in value.items()}

    @field_validator("score_range")
    @classmethod
    def _range_ascends(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"expected the lowest score before the highest, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.eval is not None:
            self._reject_unless_default(["eval_fraction", "eval_rows"], "when data.eval is given")
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order: contains {next(c for c in self.order if self.order.count(c) > 1)!r} twice")
        if self.bins is not None and self.order:
            raise ValueError("bins have an order of their own; remove order")
        if self.bins is not None and self.label_names:
            raise ValueError("bins name the classes themselves; remove label_names")
        if self.eval_rows is not None and self.eval_fraction != 0.1:
            raise ValueError("set eval_fraction or eval_rows, not both")
        return self


class SelfTrainingSection(Section):
    """Rounds of training: the model of each round labels rows without labels, and the sure ones join the training rows of the
    next round, which starts again from the base."""

    unlabelled: str = Field(
        description="rows without labels, in the same forms as data.train; a label column in them is only used to count how "
        "many of the model's labels are right"
    )
    rounds: int = Field(2, ge=1, description="number of times that the model labels these rows and is trained again")
    confidence: float = Field(
        0.95, gt=0, lt=1, description="a row joins if the probability of its label is at least this"
    )
    per_class: Literal["all", "balanced"] = Field(
        "all",
        description="all: every sure row joins; balanced: of each class as many as of the rarest, the surest first",
    )
