"""Predicts, from bytes and FLOPs, the losses that loss_speed.py times, and derives their targets.

    python -m bench.gpu_check.loss_model     prints its table, which is part of bench/results/PENDING.md

A contestant's time is its products at the card's rate plus the bytes that its passes over logits move. For dense PyTorch the
bytes are counted op by op (every input read once, every output written once) and the peak with PyTorch's profiler, both on a
CPU. The upper end of a range adds 8 bytes per logit and softmax: rows of 128,256 classes are too long to stay in a
multiprocessor, so CUDA's softmax reads them again.
"""

from __future__ import annotations

from typing import NamedTuple

from peftlab_kernels.cases import NUM_CLASSES, PlainLoss, TimedLoss, gathered

from bench.gpu_check.roofline import CARD, CARDS, gemm_flops

# By name, over all ops.
TIMED: dict[str, TimedLoss] = {
    name: timed for losses in gathered("TIMED_LOSSES").values() for name, timed in losses.items()
}
CHUNK_ROWS = 4096  # rows of logits at a time on an H200 (heads.py); an online teacher uses half of them


class Needs(NamedTuple):
    """Of the plain contestant: milliseconds from its bytes, the same with softmaxes that read twice, bytes on top of the inputs."""

    low_ms: float
    high_ms: float
    bytes: float


def products_ms(timed: TimedLoss, *, online: bool) -> float:
    """Products of the student's logits and gradient, of a trained head's gradient and, if ``online``, of the teacher's logits."""
    flops = (3 if timed.trained else 2) * gemm_flops(timed.tokens, NUM_CLASSES, timed.hidden)
    flops += gemm_flops(timed.tokens, NUM_CLASSES, timed.teacher) if online and timed.teacher else 0
    return 1e3 * flops / CARDS[CARD].flops_per_s


def logits_ms(timed: TimedLoss, bytes_per_logit: float) -> float:
    return 1e3 * timed.tokens * NUM_CLASSES * bytes_per_logit / CARDS[CARD].bytes_per_s


def ours_ms(timed: TimedLoss) -> float:
    return products_ms(timed, online=not timed.stored) + (timed.rows_ms or logits_ms(timed, timed.bytes_per_logit))


def ours_bytes(timed: TimedLoss) -> float:
    """Bytes on top of the inputs: logits of a chunk, and the gradient of the hidden states."""
    return 2.0 * CHUNK_ROWS * NUM_CLASSES + 2.0 * timed.tokens * timed.hidden


def needs_of(plain: PlainLoss, timed: TimedLoss) -> Needs:
    """The plain contestant's needs. A stored teacher is compared with an online one."""
    products = products_ms(timed, online=True)
    low, high = (logits_ms(timed, plain.bytes_per_logit + again) for again in (0, 8 * plain.softmaxes))
    return Needs(products + low, products + high, plain.peak * timed.tokens * NUM_CLASSES)


def predictions() -> list[str]:
    lines = [
        "| loss, forward + backward, H200 | products, ms | ours, ms | dense PyTorch, ms | ratio | target | its memory by ours | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, timed in TIMED.items():
        needs, ours = needs_of(timed.plain, timed), ours_ms(timed)
        ratio, memory = timed.targets[timed.plain.name]
        products = products_ms(timed, online=not timed.stored)
        cells = [f"{case}, against {timed.plain.name}", f"{products:.1f}", f"{ours:.1f}"]
        cells += [
            f"{needs.low_ms:.1f} to {needs.high_ms:.1f}",
            f"{needs.low_ms / ours:.2f} to {needs.high_ms / ours:.2f}",
        ]
        cells += [
            f"{ratio:.2f}",
            *([f"{needs.bytes / ours_bytes(timed):.1f}", f"{memory:g}"] if memory else ["", "none"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(predictions()))
