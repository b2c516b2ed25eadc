"""Injects any adapter method of ``specs.methods`` through PEFT, and reports what is trained."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlab.adapters.target_modules import check_modules_to_save, check_targets, is_adaptable, is_grouped, is_linear
from peftlab.errors import PeftlabError, RecipeError
from peftlab.specs.methods import METHODS

# PEFT's task type of a sequence classifier: it trains modules with these endings in full.
_CLASSIFIER = "SEQ_CLS"
_CLASSIFIER_HEADS = ("classifier", "score")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# A word in PEFT's refusal -> the key of the section adapter that it is about.
_KEYS_BY_WORD = {
    "dropout": "dropout",
    "dora": "dora",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
    "rank": "rank",
}


@dataclass(frozen=True)
class AdapterReport:
    """What is adapted and how much is trained (numbers of parameters and modules).

    Attributes:
        whole: names of the modules that are trained in full, such as a new head.
    """

    num_modules: int
    num_trained: int
    num_total: int
    kinds: dict[str, int]
    whole: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} x{count}" for name, count in sorted(self.kinds.items()))
        share = 100 * self.num_trained / self.num_total
        text = f"{self.num_trained:,} of {self.num_total:,} parameters trained ({share:.2f} %) in {self.num_modules} modules: {kinds}"
        return f"{text}; in full: {', '.join(self.whole)}" if self.whole else text


def inject(
    model: nn.Module,
    method: str,
    *,
    peft_type: str | None,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    new: Collection[str] = (),
    kernels: str = "auto",
    **options: Any,
) -> Any:
    """The model with adapters injected by PEFT (a ``PeftModel``); only the adapters require gradients.

    Args:
        method: name in ``specs.methods`` of a method that adds an adapter.
        peft_type: PEFT task type, such as ``CAUSAL_LM``; None if PEFT has none. For a classifier, and without a type, the
            modules outside the body are the head, which is trained in full.
        targets: ``all-linear``, module name endings, or one regular expression over full module names.
        new: names of the parameters that the model's files lack; their modules are trained in full and saved.
        kernels: auto, triton or reference; see ``fused.set_kernels``. No effect for a method without fused layers.
        options: the method's other keys of the section ``adapter``, such as ``rank``.
    Raises: RecipeError if a target or a module to save matches nothing, or PEFT refuses the adapter.
    """
    import peft

    from peftlab.adapters import fused

    check_modules_to_save(model, modules_to_save)
    config = _config(
        model, method, peft_type=peft_type, targets=targets, modules_to_save=modules_to_save, new=new, **options
    )
    if isinstance(config, peft.LoraConfig):
        fused.register(config)
    with warnings.catch_warnings(), _peft_errors():
        # PEFT 0.21 reads an attribute of transformers 5 under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        peft_model = peft.get_peft_model(model, config)
    fused.set_kernels(peft_model, kernels)
    return peft_model


def planned_modules(
    model: nn.Module,
    *,
    peft_type: str | None,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    new: Collection[str] = (),
) -> list[str]:
    """Full names of the modules of a model without adapters that ``inject`` adapts with LoRA, by PEFT's own rules.

    Raises: RecipeError if a target matches nothing.
    """
    config = _config(model, "lora", peft_type=peft_type, targets=targets, modules_to_save=modules_to_save, new=new)
    return _matched(model, config)


def report(model: Any) -> AdapterReport:
    """Counts over an injected model. Raises: RecipeError if nothing is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds: dict[str, int] = {}
    whole = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kind = base_name(name).rsplit(".", 1)[-1]
            kinds[kind] = kinds.get(kind, 0) + 1
        elif isinstance(module, ModulesToSaveWrapper):
            whole.append(base_name(name))
    trained, total = model.get_nb_trainable_parameters()
    if not trained or not kinds:
        raise RecipeError("no module was adapted, so nothing would be trained", key="adapter.targets")
    return AdapterReport(sum(kinds.values()), trained, total, kinds, tuple(whole))


def base_name(name: str) -> str:
    """The name in the base model of a module in a PEFT model."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.removesuffix(".token_adapter")


def _config(
    model: nn.Module,
    method: str,
    *,
    peft_type: str | None,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str],
    new: Collection[str],
    **options: Any,
) -> Any:
    """PEFT's configuration. Raises: RecipeError if a target matches nothing."""
    import peft

    spec = METHODS[method]
    assert spec.config is not None
    head = head_modules(model) if peft_type is None else []
    given = [*head, *modules_to_save]
    trained = [*given, *(_CLASSIFIER_HEADS if peft_type == _CLASSIFIER else ())]
    whole = list(dict.fromkeys([*given, *(n for n in new_modules(model, new) if not _is_inside(n, trained))]))
    alpha = options.get("alpha")
    if alpha is not None and float(alpha).is_integer():
        options["alpha"] = int(alpha)  # as in PEFT's own files
    config = getattr(peft, spec.config)(
        task_type=peft_type,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=whole or None,
        exclude_modules=_inside(head),
        **{spec.keys[key]: value for key, value in options.items()},
        **spec.fixed,
    )
    with _peft_errors():
        seen = _as_peft_matches(model, config)
    if not getattr(seen, "target_parameters", None):  # else PEFT translates names that no module has any more
        check_targets(model, targets)
        if targets == "all-linear":
            config.target_modules = _all_linear(model, seen)
    return config


def _matched(model: nn.Module, config: Any) -> list[str]:
    """Full names of the modules that PEFT adapts: layers, and the owners of adapted parameters."""
    from peft.tuners.tuners_utils import check_target_module_exists

    seen = _as_peft_matches(model, config)
    names = [name for name, _ in model.named_modules() if name and check_target_module_exists(seen, name)]
    endings = tuple(getattr(seen, "target_parameters", None) or ())
    for name, _ in model.named_parameters():
        if any(name == ending or name.endswith(f".{ending}") for ending in endings):
            names.append(name.rpartition(".")[0])
    return list(dict.fromkeys(names))


def _as_peft_matches(model: Any, config: Any) -> Any:
    """A copy of ``config`` with the changes that PEFT makes before it matches names."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = copy.deepcopy(config)
    if config.task_type == _CLASSIFIER:
        config.modules_to_save = [*(config.modules_to_save or []), *_CLASSIFIER_HEADS]
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    return _maybe_include_all_linear_layers(config, model)


def _all_linear(model: Any, seen: Any) -> list[str]:
    """Full names of the linear layers that run in the body, without those that are trained in full or that PEFT refuses."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists

    def refused(name: str) -> bool:
        try:
            _check_lora_target_modules_mamba(seen, model, name.rsplit(".", 1)[-1])
        except ValueError:
            return True
        return False

    towers = tuple(f"{name}." for name in idle_towers(model))
    # Attention of torch itself reads the weight of its output layer without calling the layer.
    inner = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    names = [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and check_target_module_exists(seen, name)
        and not name.startswith((*towers, *inner))
        and not refused(name)
    ]
    if not names:
        others = _other_endings(model)
        hint = f"; it has other layers that can have one: adapter.targets=[{', '.join(others[:6])}]" if others else ""
        raise RecipeError(
            f"all-linear matches nothing: {type(model).__name__} has no linear layer outside its head{hint}",
            key="adapter.targets",
        )
    return names


def _other_endings(model: nn.Module) -> list[str]:
    """The shortest endings of names that match layers which can have an adapter that merges, and nothing else."""
    fits = {
        name: is_adaptable(module) and not is_linear(module) and not is_grouped(module)
        for name, module in model.named_modules()
    }
    endings = set()
    for name in (name for name, good in fits.items() if good):
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            ending = ".".join(parts[start:])
            same = [good for n, good in fits.items() if n == ending or n.endswith(f".{ending}")]
            if all(same) and not parts[start].isdigit():
                endings.add(ending)
                break
    return sorted(endings)


def idle_towers(model: Any) -> list[str]:
    """Names of the encoders of other inputs, such as images, in a model that is given text."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return []
    names = [
        name
        for name, module in model.named_modules()
        if name and getattr(type(module), "main_input_name", "input_ids") != "input_ids"
    ]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def new_modules(model: nn.Module, new: Collection[str]) -> list[str]:
    """The largest modules whose parameters are all ``new``; the owner of a parameter if it has other parameters too.

    Raises: RecipeError for a parameter of the model itself, which PEFT cannot train and save.
    """
    modules = dict(model.named_modules())
    parameters = {name for name, _ in model.named_parameters()}
    chosen: list[str] = []
    for parameter in sorted(set(new) & parameters):
        owner = parameter.rpartition(".")[0]
        if not owner:
            raise RecipeError(
                f"the model's files lack {parameter}, which belongs to no module, so an adapter cannot contain it; "
                "use adapter.method=none",
                key="model.name",
            )
        while (above := owner.rpartition(".")[0]) and not isinstance(modules[above], _CONTAINERS):
            if any(name.startswith(f"{above}.") and name not in new for name in parameters):
                break
            owner = above
        if not any(owner == other or owner.startswith(f"{other}.") for other in chosen):
            chosen.append(owner)
    return chosen


def _is_inside(name: str, endings: Sequence[str]) -> bool:
    """Whether a module is in one that PEFT trains for ``endings``; it compares the ends of names, not of their parts."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts))]
    return name in endings or any(above.endswith(ending) for above in around for ending in endings)


def head_modules(model: Any) -> list[str]:
    """Names of the modules with weights outside the body of a transformers model."""
    body: Any = model.base_model
    if body is model:
        return []
    return [n for n, child in model.named_children() if child is not body and any(True for _ in child.parameters())]


def _inside(modules: Sequence[str]) -> str | None:
    """A regular expression for the names of ``modules`` and all their submodules; None without modules."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?" if modules else None


@contextlib.contextmanager
def _peft_errors() -> Iterator[None]:
    """Turns PEFT's refusals into errors that name the key."""
    try:
        yield
    except PeftlabError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
        # A module in the text is its class here, not the tree of what is in it.
        text = (
            re.sub(r"(Target module \w+)\(.*\)( is not)", r"\1\2", " ".join(str(error).split())) or type(error).__name__
        )
        lowered = text.lower()
        key = next((key for word, key in _KEYS_BY_WORD.items() if word in lowered), "targets")
        raise RecipeError(f"PEFT refuses this adapter: {text}", key=f"adapter.{key}") from error
