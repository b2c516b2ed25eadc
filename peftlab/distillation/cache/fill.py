"""What a cache stores of the teacher: the settings, their size per position, and the target of an example."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from peftlab.distillation.cache.bits import width_for
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import RecipeError

Kind = Literal["topk", "sampled", "mixed", "hidden"]
Values = Literal["float16", "float32"]
Hidden = Literal["bfloat16", "int8", "float32"]

# The settings that the bytes of a kind depend on, in message order.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "topk": ("k", "temperature", "values", "num_classes"),
    "sampled": ("draws", "temperature", "num_classes", "seed"),
    "mixed": ("k", "draws", "temperature", "values", "num_classes", "seed"),
    "hidden": ("hidden", "hidden_size"),
}
MAX_DRAWS = 255
# Neighbours that share a scale. For the last hidden states of SmolLM2-135M, KL(exact || stored) is 1.3e-3 with 32, 1.2e-2
# with one scale per token, 3e-5 with bfloat16.
INT8_GROUP = 32


@dataclass(frozen=True)
class Fill:
    """One of four ways to store a teacher's outputs.

    topk     the k most probable classes; for ``losses.sparse_divergence`` with tail bucket, at k = V the dense KL
    sampled  ``draws`` classes drawn with replacement, with their counts; unbiased, tail none
    mixed    k classes as in topk, ``draws`` more of the others; unbiased, tail none
    hidden   hidden states, to run through the teacher's head again: any divergence and temperature. Also embeddings

    Args:
        k: 1 to V, below V for mixed. draws: 1 to 255. temperature: of the teacher's softmax, above 0.
        values: for topk and mixed: float16 stores log-probabilities, float32 exact probabilities.
        hidden: bfloat16, int8 in groups of 32 with a bfloat16 scale each, or float32.
        num_classes: V, columns of the teacher's logits; for all kinds but hidden. hidden_size: for hidden only.
        seed: seed of the draws.
    Raises: RecipeError with the key ``distill.targets.NAME``.
    """

    kind: Kind
    k: int | None = None
    draws: int | None = None
    temperature: float = 1.0
    values: Values = "float16"
    hidden: Hidden = "bfloat16"
    num_classes: int | None = None
    hidden_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("kind", self.kind in _SETTINGS, f"one of {', '.join(_SETTINGS)}")
        for name in ("k", "draws"):
            if name not in _SETTINGS[self.kind] and getattr(self, name) is not None:
                used = ", ".join(kind for kind, names in _SETTINGS.items() if name in names)
                self._require(name, False, f"no value: {name} belongs to {used} and has no effect on {self.kind}")
        self._require("temperature", self.temperature > 0, "a temperature above 0")
        self._require("values", self.values in get_args(Values), " or ".join(get_args(Values)))
        self._require("hidden", self.hidden in get_args(Hidden), " or ".join(get_args(Hidden)))
        if self.kind == "hidden":
            assert self.hidden_size is not None and self.hidden_size > 0, "the caller must set hidden_size"
            return
        assert self.num_classes is not None and self.num_classes > 0, "the caller must set num_classes"
        if "draws" in _SETTINGS[self.kind]:
            self._require("draws", self.draws is not None and 1 <= self.draws <= MAX_DRAWS, f"1 to {MAX_DRAWS} draws")
        if "k" in _SETTINGS[self.kind]:
            most = self.num_classes - (self.kind == "mixed")
            why = "" if self.kind == "topk" else " and to draw from the others"
            self._require(
                "k", self.k is not None and 1 <= self.k <= most, f"to keep 1 to {most:,} classes per token{why}"
            )

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise RecipeError(f"expected {expected}, found {getattr(self, name)!r}", key=f"distill.targets.{name}")

    @property
    def id_bits(self) -> int:
        return width_for((self.num_classes or 1) - 1)

    @property
    def keeps_rest(self) -> bool:
        """Whether a row also stores the probability of all other classes, as one more value.

        mixed needs it as the mass of its draws. topk in float16 needs it because 1 - sum of rounded probabilities is
        wrong by up to 1e-3, which is the whole rest of a confident teacher, or a rest although no class is left.
        """
        return self.kind == "mixed" or (self.kind == "topk" and self.values == "float16" and self.k != self.num_classes)

    def settings(self) -> dict[str, Any]:
        """The settings that determine the stored bytes; fills with equal settings can share a cache."""
        return {"kind": self.kind} | {name: getattr(self, name) for name in _SETTINGS[self.kind]}

    def bytes_per_position(self) -> float:
        """Bytes of one position in a record; an example has 20 more in the index.

        Exact for topk and hidden up to the last byte of a record. For sampled and mixed an upper bound, reached if all
        draws differ: the expected number of different classes is the sum over classes of 1 - (1 - p)^draws. With 50 draws of
        SmolLM2-135M it is 15 to 25, depending on the text: 42 to 70 bytes, where the bound is 138.
        """
        if self.kind == "hidden":
            size = self.hidden_size or 0
            return {"float32": 4.0 * size, "bfloat16": 2.0 * size, "int8": size + 2.0 * -(-size // INT8_GROUP)}[
                self.hidden
            ]
        value_bits = 16 if self.values == "float16" else 32
        bits = (self.k or 0) * (self.id_bits + value_bits) + self.keeps_rest * value_bits
        if self.draws is not None:
            bits += width_for(self.draws) + self.most_drawn * (self.id_bits + width_for(self.draws - 1))
        return bits / 8

    @property
    def most_drawn(self) -> int:
        """The maximum number of different classes in the draws of a position."""
        return min(self.draws or 0, (self.num_classes or 0) - (self.k or 0))

    def target(self, values: Tensor | Iterable[Tensor], example: int) -> SparseTarget | Tensor:
        """The target of an example before rounding; the same for the same values, seed and example.

        Args: values: teacher logits [P, V], hidden states [P, H] for hidden; or parts of them in order, so that the logits
        of all positions need not exist at once. example: its number. Number and seed determine the draws, so a resumed
        capture draws the same as an uninterrupted one.
        Raises: ValueError for values of another width.
        """
        width = self.hidden_size if self.kind == "hidden" else self.num_classes
        seed = hashlib.blake2b(f"{self.seed}/{example}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        targets: list[Any] = []
        for part in [values] if isinstance(values, Tensor) else values:
            if part.dim() != 2 or part.shape[1] != width:
                raise ValueError(f"expected values [P, {width}] of the teacher, found {list(part.shape)}")
            targets.append(self._part(part, generator))
        if len(targets) == 1:
            return targets[0]  # type: ignore[no-any-return]
        return torch.cat(targets) if self.kind == "hidden" else SparseTarget.concatenated(targets)

    def _part(self, values: Tensor, generator: torch.Generator) -> SparseTarget | Tensor:
        if self.kind == "hidden":
            return values.detach()
        if self.kind == "topk":
            assert self.k is not None
            return SparseTarget.from_logits(values, self.k, temperature=self.temperature)
        assert self.draws is not None
        if self.kind == "sampled":
            return SparseTarget.sampled(values, self.draws, temperature=self.temperature, generator=generator)
        assert self.k is not None
        return SparseTarget.head_and_samples(
            values, self.k, self.draws, temperature=self.temperature, generator=generator
        )
