"""Which modules of a model an adapter changes, and which are trained in full."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import nn

from peftlab.adapters.target_modules import (
    check_targets,
    is_adaptable,
    is_linear,
    is_norm,
    is_plain_convolution,
    match_ending,
)
from peftlab.errors import PeftlabError, RecipeError
from peftlab.specs.methods import METHODS, TARGET_NAMES

# PEFT's task type of a sequence classifier: it trains modules with these endings in full.
_CLASSIFIER = "SEQ_CLS"
_CLASSIFIER_HEADS = ("classifier", "score")
# The head of T5ForQuestionAnswering (transformers 5.23), which is its own body.
_LOOSE_HEAD = "qa_outputs"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def planned_modules(model: nn.Module, *, method: str = "lora", **where: Any) -> list[str]:
    """Full names of the modules of a model without adapters that ``inject`` adapts, by PEFT's own rules; empty for a method that
    chooses them itself, or that adapts none.

    Args: where: the arguments of ``inject`` from ``peft_type`` to ``freeze``. Raises: RecipeError if a target matches nothing.
    """
    names = target_names(model, method, **where)
    return [*names, *_tied_to(model, names)] if METHODS[method].targets == "embeddings" else names


def target_names(model: nn.Module, method: str, **where: Any) -> list[str]:
    """Full names of the modules to name as targets to PEFT; see ``planned_modules``."""
    spec = METHODS[method]
    if not spec.has_targets:
        return []
    names = matched(model, place_config(model, norms=spec.targets == "all-norms", **where))
    if method == "lora":
        return names
    # Only LoRA adapts parameters of modules of other kinds, such as routers and experts.
    modules = dict(model.named_modules())
    names = [name for name in names if is_adaptable(modules[name]) or is_norm(modules[name])]
    if not names:
        raise RecipeError(f"no layer that {method} can adapt matches", key="adapter.targets")
    return names


def _tied_to(model: Any, names: Collection[str]) -> list[str]:
    """The output head, if it is tied to an embedding in ``names``: PEFT then trains its rows with those of the embedding."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return []
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {id(module): name for name, module in model.named_modules()}
    embedding, head = (found.get(id(end)) for end in ends)
    return [head] if head is not None and embedding in names else []


def place_config(
    model: nn.Module,
    *,
    peft_type: str | None,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    new: Collection[str] = (),
    layers: Sequence[int] | str | None = None,
    freeze: Sequence[str] = (),
    norms: bool = False,
    **options: Any,
) -> Any:
    """PEFT's LoraConfig with the modules to adapt and those to train in full.

    Args: norms: whether the method adapts norms, and no other layers. options: its other fields.

    Raises: RecipeError if a target matches nothing.
    """
    import peft

    head = head_modules(model) if peft_type is None else []
    trained = [*head, *modules_to_save, *(_CLASSIFIER_HEADS if peft_type == _CLASSIFIER else ())]
    whole = whole_modules(model, peft_type, modules_to_save, new)
    with peft_errors("lora"):
        config = peft.LoraConfig(
            task_type=peft_type,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=whole or None,
            exclude_modules=_inside(head),
            **options,
        )
    if targets in ("all-norms", "embeddings"):
        config.target_modules = _of_kind(model, str(targets), trained)
    with peft_errors("lora"):
        seen = _as_peft_matches(model, config)
    if not getattr(seen, "target_parameters", None):  # else PEFT translates names that no module has any more
        check_targets(model, targets, norms=norms)
        if targets == "all-linear":
            config.target_modules = _all_linear(model, seen)
    if layers is not None or freeze:
        _choose(config, seen, _chosen(matched(model, config), layers, freeze, model), model)
    return config


def whole_modules(
    model: nn.Module, peft_type: str | None, modules_to_save: Sequence[str], new: Collection[str]
) -> list[str]:
    """Names of the modules to name in PEFT's ``modules_to_save``: without the heads that it adds for a classifier."""
    given = [*(head_modules(model) if peft_type is None else []), *modules_to_save]
    trained = [*given, *(_CLASSIFIER_HEADS if peft_type == _CLASSIFIER else ())]
    return list(dict.fromkeys([*given, *(n for n in new_modules(model, new) if not _is_inside(n, trained))]))


def trained_in_full(
    model: nn.Module, peft_type: str | None, modules_to_save: Sequence[str], new: Collection[str]
) -> list[str]:
    """Names of all modules that have to be trained in full."""
    heads = [n for n, _ in model.named_modules() if peft_type == _CLASSIFIER and n.endswith(_CLASSIFIER_HEADS)]
    return list(dict.fromkeys([*heads, *whole_modules(model, peft_type, modules_to_save, new)]))


def matched(model: nn.Module, config: Any) -> list[str]:
    """Full names of the modules that PEFT adapts: layers, and the owners of adapted parameters."""
    from peft.tuners.tuners_utils import check_target_module_exists

    seen = _as_peft_matches(model, config)
    names = [name for name, _ in model.named_modules() if name and check_target_module_exists(seen, name)]
    names += [name.rpartition(".")[0] for name in _target_parameters(model, seen)]
    return list(dict.fromkeys(names))


def _choose(config: Any, seen: Any, chosen: Collection[str], model: nn.Module) -> None:
    """Makes the modules ``chosen`` the targets of ``config``: layers by their names, experts by those of their parameters, with the
    ranks that PEFT gives fused ones in ``seen``."""
    parameters = [name for name in _target_parameters(model, seen) if name.rpartition(".")[0] in chosen]
    owners = {name.rpartition(".")[0] for name in _target_parameters(model, seen)}
    if owners:
        config.target_parameters = parameters
        config.rank_pattern, config.alpha_pattern = seen.rank_pattern, seen.alpha_pattern
    config.target_modules = [name for name in chosen if name not in owners]


def _target_parameters(model: nn.Module, seen: Any) -> list[str]:
    endings = tuple(getattr(seen, "target_parameters", None) or ())
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if any(name == ending or name.endswith(f".{ending}") for ending in endings)]


def _chosen(names: list[str], layers: Sequence[int] | str | None, freeze: Sequence[str], model: nn.Module) -> list[str]:
    """The ``names`` in the blocks ``layers``, without those in the modules ``freeze``."""
    every = [name for name, _ in model.named_modules() if name]
    for ending in freeze:
        match_ending(ending, every, "adapter.freeze")
    chosen = names if layers is None else chosen_blocks_of(names, layers, model)
    if not chosen:
        raise RecipeError(
            f"none of the {len(names)} modules that adapter.targets names is in {layers}", key="adapter.layers"
        )
    kept = [n for n in chosen if not any(f".{ending}." in f".{n}." for ending in freeze)]
    if not kept:
        raise RecipeError("adapter.freeze leaves no module to adapt", key="adapter.freeze")
    return kept


def ends_with(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a module's name matches: a word of ``TARGET_NAMES`` is all, text a regular expression, a list name endings."""
    if isinstance(targets, str):
        return targets in TARGET_NAMES or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def chosen_blocks_of(
    names: Sequence[str], layers: Sequence[int] | str, model: nn.Module, *, key: str = "adapter.layers"
) -> list[str]:
    """The ``names`` in some blocks. The first number in a name is the index of its block, and what stands before it is the stack:
    negative indices and ranges count the blocks of each stack, whether they are adapted or not."""
    counts: dict[str, int] = {}
    for name, _ in model.named_modules():
        if place := _block(name):
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    places = {name: place for name in names if (place := _block(name))}
    if not places:
        raise RecipeError("the adapted modules are not in numbered blocks; remove it", key=key)
    stacks = {stack for stack, _ in places.values()}
    chosen_blocks(layers, max(counts[stack] for stack in stacks), key=key)
    chosen = {stack: _indices(layers, counts[stack]) for stack in stacks}
    return [name for name, (stack, index) in places.items() if index in chosen[stack]]


def _block(name: str) -> tuple[str, int] | None:
    """The stack of blocks that a module is in and the index of its block; None outside of blocks."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return (name[: max(found.start() - 1, 0)], int(found[1])) if found else None


def chosen_blocks(layers: Sequence[int] | str, count: int, *, key: str = "adapter.layers") -> set[int]:
    """The indices of some of ``count`` blocks. Raises: RecipeError for an index that does not exist, and if there is none."""
    if not isinstance(layers, str) and (wrong := [i for i in layers if not -count <= i < count]):
        raise RecipeError(f"there is no block {wrong[0]}: this model has {count} blocks, 0 to {count - 1}", key=key)
    if not (chosen := _indices(layers, count)):
        raise RecipeError(f"{layers} is no block of the {count} of this model, 0 to {count - 1}", key=key)
    return chosen


def _indices(layers: Sequence[int] | str, count: int) -> set[int]:
    """The ``layers`` that exist among ``count`` blocks."""
    if isinstance(layers, str):
        first, _, last = layers.partition(":")
        return set(range(count)[slice(int(first) if first else None, int(last) if last else None)])
    return {i % count for i in layers if -count <= i < count}


def _of_kind(model: Any, kind: str, trained: Sequence[str]) -> list[str]:
    """Full names of the norms or of the input embeddings, outside the modules that are trained in full."""
    if kind == "embeddings":
        embedding = model.get_input_embeddings()
        names = [name for name, module in model.named_modules() if module is embedding]
    else:
        names = [name for name, module in model.named_modules() if is_norm(module)]
    names = [name for name in names if not _is_inside(name, trained)]
    if not names:
        raise RecipeError(f"{kind} matches nothing in {type(model).__name__}", key="adapter.targets")
    return names


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
    """Full names of the linear layers that run in the body, without those that are trained in full or that PEFT refuses. A body
    without linear layers has its convolutions instead, without grouped ones: PEFT cannot merge those."""
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

    def fitting(where: Any, fits: Callable[[nn.Module], bool]) -> list[str]:
        return [
            name
            for name, module in model.named_modules()
            if fits(module)
            and check_target_module_exists(where, name)
            and not name.startswith((*towers, *inner))
            and not refused(name)
        ]

    names = fitting(seen, is_linear)
    if not names:
        everywhere = copy.copy(seen)
        everywhere.target_modules = ".*"  # PEFT's own list has linear layers only
        names = fitting(everywhere, is_plain_convolution)
    if not names:
        raise RecipeError(
            f"all-linear matches nothing: {type(model).__name__} has no linear layer, and no convolution that PEFT can merge, outside its "
            "head",
            key="adapter.targets",
        )
    return names


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
    children = [(n, child) for n, child in model.named_children() if any(True for _ in child.parameters())]
    names = [n for n, child in children if (n == _LOOSE_HEAD if body is model else child is not body)]
    return _not_nested(model, names)


def _not_nested(model: nn.Module, names: list[str]) -> list[str]:
    """``names``, with the children of a module in place of it if a module in it ends with one of the names: PEFT finds modules to
    train by the end of their names, and wraps both (the ``head.head`` of DPT)."""
    modules = dict(model.named_modules())
    while outer := next(
        (n for n in names if any(m.startswith(f"{n}.") and m.endswith(tuple(names)) for m in modules)), ""
    ):
        if any(True for _ in modules[outer].parameters(recurse=False)):
            break
        inner = [
            f"{outer}.{n}" for n, child in modules[outer].named_children() if any(True for _ in child.parameters())
        ]
        names = [name for n in names for name in (inner if n == outer else [n])]
    return names


def _inside(modules: Sequence[str]) -> str | None:
    """A regular expression for the names of ``modules`` and all their submodules; None without modules."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?" if modules else None


@contextlib.contextmanager
def peft_errors(method: str) -> Iterator[None]:
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
        raise RecipeError(
            f"PEFT refuses this adapter: {text}", key=f"adapter.{_key_in(text.lower(), method)}"
        ) from error


def _key_in(text: str, method: str) -> str:
    """The key that PEFT's refusal is about: the longest name in it."""
    words = set(re.findall(r"\w+", text))
    spec = METHODS[method]
    names = {name: name for name in spec.options} | {theirs: ours for ours, theirs in spec.keys.items()}
    names |= {ours: ours for ours in spec.keys} | {"dora": "dora"}
    found = [name for name in names if (name.lower() in words and len(name) > 1) or f"`{name}`" in text]
    return names[max(found, key=len)] if found else "targets" if "targets" in spec.keys else "method"
