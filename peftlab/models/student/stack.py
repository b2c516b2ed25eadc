"""The layers of a transformers model as one stack: finds it by the config's count, and shortens it temporarily or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from peftlab.errors import RecipeError
from peftlab.models.student.rebuild import adopt_sizes, check_layers, rebuilt, same_but_for_their_number

LAYERS_KEY = "distill.student_init.layers"
Part = Literal["encoder", "decoder"]
# Config entries with "layer" in their name that hold layer numbers instead of one value per layer.
_HOLD_LAYER_NUMBERS = {"mlp_only_layers"}


@dataclass(frozen=True)
class Stack:
    """The layers that a hidden state passes in sequence.

    Attributes:
        path: path of the ``ModuleList`` inside the model.
        counts: each config object with its attribute for the number of layers.
    """

    path: str
    owner: nn.Module
    name: str
    counts: tuple[tuple[Any, str], ...]

    @property
    def layers(self) -> nn.ModuleList:
        layers = getattr(self.owner, self.name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def __len__(self) -> int:
        return len(self.layers)


def find_stack(model: nn.Module, part: Part | None = None) -> Stack:
    """The outermost ``ModuleList`` with as many members as the config has layers.

    Args:
        part: which half of an encoder-decoder model; default: the decoder, where generation spends its time.
    Raises: RecipeError if there is none or more than one, as in a model that shares one layer's weights (ALBERT).
    """
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        if part is not None:
            raise RecipeError(
                f"{type(model).__name__} is not an encoder-decoder model: it has one stack of layers and no {part}",
                key="distill.student_init.part",
            )
        text = config.get_text_config()
        return _find(model, "", text.num_hidden_layers, ((text, "num_hidden_layers"),))
    part = part or "decoder"
    names = ("decoder_layers", "num_decoder_layers") if part == "decoder" else ("encoder_layers", "num_layers")
    count = next((name for name in names if isinstance(getattr(config, name, None), int)), None)
    half = getattr(model, f"get_{part}")()
    if count is None or half is None:
        raise RecipeError(
            f"the config of {type(model).__name__} has no {' or '.join(names)} for its {part} layers, so they cannot be cut",
            key=LAYERS_KEY,
        )
    counts = [(config, count)]
    if half.config is not config:  # T5 gives each half a copy, with its own number as num_layers
        counts.append((half.config, "num_hidden_layers" if hasattr(half.config, "num_layers") else count))
    prefix = next(name for name, module in model.named_modules() if module is half)
    return _find(half, f"{prefix}." if prefix else "", getattr(config, count), tuple(counts))


def _find(model: nn.Module, prefix: str, num_layers: int, counts: tuple[tuple[Any, str], ...]) -> Stack:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    outer = {k: v for k, v in lists.items() if not any(k.startswith(f"{other}.") for other in lists)}
    if len(outer) > 1:
        outer = {k: v for k, v in outer.items() if all(isinstance(m, GradientCheckpointingLayer) for m in v)}
    if len(outer) != 1:
        names = ", ".join(outer) or "none"
        raise RecipeError(
            f"expected one list of {num_layers} layers in {type(model).__name__}, found {names}; its layers cannot be cut",
            key=LAYERS_KEY,
        )
    path = next(iter(outer))
    owner, _, name = path.rpartition(".")
    return Stack(prefix + path, model.get_submodule(owner), name, counts)


def check_layer_numbers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """``layers``, if they are a valid choice from ``num_layers``.

    Raises: RecipeError (out of range, duplicate, not ascending, none).
    """
    wanted = f"expected different numbers from 0 to {num_layers - 1} in ascending order"
    outside = [i for i in layers if not 0 <= i < num_layers]
    if not layers:
        raise RecipeError(f"{wanted}, found none: a student keeps at least one layer", key=LAYERS_KEY)
    if outside:
        raise RecipeError(
            f"{wanted}, found {', '.join(map(str, outside))}: the model has {num_layers} layers", key=LAYERS_KEY
        )
    if len(set(layers)) != len(layers):
        twice = sorted({i for i in layers if list(layers).count(i) > 1})
        raise RecipeError(f"{wanted}, found {', '.join(map(str, twice))} more than once", key=LAYERS_KEY)
    if list(layers) != sorted(layers):
        raise RecipeError(f"{wanted}, found {list(layers)}", key=LAYERS_KEY)
    return tuple(layers)


@contextlib.contextmanager
def only_layers(model: nn.Module, stack: Stack, kept: Sequence[int]) -> Iterator[None]:
    """Inside the block, ``model`` has only the layers ``kept``. Everything is restored afterwards, also after an error.

    Nothing is copied. The layers keep their numbers, under which a cache would store keys and values, so the cache is off.
    """
    layers, saved = stack.layers, _config_of(stack)
    try:
        _shorten(stack, kept)
        for config, name, _ in saved:
            if name == "use_cache":
                config.use_cache = False
        yield
    finally:
        _restore(stack, layers, saved)


def can_cut(model: nn.Module, stack: Stack, kept: Sequence[int]) -> bool:
    """Whether ``cut_layers`` accepts this choice."""
    if same_but_for_their_number(stack.layers):
        return True
    with only_layers(model, stack, kept):
        try:
            check_layers(model, rebuilt(model, model.config, key=LAYERS_KEY), stack.path, kept, key=LAYERS_KEY)
        except RecipeError:
            return False
    return True


def cut_layers(model: nn.Module, layers: Sequence[int], *, part: Part | None = None) -> tuple[str, ...]:
    """Cuts ``model`` to ``layers``, renumbered from 0, with a matching config, and returns notes on the cut.

    The result equals the model that ``from_pretrained`` builds from its saved files: it is compared, tensor by tensor and
    attribute by attribute, with a model built from the new config. If they differ, ``model`` is unchanged.

    Args:
        layers: numbers of the layers to keep, ascending and different.
        part: as in ``find_stack``.
    Raises: RecipeError for an invalid choice, and for one that the architecture does not allow.
    """
    stack = find_stack(model, part)
    layers = check_layer_numbers(layers, len(stack))
    before, saved = stack.layers, _config_of(stack)
    try:
        _shorten(stack, layers)
        expected = rebuilt(model, model.config, key=LAYERS_KEY)
        check_layers(model, expected, stack.path, layers, key=LAYERS_KEY)
    except BaseException:
        _restore(stack, before, saved)
        raise
    adopt_sizes(stack.layers, expected.get_submodule(stack.path))
    notes = []
    for name, values in _per_layer({name: value for _, name, value in saved}, len(before)).items():
        now = [values[i] for i in layers]
        if now != values[: len(now)]:
            notes.append(f"{name} was {_runs(values)} and is now {_runs(now)}")
    return tuple(notes)


def _config_of(stack: Stack) -> list[tuple[Any, str, Any]]:
    """The changes to configs: (config, attribute, value)."""
    saved: list[tuple[Any, str, Any]] = []
    for config, count in stack.counts:
        names = [count, "use_cache", *_per_layer(vars(config), len(stack))]
        saved.extend((config, name, getattr(config, name)) for name in names if hasattr(config, name))
    return saved


def _restore(stack: Stack, layers: nn.ModuleList, saved: list[tuple[Any, str, Any]]) -> None:
    setattr(stack.owner, stack.name, layers)
    for config, name, value in saved:
        setattr(config, name, value)


def _per_layer(config: dict[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """The config entries with one value per layer, such as ``layer_types`` and ``no_rope_layers``."""
    return {
        name: list(value)
        for name, value in config.items()
        if "layer" in name
        and isinstance(value, list | tuple)
        and len(value) == num_layers
        and name not in _HOLD_LAYER_NUMBERS
    }


def _shorten(stack: Stack, kept: Sequence[int]) -> None:
    lists = [_per_layer(vars(config), len(stack)) for config, _ in stack.counts]
    setattr(stack.owner, stack.name, nn.ModuleList([stack.layers[i] for i in kept]))
    for (config, count), values in zip(stack.counts, lists, strict=True):
        setattr(config, count, len(kept))
        for name, value in values.items():
            setattr(config, name, [value[i] for i in kept])


def _runs(values: list[Any]) -> str:
    """``a x 5, b, a x 5`` for a list of values."""
    parts: list[list[Any]] = []
    for value in values:
        if parts and parts[-1][0] == value:
            parts[-1][1] += 1
        else:
            parts.append([value, 1])
    return ", ".join(f"{value} x {count}" if count > 1 else f"{value}" for value, count in parts)
