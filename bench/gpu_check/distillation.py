"""gpu-check: distillation. The loss against the plain formula in float64, stored targets, random draws, latency."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from bench.gpu_check.base import Device, Row, Task

LENGTHS = (24, 17, 9)  # lengths of the rows; the first third of each row is not scored
NUM_KEPT = 16
TEACHERS = (
    "beside the student",
    "self",
    "stored, all classes",
    f"stored top-{NUM_KEPT} and rest",
    "stored hidden states",
)
DRAWN: tuple[Literal["sampled", "mixed"], ...] = ("sampled", "mixed")
SLEEP_S = 5e-3
# Limit for draws: float32 softmaxes of two devices differ in the last bit, which changes one draw in a million.
MOST_MOVED = 1e-3


def distillation(device: Device) -> Iterator[Task]:
    """Tasks: a training step's loss and gradients with every kind of teacher, draws on a GPU, and the latency timer."""
    for dtype in device.pick(("bfloat16", "float16", "float32"), ("bfloat16", "float32")):
        for teacher in TEACHERS:
            what = {"check": "distillation loss", "teacher": teacher, "dtype": dtype}
            yield Task(what, partial(_loss, device, dtype, teacher), seconds=4)
    for kind in DRAWN:
        yield Task({"check": "draws of a GPU are those of the CPU", "kind": kind}, partial(_draws, device, kind))
    yield Task({"check": "latency waits for the device"}, partial(_latency, device))


def causal_task(tokenizer: Any) -> Any:
    from peftlab.adapters import HeadLoss
    from peftlab.data.chat import Formatter
    from peftlab.tasks.causal_lm import CausalLM

    formatter = Formatter(tokenizer, columns={}, template=None, available=["prompt", "completion"])
    return CausalLM(tokenizer, formatter, head_loss=HeadLoss())


def examples_of(lengths: tuple[int, ...], vocab: int, *, unscored: float = 1 / 3) -> list[Any]:
    """Rows of random tokens. The first share ``unscored`` of each is not scored."""
    import numpy as np

    from peftlab.tasks import Example

    rng, examples = np.random.default_rng(0), []
    for row, length in enumerate(lengths):
        trained = np.arange(length) >= max(1, int(unscored * length))
        ids = rng.integers(4, vocab, length).astype(np.int32)
        examples.append(Example(ids, row, float(trained.sum()), trained))
    return examples


def _loss(device: Device, dtype_name: str, kind: str) -> Row:
    import torch

    from peftlab.distillation import Objective
    from peftlab.training.distill_loss import DistillLoss, Share
    from peftlab.training.parity import TOLERANCES

    dtype = getattr(torch, dtype_name)
    student, teacher = _student(device), _teacher(device)
    task = causal_task(_tokenizer())
    examples = examples_of(LENGTHS, 200)
    want_loss, want = _truth(student, student if kind == "self" else teacher, examples, kind)
    cast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.kind, dtype)
    with cast:
        share = Share(_teacher_of(device, kind, task, teacher, examples))
        loss_of = DistillLoss(task, [(1.0, Objective())], [share])
        loss = loss_of(student, task.collate(examples, device.kind))
    trained = [p for p in student.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, trained)
    flat = torch.cat([g.flatten() for g in got]).cpu().double()
    limits, cosine = TOLERANCES[dtype], float(torch.nn.functional.cosine_similarity(flat, want, dim=0))
    norm = abs(float(flat.norm() / want.norm()) - 1)
    error = abs(float(loss.detach()) - want_loss) / abs(want_loss)
    agree = error <= limits.loss and cosine >= limits.cosine and norm <= limits.norm
    return {"loss": float(loss.detach()), "loss_in_float64": want_loss, "loss_error": error, "cosine": cosine,
            "norm_difference": norm, "limits": [limits.loss, limits.cosine, limits.norm], "ok": agree}  # fmt: skip


def _tokenizer() -> Any:
    from peftlab.models import find_pretrained, load_tokenizer

    return load_tokenizer(find_pretrained("tiny:llama"))


def _student(device: Device) -> Any:
    """A model with a nonzero adapter."""
    import torch

    from peftlab.adapters import inject

    model = inject(_tiny(device), "lora", peft_type="CAUSAL_LM", rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def _teacher(device: Device) -> Any:
    """Another model of the same shape, so different that the divergence is far above rounding."""
    import torch

    model, generator = _tiny(device), torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_((noise * 0.5 * parameter.detach().float().std().cpu()).to(parameter))
    return model


def _tiny(device: Device) -> Any:
    from peftlab.models import find_pretrained, load_model

    return load_model(
        find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device=device.kind, dtype="float32"
    )


def _truth(student: Any, teacher: Any, examples: list[Any], kind: str) -> tuple[float, Any]:
    """Loss and gradient in float64 on the CPU: row by row through transformers and PEFT, with full logits and sums."""
    import torch

    from peftlab.adapters.fused import set_kernels

    student, teacher = (copy.deepcopy(model).cpu().double() for model in (student, teacher))
    set_kernels(student, "reference")
    plain = teacher.disable_adapter if kind == "self" else contextlib.nullcontext
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.as_tensor(example.ids.astype("int64"))[None]
        scored = torch.as_tensor(example.trained.nonzero()[0]) - 1
        with torch.no_grad(), plain():
            p = teacher(input_ids=ids).logits[0, scored].softmax(-1)
        log_q = student(input_ids=ids).logits[0, scored].log_softmax(-1)
        if kind.startswith("stored top"):
            p, chosen = p.topk(NUM_KEPT, dim=-1)
            kept = log_q.gather(-1, chosen)
            rest = 1 - p.sum(-1, keepdim=True)
            p, log_q = torch.cat([p, rest], -1), torch.cat([kept, torch.log1p(-kept.exp().sum(-1, keepdim=True))], -1)
        total = total + (p * (p.log() - log_q)).sum()
    trained = [p for p in student.parameters() if p.requires_grad]
    return float(total.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])


def _teacher_of(device: Device, kind: str, task: Any, teacher: Any, examples: list[Any]) -> Any:
    """The teacher as training uses it. Stored targets are written and read as the cache does, on the device."""
    import torch

    from peftlab import ops
    from peftlab.distillation import SparseTarget
    from peftlab.distillation.cache import Fill
    from peftlab.training.teacher_outputs import BackboneTeacher, CachedTeacher, ModelTeacher

    if kind == "self":
        return BackboneTeacher(task)
    if kind.startswith("beside"):
        return ModelTeacher(teacher, task, device=device.kind)
    vocab, hidden_size = teacher.config.vocab_size, teacher.config.hidden_size
    if kind.endswith("states"):
        fill = Fill("hidden", hidden_size=hidden_size, hidden="float32")
    else:
        fill = Fill("topk", k=vocab if "all" in kind else NUM_KEPT, num_classes=vocab, values="float32")
    stored = []
    with torch.no_grad():
        for number, example in enumerate(examples):
            outputs = task.outputs(teacher, task.collate([example], device.kind))
            stored.append(fill.target(outputs.values if fill.kind == "hidden" else outputs.logits(), number).to("cpu"))

    def read(indices: Any) -> Any:
        parts = [stored[i] for i in indices]
        return torch.cat(parts) if fill.kind == "hidden" else SparseTarget.concatenated(parts)

    head = ops.Head(ops.DenseWeight(teacher.get_output_embeddings().weight)) if fill.kind == "hidden" else None
    return CachedTeacher(read, index_of={e.key: i for i, e in enumerate(examples)}, head=head)


def _draws(device: Device, kind: Literal["sampled", "mixed"]) -> Row:
    import torch

    from peftlab.distillation import SparseTarget
    from peftlab.distillation.cache import Fill

    vocab = device.pick(49152, 512)
    logits = 3 * torch.randn(64, vocab, generator=torch.Generator().manual_seed(0))
    fill = Fill(kind, k=8 if kind == "mixed" else None, draws=50, num_classes=vocab)
    there, here = fill.target(logits.to(device.kind), 3), fill.target(logits, 3)
    assert isinstance(there, SparseTarget) and isinstance(here, SparseTarget)
    dense = [torch.zeros(64, vocab).scatter_add_(1, t.ids.cpu(), t.probs.cpu().float()) for t in (there, here)]
    moved = float((dense[0] - dense[1]).abs().sum(-1).mean() / 2)
    return {"share_of_mass_elsewhere": moved, "limit": MOST_MOVED, "ok": moved <= MOST_MOVED}


def _latency(device: Device) -> Row:
    """Asynchronous work that nobody waits for: the latency must include its time."""
    from peftlab.measuring.latency import measure_latency

    def work(seconds: float) -> None:
        device.occupy(seconds)
        if device.dry:
            time.sleep(seconds)

    runs = {"once": lambda: work(SLEEP_S), "twice": lambda: work(2 * SLEEP_S)}
    latency = measure_latency(runs, device=device.kind, repeats=20, seconds=2.0)
    # The clock is known to within a factor of two; that does not affect the ratio.
    once, ratio = latency["once"].median_ms, latency["twice"].speed
    good = 0.5e3 * SLEEP_S <= once <= 2e3 * SLEEP_S and 0.45 <= ratio <= 0.55
    return {"ms": once, "expected_ms": 1e3 * SLEEP_S, "speed_of_twice": ratio, "ok": good}
