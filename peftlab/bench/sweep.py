"""The cells of a sweep: the product of the requested values, the impossible cells with reasons, and the order."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftlab.errors import RecipeError
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.methods import VARIANTS, rank_of
from peftlab.specs.storages import STORAGES
from peftlab.specs.tasks import TASKS

WORK = ("train", "generate")
_KNOWN = {
    "what": WORK,
    "methods": tuple(VARIANTS),
    "quantize": tuple(STORAGES),
    "kernels": tuple(name for name, mode in KERNEL_MODES.items() if mode.benched),
}


@dataclass(frozen=True)
class Cell:
    """One configuration to measure.

    Attributes:
        rank: None for a method without rank. kernels: the value of run.kernels. batch: rows per step. length: tokens per row,
            or per prompt in generation. adapters: number of adapters in one batch.
    """

    what: str
    method: str
    rank: int | None
    quantize: str
    kernels: str
    batch: int
    length: int
    adapters: int = 1

    @property
    def key(self) -> str:
        """The cell's name in files: ``train/lora/r8/nf4/auto/4x64/1``."""
        rank = "-" if self.rank is None else f"r{self.rank}"
        shape = f"{self.batch}x{self.length}"
        return "/".join((self.what, self.method, rank, self.quantize, self.kernels, shape, str(self.adapters)))

    @property
    def twin(self) -> Cell:
        """The same cell on PEFT's path."""
        return dataclasses.replace(self, kernels="reference")

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" r{self.rank}"
        weights = "" if self.quantize == "none" else f" {self.quantize}"
        adapters = "" if self.adapters == 1 else f" of {self.adapters} adapters"
        path = KERNEL_MODES[self.kernels].label
        return f"{self.what} {self.method}{rank}{weights} {path}, {self.batch} x {self.length} tokens{adapters}"


@dataclass(frozen=True)
class Sweep:
    """The values of each dimension, in order."""

    what: tuple[str, ...]
    methods: tuple[str, ...]
    ranks: tuple[int | None, ...]
    quantize: tuple[str, ...]
    kernels: tuple[str, ...]
    batch: tuple[int, ...]
    length: tuple[int, ...]
    adapters: tuple[int, ...] = (1,)

    def as_dict(self) -> dict[str, list[Any]]:
        return {f.name: list(getattr(self, f.name)) for f in dataclasses.fields(self)}


def make_sweep(**values: Sequence[Any]) -> Sweep:
    """Returns the validated sweep, without duplicate values.

    Raises: RecipeError for an empty dimension, an unknown name (with the nearest) or a number below 1.
    """
    checked: dict[str, tuple[Any, ...]] = {}
    for name, given in values.items():
        if not given:
            raise RecipeError(
                f"nothing to measure: --{name} is empty; omit it to use the recipe's value, or give a value"
            )
        for value in given:
            if name in _KNOWN and value not in _KNOWN[name]:
                near = difflib.get_close_matches(str(value), _KNOWN[name], n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RecipeError(f"--{name}: expected some of {', '.join(_KNOWN[name])}, found {value!r}{hint}")
            if name not in _KNOWN and value is not None and value < (2 if name == "length" else 1):
                least = "2 tokens, of which one is predicted" if name == "length" else "1"
                raise RecipeError(f"--{name}: expected at least {least}, found {value}")
        checked[name] = tuple(dict.fromkeys(given))
    return Sweep(**checked)


def cells_of(sweep: Sweep, recipe_method: str | None = None) -> list[Cell]:
    """Returns the product of all values, PEFT's path next to the fused one. A method without a rank, such as full
    fine-tuning, appears once, not once per rank. Args: recipe_method: see ``rank_of``."""
    ranks: tuple[int | None, ...] = sweep.ranks
    product = itertools.product(
        sweep.what, sweep.batch, sweep.length, sweep.adapters, sweep.methods, ranks, sweep.quantize, sweep.kernels
    )
    cells = [
        Cell(what, method, rank_of(method, rank, recipe_method), quantize, kernels, batch, length, adapters)
        for what, batch, length, adapters, method, rank, quantize, kernels in product
    ]
    return list(dict.fromkeys(cells))


@dataclass(frozen=True)
class Facts:
    """The facts that decide whether a cell is possible.

    Attributes:
        max_length: the model's maximum tokens. fixed_length: the number of tokens of an image; None for texts.
        no_bitsandbytes: why it cannot be imported; None if it can. no_operands: the modes among ``cpu-bf16`` and
            ``cpu-int8`` that cannot run here, with the reason.
    """

    task: str
    max_length: int
    new_tokens: int
    fixed_length: int | None = None
    no_bitsandbytes: str | None = None
    no_operands: Mapping[str, str] = field(default_factory=dict)


def impossible(cell: Cell, facts: Facts) -> str | None:
    """Why ``cell`` is impossible; None if it seems possible before a model is loaded."""
    method, variant = VARIANTS[cell.method]
    mode = KERNEL_MODES[cell.kernels]
    if STORAGES[cell.quantize].is_quantized and facts.no_bitsandbytes is not None:
        return f"{cell.quantize} needs bitsandbytes, which cannot be imported ({facts.no_bitsandbytes})"
    if not method.trains_on(cell.quantize):
        return f"{cell.quantize} weights cannot be trained: {method.label} needs --quantize none"
    if cell.kernels in facts.no_operands:
        return facts.no_operands[cell.kernels]
    if mode.operands is not None and not variant.fused:
        return f"{cell.kernels} rounds products with frozen weights under LoRA, but {cell.method} has no such path"
    if mode.storage not in (None, cell.quantize):
        return f"{mode.name} multiplies weights stored in {mode.storage}: add --quantize {mode.storage}"
    if cell.what == "generate":
        return _no_generation(cell, facts)
    if cell.adapters > 1:
        return "training uses one adapter; several adapters need --what generate"
    if facts.fixed_length is not None and cell.length != facts.fixed_length:
        return f"an image of this model has {facts.fixed_length} tokens, not {cell.length}: omit --length"
    if cell.length > facts.max_length:
        return f"the model reads at most {facts.max_length:,} tokens"
    return None


def _no_generation(cell: Cell, facts: Facts) -> str | None:
    if not TASKS[facts.task].chats:
        return f"bench generates with causal language models only, and this is task {facts.task}"
    if cell.length + facts.new_tokens > facts.max_length:
        return f"{cell.length} + {facts.new_tokens} new tokens exceed the model's {facts.max_length:,}"
    if cell.adapters == 1:
        return None
    method, variant = VARIANTS[cell.method]
    if not method.adapts:
        return "full has no adapter, so there cannot be several; omit full"
    if not variant.several:
        return f"PEFT has no batch of several {'DoRA' if cell.method == 'dora' else cell.method} adapters; use lora"
    if cell.batch < cell.adapters:
        return f"{cell.batch} rows are fewer than {cell.adapters} adapters"
    return None


def interleaved(cells: Sequence[Cell], repetition: int) -> list[Cell]:
    """Returns the order of repetition 0, 1, ...: A B C, then C B A, so that a machine that slows down or heats up affects the
    first and the last cell equally."""
    return list(cells) if repetition % 2 == 0 else list(reversed(cells))
