"""What an op's ``cases.py`` contains: plain data and small builders that say what to compile, check and time.

The programs find every op that has such a file, so a new op needs no edit in them. A cases.py defines those of these names
that apply:

- ``COMPILED``: a list of ``Compiled``, one for every way in which the op launches a kernel.
- ``checks(device)``: yields one ``Check`` per row: outputs and gradients against float64. ``times(device)``: yields one ``Timing`` per row.
- ``STORAGE``: a ``Storage``, if the op dequantizes a stored weight. ``LOSSES`` and ``TIMED_LOSSES``: a ``Loss`` and a ``TimedLoss`` by
  name, if the op is a loss of hidden states and a head. All such ops get the same checks and timings.
- ``CLAIMS``: claims about the op and the rows that decide them, in the form of the program that judges them.

Nothing here imports torch, so a program can list the ops within milliseconds.
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

# Arguments that a kernel which adds s B A takes after its own: for rows of a multiple of 16, and for other rows.
MERGE, UNALIGNED_MERGE = "*A *A *T i16 i16 R fp32", "*A *A *T i16 i32 R fp32"
NUM_CLASSES = 128256  # of Llama-3's head


class Device(Protocol):
    """What builders need from the device that a check or a measurement runs on."""

    kind: str

    @property
    def dry(self) -> bool:
        """Whether it is a CPU run at tiny shapes, which only shows that the code runs."""

    def pick(self, real: Any, dry: Any) -> Any: ...

    def randn(self, *size: int, seed: int, dtype: Any = None) -> Any: ...

    def backend(self, dtype: Any) -> str:
        """The backend for an op that computes in this type."""


@dataclass(frozen=True)
class Compiled:
    """One way in which an op launches a kernel.

    Attributes:
        signature: types of the run-time arguments, in order. T is the op's type, A the type of the adapter's factors,
            R the rank. i16 is an int32 that is a multiple of 16, as most sizes are.
        values: the op's compile-time values and launch options for a type and a rank; DOT is added.
        matrix: it multiplies matrices, so it is compiled for each rank.
        wide: in 16 bits it is compiled again with float32 factors, which PEFT keeps next to a quantized model.
    """

    kernel: str
    variant: str
    signature: str
    values: Callable[[torch.dtype, int], dict[str, Any]]
    matrix: bool = True
    wide: bool = False


@dataclass(frozen=True)
class Compared:
    """Results by name: of the op, of PyTorch in the same types, and in float64.

    Attributes:
        terms: number of terms of the longest sum, which may run in any order. rounded: how many intermediate numbers either
            path rounds, 0 if none.
    """

    actual: dict[str, Tensor]
    plain: dict[str, Tensor]
    want: dict[str, Tensor]
    terms: int
    rounded: int = 0


@dataclass(frozen=True)
class Check:
    """A row: ``compare`` runs on all shapes and the worst one counts. names: names of the sizes in a shape."""

    what: dict[str, Any]
    shapes: Sequence[tuple[int, ...]]
    compare: Callable[[tuple[int, ...]], Compared]
    names: str


@dataclass(frozen=True)
class Timing:
    """A row: contestants on the same tensors, launched ahead of the device.

    Attributes:
        make: a call per contestant, by name, and the other fields of the row. ratio: (contestant, ours): how many times as long
            the first takes. seconds: time limit for all calls.
    """

    what: dict[str, Any]
    make: Callable[[], tuple[dict[str, Callable[[], Any]], dict[str, Any]]]
    ratio: tuple[str, str]
    seconds: float = 0.5


@dataclass(frozen=True)
class Storage:
    """A stored weight [N, K] and the op that dequantizes it and adds ``low_rank`` if there is one.

    Attributes:
        kind: its name in ``lora_linear``. stored_bytes: bytes per element. make: a random weight whose values are as large as a
            layer's, from (device, N, K), ``seed`` and the options of a variant and a form. dense: the op. truth: the values in
            float64.
        library: bitsandbytes' call for the same tensors in a type; it may take memory to write to.
        library_columns: on a CPU bitsandbytes gives another result unless K is a multiple of this.
        variants: each has a row of its own; the last one is timed. forms: all are checked per variant; a dry run checks the first.
        shapes: one element, odd sizes, blocks across rows, more than 256 blocks, the aligned and the ragged path at full size.
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
    """Inputs of a loss other than the logits [N, V]: labels, a teacher's logits, or its most likely classes."""

    targets: Tensor
    teacher_logits: Tensor
    probs: Tensor
    ids: Tensor
    temperature: float
    hard_weight: float


@dataclass(frozen=True)
class Loss:
    """A sum over tokens. fused: the op, from (x, head, inputs) and its options. eager: the same loss from logits, in plain PyTorch."""

    fused: Callable[..., Tensor]
    eager: Callable[[Tensor, LossInputs], Tensor]


@dataclass(frozen=True)
class HeadProblem:
    """Tensors of a timed loss: x [N, H] and w [V, H] of the student, t [N]; tx [N, G] and tw [V, G] of a teacher, or None.

    hard_weight: weight of the labels' loss; the rest is the teacher's.
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
    """The loss in plain PyTorch on full logits, with as few passes as possible.

    Attributes:
        mean: it averages over tokens, where ours sums. bytes_per_logit: bytes that its passes over logits read and write.
            softmaxes: how many softmaxes may read their input twice. peak: most bytes held per logit. A test measures the last
            three on a CPU.
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
        make: the loss of a problem; it builds a teacher's stored classes before the first call.
        bytes_per_logit: bytes that ours moves. rows_ms: least time of its row kernel, where that is longer.
        trained: the head is trained too. teacher: a teacher's hidden size, or None. stored: its most likely classes are stored,
            so it does not run.
        hard_weight: weight of the labels' loss.
        targets: by contestant, how many times faster ours must be, and how many times less memory it must take on top of the
            inputs.
        more: (tokens, hidden, classes) of additional timings against plain PyTorch.
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
    """The path of each op's cases.py, by op, for ops that have one. Imports nothing."""
    paths = {path.parent.name: path for folder in peftlab_kernels.__path__ for path in Path(folder).glob("*/cases.py")}
    return dict(sorted(paths.items()))


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"peftlab_kernels.{op}.cases")


def gathered(name: str) -> dict[str, Any]:
    """The value of this name in each op's cases.py, by op."""
    modules = {op: cases_of(op) for op in case_files()}
    return {op: getattr(module, name) for op, module in modules.items() if hasattr(module, name)}
