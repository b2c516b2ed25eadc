"""The form of an op's ``cases.py``, which says what to compile, to check and to time of it: plain data and small builders.

The programs walk over the ops that have such a file, so that adding one needs no edit in them. Of these names a cases.py has
those that fit:

- ``COMPILED``: a list of ``Compiled``, every way in which the op launches a kernel.
- ``checks(device)``: yields a ``Check`` a row, outputs and gradients against float64. ``times(device)``: yields a ``Timing`` a row.
- ``STORAGE``: a ``Storage``, where the op makes a stored weight dense. ``LOSSES`` and ``TIMED_LOSSES``: a ``Loss`` and a ``TimedLoss`` by
  name, where it is a loss of hidden states and a head. What is checked and timed of these is the same for all.
- ``CLAIMS``: what is said of the op and which rows decide it, in the form of the program that judges them.

Nothing here imports torch: a program can ask for the names of the ops within milliseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import peftlab_kernels

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor

# Arguments of a kernel that adds s B A, after its own: rows of a multiple of 16, and others.
MERGE, UNALIGNED_MERGE = "*A *A *T i16 i16 R fp32", "*A *A *T i16 i32 R fp32"
NUM_CLASSES = 128256  # of Llama-3's head


class Device(Protocol):
    """What builders ask of the device that a check or a measurement runs on."""

    kind: str

    @property
    def dry(self) -> bool:
        """On a CPU, at shapes that prove nothing but that it runs."""

    def pick(self, real: Any, dry: Any) -> Any: ...

    def randn(self, *size: int, seed: int, dtype: Any = None) -> Any: ...

    def backend(self, dtype: Any) -> str:
        """That of an op which computes in this type."""


@dataclass(frozen=True)
class Compiled:
    """One way in which an op launches a kernel.

    Attributes:
        signature: types of the arguments that are no compile-time values, in order. T stands for the op's type, A for
            that of the adapter's factors, R for the rank; i16 is an int32 that is a multiple of 16, as most sizes are.
        values: the op's compile-time values and launch options for a type and a rank; DOT is added.
        matrix: it multiplies matrices, and so is compiled for each rank.
        wide: in 16 bits once more with float32 factors, which PEFT keeps beside a quantized model.
    """

    kernel: str
    variant: str
    signature: str
    values: Callable[[torch.dtype, int], dict[str, Any]]
    matrix: bool = True
    wide: bool = False


@dataclass(frozen=True)
class Compared:
    """By name, what the op gives, what PyTorch gives in the same types, and the same in float64.

    Attributes:
        terms: of the longest sum, which may be taken in any order. rounded: so many numbers on the way from inputs to results are
            rounded on either path; 0 where there are none.
    """

    actual: dict[str, Tensor]
    plain: dict[str, Tensor]
    want: dict[str, Tensor]
    terms: int
    rounded: int = 0


@dataclass(frozen=True)
class Check:
    """A row: ``compare`` over all shapes, of which the worst counts. names: of the sizes in a shape."""

    what: dict[str, Any]
    shapes: Sequence[tuple[int, ...]]
    compare: Callable[[tuple[int, ...]], Compared]
    names: str


@dataclass(frozen=True)
class Timing:
    """A row: contestants on the same tensors, launched ahead of the device.

    Attributes:
        make: by name, a call of each, and what else the row says. ratio: (contestant, ours), how many times as long the first
            takes. seconds: what all calls may take.
    """

    what: dict[str, Any]
    make: Callable[[], tuple[dict[str, Callable[[], Any]], dict[str, Any]]]
    ratio: tuple[str, str]
    seconds: float = 0.5


@dataclass(frozen=True)
class Storage:
    """A stored weight [N, K] and the op that makes it dense, with ``low_rank`` added if there is one.

    Attributes:
        kind: its name in ``lora_linear``. stored_bytes: of an element. make: a random one whose values have the size of a layer's,
            from (device, N, K), ``seed`` and the options of a variant and a form. dense: the op. truth: the values in float64.
        library: what bitsandbytes calls for the same tensors in a type; the call may be given memory to write to.
        library_columns: on a CPU bitsandbytes computes something else unless K is a multiple of that.
        variants: what rows tell apart; the last one is timed. forms: what each of them goes through; a dry run takes the first.
        shapes: one element, odd sizes, blocks across rows, more than 256 blocks, the aligned and the ragged path at size.
        merge_timed: shapes at which adding an adapter is timed.
    """

    kind: str
    stored_bytes: float
    make: Callable[..., Any]
    dense: Callable[..., Tensor]
    truth: Callable[[Any], Tensor]
    library: Callable[[Any, torch.dtype], Callable[[Tensor | None], Tensor]]
    library_columns: int = 1
    variants: Sequence[dict[str, Any]] = ({},)
    forms: Sequence[dict[str, Any]] = ({},)
    shapes: Sequence[tuple[int, int]] = (
        (1, 1), (1, 7), (5, 33), (33, 130), (300, 130), (64, 256), (1000, 4096), (1024, 4100),
    )  # fmt: skip
    timed: Sequence[tuple[int, int]] = ((4096, 4096), (14336, 4096), (1024, 4096))
    merge_timed: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class LossInputs:
    """What a loss is given beside the logits [N, V]: labels, a teacher's logits, or its likeliest classes."""

    targets: Tensor
    taught: Tensor
    probs: Tensor
    ids: Tensor
    temperature: float
    hard_weight: float


@dataclass(frozen=True)
class Loss:
    """A sum over tokens. fused: the op, from (x, head, inputs) and its options. eager: the same of logits, in plain PyTorch."""

    fused: Callable[..., Tensor]
    eager: Callable[[Tensor, LossInputs], Tensor]


@dataclass(frozen=True)
class HeadProblem:
    """Tensors of a timed loss: x [N, H] and w [V, H] of the student, t [N]; tx [N, G] and tw [V, G] of a teacher, or None.

    hard_weight: of labels beside the teacher.
    """

    x: Tensor
    w: Tensor
    t: Tensor
    tx: Tensor | None = None
    tw: Tensor | None = None
    hard_weight: float = 0.0

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w] if self.w.requires_grad else [self.x]


@dataclass(frozen=True)
class PlainLoss:
    """The loss in plain PyTorch on full logits, as lean as it gets.

    Attributes:
        mean: it is one over tokens, ours a sum. bytes_per_logit: its passes over logits read and write. softmaxes: those that may read
            twice. peak: bytes held at most a logit. All three are measured by a test, on a CPU.
    """

    name: str
    make: Callable[[HeadProblem], Callable[[], Tensor]]
    bytes_per_logit: float
    softmaxes: int
    peak: float
    mean: bool = False


@dataclass(frozen=True)
class TimedLoss:
    """Forward and backward in bfloat16 over a head of ``NUM_CLASSES``.

    Attributes:
        make: the loss of a problem; what a teacher has stored is made before the first call.
        bytes_per_logit: that ours moves. rows_ms: what its kernel over rows takes at least, where that is more.
        trained: the head as well. teacher: hidden size of one, or None. stored: it is not asked, its likeliest classes are kept.
        hard_weight: of labels beside it.
        targets: by contestant, how many times as fast ours has to be, and how many times less memory it may take beside the inputs.
        more: (tokens, hidden, classes) at which it is timed against plain PyTorch as well.
    """

    tokens: int
    hidden: int
    make: Callable[[HeadProblem], Callable[[], Tensor]]
    plain: PlainLoss
    bytes_per_logit: float
    rows_ms: float | None = None
    trained: bool = False
    teacher: int | None = None
    stored: bool = False
    hard_weight: float = 0.0
    targets: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    more: Sequence[tuple[int, int, int]] = ()


def case_files() -> dict[str, Path]:
    """The cases.py of every op that has one, by op; nothing is imported."""
    files = {path.parent.name: path for folder in peftlab_kernels.__path__ for path in Path(folder).glob("*/cases.py")}
    return dict(sorted(files.items()))


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"peftlab_kernels.{op}.cases")


def gathered(name: str) -> dict[str, Any]:
    """What each op's cases.py has under this name, by op."""
    modules = {op: cases_of(op) for op in case_files()}
    return {op: getattr(module, name) for op, module in modules.items() if hasattr(module, name)}
