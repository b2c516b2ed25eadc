"""Predicts the time of a LoRA linear with the model of kernels.md (section 2), and derives the targets.

    python -m bench.gpu_check.roofline     prints the predictions of bench/results/PENDING.md

Times are bytes over bandwidth plus FLOPs over rate, without launches and without a mask's random numbers.
"""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from typing import NamedTuple

from peftlab_kernels.cases import gathered
from peftlab_kernels.lora_linear.cases import LAYER
from peftlab_kernels.lora_linear.plan import rule

from bench.gpu_check.base import Device


class Card(NamedTuple):
    """Rates in the model: bfloat16 products with float32 sums; 82 to 88 % of the data sheet's memory bandwidth."""

    flops_per_s: float
    bytes_per_s: float


# gpu-check measures both. Reported for an H200: 769 to 798 TFLOP/s and a copy at 4.3 TB/s.
GEMM_FLOPS, HBM_BYTES_PER_S, HBM_SHARE, PROCESSORS = 790e12, 4.8e12, 0.85, 132
CARDS = {
    "H200": Card(GEMM_FLOPS, HBM_SHARE * HBM_BYTES_PER_S),
    "H100": Card(770e12, 2.95e12),
    "RTX 4090": Card(157e12, 0.887e12),
    "RTX 5090": Card(192e12, 1.58e12),
    "RTX 3090": Card(65e12, 0.82e12),
}
# The card of the rows' targets and of the claims that name it; on other cards a figure has no target.
CARD = "H200"
SHARED_READ_RANK = 32  # up to this rank one read of dY gives dS and dB (passes.py)
# Bytes per element, by kind of weight.
STORED_BYTES = {"dense": 2.0, **{s.kind: s.stored_bytes for s in gathered("STORAGE").values()}}
NUM_LAYERS, HIDDEN = 32, 4096
# Milliseconds of a step of 8,192 tokens outside the layers' linears: eager RMSNorm, rotations and SwiGLU 143 (4.5 per layer),
# the head's two products 22 and its logits 8, attention 20, the rest 7. Counted from bytes, not measured.
OTHER_WORK_MS = 200.0
# By rows and dropout: ratio to PEFT + bitsandbytes that should be reached on an H200 according to the arithmetic. The model gives
# 1.24 and 1.27 at 8,192 rows. At 2,048 it gives 1.22 and 1.25, but ignores a dozen small kernels per linear (2 to 5 us each) and
# that PEFT's 17 MB tensors stay in the L2: 1.12 to 1.20, and 1.15 to 1.25.
TARGET = {8192: {False: 1.20, True: 1.25}, 2048: {False: 1.12, True: 1.15}}
RANKS_TARGET = {False: 1.10, True: 1.12}  # ranks 8 and 64 at 2,048 rows: rank 64 costs another 0.02 to 0.03
LIMIT = {False: 1.32, True: 1.33}  # kernels.md's
# Both read the stored weight once. The factors (12 KB per tile against 4.2 KB of weight, from the L2) and the matrix unit
# take 2 to 4 us of about 13 for a 4096 x 4096 weight: 1.1 to 1.4.
MERGE_LIMIT = 1.4
DEQUANT_TARGET = {"small": 1.30, "large": 1.05}
SMALL_WEIGHT = 8 * 2**20  # elements; below this launches take most of bitsandbytes' time
DROPOUT_MEMORY_TARGET = 0.10  # share of the bytes that PEFT keeps for backward
STEP_TARGET = 1.15
# The whole layer. The model gives 1.06 and 1.07 at 2,048 and 8,192 rows, with dropout 1.16 and 1.18. The small kernels that it
# ignores take a larger share of the time at 2,048.
UNSLOTH_TARGET = {8192: {False: 1.05, True: 1.12}, 2048: {False: 1.00, True: 1.08}}


def card_of(device: Device) -> str | None:
    """The model's card that this device is, if any."""
    return next((name for name in CARDS if device.has(name)), None)


def dequant_bytes(kind: str, N: int, K: int) -> float:
    """Bytes to read the stored weight once and write it once in 16 bits."""
    return (STORED_BYTES[kind] + 2) * N * K if kind != "dense" else 0.0


def gemm_flops(M: int, N: int, K: int) -> float:
    return 2.0 * M * N * K


def base_bytes(kind: str, M: int, N: int, K: int, *, passes: int = 2) -> float:
    """Least bytes of the frozen product, forward and dX: the stored weight, the input and the output."""
    return passes * (STORED_BYTES[kind] * N * K + 2.0 * M * N + 2.0 * M * K)


def adapter_bytes(who: str, kind: str, M: int, N: int, K: int, R: int, *, dropout: bool, merged: bool) -> float:
    """Bytes in addition to the base products.

    Args: who: ``PEFT``, ``limit`` (the floor of kernels.md), ``built`` or ``Unsloth``. ``built`` counts the bytes of
    lora_linear's passes with their workspaces, and the adapter's parts of y and dX written once; the added product hides reading
    them again. ``Unsloth`` (fast_lora.py) reads and writes y and dX once more, and reads dY twice and x three times. With dropout it
    also makes a dropped x with its mask, again in backward, and computes dX through the mask.
    """
    MN, MK = 1.0 * M * N, 1.0 * M * K
    if who == "Unsloth":
        return 8 * MN + 10 * MK + (19 * MK if dropout else 0)
    if who == "PEFT":
        return 24 * MN + 12 * MK + (10 * MK if dropout else 0)
    floor = 2 * MN + 4 * MK + (3 / 8 * MK if dropout else 0)
    if who == "limit":
        return floor
    tiles_m, tiles_n, tiles_k = -(-M // 64), -(-N // 128), -(-K // 128)
    partial = 8.0 * R * K * _groups(M, tiles_k)
    partial += 8.0 * R * (tiles_n * M + N * _groups(M, tiles_n)) if R <= SHARED_READ_RANK else 2 * MN
    partial += 8.0 * R * M * _groups(K, tiles_m) if dropout else 0.0
    added = 0.0 if merged else 2 * MN + 2 * MK
    copied = 8.0 * N * K if merged and kind == "dense" else 0.0
    return floor + partial + added + copied


def forward_bytes(who: str, kind: str, M: int, N: int, K: int, R: int, *, dropout: bool, merged: bool) -> float:
    """The part of ``adapter_bytes`` that the forward moves."""
    MN, MK = 1.0 * M * N, 1.0 * M * K
    if who == "PEFT":
        return 16 * MN + 2 * MK + (5 * MK if dropout else 0)
    floor = 2 * MK + (MK / 8 if dropout else 0)
    if who == "limit":
        return floor
    partial = 8.0 * R * M * _groups(K, -(-M // 64)) if dropout else 0.0
    return floor + partial + (4.0 * N * K if merged and kind == "dense" else 0.0) + (0.0 if merged else 2 * MN)


def _groups(size: int, tiles: int) -> int:
    """Number of groups of rows or columns, one partial sum each, as ``passes._per_group`` forms them."""
    return max(1, min(-(-size // 256), -(-4 * PROCESSORS // tiles)))


def predicted_us(
    who: str,
    kind: str,
    M: int,
    N: int,
    K: int,
    R: int = 16,
    *,
    dropout: bool,
    card: str = CARD,
) -> float:
    """Microseconds of forward and backward; who: ``base``, or as ``adapter_bytes``."""
    moved = 2 * dequant_bytes(kind, N, K)
    if who != "base":
        moved += adapter_bytes(who, kind, M, N, K, R, dropout=dropout, merged=_merged(kind, M, N, K, dropout))
    return 1e6 * (2 * gemm_flops(M, N, K) / CARDS[card].flops_per_s + moved / CARDS[card].bytes_per_s)


def _merged(kind: str, M: int, N: int, K: int, dropout: bool) -> bool:
    return rule("sm_90", kind, M=M, N=N, K=K, dropout=dropout).backward == "merged"


def layer_us(who: str, M: int, R: int = 16, *, dropout: bool, kind: str = "nf4", card: str = CARD) -> float:
    """Microseconds of the seven linears, each on its own."""
    return sum(
        count * predicted_us(who, kind, M, N, K, R, dropout=dropout, card=card) for (N, K), count in LAYER.items()
    )


def additions_us(M: int, *, card: str = CARD) -> float:
    """Autograd's additions in a whole layer: dX of q, k and v, and of gate and up, three times two reads and a write."""
    return 1e6 * 3 * 6.0 * M * HIDDEN / CARDS[card].bytes_per_s


def step_ms(who: str, tokens: int, *, dropout: bool) -> float:
    """A training step of Llama-3-8B in NF4, r=16, with recomputation: every linear twice forward and once backward."""
    total = OTHER_WORK_MS * tokens / 8192 + 1e-3 * NUM_LAYERS * additions_us(tokens)
    for (N, K), count in LAYER.items():
        shape = (tokens, N, K, 16)
        merged = _merged("nf4", tokens, N, K, dropout)
        moved = 3 * dequant_bytes("nf4", N, K)
        moved += adapter_bytes(who, "nf4", *shape, dropout=dropout, merged=merged)
        moved += forward_bytes(who, "nf4", *shape, dropout=dropout, merged=merged)
        seconds = 3 * gemm_flops(tokens, N, K) / GEMM_FLOPS + moved / (HBM_BYTES_PER_S * HBM_SHARE)
        total += 1e3 * NUM_LAYERS * count * seconds
    return total


def predictions() -> str:
    """The tables of bench/results/PENDING.md."""
    tables = (_layers(), _linears(), _cards(), _whole_layer(), _steps(), _dequantizations())
    return "\n\n".join("\n".join(lines) for lines in tables)


def _layers() -> list[str]:
    lines = [
        "| linears of a Llama-3-8B layer, H200 | PEFT, us | ours: floor | as built | predicted ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    cases = [(M, 16, dropout) for M in (512, 2048, 8192) for dropout in (False, True)]
    for M, R, dropout in [*cases, *((2048, R, d) for R in (8, 64) for d in (False, True))]:
        peft, limit, built = (layer_us(who, M, R, dropout=dropout) for who in ("PEFT", "limit", "built"))
        targets = TARGET.get(M, {}) if R == 16 else RANKS_TARGET
        target = f"{targets[dropout]:.2f}" if dropout in targets else "none"
        name = f"M={M}, r={R}, {'dropout 0.05' if dropout else 'no dropout'}"
        lines.append(f"| {name} | {peft:,.0f} | {limit:,.0f} | {built:,.0f} | {peft / built:.2f} | {target} |")
    return lines


def _cards() -> list[str]:
    lines = [
        "| the same by card, PEFT by ours as built, r=16, no dropout / dropout | M=2048 | M=8192 |",
        "|---|---|---|",
    ]
    for card in CARDS:
        cells = []
        for M in (2048, 8192):
            pairs = (
                [layer_us(who, M, dropout=dropout, card=card) for who in ("PEFT", "built")] for dropout in (False, True)
            )
            cells.append(" / ".join(f"{peft / built:.2f}" for peft, built in pairs))
        lines.append(f"| {card} | {' | '.join(cells)} |")
    return lines


def _whole_layer() -> list[str]:
    lines = [
        "| the layer's seven linears as a whole, with autograd's additions, H200 | Unsloth, us | as built | ratio | target |",
        "|---|---|---|---|---|",
    ]
    for M in (2048, 8192):
        for dropout in (False, True):
            unsloth = layer_us("Unsloth", M, dropout=dropout)
            built = layer_us("built", M, dropout=dropout) + additions_us(M)
            name = f"M={M}, {'dropout 0.05' if dropout else 'no dropout'}"
            target = UNSLOTH_TARGET[M][dropout]
            lines.append(f"| {name} | {unsloth:,.0f} | {built:,.0f} | {unsloth / built:.2f} | {target:.2f} |")
    return lines


def _linears() -> list[str]:
    lines = ["| one NF4 linear, no dropout / dropout, r=16 | M=2048 | M=8192 |", "|---|---|---|"]
    for N, K in LAYER:
        cells = []
        for M in (2048, 8192):
            pair = (
                predicted_us("PEFT", "nf4", M, N, K, dropout=d) / predicted_us("built", "nf4", M, N, K, dropout=d)
                for d in (False, True)
            )
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in pair))
        lines.append(f"| {N}x{K} | {' | '.join(cells)} |")
    return lines


def _steps() -> list[str]:
    lines = [
        "| training step of Llama-3-8B, NF4, r=16, 8,192 tokens | PEFT, ms | as built, ms | ratio |",
        "|---|---|---|---|",
    ]
    for dropout in (False, True):
        peft, built = (step_ms(who, 8192, dropout=dropout) for who in ("PEFT", "built"))
        name = "dropout 0.05" if dropout else "no dropout"
        lines.append(f"| {name} | {peft:,.0f} | {built:,.0f} | {peft / built:.2f} |")
    return lines


def _dequantizations() -> list[str]:
    lines = ["| dequantization to bf16 | bytes at 4.8 TB/s, us | at 85 % of it |", "|---|---|---|"]
    for kind in ("nf4", "int8"):
        for N, K in ((1024, 4096), (4096, 4096), (14336, 4096)):
            best = 1e6 * dequant_bytes(kind, N, K) / HBM_BYTES_PER_S
            lines.append(f"| {kind} {N}x{K} | {best:.1f} | {best / HBM_SHARE:.1f} |")
    return lines


if __name__ == "__main__":
    print(predictions())
