"""The fused linear losses against full logits on a CPU: time in one process, peak memory in one process each.

    python -m bench.studies.linear_losses [--tokens 512] [--vocab 128256] [--hidden 1024] [--repeats 5] [--out DIR]

First the losses and gradients of both must agree (exit code 6 otherwise). Then the contestants take turns. A ratio is the ratio
of the medians. Memory is the peak of a process beyond its inputs, over forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT
from bench.records import provenance, write_json
from bench.tables import where

# Case: (trained head, teacher, type).
CASES: dict[str, tuple[bool, str | None, str]] = {
    "cross-entropy, frozen head": (False, None, "float32"),
    "cross-entropy, trained head": (True, None, "float32"),
    "cross-entropy, trained head, bfloat16": (True, None, "bfloat16"),
    "distillation, frozen head": (False, "online", "float32"),
    "distillation, trained head": (True, "online", "float32"),
    "distillation, trained head, bfloat16": (True, "online", "bfloat16"),
    "top-64 + tail, frozen head": (False, "sparse", "float32"),
}
# Relative limits of the loss and of gradients. With a tail, gradients of listed classes and tail nearly cancel. In bfloat16 both
# sides round the logits' gradient to 8 bits.
AGREEMENT = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 2e-2)}
_MIB = 2**20


def contestants(case: str, tokens: int, vocab: int, hidden: int) -> tuple[dict[str, Callable[[], Any]], list[Any]]:
    """The losses of a case by name, and the tensors that need gradients."""
    import torch
    from torch.nn import functional as F

    from peftlab import ops

    trained, way, name = CASES[case]
    dtype = getattr(torch, name)

    def normal(rows: int, columns: int, std: float = 1.0) -> Any:
        return torch.empty(rows, columns, dtype=dtype).normal_(std=std)

    torch.manual_seed(0)
    x = normal(tokens, hidden).requires_grad_()
    w = normal(vocab, hidden, hidden**-0.5).requires_grad_(trained)
    t = torch.randint(vocab, (tokens,))
    tx, tw = normal(tokens, hidden // 2), normal(vocab, hidden // 2, (hidden // 2) ** -0.5)
    sparse = None
    if way == "sparse":
        parts = [F.linear(part, tw).softmax(-1).topk(64) for part in tx.split(64)]
        sparse = ops.SparseTeacher(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))

    def fused() -> Any:
        head = ops.Head(ops.DenseWeight(w))
        if way is None:
            return ops.linear_cross_entropy(x, head, t).total
        teacher = sparse if sparse is not None else ops.OnlineTeacher(tx, ops.Head(ops.DenseWeight(tw)))
        return ops.linear_kl(x, head, teacher).total

    def full() -> Any:
        logits = F.linear(x, w).float()
        if way is None:
            return F.cross_entropy(logits, t, reduction="sum")
        log_q = logits.log_softmax(-1)
        if sparse is None:
            with torch.no_grad():
                log_p = F.linear(tx, tw).float().log_softmax(-1)
            return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        rest = (1 - sparse.probs.sum(-1)).clamp_min(1e-30)
        log_rest = log_q.scatter(1, sparse.ids, -torch.inf).logsumexp(-1)
        listed = (sparse.probs * (sparse.probs.log() - log_q.gather(1, sparse.ids))).sum()
        return listed + (rest * (rest.log() - log_rest)).sum()

    return {"peftlab": fused, "full logits": full}, [x, w] if trained else [x]


def extra_memory(case: str, name: str, sizes: tuple[int, int, int]) -> int:
    """Peak bytes of this process beyond its inputs."""
    import torch

    from peftlab.measuring.memory import memory_bytes, peak_memory_bytes, release_memory, share_one_heap

    share_one_heap()
    losses, leaves = contestants(case, *sizes)
    small, few = contestants(case, 2, 64, 16)  # a library's first allocations do not belong to the loss
    torch.autograd.grad(small[name](), few)
    release_memory()
    before = memory_bytes("cpu")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch.autograd.grad(losses[name](), leaves)
    return peak_memory_bytes("cpu") - before


def measure(case: str, sizes: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    import torch

    from peftlab.measuring.timing import time_round

    losses, leaves = contestants(case, *sizes)
    values, gradients = {}, {}
    for name, loss in losses.items():
        value = loss()
        values[name], gradients[name] = value.detach(), torch.autograd.grad(value, leaves)
    loss_gap, gradient_gap = abs(float(values["peftlab"] / values["full logits"]) - 1), 0.0
    for ours, theirs in zip(*gradients.values(), strict=True):
        gradient_gap = max(gradient_gap, float((ours.float() - theirs.float()).norm() / theirs.float().norm()))
    del gradients, ours, theirs
    calls = [(name, partial(_forward_and_backward, loss, leaves)) for name, loss in losses.items()]
    rounds = [time_round(dict(calls[:: 1 if n % 2 == 0 else -1]), "cpu", 1) for n in range(repeats)]
    times = {name: [ms[name] / 1000 for ms in rounds] for name in losses}
    command = [sys.executable, "-m", "bench.studies.linear_losses", "--memory-of", case, *map(str, sizes)]
    memory = {
        name: int(subprocess.run([*command, name], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        for name in losses
    }
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "case": case,
        "largest_relative_difference": max(loss_gap, gradient_gap),
        "agree": all(
            gap <= limit for gap, limit in zip((loss_gap, gradient_gap), AGREEMENT[CASES[case][2]], strict=True)
        ),
        "seconds": {name: sorted(seconds) for name, seconds in times.items()},
        "time_ratio": median["peftlab"] / median["full logits"],
        "pair_ratios": sorted(a / b for a, b in zip(times["peftlab"], times["full logits"], strict=True)),
        "extra_bytes": memory,
        "memory_ratio": memory["peftlab"] / memory["full logits"],
    }


def _forward_and_backward(loss: Callable[[], Any], leaves: list[Any]) -> None:
    import torch

    torch.autograd.grad(loss(), leaves)


def table(result: dict[str, Any]) -> str:
    sizes = result["sizes"]
    lines = [
        f"{sizes[0]} tokens, vocabulary {sizes[1]:,}, width {sizes[2]:,} (teacher {sizes[2] // 2:,}), float32 unless stated otherwise, "
        f"{where(result)}. `{result['command']}`",
        "",
        "| case | seconds, ours | full logits | time, ratio (range of pairs) | extra MiB, ours | full logits | memory, "
        "ratio | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        ours, full = (statistics.median(row["seconds"][name]) for name in ("peftlab", "full logits"))
        pairs = row["pair_ratios"]
        memory = row["extra_bytes"]
        lines.append(
            f"| {row['case']} | {ours:.2f} | {full:.2f} | {row['time_ratio']:.2f} ({pairs[0]:.2f}..{pairs[-1]:.2f}) | "
            f"{memory['peftlab'] / _MIB:,.0f} | {memory['full logits'] / _MIB:,.0f} | {row['memory_ratio']:.2f} | "
            f"{row['largest_relative_difference']:.1e} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", nargs=5, metavar=("CASE", "TOKENS", "VOCAB", "HIDDEN", "NAME"))
    options = parser.parse_args()
    if options.memory_of:
        case, tokens, vocab, hidden, name = options.memory_of
        print(extra_memory(case, name, (int(tokens), int(vocab), int(hidden))))
        return 0
    sizes = (options.tokens, options.vocab, options.hidden)
    rows = []
    for case in CASES:
        rows.append(measure(case, sizes, options.repeats))
        print(
            f"{case}: time {rows[-1]['time_ratio']:.2f}, memory {rows[-1]['memory_ratio']:.2f}, "
            f"difference {rows[-1]['largest_relative_difference']:.1e}",
            file=sys.stderr,
        )
    chosen = {k: v for k, v in vars(options).items() if v != parser.get_default(k) and k != "out"}
    command = " ".join(["python -m bench.studies.linear_losses", *(f"--{k} {v}" for k, v in chosen.items())])
    result = {"sizes": sizes, "cases": rows, **provenance(command)}
    write_json(options.out / "linear_losses.json", result)
    if not all(row["agree"] for row in rows):
        return 6
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
