"""Extracts a LoRA adapter from two checkpoints: the largest singular values of the difference of their weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlab.adapters.lora_files import lora_tensors, write_lora
from peftlab.adapters.spectrum import decompose_matrix
from peftlab.adapters.target_modules import is_linear
from peftlab.adapters.updates import Update
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.target import Opened, Target
from peftlab.assembly.witness import Witness
from peftlab.errors import ArtifactError, RecipeError
from peftlab.measuring.memory import release_memory
from peftlab.models import Pretrained, load_skeleton
from peftlab.recipe import LoadedRecipe
from peftlab.reworking.checkpoints import Weights, auto_class_of, find_checkpoint
from peftlab.reworking.publishing import APPROXIMATE, Comparison, check_tolerance, partial_folder, write_verified
from peftlab.reworking.source import check_new, held_out_rows, metrics_of, runs_of
from peftlab.runs import write_json
from peftlab.training.progress import Progress

_PREFIX = "base_model.model."
# Parts that PEFT's wrappers add to the names of parameters.
_WRAPPERS = ("base_layer", "original_module", "modules_to_save", "default")


@dataclass
class _Difference:
    """What differs between two checkpoints. tensors, ranks: of the linear layers. rest: names of the other parameters that
    differ, or that only the second has."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    lost: float = 0.0
    whole: float = 0.0
    num_equal: int = 0


def extract_from(
    base: str,
    finetuned: str,
    folder: Path,
    *,
    rank: int,
    save_rest: bool,
    loaded: LoadedRecipe | None,
    tolerance: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the LoRA between two checkpoints. Args and errors: see ``api.extract_adapter``.

    loaded: the recipe with ``model.name`` set to ``base``.
    """
    check_new(folder)
    check_tolerance(tolerance)
    if rank < 1:
        raise RecipeError(f"expected a --rank of at least 1, found {rank}")
    first, second = find_checkpoint(base), find_checkpoint(finetuned)
    assembly = None if loaded is None else Target("base", loaded, None).assembly(reads_data=True)
    auto_class = auto_class_of(second) if assembly is None else assembly.spec.auto_class
    kwargs = {} if assembly is None else assembly.task.model_kwargs()
    skeleton = load_skeleton(first, auto_class=auto_class, **kwargs)
    before, after = Weights(first, skeleton, auto_class), Weights(second, skeleton, auto_class)
    difference = _compare(skeleton, before, after, rank, progress)
    config, others = _config(skeleton, difference, first, save_rest), {}
    if save_rest and difference.rest:
        others = _rest_tensors(skeleton, config, difference, after)
    report: dict[str, Any] = {
        "verb": "extract",
        "base": base,
        "finetuned": finetuned,
        "output": str(folder),
        "rank": rank,
        "error": (difference.lost / difference.whole) ** 0.5,
        "parameters": {"after": sum(t.numel() for t in difference.tensors.values())},
        "in_full": sum(t.numel() for t in others.values()),
        "modules": difference.modules,
        "num_equal": difference.num_equal,
        "rest": difference.rest,
        "rest_saved": bool(others),
        "unknown": sorted(after.unknown),
    }
    del skeleton, before, after

    def write(written: Path) -> None:
        write_lora(written, difference.tensors, difference.ranks, config=config, others=others)

    if assembly is not None:
        return _verified(folder, write, assembly, second, report, tolerance, progress)
    with partial_folder(folder) as written:
        write(written)
        write_json(written / "extract.json", report)
        os.replace(written, folder)
    return report


@torch.no_grad()
def _compare(skeleton: Any, before: Weights, after: Weights, rank: int, progress: Progress) -> _Difference:
    """The difference of two checkpoints; two tensors are in memory at a time.

    Raises: ArtifactError if they are of different models, or nothing differs.
    """
    found, device = _Difference(), "cuda" if torch.cuda.is_available() else "cpu"
    linear = {f"{name}.weight": (name, module) for name, module in skeleton.named_modules() if is_linear(module)}
    shared = [name for name, _ in skeleton.named_parameters() if name in before and name in after]
    if not any(name in linear for name in shared):
        raise ArtifactError("the two checkpoints have no linear layer of the same name: they are of different models")
    for index, name in enumerate(shared):
        if index % 50 == 0:
            progress.stage(f"comparing tensor {index + 1:,} of {len(shared):,}")
        old, new = before[name].to(device), after[name].to(device)
        if old.shape != new.shape:
            raise ArtifactError(
                f"{name} has the shape {list(old.shape)} in one checkpoint and {list(new.shape)} in the other"
            )
        if torch.equal(old, new):
            found.num_equal += 1
        elif name not in linear:
            found.rest.append(name)
        else:
            module, layer = linear[name]
            transposed = type(layer).__name__ == "Conv1D"
            change = new.double() - old.double()
            parts = decompose_matrix(change.T if transposed else change)
            left, right = parts.cut(rank)
            squares = parts.values.double().square()
            lost, whole = float(squares[rank:].sum()), float(squares.sum())
            found.lost, found.whole = found.lost + lost, found.whole + whole
            found.ranks[module] = right.shape[0]
            found.tensors |= lora_tensors(Update(module, f"{_PREFIX}{module}"), left, right)
            found.modules.append(
                {
                    "name": module,
                    "rank": right.shape[0],
                    "relative": whole**0.5 / float(old.double().norm() or 1.0),
                    "error": (lost / whole) ** 0.5 if whole else 0.0,
                }
            )
    found.rest += [name for name in after if name not in before]
    if not found.tensors:
        raise ArtifactError("no linear layer differs between the two checkpoints, so there is nothing to extract")
    return found


def _config(skeleton: Any, difference: _Difference, base: Pretrained, save_rest: bool) -> Any:
    from peft import LoraConfig

    owners, biases = _owners(difference) if save_rest else (set(), False)
    return LoraConfig(
        base_model_name_or_path=base.source.name,
        modules_to_save=sorted(owners) or None,
        bias="all" if biases else "none",
        r=max(difference.ranks.values()),
        lora_alpha=max(difference.ranks.values()),
        target_modules=sorted(difference.ranks),
    )


def _owners(difference: _Difference) -> tuple[set[str], bool]:
    """The modules to save in full, and whether biases of adapted layers differ: an adapted layer cannot be saved in full."""
    rest = [name.rpartition(".")[0] for name in difference.rest]
    return {owner for owner in rest if owner not in difference.ranks}, any(owner in difference.ranks for owner in rest)


def _rest_tensors(skeleton: Any, config: Any, difference: _Difference, after: Weights) -> dict[str, Tensor]:
    """What PEFT expects in the file beside the factors, from the second checkpoint.

    The names are those of PEFT's own state dict of an adapted model on the meta device.
    """
    import peft

    with torch.device("meta"):
        model = peft.PeftModel(skeleton, copy.deepcopy(config))
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    others = {}
    for key in (key for key in expected if ".lora_" not in key):
        # PEFT also stores the biases of the modules that it replaces; they are not used.
        name = ".".join(part for part in key.removeprefix(_PREFIX).split(".") if part not in _WRAPPERS)
        if name not in after:
            raise ArtifactError(f"the second checkpoint lacks {name}, which an adapter with the rest contains")
        others[key] = after[name].clone().contiguous()
    return others


def _verified(
    folder: Path,
    write: Callable[[Path], None],
    assembly: Assembly,
    second: Pretrained,
    report: dict[str, Any],
    tolerance: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Compares the base with the written adapter with the fine-tuned model, and publishes it with the recipe's lock."""
    held_out = held_out_rows(assembly)
    tuned = assembly.derive({"model.name": second.source.name, "model.adapter": None})
    progress.stage(f"running {second.source.name} on held-out rows")
    opened = Opened(Target("base", tuned.loaded, None), tuned, assembly.task, tuned.model().eval())
    reference = Witness.take(opened.model, assembly.task, held_out.examples, **runs_of(assembly))
    report |= {"metrics": {"before": metrics_of(opened, held_out, progress)}, "reference": "the fine-tuned model"}
    del opened
    release_memory()
    rest = (
        f", or --save-rest: {len(report['rest'])} other parameters differ"
        if report["rest"] and not report["rest_saved"]
        else ""
    )
    return write_verified(
        folder,
        write,
        Comparison(Target("adapter", assembly.loaded, None), assembly, held_out, reference),
        report,
        tolerance=APPROXIMATE if tolerance is None else tolerance,
        remedy=f"Use a larger --rank{rest}, or allow more with --tolerance",
        progress=progress,
    )
