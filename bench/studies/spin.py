"""Speed of two training processes on the same cores, by how long idle OpenMP threads spin before they sleep.

    python -m bench.studies.spin [--steps 4] [--out bench/results]

Each process runs LoRA steps (8 x 40 tokens, float32) on a Llama of SmolLM2-135M's shape with random weights. The program prints
tokens/s of one process alone and of two in parallel, per GOMP_SPINCOUNT, and writes spin.json. For a pair that does not finish
its steps within the time limit, the finished steps count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT

LIMIT_S = 60


def worker(steps: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftlab.adapters import inject

    config = LlamaConfig(
        vocab_size=260, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = inject(LlamaForCausalLM(config).requires_grad_(False), "lora", peft_type="CAUSAL_LM", rank=8, alpha=16)
    ids = torch.randint(0, 260, (8, 40))
    model(input_ids=ids, labels=ids).loss.backward()
    done: list[float] = []
    started = time.monotonic()
    while len(done) < steps and time.monotonic() - started < LIMIT_S:
        begin = time.monotonic()
        model(input_ids=ids, labels=ids).loss.backward()
        done.append(ids.numel() / (time.monotonic() - begin))
    print(statistics.median(done))


def measure(spin: str | None, processes: int, steps: int) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    if spin is not None:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-m", "bench.studies.spin", "--worker", "--steps", str(steps)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(processes)
    ]
    return [float(p.communicate()[0]) for p in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.steps)
        return
    import importlib.metadata as metadata

    rows: list[dict[str, Any]] = []
    for spin in ("1000", "5000", "20000"):
        row: dict[str, Any] = {"GOMP_SPINCOUNT": spin or "default"}
        row["alone_tokens_per_s"] = measure(spin, 1, options.steps)
        row["two_side_by_side_tokens_per_s"] = measure(spin, 2, options.steps)
        rows.append(row)
        print(json.dumps(row), flush=True)
    document = {
        "command": "python -m bench.studies.spin",
        "cores": os.cpu_count(),
        "torch": metadata.version("torch"),
        "rows": rows,
    }
    (options.out / "spin.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
