"""Says which weights an adapter leaves out, where that is easily overlooked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from peftlab.adapters.places import idle_towers
from peftlab.adapters.target_modules import is_adaptable, is_grouped, is_linear
from peftlab.specs.heads import head_modules

# Share of the weights in layers from which on the adapter does not miss the point of the model.
_ENOUGH = 0.5
# Share of the parameters outside layers that is worth a line: position embeddings and class tokens are fewer.
_MUCH = 0.2
_MOST_KINDS = 6


def reach_notes(
    model: Any,
    planned: Collection[str],
    *,
    targets: str | Sequence[str],
    quantized: bool,
    everywhere: Collection[str] | None = None,
) -> list[str]:
    """One line each for routed experts, encoders that text does not reach, and layers that ``all-linear`` misses.

    Args: model: without adapters; may be on the meta device. planned: names of the modules to adapt. quantized: whether the
        linear layers are quantized. everywhere: as planned, without the blocks and modules that the recipe leaves out itself.
    """
    notes = []
    adapted = set(planned)
    experts = [(name, p) for name, p in model.named_parameters() if _is_expert(model, p)]
    total = sum(_size(p) for p in model.parameters())
    left = [(name, p) for name, p in experts if name.rpartition(".")[0] not in adapted]
    if left:
        count = sum(p.numel() for _, p in left)
        also = " and not quantized" if quantized else ""
        notes.append(
            f"routed experts are not adapted{also}: {_kinds(n for n, _ in left)} ({count:,} of {total:,} parameters)"
        )
    elif experts and quantized:
        notes.append(
            f"routed experts are not quantized: {_kinds(n for n, _ in experts)} "
            f"({sum(p.numel() for _, p in experts):,} of {total:,} parameters)"
        )
    for tower in idle_towers(model):
        inside = [n for n, m in model.named_modules() if n.startswith(f"{tower}.") and is_adaptable(m)]
        reached = sorted(set(inside) & adapted)
        if reached:
            notes.append(
                f"{len(reached)} of the {len(adapted)} adapted modules are in {tower}, which this task's text does not reach"
            )
        elif targets == "all-linear":
            notes.append(f"{tower} is not adapted ({len(inside)} layers): this task's text does not reach it")
    if targets == "all-linear":
        notes += _missed(model, adapted if everywhere is None else set(everywhere))
    return notes


def _missed(model: Any, adapted: set[str]) -> list[str]:
    """A line if ``all-linear`` adapts convolutions, reaches less than half of the weights in layers, or leaves out linear
    layers of the body."""
    skipped = tuple(f"{name}." for name in [*head_modules(model), *idle_towers(model)])
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_adaptable(module)
        and not isinstance(module, nn.Embedding)
        and hasattr(module, "weight")
        and not f"{name}.".startswith(skipped)
    }
    missed = [name for name in layers if name not in adapted]
    if adapted and not any(is_linear(layers[name]) for name in layers if name in adapted):
        grouped = [name for name in layers if is_grouped(layers[name])]
        left = f"; {_kinds(grouped)} are grouped, which PEFT cannot merge, and are left out" if grouped else ""
        return [
            f"the body has no linear layer, so all-linear adapts its convolutions: {_kinds(n for n in layers if n in adapted)}{left}"
        ]
    sizes = {name: _size(module.weight) for name, module in layers.items()}
    share = sum(sizes[n] for n in missed) / max(sum(sizes.values()), 1)
    if share > _ENOUGH:
        reached = _kinds(n for n in layers if n in adapted)
        return [
            f"the adapter reaches only {reached}; {share:.0%} of the weights in layers are elsewhere: "
            f"{_kinds(missed)} ({', '.join(sorted({type(layers[n]).__name__ for n in missed}))}); name them in adapter.targets"
        ]
    bare = [
        (name, p)
        for name, p in model.named_parameters()
        if p.dim() > 1
        and name.rpartition(".")[0] not in adapted
        and not is_adaptable(model.get_submodule(name.rpartition(".")[0]))
        and not _is_expert(model, p)
        and not name.startswith(skipped)
    ]
    total = sum(_size(p) for p in model.parameters())
    if (count := sum(p.numel() for _, p in bare)) > _MUCH * total:
        return [
            f"{_kinds(n for n, _ in bare)} are bare parameters, which all-linear does not reach ({count:,} of {total:,} parameters)"
        ]
    linear = [n for n in missed if is_linear(layers[n]) and not n.endswith("pooler.dense")]
    if linear:
        return [f"all-linear leaves out {_kinds(linear)}, which PEFT cannot adapt in this family"]
    return []


def _is_expert(model: Any, parameter: Any) -> bool:
    """Whether it is the stacked weight of several experts."""
    counts = {
        value
        for key, value in model.config.get_text_config().to_dict().items()
        if "experts" in key and "tok" not in key and isinstance(value, int)
    }
    return parameter.dim() == 3 and parameter.shape[0] in counts


def _size(parameter: Any) -> int:
    """The number of weights; bitsandbytes packs two NF4 weights into one byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel()) if state is None else int(state.shape.numel())


def _kinds(names: Iterable[str]) -> str:
    """``query x12, value x12``."""
    counts = Counter(name.rsplit(".", 1)[-1] for name in names)
    kinds = [f"{kind} x{count}" for kind, count in sorted(counts.items())]
    more = f" and {len(kinds) - _MOST_KINDS} other kinds" if len(kinds) > _MOST_KINDS else ""
    return ", ".join(kinds[:_MOST_KINDS]) + more
