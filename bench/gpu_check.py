"""``make gpu-check``: what a machine with a CUDA device can confirm, in priority order, each row written when measured.

    python bench/gpu_check.py [--out DIR] [--minutes 9]

First correctness of every op in float16 and bfloat16 against float64, then quantized loading, then the op's time and
memory against plain PyTorch, then training steps end to end on models built on the spot (nothing is downloaded).
Rows go to ``DIR/gpu_check.jsonl`` (default bench/results). A red correctness row ends the run before any timing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Row = dict[str, Any]


def op_correctness() -> Iterator[Row]:
    """linear_cross_entropy: error against float64, at most that of eager code in the same dtype plus slack."""
    import torch
    from torch.nn import functional as F

    from peftlab.ops import linear_cross_entropy

    for dtype, slack in ((torch.float32, 5e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        for num_tokens, hidden, vocab in ((63, 96, 1009), (257, 576, 49152), (1, 64, 300)):
            torch.manual_seed(0)
            x = torch.randn(num_tokens, hidden, device="cuda").to(dtype)
            w = (torch.randn(vocab, hidden, device="cuda") / hidden**0.5).to(dtype)
            t = torch.randint(0, vocab, (num_tokens,), device="cuda")

            def run(loss: Callable[..., Any], xs: Any, ws: Any, t: Any = t) -> tuple[Any, Any]:
                leaf = xs.detach().clone().requires_grad_()
                value = loss(leaf, ws, t)
                (grad,) = torch.autograd.grad(value.sum(), leaf)
                return value.double(), grad.double()

            def eager(a: Any, b: Any, t: Any) -> Any:
                return F.cross_entropy(
                    F.linear(a, b).float() if a.dtype != torch.float64 else F.linear(a, b), t, reduction="none"
                )

            truth, ours, plain = run(eager, x.double(), w.double()), run(linear_cross_entropy, x, w), run(eager, x, w)
            for name, want, got, base in zip(("loss", "grad"), truth, ours, plain, strict=True):
                error, allowed = float((got - want).abs().max()), float((base - want).abs().max())
                limit = allowed + slack * float(want.abs().max())
                yield {
                    "check": f"linear_cross_entropy {name}",
                    "dtype": str(dtype)[6:],
                    "shape": [num_tokens, hidden, vocab],
                    "error": error,
                    "limit": limit,
                    "ok": error <= limit,
                }


def quantized_loading() -> Iterator[Row]:
    """NF4 and int8 on CUDA: loads, trains a step, and the dequantized weights explain the forward pass."""
    import torch

    from peftlab.adapters import add_lora
    from peftlab.models import find_pretrained, load_model

    ids = torch.randint(4, 200, (4, 24), device="cuda")
    for quantize in ("none", "nf4", "int8"):
        model = load_model(
            find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cuda", quantize=quantize
        )
        model = add_lora(model, peft_type="CAUSAL_LM", rank=4, alpha=8)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms = [float(p.grad.norm()) for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n]
        ok = bool(torch.isfinite(loss)) and all(0 < n < float("inf") for n in norms)
        yield {"check": f"train step on {quantize}", "loss": float(loss), "num_gradients": len(norms), "ok": ok}


def end_to_end() -> Iterator[Row]:
    """The smoke recipe on CUDA: trained, merged, verified; the same recipe twice gives the same adapter bytes."""
    import peftlab

    with tempfile.TemporaryDirectory() as folder:
        for quantize in ("none", "nf4"):
            merge = "original" if quantize == "none" else "dequantized"
            runs = [
                peftlab.train(
                    "smoke",
                    [
                        f"run.dir={folder}/{quantize}-{i}",
                        f"model.quantize={quantize}",
                        f"run.merge={merge}",
                        "run.device=cuda",
                    ],
                )
                for i in range(2)
            ]
            same = len({(r.adapter / "adapter_model.safetensors").read_bytes() for r in runs}) == 1
            summary = runs[0].summary
            yield {
                "check": f"smoke recipe, {quantize}",
                "accuracy": summary["after"]["accuracy"],
                "merge": summary["merge"]["targets"][merge]["logits"],
                "same_bytes_twice": same,
                "ok": same and summary["merge"]["verified"],
            }


def op_speed() -> Iterator[Row]:
    """Time and extra memory of linear_cross_entropy against full logits in bfloat16, interleaved, medians of 20."""
    import torch
    from torch.nn import functional as F

    from peftlab.ops import linear_cross_entropy

    def full(x: Any, w: Any, t: Any) -> Any:
        return F.cross_entropy(F.linear(x, w).float(), t, reduction="none")

    for num_tokens, hidden, vocab in ((4096, 576, 49152), (4096, 4096, 128256)):
        x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
        t = torch.randint(0, vocab, (num_tokens,), device="cuda")
        times: dict[str, list[float]] = {"peftlab": [], "full logits": []}
        memory: dict[str, int] = {}
        for repetition in range(23):
            for name, loss in (("peftlab", linear_cross_entropy), ("full logits", full)):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before, start = torch.cuda.memory_allocated(), time.perf_counter()
                torch.autograd.grad(loss(x, w, t).sum(), x)
                torch.cuda.synchronize()
                if repetition >= 3:
                    times[name].append(time.perf_counter() - start)
                memory[name] = torch.cuda.max_memory_allocated() - before
        medians = {k: statistics.median(v) for k, v in times.items()}
        yield {
            "benchmark": "linear_cross_entropy forward + backward, frozen head",
            "shape": [num_tokens, hidden, vocab],
            "median_s": medians,
            "quartiles_s": {k: statistics.quantiles(v, n=4) for k, v in times.items()},
            "extra_bytes": memory,
            "time_ratio": medians["peftlab"] / medians["full logits"],
            "ok": True,
        }


def step_speed() -> Iterator[Row]:
    """Tokens/s of training steps on a Llama of SmolLM2's shape with random weights, batch 32, by storage."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftlab

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=260, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        from peftlab.models.tiny import tiny_tokenizer

        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{folder}/model")
        tiny_tokenizer().save_pretrained(f"{folder}/model")
        for quantize in ("none", "nf4", "int8"):
            run = peftlab.train(
                "smoke",
                [f"model.name={folder}/model", f"model.quantize={quantize}", f"run.dir={folder}/{quantize}", "run.merge=none",
                 "train.batch_size=32", "train.max_steps=30", "train.lr=1e-4", "run.device=cuda", "eval.before=false"],
            )  # fmt: skip
            steps = [m["tokens_per_s"] for m in run.metrics() if "tokens_per_s" in m][10:]
            yield {
                "benchmark": f"training step, Llama 106M shape, {quantize}",
                "tokens_per_s_median": statistics.median(steps),
                "tokens_per_s_quartiles": statistics.quantiles(steps, n=4),
                "peak_memory_bytes": run.summary["training"]["peak_memory_bytes"],
                "ok": True,
            }


def machine() -> Row:
    import importlib.metadata as metadata

    import torch

    names = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    properties = torch.cuda.get_device_properties(0)
    return {
        "machine": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "versions": versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new row is begun after this time")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch finds none; nothing was checked", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, red = time.monotonic() + 60 * options.minutes, 0
    with (options.out / "gpu_check.jsonl").open("w", encoding="utf-8") as stream:

        def write(row: Row) -> None:
            print(json.dumps(row), flush=True)
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        write(machine())
        for part in (op_correctness, quantized_loading, end_to_end, op_speed, step_speed):
            if red and part in (op_speed, step_speed):
                write({"skipped": part.__name__, "reason": f"{red} correctness rows are red"})
                continue
            try:
                for row in part():
                    write(row)
                    red += not row["ok"]
                    if time.monotonic() > deadline:
                        write({"stopped": part.__name__, "reason": f"{options.minutes:g} minutes are over"})
                        return 6
            except Exception as error:  # a part that breaks must not take the rows after it along
                red += 1
                write({"failed": part.__name__, "error": f"{type(error).__name__}: {error}", "ok": False})
    return 6 if red else 0


if __name__ == "__main__":
    sys.exit(main())
