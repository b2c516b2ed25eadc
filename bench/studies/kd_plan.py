"""Predicts bytes and FLOPs of one optimizer step of a distillation, from configurations only.

    python -m bench.studies.kd_plan     prints the plan of gpu-check's rows: Llama-3-8B in NF4 teaches Llama-3.2-1B, 4,096 tokens

Shapes come from models on the meta device, without weights. The student is frozen in bfloat16 with LoRA factors in float32. It
computes in bfloat16 and recomputes its layers in backward; its head is frozen. tests/bench/studies/test_kd_plan.py compares
every term below with PyTorch's allocations at tiny shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind.

    Attributes:
        linears: (outputs, inputs) of one layer's linears. others: parameters outside the layers' linears; a head tied to
            the embedding counts once. key_width: width of the keys and of the values.
    """

    num_layers: int
    hidden: int
    inner: int
    query_width: int
    key_width: int
    vocab: int
    linears: tuple[tuple[int, int], ...]
    others: int

    @property
    def layer_weights(self) -> int:
        return sum(n * k for n, k in self.linears)

    def with_layers(self, num_layers: int) -> Shape:
        norms = 2 * self.hidden * (self.num_layers - num_layers)
        return replace(self, num_layers=num_layers, others=self.others - norms)


def shape_of(model: Any) -> Shape:
    """The shape of a model on any device, including meta, without adapters."""
    from torch import nn

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    layers = model.get_decoder().layers

    def linears_of(layer: Any) -> list[Any]:
        return [m for name, m in layer.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]

    linears = tuple((m.out_features, m.in_features) for m in linears_of(layers[0]))
    inside = sum(m.weight.numel() for layer in layers for m in linears_of(layer))
    whole = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        num_layers=len(layers),
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        query_width=config.num_attention_heads * head_width,
        key_width=config.num_key_value_heads * head_width,
        vocab=head.weight.shape[0],
        linears=linears,
        others=whole - inside,
    )


def forward_flops(shape: Shape, *, tokens: int, scored: int) -> float:
    """FLOPs of the linears and, at the scored positions, the head. Attention over short rows is ignored."""
    return 2.0 * (tokens * shape.num_layers * shape.layer_weights + scored * shape.vocab * shape.hidden)


def train_flops(shape: Shape, *, tokens: int, scored: int, rank: int | None, recompute: bool) -> float:
    """FLOPs of forward and backward. rank: rank of the adapters on all linears, so that weights and head get no gradient;
    None: everything is trained. recompute: the layers run once more."""
    once = forward_flops(shape, tokens=tokens, scored=scored)
    layers = forward_flops(shape, tokens=tokens, scored=0)
    adapters = 0.0 if rank is None else 6.0 * tokens * adapter_parameters(shape, rank)
    return once * (3 if rank is None else 2) + layers * recompute + adapters


def adapter_parameters(shape: Shape, rank: int) -> int:
    return shape.num_layers * rank * sum(n + k for n, k in shape.linears)


def weight_bytes(shape: Shape, storage: str) -> float:
    """Bytes with the layers' linears in ``none`` (16 bits) or ``nf4``, and everything else in 16 bits."""
    per_layer = sum(2.0 * n * k if storage == "none" else nf4_bytes(n * k) for n, k in shape.linears)
    return shape.num_layers * per_layer + 2.0 * shape.others


def nf4_bytes(num_weights: int) -> float:
    """Bytes: 4 bits per value, a byte per 64 values for the scale, 4 bytes per 256 scales, two code books and an offset."""
    blocks = math.ceil(num_weights / 64)
    return num_weights / 2 + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def adapter_bytes(shape: Shape, rank: int) -> float:
    """Bytes of the factors, their gradients and AdamW's two moments, in float32."""
    return 16.0 * adapter_parameters(shape, rank)


def layer_bytes(shape: Shape, rank: int) -> float:
    """Bytes per token that one layer keeps for backward.

    In 16 bits: the inputs of its linears; the rotated queries, keys and values, with keys and values repeated for each query
    head; the attention's output as computed and as read by the next linear; gate, activated gate, up and their product; S = x A^T
    of each linear. In float32: the input of each norm and the logarithm of each query's sum. SwiGLU's product is the input of
    the last linear.
    """
    h, q, i = shape.hidden, shape.query_width, shape.inner
    sixteen = 2 * (2 * h + 3 * q + 2 * q + 4 * i + len(shape.linears) * rank)
    return float(sixteen + 4 * 2 * h)


def teacher_layer_bytes(shape: Shape) -> float:
    """Peak bytes per token of one layer of a model without gradients: its input, the norm's output and the norm in float32,
    then gate, activated gate and up."""
    return 2.0 * (2 * shape.hidden + 3 * shape.inner) + 4.0 * shape.hidden


@dataclass(frozen=True)
class Step:
    """One optimizer step of one micro-batch.

    Attributes:
        scored: positions with a loss. chunk: tokens whose logits exist at a time. num_stored: classes stored per
            position; None: the teacher runs online. teacher_storage: ``nf4`` or ``none``.
    """

    tokens: int
    scored: int
    rank: int
    chunk: int
    num_stored: int | None = None
    teacher_storage: str = "nf4"
    context_bytes: float = 0.5e9


def card_chunk(student: Shape, *, online: bool, card_bytes: int) -> int:
    """Tokens per chunk that linear_kl uses on an empty card of that size: logits of one or two models in 16 bits."""
    from peftlab_kernels.heads import Rows, num_tokens_on_a_gpu

    return num_tokens_on_a_gpu(2**30, Rows(2 * student.vocab, 1 + online), total=card_bytes, free=card_bytes)


def memory_plan(student: Shape, teacher: Shape, step: Step) -> dict[str, float]:
    """Bytes of each term, and the peak of the step under ``peak``.

    Phases: the teacher runs on the batch. The loss processes the logits chunk by chunk, with every layer's input kept.
    Backward recomputes one layer at a time.
    """
    online = step.num_stored is None
    held = {
        "context": step.context_bytes,
        "student, 16 bits": weight_bytes(student, "none"),
        "teacher, " + step.teacher_storage: weight_bytes(teacher, step.teacher_storage) if online else 0.0,
        "adapter, gradient, AdamW": adapter_bytes(student, step.rank),
        "stored classes, ids in 64 bits": 0.0 if online else 12.0 * step.scored * (step.num_stored or 0),
    }
    # Kept through loss and backward: the residual stream before each layer, its end (in 16 bits, and in float32 for the
    # norm), the scored hidden states and their gradient.
    states = 2.0 * step.tokens * student.hidden * (student.num_layers + 1) + 6.0 * step.tokens * student.hidden
    states += 2 * 2.0 * step.scored * student.hidden
    teacher_states = 2.0 * step.scored * teacher.hidden if online else 0.0
    widest = max(n * k for n, k in teacher.linears)
    phases = {
        "teacher's pass": step.tokens * teacher_layer_bytes(teacher) + 2.0 * widest if online else 0.0,
        "loss": states + teacher_states + (1 + online) * 2.0 * min(step.chunk, step.scored) * student.vocab,
        # The gradients of the layer's output, of both factors of SwiGLU's product and of the product itself.
        "backward": states
        + step.tokens * (layer_bytes(student, step.rank) + 2.0 * student.hidden + 6.0 * student.inner),
    }
    return {**held, **phases, "peak": sum(held.values()) + max(phases.values())}


# The case that gpu-check measures: a row of 4,096 tokens, all scored, on cards of two sizes.
TOKENS, RANK, NUM_STORED, CARDS = 4096, 32, 50, (16_000_000_000, 12_000_000_000)
TEACHER, STUDENT = "llama-3-8b", "llama-3.2-1b"
EFFECTIVE_FLOPS = 395e12  # rate of an H200 in whole training steps


def preset_shape(name: str) -> Shape:
    from peftlab.models import find_pretrained, load_skeleton

    return shape_of(load_skeleton(find_pretrained(f"shape:{name}"), auto_class="AutoModelForCausalLM"))


def tokens_per_s(student: Shape, teacher: Shape, step: Step, flops: float = EFFECTIVE_FLOPS) -> float:
    sizes = {"tokens": step.tokens, "scored": step.scored}
    work = train_flops(student, **sizes, rank=step.rank, recompute=True)
    return step.tokens * flops / (work + (forward_flops(teacher, **sizes) if step.num_stored is None else 0.0))


def main() -> None:
    student, teacher = preset_shape(STUDENT), preset_shape(TEACHER)
    for card in CARDS:
        plans = {}
        for name, stored in (("online", None), (f"stored top-{NUM_STORED}", NUM_STORED)):
            chunk = card_chunk(student, online=stored is None, card_bytes=card)
            step = Step(tokens=TOKENS, scored=TOKENS - 1, rank=RANK, chunk=chunk, num_stored=stored)
            plans[name] = memory_plan(student, teacher, step)
            plans[name] |= {"tokens/s on an H200": tokens_per_s(student, teacher, step), "tokens of a chunk": chunk}
        print(f"| GB on a card of {card / 1e9:.0f} GB | {' | '.join(plans)} |\n|---|---|---|")
        for term in next(iter(plans.values())):
            unit, digits = (1e9, 2) if not term.startswith("tokens") else (1, 0)
            print(f"| {term} | {' | '.join(f'{plan[term] / unit:,.{digits}f}' for plan in plans.values())} |")
        print()


if __name__ == "__main__":
    main()
