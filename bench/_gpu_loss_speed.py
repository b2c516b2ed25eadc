"""gpu-check: the loss against full logits and Liger, and how fast a recipe trains."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _gpu_base import Device, Row, Task
from _gpu_roofline import gemm_flops
from _gpu_speed import flops_per_s
from _gpu_timing import Run, interleaved, reaches

from peftlab.evaluation.intervals import quartiles

ROOT = Path(__file__).resolve().parent.parent


# By case: the contestant, how many times as fast ours has to be, and how many times less memory it may take beside the inputs.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    "cross-entropy, frozen head": {"full logits": (2.0, None)},
    "cross-entropy, trained head": {"full logits": (2.0, None), "Liger": (4.0, None)},
    "distillation, frozen head": {"full logits": (4.0, 15.0), "Liger": (1.45, 3.0)},
    "top-64 + tail, frozen head": {"Liger": (2.0, None)},
}


def loss_speed(device: Device) -> Iterator[Task]:
    """The fused linear losses against full logits and Liger's counterparts, and the floor of their products."""
    for case in TARGETS:
        num_tokens = 4096 if case.startswith("cross") else 8192
        for shape in device.pick([(num_tokens, 4096, 128256)], [(32, 64, 300)]):
            yield Task(
                {"case": f"{case}, forward + backward", "shape": list(shape)},
                partial(_loss_speed, device, case, shape),
                seconds=12,
            )
    for shape in device.pick([(4096, 576, 49152)], []):
        case = "cross-entropy, frozen head"
        yield Task(
            {"case": f"{case}, forward + backward", "shape": list(shape)},
            partial(_loss_speed, device, case, shape),
            seconds=5,
        )


def _loss_speed(device: Device, case: str, shape: tuple[int, int, int]) -> Row:
    import torch
    from torch.nn import functional as F

    from peftlab import ops

    num_tokens, hidden, vocab = shape
    dtype, trained, distils = torch.bfloat16, "trained" in case, not case.startswith("cross")
    x = device.randn(num_tokens, hidden, seed=0, dtype=dtype).requires_grad_()
    w = (device.randn(vocab, hidden, seed=1) / hidden**0.5).to(dtype).requires_grad_(trained)
    t = torch.randint(0, vocab, (num_tokens,), device=device.kind)
    leaves = [x, w] if trained else [x]
    if distils:
        tx = device.randn(num_tokens, hidden, seed=2, dtype=dtype)
        tw = (device.randn(vocab, hidden, seed=3) / hidden**0.5).to(dtype)

    def ours() -> Any:
        head = ops.Head(ops.DenseWeight(w))
        if not distils:
            return ops.linear_cross_entropy(x, head, t).total
        teacher = sparse if case.startswith("top") else ops.OnlineTeacher(tx, ops.Head(ops.DenseWeight(tw)))
        return ops.linear_kl(x, head, teacher).total

    def full() -> Any:
        logits = F.linear(x, w).float()
        if not distils:
            return F.cross_entropy(logits, t, reduction="sum")
        with torch.no_grad():
            p = F.linear(tx, tw).float().softmax(-1)
        return F.kl_div(logits.log_softmax(-1), p, reduction="sum")

    if case.startswith("top"):
        with torch.no_grad():  # in parts: the teacher's logits are not what is measured
            found_top = [F.linear(part, tw).float().softmax(-1).topk(min(64, vocab)) for part in tx.split(1024)]
        sparse = ops.SparseTeacher(torch.cat([f.indices for f in found_top]), torch.cat([f.values for f in found_top]))
        del found_top
    losses: dict[str, Callable[[], Any]] = {"peftlab": ours, "full logits": full}
    liger, state = _liger(device, distils)
    if liger is not None:
        losses["Liger"] = (lambda: liger(x, w, tx, tw, t)) if distils else (lambda: liger(w, x, t))
    runs: dict[str, Run] = {
        name: lambda mark, loss=loss: torch.autograd.grad(loss(), leaves) for name, loss in losses.items()
    }
    peaks = {}
    for name in list(runs):
        try:
            peaks[name] = device.peak(lambda run=runs[name]: run(lambda phase: None))
        except torch.OutOfMemoryError:
            del runs[name]
            device.release()
    found = interleaved(device, runs, seconds=3.0)
    time_of = {name: phases["time"].median for name, phases in found.times.items()}
    products = (3 if trained or (distils and not case.startswith("top")) else 2) * gemm_flops(num_tokens, vocab, hidden)
    floor = 1e6 * products / flops_per_s(device)
    ratios = {name: found.ratio(name, "peftlab", "time") for name in runs if name != "peftlab"}
    times_less = {name: peaks[name] / max(peaks["peftlab"], 1) for name in ratios}
    met = {}
    for name, (faster, smaller) in TARGETS[case].items():
        if name in ratios and not device.dry:
            met[name] = bool(reaches(ratios[name], faster)) and (smaller is None or times_less[name] >= smaller)
    return {
        "us": {name: phases["time"] for name, phases in found.spreads().items()},
        "rounds_us": found.rounds(),
        "ratios": ratios,
        "extra_bytes": peaks,
        "times_less_memory": times_less,
        "liger": state,
        "floor_us": floor,
        "over_floor": time_of["peftlab"] / floor,
        "target": {name: list(pair) for name, pair in TARGETS[case].items()},
        "met": all(met.values()) if met else None,
        "above_limit": not device.dry and time_of["peftlab"] < 0.9 * floor,
        **found.protocol(),
    }


def _liger(device: Device, distils: bool) -> tuple[Callable[..., Any] | None, str]:
    """Liger's counterpart, after it has worked once, and why not where it has not."""
    import torch

    if importlib.util.find_spec("liger_kernel") is None or device.dry:
        return None, "not installed"
    x = torch.ones(8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w, t = torch.ones(128, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(8, device="cuda", dtype=torch.long)
    try:
        if distils:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            # beta 0 is forward KL; its own mean over tokens.
            fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
            torch.autograd.grad(fused(x, w, x.detach(), w, t), x)
        else:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            torch.autograd.grad(fused(w, x, t), x)
    except Exception as error:  # of any kind: the other figures are worth having too
        return None, f"failed: {type(error).__name__}: {str(error)[:200]}"
    return fused, "measured"


def recipe_speed(device: Device) -> Iterator[Task]:
    """Tokens/s of the training loop itself, on a Llama of SmolLM2's shape with random weights, batch 32, by storage."""
    for quantize in device.pick(("none", "nf4", "int8"), ("none",)):
        what = {"case": "training loop, Llama of 106M, batch 32", "quantize": quantize}
        yield Task(what, partial(_recipe_speed, device, quantize), seconds=25)


def _recipe_speed(device: Device, quantize: str) -> Row:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftlab
    from peftlab.models.tiny import tiny_tokenizer

    hidden, layers, steps = device.pick((576, 30, 30), (64, 1, 3))
    config = LlamaConfig(
        vocab_size=260, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 192), max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(Path(folder) / "model")
        tiny_tokenizer().save_pretrained(Path(folder) / "model")
        changes = [
            *(f"model.name={folder}/model", f"model.quantize={quantize}", f"data.train={ROOT}/recipes/smoke.jsonl"),
            *(f"run.dir={folder}/run", f"run.device={device.kind}", "run.merge=none", "eval.before=false"),
            *(f"train.batch_size={device.pick(32, 2)}", f"train.max_steps={steps}", "train.lr=1e-4"),
            *device.pick([], ["eval.prompts=[]", "data.eval_rows=4"]),
        ]
        run = peftlab.train("smoke", changes)
        speeds = [m["tokens_per_s"] for m in run.metrics() if "tokens_per_s" in m][steps // 3 :]
        peak = run.summary["training"]["peak_memory_bytes"]
    return {
        "tokens_per_s": quartiles(speeds)[1],
        "quartiles": quartiles(speeds),
        "peak_memory_bytes": peak,
    }
