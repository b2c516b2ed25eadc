"""What bytes and FLOPs say of the losses that loss_speed.py times, and the targets that follow from it.

    python -m bench.gpu_check.loss_model     prints its table, which bench/results/PENDING.md has

A contestant takes its products at the card's rate and, one after the other, the bytes that its passes over logits move. Those of
dense PyTorch are counted op by op (every input read once, every output written once), their peak with PyTorch's profiler, both on a
CPU. A range has 8 bytes a logit and softmax more at its upper end: rows of 128,256 classes are too long to stay in a
multiprocessor, so that CUDA's softmax reads them again.
"""

from __future__ import annotations

from typing import NamedTuple

from peftlab_kernels.cases import NUM_CLASSES, PlainLoss, TimedLoss, gathered

from bench.gpu_check.roofline import CARD, CARDS, gemm_flops

# By name, over all ops.
TIMED: dict[str, TimedLoss] = {
    name: timed for op_losses in gathered("TIMED_LOSSES").values() for name, timed in op_losses.items()
}
CHUNK_ROWS = 4096  # of logits at a time on an H200 (heads.py): beside a teacher half of them are its own


class Needs(NamedTuple):
    """Of the plain contestant: milliseconds from its bytes, and with softmaxes that read twice; bytes beside the inputs."""

    low_ms: float
    high_ms: float
    bytes: float


def products_ms(timed: TimedLoss, *, asked: bool) -> float:
    """The student's logits and its gradient; the gradient of a trained head; the logits of a teacher that is asked."""
    flops = (3 if timed.trained else 2) * gemm_flops(timed.tokens, NUM_CLASSES, timed.hidden)
    flops += gemm_flops(timed.tokens, NUM_CLASSES, timed.teacher) if asked and timed.teacher else 0
    return 1e3 * flops / CARDS[CARD].flops_per_s


def logits_ms(timed: TimedLoss, bytes_per_logit: float) -> float:
    return 1e3 * timed.tokens * NUM_CLASSES * bytes_per_logit / CARDS[CARD].bytes_per_s


def ours_ms(timed: TimedLoss) -> float:
    return products_ms(timed, asked=not timed.stored) + (timed.rows_ms or logits_ms(timed, timed.bytes_per_logit))


def ours_bytes(timed: TimedLoss) -> float:
    """Beside the inputs: logits of a chunk, and the gradient of the hidden states."""
    return 2.0 * CHUNK_ROWS * NUM_CLASSES + 2.0 * timed.tokens * timed.hidden


def needs_of(plain: PlainLoss, timed: TimedLoss) -> Needs:
    """A stored teacher is compared with one that is asked."""
    products = products_ms(timed, asked=True)
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
        products = products_ms(timed, asked=not timed.stored)
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
