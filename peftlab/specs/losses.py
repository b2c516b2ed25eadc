"""The distillation losses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossSpec:
    """Properties of a distillation loss.

    Attributes:
        compares: what it compares between teacher and student: ``probabilities`` (formula in ``kernels/.../linear_kl``),
            ``vectors``, ``numbers`` or ``layers`` (``distillation.features``). The first entry applies, unless the key ``layers`` is set
            or the task predicts no vectors.
        needs_every_class: whether it needs the teacher's probability of every class, not only of the likeliest ones.
        keys: the keys of ``losses`` and ``distill`` that it uses, in addition to ``weight``.
    """

    name: str
    compares: tuple[str, ...]
    needs_every_class: bool = False
    keys: tuple[str, ...] = ()

    def compares_layers(self, predicts: str, *, layers_given: bool) -> bool:
        """Whether it compares layers inside the models, not their outputs.

        Args: predicts: what the task predicts. layers_given: whether the recipe sets ``layers``.
        """
        return "layers" in self.compares and (predicts not in self.compares or layers_given)


_LAYERS = ("layers",)

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("forward_kl", ("probabilities",)),
        LossSpec("reverse_kl", ("probabilities",), needs_every_class=True),
        LossSpec("skew_forward_kl", ("probabilities",), needs_every_class=True, keys=("share",)),
        LossSpec("skew_reverse_kl", ("probabilities",), needs_every_class=True, keys=("share",)),
        LossSpec("jsd", ("probabilities",), needs_every_class=True, keys=("share",)),
        LossSpec("tvd", ("probabilities",), needs_every_class=True),
        LossSpec("hidden_cosine", ("vectors", "layers"), keys=_LAYERS),
        LossSpec("hidden_mse", ("vectors", "numbers", "layers"), keys=_LAYERS),
        LossSpec("similarity_mse", ("vectors",)),
        LossSpec("similarity_kl", ("vectors",)),
        LossSpec("attention_mse", ("layers",), keys=_LAYERS),
        LossSpec("attention_kl", ("layers",), keys=_LAYERS),
        LossSpec("relation_kl", ("layers",), keys=("layers", "relation_heads")),
    )
}
