"""What each adapter method does to a weight, written from its paper as functions of tensors.

A weight is a matrix [N, K] of N outputs and K inputs, as in nn.Linear; a convolution has its kernel in K. R is a rank; ``down`` is
[R, K] and ``up`` [N, R]. No function reads a layer or calls PEFT, so that each is an independent reference for PEFT's merge;
``layer_rules`` connects them with layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """[N, K] update of LoRA: ``scale * B A``, with scale = alpha / R, or alpha / sqrt(R) for rsLoRA.

    Source: Hu et al. 2021, arXiv 2106.09685, equation 3; Kalajdzievski 2023, arXiv 2312.03732.
    """
    return scale * (up @ down)


def singular(down: Tensor, values: Tensor, up: Tensor, scale: float) -> Tensor:
    """[N, K] update of AdaLoRA: ``scale * P diag(values) Q``. Source: Zhang et al. 2023, arXiv 2303.10512, equation 3.

    Args: values: [R].
    """
    return scale * (up @ (values[:, None] * down))


def expert_low_rank(down: Tensor, up: Tensor, num_experts: int, scale: float) -> Tensor:
    """[E, N, K] updates of LoRA on E experts, each a LoRA of its own.

    Args: down: [E * R, K], expert by expert. up: [N, R * E], for each rank one column per expert; so PEFT stores them.
    """
    rank = len(down) // num_experts
    downs = down.reshape(num_experts, rank, -1)
    ups = up.reshape(len(up), rank, num_experts)
    return torch.stack([low_rank(downs[e], ups[:, :, e], scale) for e in range(num_experts)])


def dora(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """[N, K] W' of DoRA: ``m * (W + D) / ||W + D||`` with the norm of each output's weights.

    Args: weight, update: [N, K] W and D. magnitude: [N].
    Source: Liu et al. 2024, arXiv 2402.09353, equation 5.
    """
    moved = weight + update
    scaled: Tensor = (magnitude / moved.norm(dim=1))[:, None] * moved
    return scaled


def vera(down: Tensor, up: Tensor, scale_d: Tensor, scale_b: Tensor) -> Tensor:
    """[N, K] update of VeRA: ``diag(b) B diag(d) A`` with frozen A and B.

    Args: scale_d: [R]. scale_b: [N].
    Source: Kopiczko et al. 2023, arXiv 2310.11454, equation 2.
    """
    return scale_b[:, None] * (up @ (scale_d[:, None] * down))


def loha(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Update of LoHa: the elementwise product of two low-rank updates.

    Source: Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098, proposition 1; Yeh et al. 2023 (LyCORIS), arXiv 2309.14859.
    """
    return scale * first * second


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """[N, C, kernel ...] of a core [R, R, kernel ...]: its first mode times the outputs' factor, its second the inputs'.

    Args: outputs: [R, N]. inputs: [R, C].
    Source: arXiv 2108.06098, proposition 3 (``T x1 X x2 Y``), with the factors stored transposed.
    """
    return torch.einsum("ab...,an,bc->nc...", core, outputs, inputs)


def lokr(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """[L * P, M * Q] update of LoKr: the Kronecker product of [L, M] and [P, Q], with a kernel inside Q.

    Source: Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, section 3; Edalati et al. 2022 (KronA), arXiv 2212.10650.
    """
    flat = second.flatten(1)
    products = torch.einsum("lm,pq->lpmq", first, flat)
    rows, columns = len(first) * len(flat), first.shape[1] * flat.shape[1]
    return scale * products.reshape(rows, columns)


def skew(upper: Tensor, size: int) -> Tensor:
    """[B, size, size] antisymmetric matrices of their entries [B, size (size - 1) / 2] above the diagonal, row by row."""
    result = upper.new_zeros(len(upper), size, size)
    rows, columns = torch.triu_indices(size, size, 1).to(upper.device)
    result[:, rows, columns] = upper
    return result - result.mT


def within(skewed: Tensor, radius: float) -> Tensor:
    """COFT's projection: each of the B matrices is shrunk to a norm of at most ``radius / sqrt(B)``.

    Source: Qiu et al. 2023, arXiv 2306.07280, section 3.3, with the radius shared among the blocks.
    """
    norms = torch.linalg.matrix_norm(skewed)[:, None, None]
    shrunk: Tensor = skewed * (radius / len(skewed) ** 0.5 / norms).clamp(max=1.0)
    return shrunk


def cayley(skewed: Tensor) -> Tensor:
    """Rotations ``(I + Q) (I - Q)^-1`` of antisymmetric Q. Source: Qiu et al. 2023 (OFT), arXiv 2306.07280, section 3.2."""
    one = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device)
    rotations: Tensor = (one + skewed) @ torch.linalg.inv(one - skewed)
    return rotations


def cayley_series(skewed: Tensor, order: int) -> Tensor:
    """The same with the inverse as a series: ``(I + Q) (I + Q + ... + Q^order)``, nearly a rotation.

    Source: Qiu et al. 2025 (OFTv2), arXiv 2506.19847, Cayley-Neumann parameterization.
    """
    one = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device).expand_as(skewed)
    power, inverse = one, one
    for _ in range(order):
        power = power @ skewed
        inverse = inverse + power
    return (one + skewed) @ inverse


def oft(weight: Tensor, rotations: Tensor) -> Tensor:
    """[N, K] W' of OFT: ``W R^T`` with the block-diagonal R of K / b rotations [b, b], or of one that all blocks share.

    Source: arXiv 2306.07280, equation 1: ``z = (R W)^T x``, where W is the transpose of nn.Linear's.
    """
    blocks = weight.reshape(len(weight), -1, rotations.shape[-1])
    shared = rotations.expand(blocks.shape[1], -1, -1)
    return torch.einsum("nbj,bij->nbi", blocks, shared).reshape(weight.shape)
