"""A transformers model with bottleneck adapters, with the methods of a ``PeftModel`` that the engine uses.

PEFT's own classes take only the methods in its enum, and nothing is patched into it.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.adapters.bottleneck.config import BottleneckConfig
from peftlab.adapters.bottleneck.layer import BottleneckLayer, refuse_merge
from peftlab.adapters.bottleneck.places import find_blocks
from peftlab.adapters.bottleneck.trace import Block, Place
from peftlab.adapters.target_modules import check_modules_to_save
from peftlab.errors import RecipeError, listed


class BottleneckType(enum.StrEnum):
    """The ``peft_type`` of the files."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class StoredConfig:
    """The settings of one adapter in ``peft_config`` and in its file, with the names that a ``PeftConfig`` has."""

    bottleneck: BottleneckConfig
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    inference_mode: bool = False

    peft_type = BottleneckType.BOTTLENECK
    is_prompt_learning = False
    is_adaption_prompt = False

    def to_dict(self) -> dict[str, Any]:
        """The values of ``adapter_config.json``."""
        values = {"peft_type": self.peft_type.value, **asdict(self)}
        settings: dict[str, Any] = values.pop("bottleneck")
        return values | settings


def add_bottlenecks(
    model: nn.Module,
    config: BottleneckConfig,
    *,
    modules_to_save: Sequence[str] = (),
    task_type: str | None = None,
) -> BottleneckModel:
    """The model with bottlenecks in it, whose outputs are at the start those of ``model``; only they require gradients.

    Args:
        model: a transformers model without adapters; it is changed. Runs once on a short probe (see ``find_blocks``).
        modules_to_save: endings of names of modules that are trained in full and saved, such as ``classifier``.
        task_type: PEFT's name of the task, for the file.
    Raises: RecipeError if a block lacks a place, a layer is out of range, or a module to save matches nothing.
    """
    check_modules_to_save(model, modules_to_save)
    return BottleneckModel(
        model,
        StoredConfig(
            config, task_type, getattr(model, "name_or_path", None) or None, sorted(set(modules_to_save)) or None
        ),
    )


def bottleneck_places(model: nn.Module, config: BottleneckConfig) -> dict[str, Place]:
    """The places by the names of the modules that ``add_bottlenecks`` wraps. Raises: RecipeError as it does."""
    blocks = find_blocks(model)
    chosen = range(len(blocks)) if config.layers is None else config.layers
    if (beyond := [index for index in chosen if index >= len(blocks)]) != []:
        raise RecipeError(
            f"expected layers from 0 to {len(blocks) - 1}, the blocks of {type(model).__name__}; found {listed(beyond)}",
            key="adapter.layers",
        )
    places: dict[str, Place] = {}
    for index in chosen:
        for place in _of_block(model, blocks[index], config):
            places[place.norm if config.style == "pfeiffer" and place.norm else place.output] = place
    return places


def _of_block(model: nn.Module, block: Block, config: BottleneckConfig) -> list[Place]:
    """The places of a style in one block. Raises: RecipeError."""

    def missing(what: str) -> RecipeError:
        detail = f" ({block.problem})" if block.problem else ""
        return RecipeError(
            f"{config.style} adapters need {what} in each block of {type(model).__name__}, and it was not found in "
            f"{block.name}{detail}; use another adapter.style or method, such as lora",
            key="adapter.method",
        )

    forward = block.feed_forward
    if forward is None:
        raise missing("one feed-forward output that is added to the residual stream")
    reads_residual = config.style == "parallel" or (config.style == "pfeiffer" and forward.norm is None)
    if reads_residual and forward.residual is None:
        raise missing("a module that reads the residual stream before the feed-forward")
    if config.style != "houlsby":
        return [forward]
    if block.attention is None:
        raise missing("an attention output that is added to the residual stream")
    return [block.attention, forward]


class BottleneckTuner(nn.Module):
    """What a ``PeftModel`` has as ``base_model``: it holds the transformers model as ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)


class BottleneckModel(nn.Module):
    """A transformers model with bottleneck adapters; has what the engine uses of a ``PeftModel``.

    What it does not define itself (``config``, ``generate``, ``gradient_checkpointing_enable``) is that of the transformers
    model. An adapter that is added later has the style and the layers of the first one.

    Args: model: a transformers model without adapters. stored: the settings of the adapter ``default``.
    """

    def __init__(self, model: nn.Module, stored: StoredConfig) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.peft_config: dict[str, StoredConfig] = {}
        places = bottleneck_places(model, stored.bottleneck)
        for name, place in places.items():
            _wrap(model, name, place, stored.bottleneck)
        self.base_model = BottleneckTuner(model)
        self.add_adapter("default", stored)
        self.set_adapter("default", inference_mode=stored.inference_mode)
        self.training = self.base_model.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The transformers model, with the adapters in it."""
        return self.base_model.model

    @property
    def active_adapter(self) -> str:
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        return [self._active]

    def bottleneck_layers(self) -> list[BottleneckLayer]:
        """The adapted layers."""
        return [module for module in self.modules() if isinstance(module, BottleneckLayer)]

    def add_adapter(self, adapter_name: str, peft_config: StoredConfig) -> None:
        """Adds an adapter, frozen and not active. Raises: ValueError for another style or other layers than the first's."""
        from peft.utils.other import _set_trainable

        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already")
        ours = peft_config.bottleneck
        for first in self.peft_config.values():
            theirs = first.bottleneck
            if (ours.style, ours.layers) != (theirs.style, theirs.layers):
                raise ValueError(
                    f"a second bottleneck has the places of the first ({theirs.style}, layers {theirs.layers or 'all'}); "
                    f"this one is {ours.style}, layers {ours.layers or 'all'}"
                )
        for layer in self.bottleneck_layers():
            layer.add(adapter_name, ours)
            layer.set_requires_grad(adapter_name, requires_grad=False)
        _set_trainable(
            self.base_model.model,
            adapter_name,
            module_names=peft_config.modules_to_save,
            inference_mode=True,
            activate_adapter=not self.peft_config,
        )
        self.peft_config[adapter_name] = peft_config

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activates one adapter; it alone requires gradients, unless ``inference_mode``."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        if adapter_name not in self.peft_config:
            raise ValueError(f"there is no adapter {adapter_name!r}, only {listed(self.peft_config)}")
        for module in self.modules():
            if isinstance(module, BottleneckLayer):
                module.set_adapter(adapter_name, inference_mode=inference_mode)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter(module.check_set_adapter(adapter_name) or [], inference_mode=inference_mode)
        self._active = adapter_name

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model without its adapters and trained modules inside of the block."""
        trained = [(p, p.requires_grad) for p in self.parameters()]
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()
            for parameter, requires_grad in trained:  # PEFT's layers make an enabled adapter trainable
                parameter.requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on."""
        self._enable(True)

    def disable_adapter_layers(self) -> None:
        """Switches the adapters off until ``enable_adapter_layers``."""
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        from peft.utils.other import AuxiliaryTrainingWrapper

        for module in self.modules():
            if isinstance(module, BottleneckLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)

    def load_adapter(self, folder: str, adapter_name: str, is_trainable: bool = False) -> None:
        """Adds a saved adapter, not active. Raises: ArtifactError for damaged files or another model's, ValueError as
        ``add_adapter``."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        from peftlab.adapters.bottleneck.files import load_next

        load_next(self, Path(folder), adapter_name)
        if is_trainable:
            for module in self.modules():
                if isinstance(module, BottleneckLayer | AuxiliaryTrainingWrapper):
                    module.set_requires_grad(adapter_name)

    def save_pretrained(
        self, save_directory: str, selected_adapters: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Writes each adapter's two files; ``default`` into the folder, others into one of their name. ``kwargs``: those of
        PEFT, which have no meaning here: the format is always safetensors, and embeddings are never added."""
        from peftlab.adapters.bottleneck.files import save_bottlenecks

        for name in self.peft_config if selected_adapters is None else selected_adapters:
            folder = Path(save_directory)
            save_bottlenecks(self, folder if name == "default" else folder / name, adapter_name=name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trained and of all parameters, by PEFT's own count."""
        from peft import PeftModel

        model: Any = self
        return PeftModel.get_nb_trainable_parameters(model)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises: ValueError, because a bottleneck cannot be merged."""
        refuse_merge()

    merge_adapter = merge
    merge_and_unload = merge

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)


def _wrap(model: nn.Module, name: str, place: Place, config: BottleneckConfig) -> None:
    """Replaces the module by one with room for adapters, and lets it see the residual stream if its style reads it."""
    parent, _, child = name.rpartition(".")
    layer = BottleneckLayer(model.get_submodule(name), place, config.style)
    layer.train(layer.base_layer.training)
    if config.style == "parallel" or (config.style == "pfeiffer" and place.norm is None):
        assert place.residual is not None
        # Before the replacement: this module may be the one that is wrapped.
        reader = layer if place.residual == name else model.get_submodule(place.residual)
        reader.register_forward_pre_hook(layer.remember, with_kwargs=True)
    setattr(model.get_submodule(parent), child, layer)
