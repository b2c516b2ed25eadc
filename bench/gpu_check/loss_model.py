"""What bytes and FLOPs say of the losses that loss_speed.py times, and the targets that follow from it.

    python -m bench.gpu_check.loss_model     prints its table, which bench/results/PENDING.md has

A contestant takes its products at the card's rate and, one after the other, the bytes that its passes over logits move. Those of
dense PyTorch are counted op by op (every input read once, every output written once), their peak with PyTorch's profiler, both on a
CPU. A range has 8 bytes a logit and softmax more at its upper end: rows of 128,256 classes are too long to stay in a
multiprocessor, so that CUDA's softmax reads them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu_check.roofline import CARD, CARDS, gemm_flops

CE_FROZEN, CE_TRAINED = "cross-entropy, frozen head", "cross-entropy, trained head"
KL, JSD, TOP = "distillation, frozen head", "JSD + labels, frozen head", "top-64 + tail, frozen head"
CLASSES = 128256
CHUNK_ROWS = 4096  # of logits at a time on an H200 (heads.py): beside a teacher half of them are its own
# Tokens, hidden size of the student's head; the teacher's is 4096. Liger's own benchmark of JSD halves the student's.
SHAPES = {CE_FROZEN: (4096, 4096), CE_TRAINED: (4096, 4096), KL: (8192, 4096), JSD: (8192, 2048), TOP: (8192, 4096)}
TEACHER_HIDDEN = 4096
# By case: the contestant, how many times as fast ours has to be, and how many times less memory it may take beside the inputs.
# Where the arithmetic gives a range, the target is a little below its lower end.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    CE_FROZEN: {"full logits": (1.30, None)},
    CE_TRAINED: {"full logits": (1.20, None), "Liger": (4.0, None), "Liger CuTe": (0.97, None), "QuACK": (0.83, None)},
    KL: {
        "lean KL": (1.50, 15.0),
        "Liger JSD": (1.80, 3.0),
        "Liger KLDiv": (1.00, 3.0),
        "Liger chunked JSD": (1.45, 3.0),
    },
    JSD: {"JSD + CE": (4.0, 50.0), "Liger chunked JSD": (1.45, 3.0)},
    TOP: {"lean KL": (2.20, 15.0), "Liger chunked JSD": (2.00, None)},
}


@dataclass(frozen=True)
class Dense:
    """Of a loss in plain PyTorch on full logits. softmaxes: those that may read twice. peak: bytes held at most a logit."""

    bytes_per_logit: float
    softmaxes: int
    peak: float


DENSE = {
    "full logits": Dense(44, 2, 12),
    "lean KL": Dense(102, 2, 20),
    "JSD + CE": Dense(394, 3, 64),
}
# Ours: written by the product, read twice (JSD: three times), the gradient written and read by the next product; two such logits
# beside a dense teacher.
OURS_BYTES = {CE_FROZEN: 10, CE_TRAINED: 10, KL: 16, JSD: 18, TOP: 10}
# Of 8192 x 128256 logits, by instructions counted in PTX: more than its bytes take.
JSD_ROWS_MS = 7.0


def products_ms(case: str) -> float:
    """The student's logits and its gradient; the head's gradient; the teacher's logits."""
    num_tokens, hidden = SHAPES[case]
    flops = (3 if case == CE_TRAINED else 2) * gemm_flops(num_tokens, CLASSES, hidden)
    flops += gemm_flops(num_tokens, CLASSES, TEACHER_HIDDEN) if case in (KL, JSD) else 0
    return 1e3 * flops / CARDS[CARD].flops_per_s


def logits_ms(case: str, bytes_per_logit: float) -> float:
    return 1e3 * SHAPES[case][0] * CLASSES * bytes_per_logit / CARDS[CARD].bytes_per_s


def ours_ms(case: str) -> float:
    return products_ms(case) + (JSD_ROWS_MS if case == JSD else logits_ms(case, OURS_BYTES[case]))


def dense_ms(case: str, name: str) -> tuple[float, float]:
    """Of the plain contestant, from its bytes and with softmaxes that read twice."""
    dense = DENSE[name]
    # A stored teacher is compared with one that is asked.
    products = products_ms(KL if case == TOP else case)
    low, high = (logits_ms(case, dense.bytes_per_logit + again) for again in (0, 8 * dense.softmaxes))
    return products + low, products + high


def ours_bytes(case: str) -> float:
    """Beside the inputs: logits of a chunk, and the gradient of the hidden states."""
    num_tokens, hidden = SHAPES[case]
    return 2.0 * CHUNK_ROWS * CLASSES + 2.0 * num_tokens * hidden


def dense_bytes(case: str, name: str) -> float:
    return DENSE[name].peak * SHAPES[case][0] * CLASSES


def predictions() -> list[str]:
    lines = [
        "| loss, forward + backward, H200 | products, ms | ours, ms | dense PyTorch, ms | ratio | target | its memory by ours | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, targets in TARGETS.items():
        for name in (name for name in targets if name in DENSE):
            low, high = dense_ms(case, name)
            ours, (ratio, memory) = ours_ms(case), targets[name]
            less = dense_bytes(case, name) / ours_bytes(case)
            cells = [f"{case}, against {name}", f"{products_ms(case):.1f}", f"{ours:.1f}", f"{low:.1f} to {high:.1f}"]
            cells += [f"{low / ours:.2f} to {high / ours:.2f}", f"{ratio:.2f}"]
            cells += [f"{less:.1f}", f"{memory:g}"] if memory else ["", "none"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(predictions()))
