"""gpu-check: training speed of a recipe with the whole loop."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.gpu_check.base import Device, Row, Task
from peftlab.measuring.intervals import quartiles


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
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(Path(folder) / "model")
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
