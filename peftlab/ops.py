"""The only importer of ``peftlab_kernels``: the rest of peftlab imports its ops from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftlab_kernels.heads import Head, NeedsGrad, head_logits, pass_bytes, unpack_head
from peftlab_kernels.linear_cross_entropy import LinearLoss, linear_cross_entropy
from peftlab_kernels.linear_kl import (
    DIVERGENCES,
    DenseTeacher,
    DistilledLoss,
    OnlineTeacher,
    SparseTeacher,
    check_divergence,
    linear_kl,
    token_divergence,
)
from peftlab_kernels.lora_linear import (
    BaseWeight,
    DenseWeight,
    Int8Weight,
    dropout_mask,
    lora_linear,
    lora_linear_reference,
    plan,
    planned_for,
)
from peftlab_kernels.lora_linear.plan import BACKWARD as BACKWARD_PLANS
from peftlab_kernels.lora_linear.plan import FORWARD as FORWARD_PLANS
from peftlab_kernels.lora_linear.plan import Key as PlanKey
from peftlab_kernels.lora_linear.plan import Plan, int8_by_library
from peftlab_kernels.lora_linear.plan import forced as forced_plan
from peftlab_kernels.lora_linear.plan import in_use as plans_in_use
from peftlab_kernels.lora_linear.plan import key_of as plan_key
from peftlab_kernels.nf4_dequant import NF4Weight, nf4_dequant_reference
from peftlab_kernels.runtime import CPU_OPERANDS, new_seed, operands_problem, release_scratch, triton_problem

from peftlab.errors import ArtifactError

# Operation -> whether its kernels need matrix products. Both dequantizations include one that merges an adapter.
_TRITON_OPS = {
    "int8_dequant": False, "linear_cross_entropy": False, "linear_kl": False, "lora_linear": True, "nf4_dequant": False,
}  # fmt: skip


def kernel_paths(device_type: str) -> dict[str, tuple[str, str]]:
    """Per operation: what runs on this device type with ``run.kernels: auto``, and why nothing faster."""
    hint = None if device_type == "cuda" else "run.kernels=triton asks for it"
    problems = {name: triton_problem(device_type, products=products) for name, products in _TRITON_OPS.items()}
    return {
        name: ("PyTorch, fused", problem or hint or "") if problem or hint else ("Triton", "")
        for name, problem in problems.items()
    }


def kernels_note(device_type: str) -> str | None:
    """Which kernels a GPU runs in PyTorch, and why; None if Triton runs all."""
    if device_type != "cuda":
        return None
    if problem := triton_problem(device_type, products=False):
        return f"the kernels run in PyTorch, slower: {problem}"
    if problem := triton_problem(device_type, products=True):
        return f"the adapter's products run in PyTorch, slower: {problem}"
    return None


def plan_by_rule(key: PlanKey) -> Plan:
    """The plan that applies without measurements."""
    return plan.rule(key.device, key.kind, M=key.m, N=key.n, K=key.k, dropout=key.dropout)


def loss_workspace(function: str, arguments: dict[str, Any], *, gpu_bytes: int | None = None) -> int:
    """Bytes that an operator of a loss holds while it runs, beside its results; 0 for any other operator.

    Args: function: the operator's name. arguments: by the names in its schema. gpu_bytes: see ``pass_bytes``.
    """
    if function not in ("peftlab::linear_cross_entropy", "peftlab::linear_kl"):
        return 0
    head = unpack_head(*(arguments[name] for name in ("tensors", "kind", "numbers", "factors")))
    sides = 2 if arguments.get("teacher_kind") == "online" else 1
    return pass_bytes(
        arguments["hidden_NH"],
        head,
        NeedsGrad(*arguments["needs"]),
        chunk=arguments["chunk"],
        sides=sides,
        gpu_bytes=gpu_bytes,
    )


def read_plans(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of measured plans. Raises: ArtifactError if ``path`` is not such a table."""
    try:
        return plan.read_table(path)
    except ValueError as error:
        raise _not_a_table(error) from error


def use_plans(path: Path | None) -> None:
    """Uses the plans measured in ``path`` from now on, replacing those of an earlier call; None: use no plans.

    Raises: ArtifactError if ``path`` is not such a table.
    """
    try:
        plan.use_table(path)
    except ValueError as error:
        raise _not_a_table(error) from error


def _not_a_table(error: ValueError) -> ArtifactError:
    return ArtifactError(f"{error}; run `peftlab bench tune-kernels` to rewrite it, or delete it")


__all__ = [
    "BACKWARD_PLANS",
    "BaseWeight",
    "CPU_OPERANDS",
    "DIVERGENCES",
    "DenseTeacher",
    "DenseWeight",
    "DistilledLoss",
    "FORWARD_PLANS",
    "Head",
    "Int8Weight",
    "LinearLoss",
    "NF4Weight",
    "OnlineTeacher",
    "Plan",
    "PlanKey",
    "SparseTeacher",
    "check_divergence",
    "dropout_mask",
    "forced_plan",
    "head_logits",
    "int8_by_library",
    "kernel_paths",
    "kernels_note",
    "linear_cross_entropy",
    "linear_kl",
    "loss_workspace",
    "lora_linear",
    "lora_linear_reference",
    "new_seed",
    "nf4_dequant_reference",
    "operands_problem",
    "plan_by_rule",
    "plan_key",
    "plans_in_use",
    "planned_for",
    "read_plans",
    "release_scratch",
    "token_divergence",
    "triton_problem",
    "use_plans",
]
