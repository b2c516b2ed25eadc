"""The section ``adapter`` of a recipe, and the sections in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from peftlab.recipe.method_options import add_method_options
from peftlab.recipe.section import Section
from peftlab.specs.methods import METHODS, TARGET_NAMES

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


def _parsed_targets(value: str | list[str]) -> str | list[str]:
    if isinstance(value, str) and value not in TARGET_NAMES:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a valid regular expression: {error}") from None
    if isinstance(value, list) and not value:
        raise ValueError("an empty list adapts nothing; write all-linear or module names")
    return value


def _parsed_layers(value: list[int] | str | None) -> list[int] | str | None:
    if isinstance(value, str) and not re.fullmatch(r"(-?\d+)?:(-?\d+)?", value):
        raise ValueError(f"expected a list of indices, or a range such as 12: or -6:; found {value!r}")
    if value in ([], ":"):
        raise ValueError("adapts no block in particular; remove it" if value else "an empty list adapts nothing")
    return value


class PatternSection(Section):
    targets: str | list[str] = Field(
        description="which of the adapted modules: a list of name endings, or one regular expression"
    )
    layers: list[int] | str | None = Field(None, description="blocks, as adapter.layers")
    rank: int | None = Field(None, ge=1, description="their rank")
    alpha: float | None = Field(None, gt=0, description="their alpha")
    dropout: float | None = Field(None, ge=0, lt=1, description="their dropout")
    lr: float | None = Field(None, gt=0, description="their peak learning rate, instead of train.lr")

    _targets_parse = field_validator("targets")(_parsed_targets)
    _layers_are_a_range = field_validator("layers")(_parsed_layers)

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if all(value is None for value in (self.rank, self.alpha, self.dropout, self.lr)):
            raise ValueError("a pattern without rank, alpha, dropout or lr changes nothing")
        return self


class BesideSection(Section):
    """An adapter of another method; the other options of the method have PEFT's own names."""

    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=add_method_options)

    method: MethodName = Field(description="its method")
    targets: str | list[str] | None = Field(
        None,
        description="its modules: a list of name endings, or one regular expression; the main adapter leaves them out",
    )
    layers: list[int] | str | None = Field(None, description="blocks, as adapter.layers")
    rank: int | None = Field(None, ge=1, description="its rank")
    alpha: float | None = Field(None, gt=0, description="its alpha")
    dropout: float = Field(0.0, ge=0, lt=1, description="its dropout")
    rslora: bool = Field(False, description="as adapter.rslora")
    dora: bool = Field(False, description="as adapter.dora")
    lr: float | None = Field(None, gt=0, description="its peak learning rate, instead of train.lr")

    _layers_are_a_range = field_validator("layers")(_parsed_layers)

    @field_validator("targets")
    @classmethod
    def _targets_parse(cls, value: str | list[str] | None) -> str | list[str] | None:
        return None if value is None else _parsed_targets(value)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, value: Any) -> Any:
        return _with_defaults(cls, value, ("rank", "alpha"))

    @property
    def options(self) -> dict[str, Any]:
        """The options that the recipe sets by PEFT's own names."""
        return dict(self.__pydantic_extra__ or {})


def _with_defaults(section: type[Section], value: Any, keys: tuple[str, ...]) -> Any:
    """``value`` with the method's own defaults of ``keys``, so that a lock file says them. A null sets no key of ours, but is a
    value in PEFT."""
    method = value.get("method", "lora") if isinstance(value, dict) else None
    spec = METHODS.get(method) if isinstance(method, str) else None
    if spec is None:
        return value
    values: dict[str, Any] = {k: spec.default(k) for k in ("rank", "alpha") if k in keys and k in spec.keys}
    if "targets" in keys and "targets" in spec.keys:
        values["targets"] = spec.targets
    given = {k: v for k, v in value.items() if v is not None or k not in section.model_fields}
    return {k: v for k, v in values.items() if v is not None} | given


class AdapterSection(Section):
    """Keys for all methods. The other options of a method have PEFT's own names; ``peftlab adapters list NAME`` lists them."""

    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=add_method_options)

    method: MethodName = Field(
        "lora",
        description="adapter method of PEFT (`peftlab adapters` lists them); none trains the model's own weights (full "
        "fine-tuning)",
    )
    start: str | None = Field(
        None,
        description="run, checkpoint or folder of an adapter whose weights the new one begins with; it also gives the keys of "
        "this section that the recipe leaves out",
    )
    rank: int | None = Field(None, ge=1, description="rank r of the update; default 8 for lora, else PEFT's")
    alpha: float | None = Field(
        None, gt=0, description="the update is scaled by alpha / rank; default 16 for lora, else PEFT's"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: str | list[str] = Field(
        "all-linear",
        description="all-linear, all-norms, embeddings, a list of module name endings, or one regular expression; the "
        "default depends on the method",
    )
    layers: list[int] | str | None = Field(
        None,
        description="indices of the blocks to adapt, such as [0, 1], or a range of them: 12:, :6, -6: (the last six); "
        "default: all",
    )
    tokens: list[str] | dict[str, str] = Field(
        default_factory=list,
        description="tokens to add to the vocabulary, or a mapping of tokens to descriptions whose mean they start from; with "
        "lora only their rows are trained",
    )
    patterns: list[PatternSection] = Field(
        default_factory=list,
        description="other settings for some of the adapted modules, such as [{targets: [q_proj], rank: 32, lr: 1e-3}]",
    )
    beside: list[BesideSection] = Field(
        default_factory=list,
        description="adapters of other methods to train at the same time on other modules, such as [{method: ia3, targets: "
        "[k_proj, v_proj]}]",
    )
    rslora: bool = Field(False, description="scale the update by alpha / sqrt(rank) instead of alpha / rank")
    dora: bool = Field(False, description="use DoRA, weight-decomposed LoRA")
    bias: str = Field("none", description="which biases to train: none, all or lora_only (of the adapted modules)")
    modules_to_save: list[str] = Field(
        default_factory=list, description="modules that are trained in full and saved with the adapter"
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="endings of the names of modules to leave as they are, such as [embeddings]; with an adapter: not to "
        "adapt",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, value: Any) -> Any:
        return _with_defaults(cls, value, ("rank", "alpha", "targets"))

    _targets_parse = field_validator("targets")(_parsed_targets)
    _layers_are_a_range = field_validator("layers")(_parsed_layers)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the recipe sets by PEFT's own names."""
        return dict(self.__pydantic_extra__ or {})
