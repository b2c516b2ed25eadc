"""Folds an adapter into its base model, and verifies the written files (contract C6)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftlab.adapters import load_adapter
from peftlab.adapters.merge import DequantizedWeights
from peftlab.adapters.merge_check import MergeCheck
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.folding import check_mergeable, folded, is_tied, untie_if_adapted
from peftlab.assembly.target import Target, check_same_model, find_target, open_target
from peftlab.assembly.witness import Witness, read_witness
from peftlab.data import require
from peftlab.errors import RecipeError, VerificationError
from peftlab.evaluation.agreement import Agreement
from peftlab.measuring.memory import release_memory
from peftlab.models import ImageReader, find_pretrained, load_image_reader, load_tokenizer, quiet, save_plain
from peftlab.recipe import write_lock
from peftlab.runs import LOCK_NAME, write_json
from peftlab.tasks import Example, Task
from peftlab.training.padding_check import check_padding
from peftlab.training.progress import Progress

TARGETS = ("original", "dequantized")
# Maximum mean KL (nats) and minimum top-1 agreement per base. A merge into the weights used in training only rounds; a
# merge into the original weights also removes the quantization error.
_LIMITS = {"same": {"kl_mean": 1e-3, "top1": 0.99}, "original": {"kl_mean": 0.25, "top1": 0.8}}
_PROBES = [
    "The quick brown fox.",
    "  spaces\tand\nlines",
    "0123456789 + - * /",
    "naive cafe \u00e9\u00fc \u4f60\u597d \U0001f600",
]


def merge_run(
    folder: Path,
    *,
    base: str | None = None,
    output: Path | None = None,
    dtype: str = "auto",
    limits: dict[str, float] | None = None,
    replace: bool = False,
    progress: Progress,
    assembly: Assembly | None = None,
    target: Target | None = None,
) -> dict[str, Any]:
    """Merges the adapter of the run or adapter ``folder`` and compares the written model with what was trained: the
    witness of the run, or base + adapter for an adapter without one.

    Args and errors: see ``api.merge``. limits: override the default thresholds, by figure name.
    assembly: see ``open_target``. target: the resolved ``folder``; default: with the recipe of its run.
    """
    target = target or find_target(folder)
    check_mergeable(target.loaded.recipe.adapter.methods)
    sources = assembly or target.assembly()
    quantized = sources.storage != "none"
    targets = _targets(sources)
    chosen = base or ("dequantized" if quantized else "original")
    if chosen not in targets:
        why = "not quantized" if targets == ("original",) else f"stored in {sources.stored}"
        allowed = " or ".join(targets) if len(targets) > 1 else f"{targets[0]} (the base of this run is {why})"
        raise RecipeError(f"expected a merge into {allowed}, found {chosen!r}", key="run.merge")
    output = output or folder / "merged"
    _check_output(output, replace)
    reference = _Reference.take(target, progress, assembly)
    release_memory()
    report: dict[str, Any] = {
        "target": chosen,
        "output": str(output),
        "model_class": target.loaded.recipe.spec.auto_class,
        "dtype": dtype,
        "targets": {},
    }
    for name in targets:
        if name != chosen:
            progress.stage(f"merge: the adapter on the {name} weights, for comparison")
            report["targets"][name] = _compare_one(target, reference, name)
            release_memory()
            continue
        progress.stage(f"merge: folding the adapter into the {name} weights")
        written = output.with_name(f".{output.name}.partial-{os.getpid()}")
        try:
            figures = _merge_one(target, reference, name, written, dtype)
            release_memory()
            report["targets"][name] = figures
            failures = _failures(figures, name, quantized, limits or {})
            report["verified"] = not failures
            write_json(folder / "merge.json", report)
            if failures:
                raise VerificationError(
                    f"merge verification failed, nothing was written: {'; '.join(failures)}. Figures: {folder / 'merge.json'}"
                    + ("; --base dequantized merges exactly" if name == "original" and quantized else "")
                )
            if (lost := _lost(figures)) is not None:
                progress.note(lost)
            shutil.rmtree(output, ignore_errors=True)
            os.replace(written, output)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    write_json(folder / "merge.json", report)
    return report


def _targets(assembly: Assembly) -> tuple[str, ...]:
    """The base weights that an adapter can be merged into."""
    if assembly.stored != "none":
        return ("dequantized",)
    return TARGETS if assembly.storage != "none" else ("original",)


def _check_output(output: Path, replace: bool) -> None:
    if output.exists() and not replace:
        raise RecipeError(f"{output} exists; overwrite it with --replace or choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise RecipeError(f"{output} contains other files and no model; choose another --output")


@dataclass(frozen=True)
class _Reference:
    """What the merged model is compared with, and the weights to merge into.

    Attributes:
        witness: outputs of the trained model. of_training: whether training wrote it; otherwise it comes from base + adapter.
        dequantized: the weights of a quantized base, by module name.
    """

    assembly: Assembly
    witness: Witness
    of_training: bool
    dequantized: Mapping[str, torch.Tensor]

    @classmethod
    def take(cls, target: Target, progress: Progress, assembly: Assembly | None) -> _Reference:
        assert target.adapter is not None
        witness = read_witness(target.adapter)
        assembly = assembly or target.assembly(reads_data=witness is None)
        dequantized: Mapping[str, torch.Tensor] = {}
        if witness is None:
            opened = open_target(target, progress, assembly=assembly)
            progress.stage("merge: running base + adapter on held-out rows")
            taken = Witness.take(opened.model, assembly.task, _held_out(assembly), **_runs(assembly))
            if assembly.storage != "none":
                dequantized = DequantizedWeights(opened.model.get_base_model())
            return cls(assembly, taken, False, dequantized)
        check_same_model(target, assembly.pretrained)
        if assembly.storage != assembly.stored:  # dequantizing what is stored gives its weights again
            progress.stage(f"merge: loading {assembly.recipe.model.name} ({assembly.storage})")
            dequantized = DequantizedWeights(assembly.model())
        return cls(assembly, witness, True, dequantized)

    def figures(self) -> dict[str, Any]:
        return {"rows": len(self.witness.examples), "of_training": self.of_training}

    def compare(self, model: Any) -> Agreement:
        # As at the start of training: a family that reads padding gave the witness row by row.
        assembly = self.assembly
        check_padding(model, assembly.task, max_length=assembly.model_limit, device=assembly.device)
        return self.witness.compare(model, assembly.task, **_runs(assembly))


def _runs(assembly: Assembly) -> dict[str, Any]:
    return {"batch_tokens": assembly.recipe.eval.batch_tokens, "device": assembly.device}


def _held_out(assembly: Assembly) -> list[Example]:
    encoded = assembly.task.encode(
        assembly.data.eval, max_length=assembly.limit, too_long="truncate", training=False, labelled=False
    )
    require(encoded.ledger, training=False)
    return encoded.examples


def _merge_one(target: Target, reference: _Reference, name: str, written: Path, dtype: str) -> dict[str, Any]:
    """Merges into one kind of base weights, writes the result to ``written`` and verifies the reloaded files."""
    assembly = reference.assembly
    plain, adapted = _adapted(target, reference, name)
    tied = untie_if_adapted(plain)
    check = MergeCheck(adapted, reference.dequantized if name == "dequantized" else None)
    merged = folded(adapted)
    saved = _save_dtype(assembly.pretrained, dtype)
    _save(merged.to(saved), reference, written, target)
    tokenizer_same = _same_tokenizer(assembly.reader, written)
    del merged, plain, adapted
    release_memory()
    merged = _reload(written, assembly.task, assembly.device)
    layers = check.error(merged, saved)
    del check  # it has the base weights
    return {
        **reference.figures(),
        "dtype": str(saved).removeprefix("torch."),
        "tied_head": is_tied(merged),
        "tied_head_kept": is_tied(merged) == tied,
        "tokenizer_same": tokenizer_same,
        "bytes": sum(p.stat().st_size for p in written.iterdir()),
        "layers": None if layers is None else asdict(layers),
        "logits": asdict(reference.compare(merged.float())),
    }


def _compare_one(target: Target, reference: _Reference, name: str) -> dict[str, Any]:
    """The figures of a kind of base weights that is not written. The adapter on them gives the outputs of their merge."""
    _, adapted = _adapted(target, reference, name)
    return {**reference.figures(), "layers": None, "logits": asdict(reference.compare(adapted))}


def _adapted(target: Target, reference: _Reference, name: str) -> tuple[Any, Any]:
    """The plain float32 model with one kind of base weights, and the model with the adapter on it."""
    assert target.adapter is not None
    plain = reference.assembly.model(quantize="none", dtype="float32")
    if name == "dequantized":
        _replace_weights(plain, reference.dequantized)
    return plain, load_adapter(plain, target.adapter)


def _replace_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies [out, in] weights into the linear layers of ``model``; GPT-2's Conv1D keeps [in, out]."""
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        module = modules[name]
        module.weight.data.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)


def _save_dtype(pretrained: Any, dtype: str) -> torch.dtype:
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if pretrained.source.kind == "tiny":
        return torch.float32
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pretrained.location, **pretrained.hub_kwargs)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _save(model: Any, reference: _Reference, written: Path, target: Target) -> None:
    """Writes the merged model with the lock of the run, or, for an adapter with a recipe of its own, one of that recipe."""
    save_plain(model, reference.assembly.task.files, written, extra_file=target.lock)
    if target.lock is None:
        assembly = reference.assembly
        fingerprints, kept = assembly.fingerprints, assembly.kept
        write_lock(written / LOCK_NAME, assembly.loaded, fingerprints=fingerprints, environment=kept)


def _reload(folder: Path, task: Task, device: str) -> Any:
    """Loads the written files with plain transformers."""
    import transformers

    with quiet():
        return getattr(transformers, task.spec.auto_class).from_pretrained(folder, dtype="auto").to(device).eval()


def _same_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Whether the written tokenizer has the same probe ids, template and special tokens."""
    written = find_pretrained(str(folder))
    if isinstance(tokenizer, ImageReader):
        return tokenizer.fingerprint == load_image_reader(written).fingerprint
    again = load_tokenizer(written)
    return (
        all(tokenizer(p)["input_ids"] == again(p)["input_ids"] for p in _PROBES)
        and tokenizer.chat_template == again.chat_template
        and tokenizer.special_tokens_map == again.special_tokens_map
    )


def _lost(figures: dict[str, Any]) -> str | None:
    """A line if rounding takes most of what the adapter changes in a layer: an update below the resolution of 16 bits is gone."""
    layers = figures["layers"]
    if not layers or not layers["num_lost"]:
        return None
    wider = "" if figures["dtype"] == "float32" else "; a merge in float32 keeps it: --dtype float32"
    return (
        f"merge: rounding to {figures['dtype']} changes {layers['num_lost']} of {_compared(layers)} layers by more than half of "
        f"what the adapter changes, most {layers['most_lost']}: by {layers['most_lost_relative']:.0%}{wider}"
    )


def _compared(layers: dict[str, Any]) -> int:
    return int(layers["by_formula"] + layers["by_probes"])


def _failures(figures: dict[str, Any], name: str, quantized: bool, limits: dict[str, float]) -> Iterable[str]:
    """Describes every failed check of the written model."""
    allowed = _LIMITS["original" if quantized and name == "original" else "same"] | limits
    failures = Agreement(**figures["logits"]).failures(**allowed)
    layers = figures["layers"]
    if layers and layers["wrong"]:
        failures.append(
            f"{layers['wrong']} of {_compared(layers)} merged layers differ from the layers with their adapters, most "
            f"{layers['worst']}: by {layers['worst_relative']:.1%} of what the adapter changes"
        )
    if not figures["tied_head_kept"]:
        failures.append("the output head is no longer tied to the embeddings")
    if not figures["tokenizer_same"]:
        failures.append("the written tokenizer gives different ids")
    return failures
