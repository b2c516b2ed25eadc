"""gpu-check: the loss against full logits and Liger, and how fast a recipe trains."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _gpu_base import Device, Row, Run, Task, interleaved
from _gpu_roofline import GEMM_FLOPS, gemm_flops

ROOT = Path(__file__).resolve().parent.parent


def loss_speed(device: Device) -> Iterator[Task]:
    """linear_cross_entropy with a frozen head against full logits, and against Liger where it is installed."""
    for shape in device.pick([(4096, 4096, 128256), (4096, 576, 49152)], [(32, 64, 300)]):
        what = {"case": "linear_cross_entropy, forward + backward, frozen head", "shape": list(shape)}
        yield Task(what, partial(_loss_speed, device, shape), seconds=6)


def _loss_speed(device: Device, shape: tuple[int, int, int]) -> Row:
    import torch
    from torch.nn import functional as F

    from peftlab.ops import linear_cross_entropy

    num_tokens, hidden, vocab = shape
    dtype = torch.bfloat16
    x = device.randn(num_tokens, hidden, seed=0, dtype=dtype).requires_grad_()
    w = (device.randn(vocab, hidden, seed=1) / hidden**0.5).to(dtype)
    t = torch.randint(0, vocab, (num_tokens,), device=device.kind)

    def full(x: Any, w: Any, t: Any) -> Any:
        return F.cross_entropy(F.linear(x, w).float(), t, reduction="none")

    losses: dict[str, Callable[..., Any]] = {"peftlab": linear_cross_entropy, "full logits": full}
    liger, state = _liger(device)
    if liger is not None:
        losses["Liger"] = liger
    runs: dict[str, Run] = {
        name: lambda mark, loss=loss: torch.autograd.grad(loss(x, w, t).sum(), x) for name, loss in losses.items()
    }
    peaks = {name: device.peak(lambda run=run: run(lambda phase: None)) for name, run in runs.items()}
    found = interleaved(device, runs, seconds=3.0)
    ours = found.times["peftlab"]["time"].median
    floor = 1e6 * 2 * gemm_flops(num_tokens, vocab, hidden) / device.found.get("gemm", GEMM_FLOPS)
    return {
        "us": {name: phases["time"] for name, phases in found.spreads().items()},
        "ratios": {name: found.ratio(name, "peftlab", "time") for name in losses if name != "peftlab"},
        "extra_bytes": peaks,
        "liger": state,
        "floor_us": floor,
        "above_limit": not device.dry and ours < 0.9 * floor,
        **found.protocol(),
    }


def _liger(device: Device) -> tuple[Callable[..., Any] | None, str]:
    """Liger's fused loss, after it has worked once, and why not where it has not."""
    import torch

    if importlib.util.find_spec("liger_kernel") is None or device.dry:
        return None, "not installed"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        x = torch.ones(8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w, t = torch.ones(128, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(8, device="cuda", dtype=torch.long)
        torch.autograd.grad(fused(w, x, t), x)
    except Exception as error:  # of any kind: the other figures are worth having too
        return None, f"failed: {type(error).__name__}: {str(error)[:200]}"
    return lambda x, w, t: fused(w, x, t), "measured"


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
        "tokens_per_s": statistics.median(speeds),
        "quartiles": statistics.quantiles(speeds, n=4),
        "peak_memory_bytes": peak,
    }
