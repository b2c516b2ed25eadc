"""Checks, chunks and autograd of ``linear_kl``."""

# Shape suffixes: N tokens, C of a chunk, H hidden, V vocabulary, k stored classes of a sparse target.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlab_kernels import runtime
from peftlab_kernels.heads import (
    Finish,
    Head,
    HeadPass,
    NeedsGrad,
    chunks,
    empty_gradients,
    needs_grad_of,
    pack_head,
    size_where_nothing_is_deferred,
    unpack_head,
    walk_of,
    wide_logits,
)
from peftlab_kernels.linear_cross_entropy import linear_cross_entropy
from peftlab_kernels.linear_cross_entropy.op import (
    backward_of_sum,
    row_pieces,
    rows_options,
    write_gradient,
)
from peftlab_kernels.linear_kl.reference import DIVERGENCES, check_divergence

TAILS = ("none", "bucket", "renormalized")
_LOWEST = -1e30  # replaces -inf where the difference of two of them must be 0


@dataclass(frozen=True)
class OnlineTeacher:
    """The teacher's hidden states of the same tokens, [N, its width], and its head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class DenseTeacher:
    """The teacher's logits, [N, V] of any float type, as the teacher gives them (scaled and capped)."""

    logits: Tensor


@dataclass(frozen=True)
class SparseTeacher:
    """Probabilities of a few classes, taken at the temperature of the loss. Forward KL only.

    Attributes:
        ids: [N, k] int64. probs: [N, k] float32; ids are distinct where probs is above 0, and are ignored elsewhere.
        tail: ``bucket``: one more class on both sides holds the mass of all other classes.
            ``renormalized``: KL between both sides restricted to the k classes (a biased approximation: the mass outside is
            free). ``none``: the values are unchanged weights (sampled targets), sum w (log w - log q).
    """

    ids: Tensor
    probs: Tensor
    tail: str = "bucket"


Teacher = OnlineTeacher | DenseTeacher | SparseTeacher


class DistilledLoss(NamedTuple):
    """total: [] float32, the weighted sum, differentiable. soft: [N] divergence in nats, without any factor. hard: [N]
    cross-entropy in nats, None without targets. soft and hard are not differentiable."""

    total: Tensor
    soft: Tensor | None
    hard: Tensor | None


def linear_kl(
    hidden_NH: Tensor,
    head: Head,
    teacher: Teacher,
    target_N: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    share: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    hard_weight: float = 0.0,
    weights: Tensor | None = None,
    adapter_hidden: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> DistilledLoss:
    """Sum over tokens of ``hard_weight * CE + (1 - hard_weight) * T^2 * D(teacher, student)``, without all logits in memory.

    The forward pass computes the gradient of the hidden states and of the trained parts of the student's head. A frozen
    head gets none, and the teacher never gets one. Differentiable once.

    Args:
        hidden_NH: [N, H] of the student, at positions whose next token counts. head: the student's.
        teacher: online, dense or sparse. target_N: [N] int64, needed with ``hard_weight`` above 0.
        divergence, share, temperature: see ``token_divergence``. scale_by_t2: False omits the factor T^2.
        weights: [N] factors of tokens, known beforehand. adapter_hidden, chunk, backend: see ``linear_cross_entropy``.
    Returns: the losses; with ``hard_weight=1`` exactly those of ``linear_cross_entropy``, ignoring the teacher.
    Raises: ValueError on sizes that do not match or arguments out of range.
    """
    head.check(hidden_NH)
    check_divergence(divergence, share, temperature)
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"expected hard_weight in [0, 1], found {hard_weight}")
    if hard_weight and target_N is None:
        raise ValueError("hard_weight needs targets")
    N = hidden_NH.shape[0]
    for name, tensor in (("targets", target_N), ("weights", weights)):
        if tensor is not None and tensor.shape != (N,):
            raise ValueError(f"expected {name} [{N}], found {list(tensor.shape)}")
    if hard_weight == 1:
        assert target_N is not None
        loss = linear_cross_entropy(
            hidden_NH, head, target_N, weights=weights, adapter_hidden=adapter_hidden, chunk=chunk, backend=backend
        )
        return DistilledLoss(loss.total, None, loss.per_token)
    _check_teacher(teacher, N, head.num_logits, divergence)
    needs = needs_grad_of(head, hidden_NH, adapter_hidden)
    total, soft_N, hard_N, _ = linear_kl_op(
        hidden_NH, adapter_hidden, *pack_head(head), *_pack_teacher(teacher), target_N, weights,
        [float(share), float(temperature), float(scale_by_t2), float(hard_weight)], divergence, needs.flags(),
        *walk_of(head, hidden_NH, needs, chunk, sides=_sides(teacher)), backend,
    )  # fmt: skip
    return DistilledLoss(total, soft_N, hard_N if target_N is not None else None)


def _sides(teacher: Teacher) -> int:
    """Number of models whose logits the op computes."""
    return 2 if isinstance(teacher, OnlineTeacher) else 1


def _check_teacher(teacher: Teacher, N: int, V: int, divergence: str) -> None:
    if isinstance(teacher, OnlineTeacher):
        teacher.head.check(teacher.hidden)
        shape = [teacher.hidden.shape[0], teacher.head.num_logits]
    elif isinstance(teacher, DenseTeacher):
        shape = list(teacher.logits.shape)
    else:
        if teacher.tail not in TAILS:
            raise ValueError(f"expected a tail out of {', '.join(TAILS)}, found {teacher.tail!r}")
        if divergence != "forward_kl":
            raise ValueError(f"a sparse teacher supports forward_kl only, found {divergence}")
        ids, probs = teacher.ids.shape, teacher.probs.shape
        if len(ids) != 2 or ids != probs or ids[0] != N or not 1 <= ids[1] <= V:
            raise ValueError(f"expected ids and probs [{N}, 1 to {V}], found {list(ids)} and {list(probs)}")
        return
    if shape != [N, V]:
        raise ValueError(
            f"expected teacher logits [{N}, {V}], found {shape}; if a vocabulary is padded, set num_classes to its "
            "number of classes"
        )


def _pack_teacher(teacher: Teacher) -> tuple[list[Tensor], str, list[int], list[float]]:
    if isinstance(teacher, OnlineTeacher):
        tensors, kind, numbers, factors = pack_head(teacher.head)
        detached = [t.detach() for t in (teacher.hidden, *tensors)]
        return detached, f"online {kind}", numbers, factors
    if isinstance(teacher, DenseTeacher):
        return [teacher.logits.detach()], "dense", [0], [0.0]  # an empty list would count as one of tensors
    return [teacher.ids, teacher.probs.detach()], f"sparse {teacher.tail}", [0], [0.0]


@dataclass(frozen=True)
class _Terms:
    """The settings of a row's loss."""

    divergence: str
    share: float
    temperature: float
    soft_factor: float
    hard_factor: float

    @property
    def kind(self) -> str:
        """The divergence, with special cases replaced by the KL they equal."""
        if self.divergence == "jsd" and self.share in (0, 1):
            return "reverse_kl" if self.share else "forward_kl"
        return self.divergence.removeprefix("skew_") if self.share == 0 else self.divergence


@torch.library.custom_op("peftlab::linear_kl", mutates_args=())
def linear_kl_op(
    hidden_NH: Tensor,
    adapter_NH: Tensor | None,
    tensors: list[Tensor],
    kind: str,
    numbers: list[int],
    factors: list[float],
    teacher: list[Tensor],
    teacher_kind: str,
    teacher_numbers: list[int],
    teacher_factors: list[float],
    target_N: Tensor | None,
    weight_N: Tensor | None,
    settings: list[float],
    divergence: str,
    needs: list[bool],
    chunk: int | None,
    deferred: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Operator behind ``linear_kl``. Returns the sum, each token's divergence and cross-entropy, and the gradients of the sum."""
    head = unpack_head(tensors, kind, numbers, factors)
    share, temperature, scale_by_t2, hard_weight = settings
    soft_factor = (1 - hard_weight) * (temperature**2 if scale_by_t2 else 1.0)
    terms = _Terms(divergence, share, temperature, soft_factor, hard_weight)
    backend = runtime.choose_backend(backend, hidden_NH, products=False)
    N, device = hidden_NH.shape[0], hidden_NH.device
    wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    soft_N = torch.empty(N, dtype=wide, device=device)
    hard_N = torch.empty(N if target_N is not None else 0, dtype=wide, device=device)
    way, _, what = teacher_kind.partition(" ")
    size = chunk or size_where_nothing_is_deferred(
        head, hidden_NH, NeedsGrad(*needs), sides=2 if way == "online" else 1
    )
    with torch.autocast(device.type, enabled=False):
        walk = HeadPass(head, hidden_NH, adapter_NH, NeedsGrad(*needs), backend, deferred=deferred)
        teacher_head = unpack_head(teacher[1:], what, teacher_numbers, teacher_factors) if way == "online" else None
        teacher_pass = (
            HeadPass(teacher_head, teacher[0], None, NeedsGrad(), backend) if teacher_head is not None else None
        )
        for part in chunks(N, size):
            logits_CV = walk.logits(part)
            rows = _Rows(
                logits_CV,
                target_N[part] if target_N is not None else None,
                weight_N[part] if weight_N is not None else None,
                soft_N[part],
                hard_N[part],
                head,
                any(needs),
                backend,
            )
            if way == "sparse":
                _sparse_rows(rows, teacher[0][part], teacher[1][part], what, terms)
            else:
                teacher_CV = teacher_pass.logits(part) if teacher_pass is not None else teacher[0][part]
                _dense_rows(rows, teacher_CV, teacher_head, terms)
                del teacher_CV
            if any(needs):
                walk.backward(part, logits_CV)
            del rows, logits_CV  # before the next chunk allocates its own
    loss_N = soft_factor * soft_N
    if target_N is not None and hard_weight:
        loss_N = loss_N + hard_weight * hard_N
    total = loss_N.sum() if weight_N is None else torch.dot(loss_N, weight_N.to(wide))
    return total, soft_N, hard_N, walk.gradients(head)


@dataclass(frozen=True)
class _Rows:
    """Rows of student logits, before scale and cap, and the outputs for their losses. ``gradient`` overwrites the logits."""

    logits: Tensor
    target: Tensor | None
    weight: Tensor | None
    soft: Tensor
    hard: Tensor
    head: Head
    gradient: bool
    backend: str

    def launch_options(self) -> dict[str, Any]:
        return {
            "HAS_HARD": self.target is not None,
            "HAS_WEIGHT": self.weight is not None,
            "HAS_CAP": self.head.softcap is not None,
            "HAS_GRAD": self.gradient,
            **rows_options(self.logits.shape[1]),
        }

    def add_hard(self, rows: slice, z_CV: Tensor, dz_CV: Tensor | None, factor: float) -> None:
        """Stores the cross-entropy of final logits ``z_CV`` and adds its gradient times ``factor`` to ``dz_CV``."""
        if self.target is None:
            return
        index_C1 = self.target[rows, None]
        top_C1 = z_CV.amax(dim=-1, keepdim=True)
        at_target_C1 = z_CV.gather(1, index_C1) - top_C1
        probs_CV = (z_CV - top_C1).exp_()
        sum_C1 = probs_CV.sum(dim=-1, keepdim=True)
        self.hard[rows] = (sum_C1.log() - at_target_C1).squeeze(1)
        if dz_CV is not None and factor:
            dz_CV.addcmul_(probs_CV, factor / sum_C1)
            dz_CV.scatter_add_(1, index_C1, dz_CV.new_full(index_C1.shape, -factor))

    def finish(self, rows: slice, dz_CV: Tensor, slope_CV: Tensor | None) -> None:
        if self.weight is not None:
            dz_CV.mul_(self.weight[rows, None].to(dz_CV.dtype))
        write_gradient(self.logits[rows], dz_CV, slope_CV, self.head)


def _dense_rows(rows: _Rows, teacher_CV: Tensor, teacher_head: Head | None, terms: _Terms) -> None:
    """teacher_head: the head whose scale and cap the teacher's logits still need, or None."""
    if rows.backend == "triton":
        from peftlab_kernels.linear_kl.kernel import divergence_rows_kernel

        C, V = rows.logits.shape
        if teacher_CV.stride(1) != 1:
            teacher_CV = teacher_CV.contiguous()
        cap = teacher_head.softcap if teacher_head is not None else None
        runtime.launch(
            divergence_rows_kernel, (C,), rows.logits, teacher_CV,
            rows.target if rows.target is not None else rows.soft,
            rows.weight if rows.weight is not None else rows.soft,
            rows.soft, rows.hard, V, rows.logits.stride(0), teacher_CV.stride(0),
            rows.head.scale, rows.head.softcap or 1.0, teacher_head.scale if teacher_head is not None else 1.0, cap or 1.0,
            1.0 / terms.temperature, terms.share, terms.soft_factor, terms.hard_factor,
            KIND=DIVERGENCES.index(terms.kind), TEACHER_HAS_CAP=cap is not None, **rows.launch_options(),
        )  # fmt: skip
        return
    for part in row_pieces(rows.logits):
        z_CV, slope_CV = wide_logits(rows.logits[part], rows.head, slope=rows.gradient)
        raw_CV = teacher_CV[part].to(z_CV.dtype, copy=teacher_head is None)
        t_CV = wide_logits(raw_CV, teacher_head, slope=False)[0] if teacher_head is not None else raw_CV
        log_p = (t_CV.div_(terms.temperature) if terms.temperature != 1 else t_CV).log_softmax(-1)
        log_q = (z_CV / terms.temperature).log_softmax(-1) if terms.temperature != 1 else z_CV.log_softmax(-1)
        loss_C, dz_CV = _divergence(log_p, log_q, terms, gradient=rows.gradient)
        rows.soft[part] = loss_C
        if dz_CV is not None:
            dz_CV.mul_(terms.soft_factor / terms.temperature)
        rows.add_hard(part, z_CV, dz_CV, terms.hard_factor)
        if dz_CV is not None:
            rows.finish(part, dz_CV, slope_CV)


def _divergence(log_p: Tensor, log_q: Tensor, terms: _Terms, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Divergence of each row, and its derivative with respect to the student's logits over T. Overwrites both inputs."""
    log_p.clamp_(min=_LOWEST)
    log_q.clamp_(min=_LOWEST)
    kind, share = terms.kind, terms.share
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        loss = log_p.sub_(log_q).mul_(p).sum(-1)
        return loss, q.sub_(p) if gradient else None
    if kind == "reverse_kl":
        derivative = log_q.sub_(log_p)
        loss = torch.linalg.vecdot(q, derivative)
        return loss, derivative.sub_(loss[:, None]).mul_(q) if gradient else None
    if kind == "tvd":
        difference = q - p
        derivative, loss = difference.sign().mul_(0.5), difference.abs_().sum(-1).mul_(0.5)
    elif kind == "skew_forward_kl":
        log_m = _log_mix(log_p, log_q, share)
        log_p.sub_(log_m)
        loss = torch.linalg.vecdot(p, log_p)
        derivative = log_p.exp_().mul_(share - 1)
    elif kind == "skew_reverse_kl":
        log_m = _log_mix(log_q, log_p, share)
        log_q.sub_(log_m)
        loss = torch.linalg.vecdot(q, log_q)
        derivative = log_q.sub_(log_q.exp().mul_(share))
    else:
        log_m = _log_mix(log_p, log_q, share)
        loss = share * torch.linalg.vecdot(p, log_p.sub_(log_m))
        derivative = log_q.sub_(log_m).mul_(1 - share)
        loss = loss + torch.linalg.vecdot(q, derivative)
    if not gradient:
        return loss, None
    return loss, derivative.sub_(torch.linalg.vecdot(q, derivative)[:, None]).mul_(q)


def _log_mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _sparse_rows(rows: _Rows, ids_Ck: Tensor, probs_Ck: Tensor, tail: str, terms: _Terms) -> None:
    C, V = rows.logits.shape
    k = ids_Ck.shape[1]
    if rows.backend == "triton":
        from peftlab_kernels.linear_kl.kernel import sparse_rows_kernel

        runtime.launch(
            sparse_rows_kernel, (C,), rows.logits, ids_Ck.contiguous(), probs_Ck.contiguous(),
            rows.target if rows.target is not None else rows.soft,
            rows.weight if rows.weight is not None else rows.soft,
            rows.soft, rows.hard, V, k, rows.logits.stride(0), rows.head.scale, rows.head.softcap or 1.0,
            1.0 / terms.temperature, terms.soft_factor, terms.hard_factor,
            TAIL=TAILS.index(tail), BLOCK_K=max(16, runtime.next_power_of_2(k)), **rows.launch_options(),
        )  # fmt: skip
        return
    for part in row_pieces(rows.logits):
        z_CV, slope_CV = wide_logits(rows.logits[part], rows.head, slope=rows.gradient)
        loss_C, dz_CV = _sparse_divergence(
            z_CV / terms.temperature, ids_Ck[part], probs_Ck[part].to(z_CV.dtype), tail, gradient=rows.gradient
        )
        rows.soft[part] = loss_C
        if dz_CV is not None:
            dz_CV.mul_(terms.soft_factor / terms.temperature)
        rows.add_hard(part, z_CV, dz_CV, terms.hard_factor)
        if dz_CV is not None:
            rows.finish(part, dz_CV, slope_CV)


def _sparse_divergence(
    z_CV: Tensor, ids_Ck: Tensor, p_Ck: Tensor, tail: str, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """As ``_divergence``, from student logits over T. Overwrites them."""
    counts_Ck = p_Ck > 0  # the others pad the row, with a class that it may contain already
    stored_Ck = z_CV.gather(1, ids_Ck)
    # Sum the tail's mass over the tail: 1 minus the others has no correct digits where the student is confident.
    tail_CV = z_CV.scatter_reduce_(1, ids_Ck, torch.where(counts_Ck, -math.inf, stored_Ck), "amin")
    tail_top_C1 = tail_CV.amax(dim=-1, keepdim=True).clamp_(min=_LOWEST)
    tail_sum_C1 = tail_CV.sub_(tail_top_C1).exp_().sum(-1, keepdim=True)
    log_tail_C1 = tail_top_C1 + tail_sum_C1.log()
    log_stored_C1 = torch.where(counts_Ck, stored_Ck, -math.inf).logsumexp(-1, keepdim=True)
    log_total_C1 = torch.logaddexp(log_tail_C1, log_stored_C1)
    mass_C1 = p_Ck.sum(-1, keepdim=True)
    if tail == "renormalized":
        p_Ck, log_total_C1 = p_Ck / mass_C1, log_stored_C1
    log_q_Ck = stored_Ck - log_total_C1
    loss_C1 = (torch.xlogy(p_Ck, p_Ck) - p_Ck * log_q_Ck).sum(-1, keepdim=True)
    # In the tail the derivative is tail_mass * q - tail_target * (q without the stored classes, renormalized).
    tail_mass_C1, tail_target_C1 = mass_C1, torch.zeros_like(mass_C1)
    if tail == "bucket":
        has_tail_C1 = counts_Ck.sum(-1, keepdim=True) < z_CV.shape[1]
        missing_C1 = torch.where(has_tail_C1, (1 - mass_C1).clamp(min=0), 0.0)
        some_C1 = missing_C1 > 0
        parting_C1 = torch.xlogy(missing_C1, missing_C1) - missing_C1 * (log_tail_C1 - log_total_C1)
        loss_C1 = loss_C1 + torch.where(some_C1, parting_C1, 0.0)
        tail_mass_C1 = mass_C1 + missing_C1
        tail_target_C1 = torch.where(some_C1, missing_C1 / tail_sum_C1, 0.0)
    elif tail == "renormalized":
        tail_mass_C1 = torch.zeros_like(mass_C1)
    loss_C = loss_C1.squeeze(1)
    if not gradient:
        return loss_C, None
    tail_CV.mul_(tail_mass_C1 * (tail_top_C1 - log_total_C1).exp() - tail_target_C1)
    q_Ck = log_q_Ck.exp() if tail == "renormalized" else tail_mass_C1 * log_q_Ck.exp()
    return loss_C, tail_CV.scatter_add_(1, ids_Ck, torch.where(counts_Ck, q_Ck - p_Ck, 0.0))


@linear_kl_op.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden_NH, adapter_NH, tensors, kind, numbers, factors, teacher, teacher_kind, teacher_numbers, teacher_factors,
    target_N, weight_N, settings, divergence, needs, chunk, deferred, backend,
):  # fmt: skip
    N, wide = hidden_NH.shape[0], torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    return (
        hidden_NH.new_empty((), dtype=wide),
        hidden_NH.new_empty((N,), dtype=wide),
        hidden_NH.new_empty((N if target_N is not None else 0,), dtype=wide),
        empty_gradients(NeedsGrad(*needs), hidden_NH, adapter_NH, tensors, numbers, deferred=deferred),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    hidden_NH, _, tensors, _, ctx.numbers, *_, needs, _, deferred, _ = inputs
    ctx.finish = Finish(len(tensors[0]), tensors[0].dtype, deferred)
    ctx.needs, ctx.num_tensors, ctx.num_inputs = NeedsGrad(*needs), len(tensors), len(inputs)
    ctx.teacher_at, ctx.num_teacher = 6, len(inputs[6])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2], *output[3])
    ctx.save_for_backward(hidden_NH, *output[3])


def _backward(ctx: Any, dtotal: Tensor, *rest: Any) -> tuple[Any, ...]:
    gradients = list(backward_of_sum(ctx, dtotal, *rest))
    gradients[ctx.teacher_at] = [None] * ctx.num_teacher
    return tuple(gradients)


linear_kl_op.register_autograd(_backward, setup_context=_setup_context)
