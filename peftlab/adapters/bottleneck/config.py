"""The settings of bottleneck adapters, checked when they are made."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.errors import RecipeError, listed

Style = Literal["houlsby", "pfeiffer", "parallel"]
STYLES: tuple[Style, ...] = ("houlsby", "pfeiffer", "parallel")


@dataclass(frozen=True)
class BottleneckConfig:
    """An adapter ``A(x) = scaling * up(f(down(x)))`` after or beside the sublayers of each block.

    ``h`` is the output of a sublayer, after its dropout if that is a module (BART's blocks drop what the adapter gives), ``r``
    the residual stream that is added to it, and ``LN`` the layer norm over the sum if the block has one (post-norm, as BERT; a
    pre-norm block such as Llama's has none):

        houlsby   LN(h + A(h) + r)        after self-attention and after the feed-forward sublayer
        pfeiffer  LN(h + A(LN(h + r)) + r)  after the feed-forward sublayer; pre-norm: h + A(h + r) + r
        parallel  LN(h + A(r) + r)        beside the feed-forward sublayer

    No style puts an adapter after cross-attention, as the defaults of ``adapters`` (``cross_adapter=False``). Feed-forward
    sublayers that run beside the attention (Phi, GPT-NeoX) have the block's input as ``r``.

    Args:
        style: published defaults of the others are houlsby: swish, factor 16; pfeiffer: relu, factor 16; parallel: relu,
            factor 2, scaling 4.
        reduction_factor: width of the block / width of the bottleneck, which is rounded down and at least 1. Above 0; below 1
            the bottleneck is wider than the block.
        non_linearity: a name in transformers' ``ACT2FN``.
        dropout: probability, on the adapter's output, in training.
        scaling: a number, or ``learned``: one trained number per adapter, from 1.
        layers: indices of the blocks with adapters, those of the encoder before those of the decoder; None: all.
    Raises: RecipeError for a value out of range, and an unknown style or non-linearity.
    Source: Houlsby et al. 2019 (arXiv 1902.00751, figure 2); Pfeiffer et al. 2020 (arXiv 2005.00247, section 2.2); He et al.
        2021 (arXiv 2110.04366, table 1); placement of the residual and LN: ``DoubleSeqBnConfig``, ``SeqBnConfig`` and
        ``ParBnConfig`` of adapters 1.3.0.
    """

    style: Style = "pfeiffer"
    reduction_factor: float = 16.0
    non_linearity: str = "relu"
    dropout: float = 0.0
    scaling: float | Literal["learned"] = 1.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise RecipeError(
                f"expected one of {', '.join(STYLES)}, found {self.style!r}{_near(self.style, STYLES)}",
                key="adapter.style",
            )
        if not _is_number(self.reduction_factor) or not 0 < self.reduction_factor < float("inf"):
            raise RecipeError(
                f"expected a number above 0, found {self.reduction_factor!r}", key="adapter.reduction_factor"
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise RecipeError(
                f"expected a probability from 0 to below 1, found {self.dropout!r}", key="adapter.dropout"
            )
        if self.scaling != "learned" and not (_is_number(self.scaling) and abs(float(self.scaling)) < float("inf")):
            raise RecipeError(f"expected a number or 'learned', found {self.scaling!r}", key="adapter.scaling")
        if self.layers is not None:
            object.__setattr__(self, "layers", _indices(self.layers))
        self._check_non_linearity()

    def _check_non_linearity(self) -> None:
        from transformers.activations import ACT2FN

        if self.non_linearity not in ACT2FN:
            raise RecipeError(
                f"transformers has no activation {self.non_linearity!r}{_near(self.non_linearity, list(ACT2FN))}; it has "
                f"{', '.join(sorted(ACT2FN))}",
                key="adapter.non_linearity",
            )


def _indices(layers: object) -> tuple[int, ...]:
    """The sorted indices without repetitions. Raises: RecipeError unless they are indices, and at least one."""
    given: list[Any] = list(layers) if isinstance(layers, list | tuple | range | set | frozenset) else [layers]
    if not given or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in given):
        raise RecipeError(f"expected indices of layers from 0, found {listed(given) or 'none'}", key="adapter.layers")
    return tuple(sorted(set(given)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _near(name: object, names: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
