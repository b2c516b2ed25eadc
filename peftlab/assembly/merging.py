"""Folds an adapter into its base model, and verifies the written files (contract C6)."""

from __future__ import annotations

import os
import shutil
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peftlab import ops
from peftlab.adapters import load_adapter
from peftlab.adapters.fused import set_kernels
from peftlab.adapters.merge import DequantizedWeights, agreement, exact_updates, weight_error
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.target import Target, find_target, open_target
from peftlab.data import eval_batches, require
from peftlab.errors import RecipeError, VerificationError
from peftlab.measuring.memory import release_memory
from peftlab.models import ImageReader, find_pretrained, load_image_reader, load_tokenizer, quiet, save_plain
from peftlab.recipe import write_lock
from peftlab.runs import LOCK_NAME, write_json
from peftlab.tasks import Batch, Task
from peftlab.training.progress import Progress

TARGETS = ("original", "dequantized")
# Number of held-out positions to compare: 512 x 49,152 float32 logits are 96 MiB.
_POSITIONS = 512
# Maximum mean KL (nats) and minimum top-1 agreement per base. A merge into the weights used in training only rounds; a
# merge into the original weights also removes the quantization error.
_LIMITS = {"same": {"kl_mean": 1e-3, "top1": 0.99}, "original": {"kl_mean": 0.25, "top1": 0.8}}
# Mean weight error relative to the mean update, for float32 files; a 16-bit file rounds the whole weight.
_WEIGHT_LIMIT = 1e-3
# Brings the components of a unit vector, about 1 / sqrt(H), to the size of logits.
_VECTOR_TEMPERATURE = 0.05
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
    """Merges the adapter of the run or adapter ``folder`` and compares the written model with base + adapter.

    Args and errors: see ``api.merge``. limits: override the default thresholds, by figure name.
    assembly: see ``open_target``. target: the resolved ``folder``; default: with the recipe of its run.
    """
    target = target or find_target(folder)
    quantized = target.loaded.recipe.model.quantize != "none"
    chosen = base or ("dequantized" if quantized else "original")
    if chosen not in TARGETS or (chosen == "dequantized" and not quantized):
        allowed = " or ".join(TARGETS) if quantized else "original (the base of this run is not quantized)"
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
    for name in [t for t in TARGETS if quantized or t == "original"]:
        progress.stage(
            f"merge: folding the adapter into the {name} weights" + ("" if name == chosen else " (for comparison)")
        )
        written = output.with_name(f".{output.name}.partial-{os.getpid()}") if name == chosen else None
        try:
            figures = _merge_one(target, reference, name, written, dtype)
            release_memory()
            report["targets"][name] = figures
            if written is not None:
                failures = _failures(figures, name, quantized, limits or {})
                report["verified"] = not failures
                write_json(folder / "merge.json", report)
                if failures:
                    raise VerificationError(
                        f"merge verification failed, nothing was written: {'; '.join(failures)}. Figures: {folder / 'merge.json'}"
                        + ("; --base dequantized merges exactly" if name == "original" and quantized else "")
                    )
                shutil.rmtree(output, ignore_errors=True)
                os.replace(written, output)
        finally:
            if written is not None:
                shutil.rmtree(written, ignore_errors=True)
    write_json(folder / "merge.json", report)
    return report


def _check_output(output: Path, replace: bool) -> None:
    if output.exists() and not replace:
        raise RecipeError(f"{output} exists; overwrite it with --replace or choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise RecipeError(f"{output} contains other files and no model; choose another --output")


class _Reference:
    """The reference for the merged model, computed from base + adapter as trained."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly, self.task = assembly, assembly.task
        task = self.task
        rows = assembly.data.eval
        encoded = task.encode(rows, max_length=assembly.limit, too_long="truncate", training=False)
        require(encoded.ledger, training=False)
        count, positions = 0, 0
        while count < len(encoded.examples) and positions < _POSITIONS:
            positions += int(encoded.examples[count].weight)
            count += 1
        examples = encoded.examples[:count]
        self.batches: list[Batch] = [
            task.collate([examples[i] for i in part], assembly.device)
            for part in eval_batches([len(e) for e in examples], assembly.recipe.eval.batch_tokens)
        ]
        self.num_rows = count
        self.logits: list[torch.Tensor] = []
        self.updates: dict[str, dict[str, torch.Tensor]] = {}
        self.dequantized: Mapping[str, torch.Tensor] = {}
        self.tied = False
        self.untie = False

    @classmethod
    def take(cls, target: Target, progress: Progress, assembly: Assembly | None) -> _Reference:
        recipe = target.loaded.recipe
        # float32 matmuls, so that the comparison measures the merge and not bfloat16 noise.
        exact = {"compute_dtype": "float32"} if recipe.model.quantize == "nf4" else {}
        opened = open_target(target, progress, reads_data=True, assembly=assembly, **exact)
        if recipe.run.kernels in ops.CPU_OPERANDS:  # for the same reason
            set_kernels(opened.model, "auto")
        progress.stage("merge: computing reference logits")
        reference = cls(opened.assembly)
        reference.logits = reference.run(opened.model)
        reference.updates = exact_updates(opened.model)
        base = opened.model.get_base_model()
        reference.dequantized = DequantizedWeights(base)
        reference.tied, reference.untie = _tied_head(base)
        return reference

    @torch.no_grad()
    def run(self, model: Any) -> list[torch.Tensor]:
        model.eval()
        outputs_per_batch = [self.task.outputs(model, batch) for batch in self.batches]
        if self.task.spec.predicts != "vectors":
            return [outputs.logits().float().cpu() for outputs in outputs_per_batch]
        # Use the components of a unit vector as logits: equal vectors give equal logits, and the largest component is
        # distinct even if the vectors of two texts are close.
        return [
            torch.nn.functional.normalize(o.values.float().cpu(), dim=-1) / _VECTOR_TEMPERATURE
            for o in outputs_per_batch
        ]


def _merge_one(target: Target, reference: _Reference, name: str, written: Path | None, dtype: str) -> dict[str, Any]:
    """Merges into one kind of base weights; with ``written`` saves the result and verifies the reloaded files."""
    assembly = reference.assembly
    assert target.adapter is not None
    plain = assembly.model(quantize="none", dtype="float32")
    if name == "dequantized":
        _replace_weights(plain, reference.dequantized)
    if reference.untie:
        _untie(plain)
    modules = dict(plain.named_modules())
    base_weights = _base_weights(modules, reference, name)
    merged = load_adapter(plain, target.adapter).merge_and_unload(safe_merge=True)
    figures: dict[str, Any] = {"positions": sum(map(len, reference.logits)), "rows": reference.num_rows}
    if written is not None:
        save_dtype = _save_dtype(assembly.pretrained, dtype)
        _save(merged.to(save_dtype), reference, written, target)
        tokenizer_same = _same_tokenizer(assembly.reader, written)
        del merged, plain, modules
        release_memory()
        merged = _reload(written, reference.task, assembly.device)
        figures |= {
            "dtype": str(save_dtype).removeprefix("torch."),
            "tied_head": _is_tied(merged),
            "tied_head_kept": _is_tied(merged) == reference.tied,
            "tokenizer_same": tokenizer_same,
            "bytes": sum(p.stat().st_size for p in written.iterdir()),
        }
    by_name = dict(merged.named_modules())
    merged_weights = {m: by_name[m].weight.detach() for m in reference.updates}
    weights = weight_error(base_weights, merged_weights, reference.updates)
    figures["weights"] = None if weights is None else asdict(weights)
    figures["logits"] = asdict(agreement(reference.logits, reference.run(merged.float())))
    return figures


def _base_weights(modules: dict[str, Any], reference: _Reference, name: str) -> Mapping[str, torch.Tensor]:
    """Copies the adapted modules' weights before the in-place merge; dequantized weights need no copy."""
    ready = reference.dequantized if name == "dequantized" else {}
    copied = {m: modules[m].weight.detach().to("cpu", copy=True) for m in reference.updates if m not in ready}
    return ChainMap(copied, ready)  # type: ignore[arg-type]  # read only


def _replace_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        module = modules[name]
        module.weight.data.copy_(weight.reshape(module.weight.shape))


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
    save_plain(model, reference.task.files, written, extra_file=target.lock)
    if target.lock is None:
        assembly = reference.assembly
        names = {"class_names": assembly.classes} if assembly.spec.classifies else {}
        write_lock(written / LOCK_NAME, assembly.loaded, fingerprints=assembly.fingerprints, environment=names)


def _reload(folder: Path, task: Task, device: str) -> Any:
    """Loads the written files with plain transformers."""
    import transformers

    with quiet():
        return getattr(transformers, task.spec.auto_class).from_pretrained(folder, dtype="auto").to(device).eval()


def _tied_head(base: Any) -> tuple[bool, bool]:
    """Whether the merged head must be tied to the embeddings, and whether the adapter unties it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    adapted = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in (head, embedding))
    return tied and not adapted, tied and adapted


def _untie(model: Any) -> None:
    """Gives the head a separate tensor, so that an update of head or embedding does not change the other."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()


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


def _failures(figures: dict[str, Any], name: str, quantized: bool, limits: dict[str, float]) -> Iterable[str]:
    """Describes every failed check of the written model."""
    allowed = _LIMITS["original" if quantized and name == "original" else "same"] | limits
    logits, weights = figures["logits"], figures["weights"]
    failures = []
    if not logits["kl_mean"] <= allowed["kl_mean"]:
        failures.append(f"mean KL to base + adapter is {logits['kl_mean']:.3g} nats, allowed {allowed['kl_mean']:g}")
    if not logits["top1"] >= allowed["top1"]:
        failures.append(f"top-1 agreement is {logits['top1']:.1%}, required {allowed['top1']:.1%}")
    if weights and figures["dtype"] == "float32" and not weights["relative"] <= _WEIGHT_LIMIT:
        failures.append(f"merged weights miss {weights['relative']:.1%} of the update on average")
    if not figures["tied_head_kept"]:
        failures.append("the output head is no longer tied to the embeddings")
    if not figures["tokenizer_same"]:
        failures.append("the written tokenizer gives different ids")
    return failures
