"""Trains SmolLM2 on the fused path and on PEFT's own path, and compares the losses.

    python -m bench.studies.loss_curves [--steps 20] [--out DIR]     runs; writes DIR/loss_curves.json (default bench/results)

First it trains in float32 on three storages. There both paths compute the same and only the order of sums differs, so losses
and trained adapters must agree (exit code 6 beyond the budget). Then it trains in bfloat16 on NF4 with a small learning rate,
where adapters stay small and roundings differ. PEFT rounds base and adapter output separately; the fused path does the same
(split) or rounds once (merged). There float32 is the reference and nothing is asserted: the table shows the result.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.records import provenance, write_json

STORAGES = ("none", "nf4", "int8")
# Relative limits. Another order of sums gives about 1e-6 at the first step; AdamW turns rounding of near-zero gradients into steps.
LOSS_BUDGET, ADAPTER_BUDGET = 1e-3, 2e-2
COMMON = (
    "train.epochs=", "eval.before=false", "eval.prompts=[]", "data.eval_rows=40", "run.merge=none", "run.device=cpu",
)  # fmt: skip
SMALL = ("model.compute_dtype=bfloat16", "train.precision=bfloat16", "train.lr=1e-4", "train.schedule=constant")


def train(work: Path, name: str, steps: int, *overrides: str, plan: tuple[str, str] | None = None) -> dict[str, Any]:
    """Losses of every step, the held-out loss, and the trained adapter of one run."""
    from safetensors.torch import load_file

    import peftlab
    from peftlab import ops
    from peftlab.training.metrics_log import read_metrics
    from peftlab.training.progress import SilentProgress

    folder = work / name
    forced = ops.forced_plan(ops.Plan(*plan)) if plan else contextlib.nullcontext()
    with forced:
        run = peftlab.train(
            "quickstart",
            [*COMMON, f"train.max_steps={steps}", f"run.dir={folder}", *overrides],
            progress=SilentProgress(),
        )
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}, held out {run.summary['after']['loss']:.4f}", flush=True)
    return {
        "losses": losses,
        "held_out": run.summary["after"]["loss"],
        "parity": run.summary["parity"],
        "adapter": load_file(str(folder / "adapter" / "adapter_model.safetensors")),
    }


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Norm of the difference divided by the norm, over all updates B A together, because A and B may trade factors."""
    import torch

    gap = total = torch.zeros(())
    for name in one:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            update, reference = one[b] @ one[name], other[b] @ other[name]
            gap, total = gap + (update - reference).square().sum(), total + reference.square().sum()
    return float((gap / total).sqrt())


def run_all(steps: int) -> dict[str, Any]:
    result: dict[str, Any] = {"steps": steps, "float32": {}, "bfloat16": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for storage in STORAGES:
            pair = {
                kernels: train(
                    work, f"{storage}-{kernels}", steps, f"model.quantize={storage}", f"run.kernels={kernels}"
                )
                for kernels in ("auto", "reference")
            }
            fused, plain = pair["auto"], pair["reference"]
            result["float32"][storage] = {
                "fused": fused["losses"],
                "peft": plain["losses"],
                "held_out": [fused["held_out"], plain["held_out"]],
                "largest_loss_difference": max(
                    abs(a - b) / abs(b) for a, b in zip(fused["losses"], plain["losses"], strict=True)
                ),
                "adapter_difference": distance(fused["adapter"], plain["adapter"]),
                "num_fused": fused["parity"]["num_fused"],
            }
        truth = train(work, "truth", steps, "train.lr=1e-4", "train.schedule=constant", "run.kernels=reference")
        paths: dict[str, Any] = {
            "peft": {"run.kernels": "reference"},
            "split": {"plan": ("split", "split")},
            "merged": {"plan": ("merged", "merged")},
        }
        for name, options in paths.items():
            plan = options.pop("plan", None)
            run = train(work, f"bf16-{name}", steps, *SMALL, *(f"{k}={v}" for k, v in options.items()), plan=plan)
            result["bfloat16"][name] = {
                "losses": run["losses"],
                "held_out": run["held_out"],
                "mean_loss_difference": sum(
                    abs(a - b) / abs(b) for a, b in zip(run["losses"], truth["losses"], strict=True)
                )
                / steps,
                "adapter_difference": distance(run["adapter"], truth["adapter"]),
            }
        result["truth"] = {"losses": truth["losses"], "held_out": truth["held_out"]}
    return result


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| storage | step 1 | step 10 | last step | held out | largest difference | updates differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for storage, row in result["float32"].items():
        for name, at in (("fused", 0), ("peft", 1)):
            losses = row[name]
            ends = (
                f"{row['largest_loss_difference']:.1e} | {row['adapter_difference']:.1e}" if name == "fused" else " | "
            )
            middle = losses[min(9, len(losses) - 1)]
            lines.append(
                f"| {storage}, {name} | {losses[0]:.6f} | {middle:.6f} | {losses[-1]:.6f} | {row['held_out'][at]:.6f} | {ends} |"
            )
    lines += [
        "",
        "| bfloat16 on NF4, lr 1e-4 | last step | held out | mean loss difference to float32 | updates differ by |",
        "|---|---|---|---|---|",
        f"| float32 | {result['truth']['losses'][-1]:.5f} | {result['truth']['held_out']:.5f} | | |",
    ]
    for name, row in result["bfloat16"].items():
        lines.append(
            f"| {name} | {row['losses'][-1]:.5f} | {row['held_out']:.5f} | {row['mean_loss_difference']:.1e} | "
            f"{100 * row['adapter_difference']:.1f} % |"
        )
    versions = ", ".join(f"{k} {result['versions'][k]}" for k in ("torch", "transformers", "peft", "bitsandbytes"))
    lines += ["", f"{result['hardware']['cpu']}; {versions}; commit {result['commit'][:9]}. `{result['command']}`"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    command = f"python -m bench.studies.loss_curves --steps {arguments.steps}"
    result = {**provenance(command), **run_all(arguments.steps)}
    write_json(arguments.out / "loss_curves.json", result)
    print(tables(result))
    worst = max(row["largest_loss_difference"] for row in result["float32"].values())
    furthest = max(row["adapter_difference"] for row in result["float32"].values())
    return 6 if worst > LOSS_BUDGET or furthest > ADAPTER_BUDGET else 0


if __name__ == "__main__":
    sys.exit(main())
