"""Combines several LoRA adapters of one base into one, through PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftlab.adapters import check_adapter_files, load_adapter, made_for, method_of
from peftlab.adapters.lora_files import lora_tensors, other_tensors, write_lora
from peftlab.adapters.spectrum import decompose
from peftlab.adapters.updates import read_updates
from peftlab.assembly.stack import stacked_fingerprint
from peftlab.assembly.target import Opened, Target
from peftlab.assembly.witness import Witness
from peftlab.errors import ArtifactError, RecipeError, listed
from peftlab.measuring.memory import release_memory
from peftlab.reworking.publishing import APPROXIMATE, EXACT, Comparison, check_tolerance, write_verified
from peftlab.reworking.source import Source, check_new, metrics_of, refuse_unplain, runs_of
from peftlab.training.progress import Progress

# Method -> PEFT's combination type. PEFT's own `linear` adds the factors A and B, whose product is not the sum of the updates;
# `cat` is that sum. PEFT's `svd` decomposes the dense sum; the same values come from the factors of `cat`.
METHODS = {
    "linear": "cat",
    "difference": "cat",
    "svd": "cat",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
}
_SUMS = ("linear", "difference", "svd")
_DENSITY = 0.5
_NEW = "combined"


def check_method(
    method: str, weights: Sequence[float] | None, count: int, density: float | None, rank: int | None
) -> None:
    """Raises RecipeError for an unknown method, or options that do not belong to it."""
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"unknown method {method!r}; {hint}there are {listed(METHODS)}")
    if count < 2:
        raise RecipeError("expected at least two adapters to combine, found one")
    if method == "difference" and count != 2:
        raise RecipeError(f"a difference is of two adapters, found {count}")
    if weights is not None and len(weights) != count:
        raise RecipeError(f"expected {count} weights, one per adapter, found {len(weights)}")
    if weights is not None and (not all(abs(w) < float("inf") for w in weights) or not any(weights)):
        raise RecipeError(f"expected finite weights that are not all zero, found {', '.join(map(str, weights))}")
    if density is not None and method in _SUMS:
        raise RecipeError(f"--density belongs to ties, dare_linear and dare_ties; {method} keeps every value")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"expected a --density above 0 and at most 1, found {density}")
    if rank is not None and method != "svd":
        raise RecipeError(f"--rank belongs to svd; the rank of {method} follows from its adapters")
    if rank is not None and rank < 1:
        raise RecipeError(f"expected a --rank of at least 1, found {rank}")


def combine_runs(
    targets: Sequence[Target],
    folder: Path,
    *,
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    tolerance: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the combination of the adapters of ``targets``, and verifies it. Args and errors: see ``api.combine_adapters``."""
    check_new(folder)
    check_method(method, weights, len(targets), density, rank)
    check_tolerance(tolerance)
    stacked = _check_same_base(targets, progress)
    weights = list(weights or [1.0] * len(targets))
    folders = [target.adapter for target in targets if target.adapter is not None]
    for each in folders:
        check_adapter_files(each)
        _check_plain_lora(each)
    source = Source.open(targets[0], progress)
    assembly, held_out, config = source.assembly, source.held_out, source.config
    parents = [{"adapter": str(folders[0]), "weight": weights[0], "metrics": source.metrics(progress)}]
    del source  # each parent is loaded on a base of its own
    for other, each, weight in zip(targets[1:], folders[1:], weights[1:], strict=True):
        release_memory()
        progress.stage(f"loading {assembly.recipe.model.name} with {each}")
        own = other.assembly() if other in stacked else assembly
        loaded = load_adapter(own.model(), each, kernels=assembly.recipe.run.kernels).eval()
        metrics = metrics_of(Opened(other, assembly, assembly.task, loaded), held_out, progress)
        parents.append({"adapter": str(each), "weight": weight, "metrics": metrics})
        del loaded
    release_memory()
    signed = [weights[0], -weights[1]] if method == "difference" else weights
    progress.stage(f"combining {len(folders)} adapters: {method}")
    # The head that was trained last, over those of the others.
    whole = folders[0] if not stacked else folders[targets.index(stacked[-1])]
    model, others = _with_parents(assembly.model(), folders, whole)
    # The sum of the updates by PEFT's own forward with all parents active: no formula of ours takes part in it.
    summed = _all_active(model, signed)
    reference = Witness.take(summed, assembly.task, held_out.examples, **runs_of(assembly)) if method in _SUMS else None
    _add_combination(model, signed, METHODS[method], density if density is not None else _DENSITY)
    if reference is None:
        reference = Witness.take(model, assembly.task, held_out.examples, **runs_of(assembly))
    updates = list(read_updates(model, _NEW))
    parts = {update.name: decompose(update) for update in updates}
    most = max(int(u.rank or 0) for u in read_updates(model, _name(0))) if rank is None else rank
    ranks = {n: min(len(p.values), most) if method == "svd" else len(p.values) for n, p in parts.items()}
    if not any(ranks.values()):
        raise RecipeError("nothing would be left: the adapters cancel each other")
    tensors: dict[str, Any] = {}
    for update in updates:
        if ranks[update.name]:
            tensors |= lora_tensors(update, *parts[update.name].cut(ranks[update.name]))
    lost = sum(float(p.values[ranks[n] :].square().sum()) for n, p in parts.items())
    everything = sum(float(p.values.square().sum()) for p in parts.values())
    exact = lost == 0.0
    report: dict[str, Any] = {
        "verb": "combine",
        "method": method,
        "density": (density or _DENSITY) if method not in _SUMS else None,
        "parents": parents,
        "reference": "the sum of the updates" if method in _SUMS else "PEFT's combined adapter in memory",
        "error": (lost / everything) ** 0.5,
        "parameters": {
            "before": sum(_num_factors(each) for each in folders),
            "after": sum(ranks[u.name] * sum(u.shape) for u in updates),
        },
        "in_full": sum(t.numel() for t in others.values()),
        "modules": [{"name": name, "rank": ranks[name]} for name in parts],
    }
    del model, summed, updates, parts
    release_memory()
    return write_verified(
        folder,
        lambda written: write_lora(written, tensors, ranks, config=config, others=others),
        Comparison(targets[0], assembly, held_out, reference),
        report,
        tolerance=tolerance if tolerance is not None else EXACT if exact else APPROXIMATE,
        remedy="" if exact else "Use a larger --rank, or --method linear, which loses nothing",
        progress=progress,
    )


def _check_same_base(targets: Sequence[Target], progress: Progress) -> list[Target]:
    """The targets that were trained over an earlier one, on the model with its adapter folded in: the sum of their updates over the
    plain model is what they compute. Raises ArtifactError if the locks name other weights; a note if an adapter has no lock to
    tell."""
    prints = [((t.loaded.recipe.lock or {}).get("fingerprints") or {}).get("model") for t in targets]
    bases, stacked = {prints[0]}, []
    for target, fingerprint in zip(targets, prints, strict=True):
        if None not in (fingerprint, prints[0]) and fingerprint not in bases:
            raise ArtifactError(
                f"the adapters have different bases: {targets[0].adapter} was trained on weights {str(prints[0])[:12]}, "
                f"{target.adapter} on {str(fingerprint)[:12]}; only updates of the same weights can be combined"
            )
        assert target.adapter is not None
        if fingerprint is None or prints[0] is None:
            progress.note(
                f"{target.adapter} has no fingerprint of its base, {made_for(target.adapter) or 'which it does not name'}"
            )
            continue
        if fingerprint != prints[0]:
            stacked.append(target)
        bases.add(stacked_fingerprint(fingerprint, target.adapter))
    return stacked


def _check_plain_lora(folder: Path) -> None:
    """Raises RecipeError for an adapter whose update is no product of two factors."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    method = method_of(config)
    if method != "lora" or getattr(config, "use_dora", False):
        what = "DoRA" if method == "lora" else method.upper()
        raise RecipeError(
            f"{folder} is an adapter of {what}, and only LoRA can be combined; first: peftlab adapters convert"
        )
    refuse_unplain(config)
    if getattr(config, "trainable_token_indices", None) or getattr(config, "target_parameters", None):
        raise RecipeError(f"{folder} trains token rows or bare parameters, which PEFT does not combine")


def _name(index: int) -> str:
    return f"parent{index}"


def _with_parents(base: Any, folders: Sequence[Path], whole: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A PeftModel with the factors of each adapter, without what they train in full, and those parts of ``whole``, which are put
    into the base: PEFT refuses to combine adapters that train the same module in full."""
    import peft
    from peft import PeftConfig, PeftModel
    from safetensors.torch import load_file

    others = other_tensors(whole, "LORA")
    unknown: Any = base.load_state_dict(
        {n.removeprefix("base_model.model."): t for n, t in others.items()}, strict=False
    )
    if unknown.unexpected_keys:
        raise ArtifactError(f"{whole} has tensors that the model lacks, such as {unknown.unexpected_keys[0]}")
    model: Any = None
    for index, folder in enumerate(folders):
        state = {n: t for n, t in load_file(str(folder / "adapter_model.safetensors")).items() if ".lora_" in n}
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.task_type = config.modules_to_save = config.exclude_modules = None
        config.layers_to_transform = config.layers_pattern = None
        config.target_modules = {n.partition(".lora_")[0].removeprefix("base_model.model.") for n in state}
        if model is None:
            model = PeftModel(base, config, adapter_name=_name(index))
        else:
            model.add_adapter(_name(index), config)
        result: Any = peft.set_peft_model_state_dict(model, state, adapter_name=_name(index))
        if result.unexpected_keys:
            raise ArtifactError(f"{folder} was made for another model: it has {result.unexpected_keys[0]}")
        # The scaling is in the layers by now. PEFT's combination would take sqrt(r) from the first config.
        model.peft_config[_name(index)].use_rslora = False
    return model.eval(), others


def _all_active(model: Any, weights: Sequence[float]) -> Any:
    """``model`` with all parents active, each times its weight; they stay so."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for index, weight in enumerate(weights):
                if _name(index) in module.scaling:
                    module.scaling[_name(index)] *= weight
    model.base_model.set_adapter([_name(index) for index in range(len(weights))])
    return model


def _add_combination(model: Any, weights: Sequence[float], kind: str, density: float) -> None:
    """Adds the combination to a model whose scalings have the weights already, and makes only it active."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # DARE drops values at random
            model.add_weighted_adapter(
                [_name(index) for index in range(len(weights))],
                [1.0] * len(weights),
                _NEW,
                combination_type=kind,
                density=None if kind == "cat" else density,
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise RecipeError(f"PEFT cannot combine these adapters: {reason}; --method linear or svd can") from error
    model.set_adapter(_NEW)


def _num_factors(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        names = [name for name in file.keys() if ".lora_" in name]  # noqa: SIM118  (no mapping)
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)
