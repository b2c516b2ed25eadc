"""Adapters of other methods that are trained at the same time as the main one, each on modules of its own.

A file of PEFT has one method. Each of these adapters has files of its own in ``beside/METHOD`` of the main adapter's folder, which
plain PEFT opens too. In memory all of them have PEFT's name ``default`` and are layers of one model, so that everything that walks
over layers, such as a merge, takes them along.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlab.adapters.places import peft_errors
from peftlab.adapters.state import method_of
from peftlab.errors import ArtifactError, RecipeError
from peftlab.specs.methods import METHODS

FOLDER_BESIDE = "beside"
_KEY = "adapter.beside"
# A task type of PEFT that adds no head to what is trained.
PLAIN_TYPE = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class Beside:
    """An adapter of another method. targets, layers: as in ``inject``; targets: None for bottlenecks, whose style says where.
    options: the other arguments of ``inject`` for the method. lr: its learning rate at the peak; None: that of the run."""

    method: str
    targets: str | Sequence[str] | None = None
    layers: Sequence[int] | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None

    @property
    def is_bottleneck(self) -> bool:
        return bool(METHODS[self.method].own_options)


def check_methods(main: str, others: Sequence[Beside]) -> None:
    """Raises RecipeError for a method that cannot be trained beside another one, or twice, and for tensors that PEFT cannot tell
    apart by their names."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    def prefix(method: str) -> str:
        own = METHODS[method].peft
        return PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(own.upper()), "") if own else ""

    seen = [main]
    for index, other in enumerate(others):
        key = f"{_KEY}.{index}.method"
        if not METHODS[other.method].beside:
            fits = ", ".join(name for name, spec in METHODS.items() if spec.beside)
            raise RecipeError(f"{other.method} keeps values outside of its layers; expected one of {fits}", key=key)
        for before in seen:
            a, b = prefix(before), prefix(other.method)
            if before == other.method:
                raise RecipeError(
                    f"there is one {before} already; adapter.patterns gives modules other settings", key=key
                )
            if a and b and (a in b or b in a):
                raise RecipeError(f"PEFT cannot tell the tensors of {other.method} from those of {before}", key=key)
        seen.append(other.method)


def claimed_modules(
    model: nn.Module, others: Sequence[Beside], planned: Callable[[Beside], Sequence[str]]
) -> dict[str, list[str]]:
    """The modules of each adapter by its method. Args: planned: the modules that one adapts.

    Raises: RecipeError if two claim one module, or parts of one.
    """
    claimed: dict[str, list[str]] = {}
    for index, other in enumerate(others):
        with errors_beside(index):
            names = list(planned(other))
        for method, taken in claimed.items():
            if clash := _overlap(names, taken):
                raise RecipeError(f"{clash} has an adapter of {method} already", key=f"{_KEY}.{index}.targets")
        claimed[other.method] = names
    return claimed


@contextlib.contextmanager
def errors_beside(index: int) -> Iterator[None]:
    """Gives errors about an adapter its place in ``adapter.beside``."""
    try:
        yield
    except RecipeError as error:
        part = (error.key or "adapter.targets").removeprefix("adapter.")
        raise RecipeError(str(error), key=f"{_KEY}.{index}.{part}") from error


def check_apart(main: Sequence[str], claimed: Mapping[str, Sequence[str]]) -> None:
    """Raises RecipeError if the main adapter and another one are on one module, or inside of it."""
    for index, (method, names) in enumerate(claimed.items()):
        if clash := _overlap(main, names):
            raise RecipeError(
                f"{clash} has both the main adapter and one of {method}; leave it out of one of them",
                key=f"{_KEY}.{index}.targets",
            )


def _overlap(names: Collection[str], others: Collection[str]) -> str | None:
    for name in names:
        for other in others:
            if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
                return name
    return None


def add_beside(model: Any, method: str, config: Any) -> None:
    """Injects an adapter of PEFT into a ``PeftModel`` that has the main one. Both are trained then."""
    import peft

    from peftlab.adapters import fused

    base = model.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    if type(config) is peft.LoraConfig:
        fused.register(config)
    with warnings.catch_warnings(), peft_errors(method), _as_main(model, config):
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # that of the main adapter
        before = {id(p) for p in model.parameters()}
        peft.inject_adapter_in_model(config, base, adapter_name="default")
    new = [p for p in model.parameters() if id(p) not in before and p.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in [*trained, *new]:
        parameter.requires_grad_(True)
    _remember(model, method, config)


def keep_bottlenecks(model: Any, stored: Any) -> None:
    """Notes that the base of a ``PeftModel`` has bottlenecks with the settings ``stored``, and trains them: injecting the main
    adapter froze them."""
    for layer in bottleneck_layers(model):
        layer.set_requires_grad("default")
    _remember(model, "bottleneck", stored)


def bottleneck_layers(model: nn.Module) -> list[Any]:
    """The layers with bottlenecks."""
    from peftlab.adapters.bottleneck import BottleneckLayer

    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def beside(model: Any) -> Mapping[str, Any]:
    """The configurations of the adapters beside the main one, by method."""
    found: Mapping[str, Any] = getattr(model, "adapters_beside", {})
    return found


def method_of_layer(model: Any, layer: Any, adapter: str = "default") -> str:
    """The name in ``specs.methods`` of the method of an adapted layer."""
    from peftlab.adapters.bottleneck import BottleneckLayer

    if isinstance(layer, BottleneckLayer):
        return "bottleneck"
    others = [method for method in beside(model) if method != "bottleneck"]
    own = [m for m in others if any(_prefix(m) in name for name in layer.adapter_layer_names)]
    return own[0] if own else method_of(model.peft_config[adapter])


def _remember(model: Any, method: str, config: Any) -> None:
    model.adapters_beside = {**beside(model), method: config}


@contextlib.contextmanager
def _as_main(model: Any, config: Any) -> Iterator[None]:
    """Lets PEFT's functions see another configuration as the main one, and keeps them from changing that."""
    main = model.peft_config["default"]
    model.peft_config["default"] = config
    try:
        yield
    finally:
        model.peft_config["default"] = main
        base = model.get_base_model()
        if getattr(base, "peft_config", None) is not model.peft_config and hasattr(base, "peft_config"):
            del base.peft_config  # PEFT leaves it on a model that had none


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The model without its adapters inside of the block; PEFT leaves bottlenecks on where the main adapter is a prompt."""
    layers = bottleneck_layers(model) if beside(model) else []
    with model.disable_adapter():
        states = [(layer, layer.disable_adapters) for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in states:
                layer._disable_adapters = disabled


def tensors_beside(model: Any, method: str) -> dict[str, Tensor]:
    """The tensors of one of these adapters by their names in its file."""
    from peft import get_peft_model_state_dict

    if method == "bottleneck":
        from peftlab.adapters.bottleneck import bottleneck_state

        tensors = bottleneck_state(model)
    else:
        with _as_main(model, beside(model)[method]):
            tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    layers = _layers(model, method)
    return {_in_file(model, name): tensor for name, tensor in tensors.items() if name.startswith(layers)}


def tensors_of_main(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those ``tensors``, PEFT's for the main adapter, that are not of an adapter beside it: PEFT takes all layers of any method."""
    layers = tuple(layer for method in beside(model) for layer in _layers(model, method))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(layers)}


def _layers(model: nn.Module, method: str) -> tuple[str, ...]:
    """The beginnings of the names in the layers of one of these adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    return tuple(f"{name}." for name, layer in layers if method_of_layer(model, layer) == method)


def load_tensors_beside(model: Any, method: str, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a file into the adapter of this method. Raises: RuntimeError for another adapter."""
    own = tensors_beside(model, method)
    shapes = {n: t.shape for n, t in tensors.items()}
    if {n: t.shape for n, t in own.items()} != shapes:
        odd = next(iter(sorted(own.keys() ^ tensors.keys())), None) or next(n for n in own if own[n].shape != shapes[n])
        raise RuntimeError(f"its tensors of {method} differ, such as {odd}")
    for name, value in own.items():
        value.data.copy_(tensors[name])


def save_beside(model: Any, folder: Path) -> list[Path]:
    """Writes each of these adapters into its folder in ``folder``; returns the paths of their configurations."""
    from safetensors.torch import save_file

    from peftlab.adapters.bottleneck import write_config

    paths = []
    for method, config in beside(model).items():
        target = folder / FOLDER_BESIDE / method
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors_beside(model, method).items()}
        save_file(tensors, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
        if method == "bottleneck":
            write_config(config, target)
        else:
            config.save_pretrained(str(target))
            paths.append(target / "adapter_config.json")
    return paths


def folders_beside(folder: Path) -> list[Path]:
    """The folders of the adapters beside the one in ``folder``; not those that an editor or a notebook left there."""
    return sorted(path for path in (folder / FOLDER_BESIDE).glob("*") if path.is_dir() and path.name in METHODS)


def refuse_beside(folder: Path, why: str) -> None:
    """Raises RecipeError if the adapter in ``folder`` has others beside it."""
    if found := folders_beside(folder):
        raise RecipeError(
            f"{folder} has adapters of several methods ({', '.join(p.name for p in found)} beside it); {why}"
        )


def load_beside(model: Any, folder: Path, *, trainable: bool) -> None:
    """Adds the saved adapters of PEFT's methods in ``folder`` to a ``PeftModel`` with the main one, and the values of bottlenecks that
    are in it. Raises: ArtifactError for another model's."""
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in folders_beside(folder):
        try:
            tensors = load_file(str(path / "adapter_model.safetensors"))
            if path.name != "bottleneck":
                add_beside(model, path.name, PeftConfig.from_pretrained(str(path)))
            load_tensors_beside(model, path.name, tensors)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; restore it from a checkpoint") from error
        except (RuntimeError, ValueError, KeyError, RecipeError) as error:
            raise ArtifactError(f"the adapter in {path} was made for another model: {error}") from error
    if not trainable:
        for parameter in model.parameters():
            parameter.requires_grad_(False)


def _prefix(method: str) -> str:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    peft = METHODS[method].peft
    assert peft is not None
    return str(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(peft.upper())])


def _around(model: Any) -> str:
    """What stands before a base module's name in the names of a ``PeftModel``; virtual tokens put nothing around the base."""
    return "base_model." if model.peft_config["default"].is_prompt_learning else "base_model.model."


def _in_file(model: Any, name: str) -> str:
    return "base_model.model." + name.removeprefix(_around(model))
