"""The parity gate (contract C7): compares the training path with the reference path on the first micro-batch.

The reference is transformers' forward with PEFT's layers and full logits; the fast path is what the loop runs. Both draw
the same dropout masks. Loss, gradients and the adapted modules must agree before training starts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters import base_name, changed_buffers, kept_buffers, train_mode
from peftlab.adapters.fused import FusedLora, frozen_weight, fusion_report, set_kernels
from peftlab.errors import PeftlabError, RecipeError, VerificationError
from peftlab.models import base_model
from peftlab.tasks import Batch, Example, Task, collate_packed, weighted_sum
from peftlab.training.checkpoint import RngState

# Tokens sampled from the first micro-batch: enough to be meaningful, few enough to be quick.
_MAX_TOKENS = {"cpu": 256, "cuda": 512}
# Rows in the sample of a task that compares rows.
_COMPARED = 4

_NOTHING_DONE = "Nothing was trained; run.kernels=reference trains without the fused layers"


@dataclass(frozen=True)
class Tolerance:
    """Maximum relative difference of the loss, minimum cosine and maximum relative norm difference of a gradient."""

    loss: float
    cosine: float
    norm: float


# Rounding stays within these (float32: reordered sums; 16 bits: through all layers of a deep model). A missing scaling
# factor or mask is off by tens of percent.
TOLERANCES = {
    torch.float32: Tolerance(loss=1e-4, cosine=0.9999, norm=1e-2),
    torch.float16: Tolerance(loss=1e-2, cosine=0.99, norm=0.1),
    torch.bfloat16: Tolerance(loss=2e-2, cosine=0.97, norm=0.15),
}


# Rows of x in 8 bits: the smallest cosine of SmolLM2's 420 gradients is 0.80; its losses at steps 1, 2, 4 are within 0.7 %.
_INT8_ROWS = Tolerance(loss=2e-2, cosine=0.5, norm=0.5)
_ROUNDED = {"cpu-bf16": TOLERANCES[torch.bfloat16], "cpu-int8": _INT8_ROWS}


@dataclass(frozen=True)
class ParityReport:
    """The result of the gate. ``worst_*``: the parameter that agrees least; None if the loss is not finite on either path,
    which the loop reports."""

    loss_reference: float
    loss_fast: float
    num_planned: int
    num_adapted: int
    num_fused: int
    slow: dict[str, str]
    num_parameters: int
    num_zero_gradients: int
    idle: list[str]
    """Adapted modules that the loss does not depend on."""
    worst_cosine: float | None
    worst_cosine_at: str | None
    worst_norm_ratio: float | None
    worst_norm_ratio_at: str | None
    rows: int
    tokens: int
    seconds: float
    rounded: dict[str, Any] | None = None
    """With run.kernels=cpu-bf16 or cpu-int8: loss and ``worst_*`` of that rounding, against the fast path without it."""
    unrounded: dict[str, Any] | None = None
    """With int8 weights on a GPU: the same for the training plans, which may not round rows of x to 8 bits, against the fast
    path with bitsandbytes' products. The figures above compare the latter with the reference, which rounds rows."""

    def __str__(self) -> str:
        if self.worst_cosine is None:
            return f"parity: not compared, the loss of the first micro-batch is {self.loss_fast}"
        text = (
            f"parity: loss {self.loss_fast:.6g}, on the reference path {self.loss_reference:.6g}; smallest cosine of "
            f"{self.num_parameters} gradients {self.worst_cosine:.6f} ({self.seconds:.1f} s)"
        )
        if self.rounded is not None and self.rounded["worst_cosine"] is not None:
            text += (
                f"; with rounded operands loss {self.rounded['loss']:.6g}, cosine {self.rounded['worst_cosine']:.4f}"
            )
        if self.unrounded is not None and self.unrounded["worst_cosine"] is not None:
            text += (
                f"; without bitsandbytes' rounding to 8 bits loss {self.unrounded['loss']:.6g}, cosine "
                f"{self.unrounded['worst_cosine']:.4f}"
            )
        return text


def check_parity(
    model: nn.Module,
    task: Task,
    micro_batch: Sequence[Example],
    *,
    planned: Collection[str],
    kernels: str,
    device: Any,
    where: Callable[[int], str],
    autocast: Any = contextlib.nullcontext,
    packed: bool = False,
    loss_sum: Callable[[nn.Module, Batch], Tensor] | None = None,
    reference_loss_sum: Callable[[nn.Module, list[Example], Any], Tensor] | None = None,
) -> ParityReport:
    """Compares the two paths and restores the model, its gradients and all random state.

    Args:
        micro_batch: the first micro-batch; a large one is sampled. planned: names of the modules to adapt.
        kernels: the run.kernels mode used in training. where: row index -> place in the data, for messages.
        autocast: the context of the training loop. packed: whether training packs the micro-batch; the reference is padded.
        loss_sum: the loss of the loop, default the task's. reference_loss_sum: the same loss by the reference path, default
        the task's losses on ``task.reference_outputs``.
    Raises: VerificationError naming the module, the parameter or the loss that differs.
    """
    started = time.perf_counter()
    adapted = {base_name(name) for name in _adapted(model)}
    if missing := sorted(set(planned) - adapted) or sorted(adapted - set(planned)):
        state = "should be adapted but is not" if missing[0] in planned else "should not be adapted but is"
        raise VerificationError(
            f"{missing[0]} {state} ({len(adapted)} of {len(planned)} planned modules are adapted): the adapter does not match "
            "the recipe. This is a bug in peftlab or PEFT; nothing was trained"
        )
    # A row that is compared with others needs some.
    fewest = _COMPARED if task.spec.contrasts else 1
    sample = _sample(micro_batch, _MAX_TOKENS.get(torch.device(device).type, 256), fewest=fewest)
    rows = sum(map(len, micro_batch)) if packed else len(micro_batch) * max(map(len, micro_batch))

    trained_loss, reference_loss = loss_sum or task.loss_sum, reference_loss_sum or _own_loss_sum(task)

    def fast_loss() -> Tensor:
        return trained_loss(model, collate_packed(sample, device=device) if packed else task.collate(sample, device))

    rounds, rounds_x = kernels in ops.CPU_OPERANDS, int8_rounds_rows(model)
    rng = RngState.capture()
    with woken(model), kept_buffers(model) as before:
        try:
            if packed and _draws(fast_loss, autocast):  # a single row has the same dropout masks packed and padded
                sample = sample[:1]
            # In mode "compared" PEFT's layers use the masks of the fused layers; in mode "reference" both sides draw PEFT's masks.
            set_kernels(model, "reference" if kernels == "reference" else "compared")
            with _model_errors(model):
                reference = _pass(model, lambda: reference_loss(model, sample, device), autocast, sample)
            set_kernels(model, kernels)
            with ops.planned_for(rows):
                if rounds:  # float32 separates errors of masks, adapters and head from rounding
                    set_kernels(model, "auto")
                library: contextlib.AbstractContextManager[list[ops.Plan]]
                library = ops.int8_by_library() if rounds_x else contextlib.nullcontext([])
                with library as replaced:  # likewise for the reference's rounding
                    fast = _pass(model, fast_loss, autocast, sample)
                set_kernels(model, kernels)
                trained = _pass(model, fast_loss, autocast, sample) if rounds or replaced else None
            _check_buffers(model, before)
            fusion = fusion_report(model)
        finally:
            set_kernels(model, kernels)
            rng.restore()
    tolerance = TOLERANCES[coarsest_dtype(model, autocast, device)]
    places = [where(example.row) for example in sample]
    compared = _compare(reference, fast, tolerance, places)
    if trained is not None:
        name, allowed, against = (
            ("unrounded", _INT8_ROWS, "the same path with bitsandbytes' 8-bit rows")
            if replaced
            else ("rounded", _ROUNDED[kernels], "the same path without rounding")
        )
        compared[name] = {"loss": trained[0], **_compare(fast, trained, allowed, places, against=against)}
    return ParityReport(
        loss_reference=reference[0],
        loss_fast=fast[0],
        num_planned=len(planned),
        num_adapted=len(adapted),
        num_fused=len(fusion.fused),
        slow={base_name(name): reason for name, reason in fusion.slow.items()},
        num_parameters=len(reference[1]),
        num_zero_gradients=sum(not g.any() for g in fast[1].values()),
        idle=_idle(_adapted(model), fast[1]) if math.isfinite(fast[0]) else [],
        **compared,
        rows=len(sample),
        tokens=sum(map(len, sample)),
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _model_errors(model: nn.Module) -> Iterator[None]:
    """Turns errors of the model's own forward and backward, which use no code of peftlab, into its reason."""
    try:
        yield
    except (PeftlabError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, ImportError) as error:
        base = base_model(model)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"{type(base).__name__} ({base.config.model_type}) cannot be trained on these rows with these settings: {reason}",
            key="model.name",
        ) from error


def _idle(adapted: Sequence[str], gradients: dict[str, Tensor]) -> list[str]:
    """The adapted modules of whose adapters no value has a gradient."""
    moved = {name for name, gradient in gradients.items() if gradient.any()}
    trained = [n for n in adapted if any(name.startswith(f"{n}.") for name in gradients)]
    return [base_name(n) for n in trained if not any(name.startswith(f"{n}.") for name in moved)]


def _check_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raises VerificationError if training changes state that an adapter's files do not contain."""
    if not hasattr(model, "peft_config") or not (moved := changed_buffers(model, before)):
        return
    module = base_name(moved[0]).rpartition(".")[0]
    if ".lora_" in moved[0]:
        raise VerificationError(
            f"training changes {len(moved)} buffers of the adapter itself, such as {base_name(moved[0])}, and its files would not "
            "contain them; VeLoRA works with adapter.velora_config={init_type: random}. Nothing was trained",
            key="adapter.velora_config",
        )
    raise VerificationError(
        f"training changes {len(moved)} buffers of frozen modules, such as {base_name(moved[0])}, and the adapter's files "
        f"would not contain them; train the module in full with adapter.modules_to_save=[{module}], or use "
        "adapter.method=none. Nothing was trained"
    )


def int8_rounds_rows(model: nn.Module) -> bool:
    """Whether adapted bitsandbytes layers multiply int8 by int8 in training, as they do on a GPU."""
    bases = (module.get_base_layer() for module in model.modules() if isinstance(module, FusedLora))
    return any(b.weight.device.type == "cuda" and isinstance(frozen_weight(b), ops.Int8Weight) for b in bases)


def _own_loss_sum(task: Task) -> Callable[[nn.Module, list[Example], Any], Tensor]:
    def loss_sum(model: nn.Module, examples: list[Example], device: Any) -> Tensor:
        outputs = task.reference_outputs(model, examples, device)
        return weighted_sum(task.losses(outputs), outputs.weights)

    return loss_sum


def _adapted(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _sample(micro_batch: Sequence[Example], max_tokens: int, *, fewest: int = 1) -> list[Example]:
    """Rows of the micro-batch up to ``max_tokens`` padded tokens; a row that is too long for ``fewest`` of them is cut, so that
    it ends with its last trained token."""
    cut = [_cut(example, max_tokens // fewest) for example in micro_batch]
    chosen = cut[:1]
    for example in cut[1:]:
        if (len(chosen) + 1) * max(len(example), *map(len, chosen)) > max_tokens:
            break
        chosen.append(example)
    return chosen


def _cut(example: Example, max_tokens: int) -> Example:
    if len(example) <= max_tokens:
        return example
    if example.sizes:
        texts = [ids[: max_tokens // len(example.sizes)] for ids in example.texts]
        return replace(example, ids=np.concatenate(texts), sizes=tuple(map(len, texts)))
    if example.trained is None:
        if isinstance(example.label, np.ndarray):
            return example
        extra = {n: v[:max_tokens] if len(v) == len(example) else v for n, v in example.extra.items()}
        return replace(example, ids=example.ids[:max_tokens], extra=extra)
    end = int(example.trained.nonzero()[0][-1]) + 1
    window = slice(max(0, end - max_tokens), end)
    trained = example.trained[window].copy()
    trained[0] = False  # the first token cannot be predicted
    label = example.label
    if isinstance(label, np.ndarray) and len(label) == len(example):
        label = label[window]
    return replace(example, ids=example.ids[window], trained=trained, label=label, weight=float(trained.sum()))


@contextlib.contextmanager
def woken(model: nn.Module) -> Iterator[None]:
    """Gives zero LoRA B matrices, and zero up-projections of bottlenecks, values that change a layer's output by a few percent,
    for the comparison: with the initial 0 neither the adapter's output nor the gradient of A would show an error."""
    held: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    modes = {module: module.training for module in model.modules()}
    train_mode(model)
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                if _starts_at_zero(name) and parameter.dim() == 2 and not parameter.any():
                    held[name] = parameter.detach().clone()
                    noise = torch.randn(parameter.shape, generator=generator) * (0.02 / parameter.shape[1] ** 0.5)
                    parameter.copy_(noise)
        yield
    finally:
        with torch.no_grad():
            for name, value in held.items():
                parameters[name].copy_(value)
        for module, training in modes.items():
            module.training = training


def _starts_at_zero(name: str) -> bool:
    return ".lora_B." in name or (".bottleneck." in name and ".up." in name)


def _pass(model: nn.Module, loss_sum: Any, autocast: Any, sample: list[Example]) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight = sum(e.weight for e in sample)
    with autocast():
        loss = loss_sum() / weight
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return float(loss.detach()), {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained.items(), gradients, strict=True)
    }


@torch.no_grad()
def _draws(loss_sum: Callable[[], Tensor], autocast: Any) -> bool:
    """Whether the loss depends on the seed, as with dropout."""
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with autocast():
            losses.append(float(loss_sum()))
    return losses[0] != losses[1]


def coarsest_dtype(model: nn.Module, autocast: Any, device: Any) -> torch.dtype:
    """The least precise dtype used in a forward pass."""
    kind = torch.device(device).type
    with autocast():
        dtypes: set[torch.dtype | None] = {torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else set()
    dtypes |= {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {
        cast(torch.dtype | None, module.compute_dtype)
        for module in model.modules()
        if isinstance(module, nn.Linear) and hasattr(module, "compute_dtype")
    }
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)


def _compare(
    reference: tuple[float, dict[str, Tensor]],
    fast: tuple[float, dict[str, Tensor]],
    tolerance: Tolerance,
    places: Sequence[str],
    *,
    against: str = "the reference path",
) -> dict[str, Any]:
    """Returns the ``worst_*`` fields of the report. against: the name of ``reference`` in messages. Raises:
    VerificationError beyond ``tolerance``."""
    want, got = reference[0], fast[0]
    if not math.isfinite(want) and not math.isfinite(got):
        return dict.fromkeys(("worst_cosine", "worst_cosine_at", "worst_norm_ratio", "worst_norm_ratio_at"))
    if not abs(got - want) <= tolerance.loss * max(abs(want), 1e-3):
        raise VerificationError(
            f"the loss of the first micro-batch is {got:.6g} on the training path and {want:.6g} on {against} "
            f"(allowed difference {tolerance.loss:g}, relative): mask, labels, adapters or head of the training path are "
            f"wrong. Rows: {', '.join(places[:4])}{', ...' if len(places) > 4 else ''}. {_NOTHING_DONE}"
        )
    floor = 1e-6 * max((float(g.norm()) for g in reference[1].values()), default=0.0)
    cosines, ratios = {}, {}
    for name, wanted in reference[1].items():
        gradient = fast[1][name].double()
        norm, fast_norm = float(wanted.double().norm()), float(gradient.norm())
        if max(norm, fast_norm) <= floor:
            continue
        cosine = float((wanted.double() * gradient).sum()) / max(norm * fast_norm, 1e-300)
        counts = int(wanted.count_nonzero()), int(gradient.count_nonzero())
        cosines[name], ratios[name] = cosine, fast_norm / max(norm, 1e-300)
        if not cosine >= tolerance.cosine or not abs(ratios[name] - 1) <= tolerance.norm or counts[1] < 0.9 * counts[0]:
            raise VerificationError(
                f"the gradient of {base_name(name)} differs between the training path and {against}: cosine "
                f"{cosine:.4f} (at least {tolerance.cosine:g}), norm {fast_norm:.4g} against {norm:.4g} (within "
                f"{100 * tolerance.norm:g} %), {counts[1]:,} against {counts[0]:,} non-zero values of {wanted.numel():,}. "
                f"{_NOTHING_DONE}"
            )
    lowest = min(cosines, key=cosines.__getitem__, default="")
    furthest = max(ratios, key=lambda name: abs(ratios[name] - 1), default="")
    return {
        "worst_cosine": cosines.get(lowest, 1.0),
        "worst_cosine_at": base_name(lowest),
        "worst_norm_ratio": ratios.get(furthest, 1.0),
        "worst_norm_ratio_at": base_name(furthest),
    }
