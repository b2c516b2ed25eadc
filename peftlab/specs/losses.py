"""The losses of a distillation against its teacher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossSpec:
    """What everyone else asks about a loss.

    Attributes:
        compares: what of teacher and student it compares: ``probabilities`` (formula in ``kernels/.../linear_kl``), ``vectors``
            or ``layers`` (``distillation.features``). The first one is what it compares unless its key ``layers`` is given or
            the task predicts no vectors.
        needs_every_class: whether it needs the teacher's probability of every class, and not only of the likeliest.
        keys: of the section ``losses`` and of ``distill`` that it uses, beside ``weight``.
    """

    name: str
    compares: tuple[str, ...]
    needs_every_class: bool = False
    keys: tuple[str, ...] = ()

    def compares_layers(self, predicts: str, *, layers_given: bool) -> bool:
        """Whether it is about what is inside the models, and not about their answers.

        Args: predicts: of the task. layers_given: whether the recipe says which layers.
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
        LossSpec("hidden_mse", ("vectors", "layers"), keys=_LAYERS),
        LossSpec("similarity_mse", ("vectors",)),
        LossSpec("similarity_kl", ("vectors",)),
        LossSpec("attention_mse", ("layers",), keys=_LAYERS),
        LossSpec("attention_kl", ("layers",), keys=_LAYERS),
        LossSpec("relation_kl", ("layers",), keys=("layers", "relation_heads")),
    )
}
