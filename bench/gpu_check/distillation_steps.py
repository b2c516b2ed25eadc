"""gpu-check: one optimizer step of a distillation, Llama-3-8B in NF4 to Llama-3.2-1B, as on a card with 16 or 12 GB.

The process is limited to the card's memory minus a CUDA context, and the loss uses the chunk size of such a card.
A row has the planned memory (kd_plan.py) next to the measured one.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.distillation import causal_task, examples_of
from bench.gpu_check.training_steps import build_preset_model
from bench.studies import kd_plan

CONTEXT_BYTES = 500_000_000
WARMUPS, MOST_STEPS, STEPS_S = 2, 20, 4.0


def distillation_steps(device: Device) -> Iterator[Task]:
    """First with the teacher online; then without it, on stored classes."""
    yield Task({"case": "building teacher and student"}, partial(_build, device), seconds=20, makes=True)
    for way, stored in (
        ("the teacher beside the student, NF4", None),
        (f"stored top-{kd_plan.NUM_STORED}", kd_plan.NUM_STORED),
    ):
        if stored is not None:
            yield Task({"case": "the teacher leaves the GPU"}, partial(_leave, device), makes=True)
        for card in kd_plan.CARDS:
            what: Row = {"case": f"distillation step, {way}, r={kd_plan.RANK} on all linears, checkpointing"}
            what |= {"batch": 1, "length": _tokens(device), "card_gb": card / 1e9}
            yield Task(what, partial(_step, device, stored, card), seconds=6)


def _tokens(device: Device) -> int:
    return int(device.pick(kd_plan.TOKENS, 32))


def _build(device: Device) -> Row:
    """The teacher is the model of the training steps without its adapter, if this process has built that."""
    import torch

    from peftlab.adapters import inject
    from peftlab.adapters.fused import fusion_report

    if "model" not in device.shared:
        model, num_layers, _ = build_preset_model(device, kd_plan.TEACHER, quantize="nf4", left_s=20.0)
        device.shared |= {"model": model, "layers": num_layers}
    teacher = device.shared.pop("model")
    teacher = teacher.unload() if hasattr(teacher, "unload") else teacher
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    device.shared["teacher"] = teacher.eval()
    before = device.allocated()
    student, _, _ = build_preset_model(device, kd_plan.STUDENT, quantize="none", left_s=0.0)
    student = inject(student, "lora", peft_type="CAUSAL_LM", rank=kd_plan.RANK, alpha=2 * kd_plan.RANK).train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    device.release()
    device.shared["student"] = student
    fusion = fusion_report(student)
    return {
        "layers": device.shared["layers"],
        "teacher_bytes": before,
        "student_bytes": device.allocated() - before,
        "fusion": str(fusion),
        "ok": not fusion.slow,
    }


def _leave(device: Device) -> Row:
    device.shared["teacher_shape"] = kd_plan.shape_of(device.shared.pop("teacher"))
    device.release()
    return {"held_bytes": device.allocated()}


def _step(device: Device, stored: int | None, card: int) -> Row:
    import torch

    if "student" not in device.shared:
        return {"not_run": "the models were not built", "ok": None}
    student, tokens = device.shared["student"], _tokens(device)
    run, scored = _runner(device, student, tokens, stored)
    teacher = device.shared.get("teacher")
    shapes = (
        kd_plan.shape_of(student.get_base_model()),
        (device.shared["teacher_shape"] if teacher is None else kd_plan.shape_of(teacher)),
    )
    chunk = kd_plan.card_chunk(shapes[0], online=stored is None, card_bytes=card - CONTEXT_BYTES)
    step = kd_plan.Step(tokens, scored, kd_plan.RANK, chunk, stored, context_bytes=CONTEXT_BYTES)
    plan = kd_plan.memory_plan(*shapes, step)
    row: Row = {"plan_bytes": plan, "predicted_tokens_per_s": round(kd_plan.tokens_per_s(*shapes, step))}
    row |= {"layers": device.shared["layers"], "chunk": chunk}
    try:
        with memory_of(device, card):
            seconds, losses = _timed(device, run)
            peak, reserved = _peaks(device)
    except torch.OutOfMemoryError as error:
        device.release()
        return {**row, "failed": f"does not fit {card / 1e9:.0f} GB: {error}", "ok": False}
    finally:
        student.zero_grad(set_to_none=True)
        device.release()
    peak += CONTEXT_BYTES
    return row | {
        "peak_bytes": peak,
        "reserved_bytes": reserved + CONTEXT_BYTES,
        "planned_over_measured": None if device.dry else plan["peak"] / peak,
        "tokens_per_s": round(tokens / statistics.median(seconds)),
        "seconds": [round(s, 4) for s in seconds],
        "loss": losses[-1],
        "ok": all(map(_finite, losses)) and reserved + CONTEXT_BYTES <= card,
    }


def _runner(device: Device, student: Any, tokens: int, stored: int | None) -> tuple[Callable[[], Any], int]:
    """A whole optimizer step as in the training loop, and the number of scored positions."""
    import torch

    from peftlab.distillation import Objective
    from peftlab.models import find_pretrained, load_tokenizer
    from peftlab.training.distill_loss import DistillLoss, Share
    from peftlab.training.optimizers import make_optimizer
    from peftlab.training.teacher_outputs import CachedTeacher, ModelTeacher

    vocab = student.config.vocab_size
    task = causal_task(load_tokenizer(find_pretrained(f"shape:{kd_plan.STUDENT}")))
    examples = examples_of((tokens,), vocab, unscored=0.0)
    scored = int(examples[0].weight)
    if stored is None:
        teacher: Any = ModelTeacher(device.shared["teacher"], task, device=device.kind)
    else:
        target = _random_target(scored, min(stored, vocab - 1), vocab)
        teacher = CachedTeacher(lambda indices: target, index_of={(0, 0): 0})
    loss_of = DistillLoss(task, [(1.0, Objective())], [Share(teacher)])
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = make_optimizer(student, "adamw", lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)

    def run() -> float:
        batch = task.collate(examples, device.kind)
        with torch.autocast(device.kind, torch.bfloat16):
            loss = loss_of(student, batch) / scored
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run, scored


def _random_target(rows: int, k: int, vocab: int) -> Any:
    """Distinct classes per row, with 0.8 of the mass."""
    import torch

    from peftlab.distillation import SparseTarget

    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, vocab, (rows, 1), generator=generator)
    ids = (first + torch.arange(k) * (vocab // k)) % vocab
    return SparseTarget(ids, 0.8 * torch.randn(rows, k, generator=generator).softmax(-1))


@contextlib.contextmanager
def memory_of(device: Device, card: int) -> Iterator[None]:
    """Inside the context this process is limited to a card's bytes minus a CUDA context."""
    import torch

    from peftlab.ops import release_scratch

    release_scratch()
    device.release()
    if device.dry:
        yield
        return
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card - CONTEXT_BYTES) / total))
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _timed(device: Device, run: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds of each step after the warm-up, and the losses. A step ends when its loss is on the CPU."""
    losses = [run() for _ in range(device.pick(WARMUPS, 1))]
    seconds: list[float] = []
    while len(seconds) < device.pick(MOST_STEPS, 2) and sum(seconds) < STEPS_S:
        device.synchronize()
        started = time.perf_counter()
        losses.append(run())
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def _peaks(device: Device) -> tuple[int, int]:
    import torch

    return (0, 0) if device.dry else (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
