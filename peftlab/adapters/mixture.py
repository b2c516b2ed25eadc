"""X-LoRA: a trained classifier that mixes given LoRA adapters by token (arXiv 2402.07148).

PEFT 0.21 names the adapters ``0``, ``1``, ..., and its ``save_pretrained`` takes the same parts out of the names of the classifier's
tensors, so that its file lacks them. Here the file has them, and PEFT reads it. The adapters are saved with the classifier, from the
values in memory: a run does not need the folders that they came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlab.adapters.beside import FOLDER_BESIDE
from peftlab.adapters.initial import changes_weights
from peftlab.errors import RecipeError

_KEY = "adapter.adapters"
# PEFT sorts their numbers as text, so that 10 would come before 2.
_MOST = 10
_CLASSIFIER = "internal_xlora_classifier"


def is_mixture(model: Any) -> bool:
    """Whether a PeftModel, or a configuration, is X-LoRA's."""
    config = model.peft_config.get("default") if hasattr(model, "peft_config") else model
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind)) == "XLORA"


def numbered(model: Any, folders: Mapping[str, str]) -> dict[str, str]:
    """The folders of the adapters by the number that PEFT knows them under.

    Args: model: may have no weights yet. folders: by the recipe's names. Raises: RecipeError with everything that is wrong with them.
    """
    if model.base_model_prefix != "model":
        raise RecipeError(
            f"PEFT loads adapters for X-LoRA only into models whose body is called model, such as Llama, Qwen, Mistral and Gemma; "
            f"that of {type(model).__name__} is called {model.base_model_prefix}",
            key="adapter.method",
        )
    if not 2 <= len(folders) <= _MOST:
        raise RecipeError(f"expected 2 to {_MOST} adapters to mix, found {len(folders)}", key=_KEY)
    problems = []
    for name, folder in folders.items():
        if not re.fullmatch(r"\w[\w-]*", name) or name == FOLDER_BESIDE:
            problems.append(f"{name!r} is no name for a folder of its own: expected letters, digits, _ and -")
        elif problem := _problem(model, Path(folder)):
            problems.append(f"{name}: {problem}")
    if problems:
        raise RecipeError("; ".join(problems), key=_KEY)
    return {str(index): folder for index, folder in enumerate(folders.values())}


def _problem(model: nn.Module, folder: Path) -> str | None:
    """Why X-LoRA cannot mix the adapter in ``folder``; None if it can."""
    from peft import PeftConfig
    from safetensors import safe_open

    config: Any = PeftConfig.from_pretrained(str(folder))
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method != "LORA" or config.use_dora:
        return f"{folder} is an adapter of {'DoRA' if method == 'LORA' else method}, and X-LoRA mixes plain LoRA"
    if changes_weights(config.init_lora_weights):
        return f"{folder} belongs to weights that {config.init_lora_weights} changed"
    if config.layer_replication:
        return f"{folder} replicates layers"
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118  (no mapping)
    modules = dict(model.named_modules())
    for tensor, shape in shapes.items():
        name, lora, part = tensor.removeprefix("base_model.model.").partition(".lora_")
        if not lora or not name.startswith("model."):
            return f"{folder} changes {name}, and PEFT's X-LoRA reads only the factors of layers in the body"
        layer = modules.get(name)
        if layer is None:
            return f"{folder} was made for another model: this one has no {name}"
        side, width = {"A.weight": (1, "in_features"), "B.weight": (0, "out_features")}.get(part, (0, ""))
        if isinstance(layer, nn.Linear) and width and shape[side] != (own := getattr(layer, width)):
            return f"{folder} was made for another model: {width} of {name} are {shape[side]} in it, and {own} here"
    return None


def before_mixing(model: Any) -> None:
    """X-LoRA runs the model twice in each forward, and has no place for a cache of keys and values."""
    model.config.use_cache = False


def after_mixing(model: Any, names: list[str]) -> None:
    """Remembers the ``names`` of the adapters, and keeps the trained classifier in float32: a single update is often below the
    resolution of 16 bits."""
    model.mixed_names = names
    layers = getattr(model.base_model, _CLASSIFIER).layers.float()
    layers[0].register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype), *args[1:]))


def mixture_state(model: Any) -> dict[str, Tensor]:
    """The tensors of the classifier, by the names that PEFT reads."""
    return {name: value for name, value in model.state_dict().items() if _CLASSIFIER in name}


def save_mixed(model: Any, folder: Path) -> dict[str, Any]:
    """Writes each adapter to a folder with its name in ``folder``; returns the change of the configuration there."""
    from safetensors.torch import save_file

    places = {}
    for index, name in enumerate(model.mixed_names):
        place = folder / name
        place.mkdir(exist_ok=True)
        model.peft_config[str(index)].save_pretrained(str(place))
        values = {n: t.detach().cpu().contiguous() for n, t in _factors(model, str(index))}
        save_file(values, str(place / "adapter_model.safetensors"), metadata={"format": "pt"})
        places[str(index)] = str(place.absolute())
    return {"adapters": places}


def saved_places(folder: Path) -> dict[str, str] | None:
    """The folders of the adapters in a saved X-LoRA, wherever it was moved to; None if they are not in it."""
    stored = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["adapters"]
    places = {number: folder / Path(path).name for number, path in stored.items()}
    return {n: str(p) for n, p in places.items()} if all(p.is_dir() for p in places.values()) else None


def _factors(model: Any, number: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one adapter by their names in a file of its own."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            held: Any = getattr(module, part)
            if number not in held:
                continue
            inner = held[number].state_dict() if isinstance(held[number], nn.Module) else {"": held[number]}
            yield from ((f"base_model.model.{name}.{part}{f'.{n}' if n else ''}", value) for n, value in inner.items())
