"""gpu-check: whole training steps of a Llama-3-8B with NF4 weights, on peftlab's fused path and on PEFT's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.roofline import CARD, STEP_TARGET
from bench.gpu_check.timing import Run, interleaved, reaches

MODEL = "llama-3-8b"
NUM_PARAMETERS = {"llama-3-8b": 8.03e9, "llama-3.2-1b": 1.24e9}
NUM_LAYERS = 32
SHARE_LAYERS = 8  # of 32, if the whole model would take too long
STEPS_S = 80.0  # reserved for the steps themselves
ROW_S = 16.0  # per row: a step of 0.7 s (roofline.py), three contestants
BASELINE = "PEFT + bitsandbytes"
FULL_LOGITS = "PEFT + bitsandbytes, full logits"


def training_steps(device: Device) -> Iterator[Task]:
    """Forward, backward with recomputation, clipping and AdamW; random weights, random tokens."""
    yield Task({"case": "building the model"}, partial(_build, device), seconds=30, makes=True)
    cases = [(4, 2048, 0.0), (1, 8192, 0.0), (4, 2048, 0.05)]
    for batch, length, dropout in device.pick(cases, [(2, 16, 0.0)]):
        what = {"case": "training step, NF4, r=16 on all linears, checkpointing", "model": MODEL}
        what |= {"batch": batch, "length": length, "dropout": dropout}
        yield Task(what, partial(_steps, device, batch, length, dropout), seconds=15)


def _build(device: Device) -> Row:
    """Builds fewer layers, as every row says, if drawing and quantizing all would leave too little time for the steps."""
    import torch

    from peftlab.adapters import inject
    from peftlab.adapters.fused import fusion_report

    started = time.perf_counter()
    model, num_layers, expected_s = build_preset_model(device, MODEL, quantize="nf4", left_s=STEPS_S)
    build_s = time.perf_counter() - started
    model = inject(model, "lora", peft_type="CAUSAL_LM", rank=16, alpha=32, dropout=0.05).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.005)
    device.release()
    device.shared["model"], device.shared["layers"] = model, num_layers
    fusion = fusion_report(model)
    row = {"layers": num_layers, "of_layers": NUM_LAYERS, "build_s": build_s, "expected_s": expected_s}
    return {**row, "resident_bytes": device.allocated(), "fusion": str(fusion), "ok": not fusion.slow}


def build_preset_model(device: Device, preset: str, *, quantize: str, left_s: float) -> tuple[Any, int, float]:
    """The model of a preset, its number of layers, and the expected seconds for the whole model.

    Args: left_s: seconds that must be left in the section afterwards; otherwise the model has ``SHARE_LAYERS`` layers.
    """
    import torch

    from peftlab.models import find_pretrained, load_model, presets

    class_name, values = presets.PRESETS[preset]
    shape = device.pick((4096, 4096), (64, 64))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in range(2):  # the first also starts the threads and CUDA
            started = time.perf_counter()
            presets.random_weight(shape, dtype=torch.bfloat16, device=device.kind, seed="0", pool=pool)
            device.synchronize()
            one_s = time.perf_counter() - started
    expected_s = 1.5 * one_s * NUM_PARAMETERS[preset] / (shape[0] * shape[1])
    whole = not device.dry and (not left_s or expected_s + left_s < device.shared["until"] - time.time())
    num_layers = values["num_hidden_layers"] if whole else device.pick(SHARE_LAYERS, 1)
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    # A preset of this process only, because the presets have fixed numbers of layers.
    changed = {**values, **device.pick({}, small), "num_hidden_layers": num_layers}
    name = preset if whole else f"{preset}-{num_layers}-layers"
    presets.PRESETS[name] = (class_name, changed)
    try:
        model = load_model(
            find_pretrained(f"shape:{name}"), auto_class="AutoModelForCausalLM", device=device.kind, quantize=quantize
        )
    finally:
        if not whole:
            del presets.PRESETS[name]
    return model, num_layers, expected_s


def _steps(device: Device, batch: int, length: int, dropout: float) -> Row:
    import torch

    from peftlab.adapters.fused import FusedLora

    if "model" not in device.shared:
        return {"not_run": "the model was not built", "ok": None}
    model = device.shared["model"]
    fused: list[Any] = [module for module in model.modules() if isinstance(module, FusedLora)]
    for module in fused:  # PEFT omits dropout 0 completely
        module.lora_dropout["default"] = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (batch, length + 1), device=device.kind)
    runs = step_runs(device, model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    losses: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name, run in runs.items():
        device.release()
        base = device.allocated()
        torch.manual_seed(0)
        peaks[name] = base + device.peak(partial(_kept, losses, name, run))
    values = {name: float(loss) for name, loss in losses.items()}
    seconds = device.pick(min(ROW_S, (device.shared["until"] - time.time()) / 2.5), 1)
    timed = interleaved(device, runs, seconds=seconds, per_block=4, warmups=3)
    tokens = batch * length
    row: Row = {
        "us": {name: phases["time"] for name, phases in timed.spreads().items()},
        "rounds_us": timed.rounds(),
        "tokens_per_s": {n: round(1e6 * tokens / phases["time"].median) for n, phases in timed.times.items()},
        "ratio": timed.ratio(BASELINE, "peftlab", "time"),
        "full_logits_ratio": timed.ratio(FULL_LOGITS, "peftlab", "time"),
        "peak_bytes": peaks,
        "saved_bytes": peaks[FULL_LOGITS] - peaks["peftlab"],
        "layers": device.shared["layers"],
        "loss": values,
        "target": STEP_TARGET if device.has(CARD) else None,
        **timed.protocol(),
    }
    row["met"] = reaches(row["ratio"], row["target"])
    # The weights change between the measured steps, so only the first losses are comparable. With dropout the masks differ.
    spread = max(values.values()) - min(values.values())
    row["losses_agree"] = spread <= 2e-2 * max(values.values())
    return row if row["losses_agree"] else {**row, "ok": False, "met": None}


def _kept(losses: dict[str, Any], name: str, run: Run) -> None:
    losses[name] = run(lambda phase: None)


def step_runs(device: Device, model: Any, ids: Any, targets: Any) -> dict[str, Run]:
    """A training step per contestant, on one model. They differ in the forward of the adapted layers; the last also in the loss."""
    import torch

    from peftlab.adapters import HeadLoss
    from peftlab.adapters.fused import set_kernels

    trained = [p for p in model.parameters() if p.requires_grad]
    # A learning rate that hardly changes the loss, so that every contestant trains from nearly the same weights.
    optimizer = torch.optim.AdamW(trained, lr=1e-8, fused=True)
    base, head_loss = model.get_base_model(), HeadLoss()

    def chunked() -> Any:
        hidden = base.model(input_ids=ids, use_cache=False)[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return head_loss(base.lm_head, flat, targets.reshape(-1), softcap=None, scale=1.0) / targets.numel()

    def full() -> Any:
        logits = base(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.reshape(-1))

    def step(kernels: str, loss_of: Any) -> Run:
        def run(mark: Any) -> Any:
            set_kernels(model, kernels)
            with contextlib.nullcontext() if device.dry else torch.autocast("cuda", torch.bfloat16):
                loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    return {
        "peftlab": step("auto", chunked),
        BASELINE: step("reference", chunked),
        FULL_LOGITS: step("reference", full),
    }
