"""An adapter folded into its base model: what can be folded, and what becomes of a head that is tied to the embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from peftlab.adapters import beside, method_of
from peftlab.adapters.merge import fold
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS


def folded(adapted: Any) -> Any:
    """The base model of a ``PeftModel`` with the adapter in its weights. Raises: RecipeError for a method that PEFT cannot merge."""
    method = method_of(adapted.peft_config["default"])
    check_mergeable((method, *beside(adapted)))
    try:
        return _with_biases(fold(adapted))
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise RecipeError(
            f"PEFT cannot merge this {method.upper()} adapter: {reason}; use it as an adapter, without merging",
            key="adapter.method",
        ) from error


def _with_biases(model: Any) -> Any:
    """Keeps the bias of an output layer that transformers shares with another place: a head that is no longer tied gets both
    in its files, because transformers then opens them apart."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for used, other in (getattr(model, "_tied_weights_keys", None) or {}).items():
        if used.endswith(".bias") and used in parameters and other in parameters:
            tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
            parameters[other].data = parameters[used].data if tied else parameters[used].data.clone()
            if not tied and parameters[other] is parameters[used]:
                module = model.get_submodule(used.rpartition(".")[0])
                module.bias = torch.nn.Parameter(parameters[used].data.clone(), requires_grad=False)
    return model


def check_mergeable(methods: Iterable[str]) -> None:
    """Raises RecipeError for the first of these methods whose adapters cannot be merged."""
    for spec in filter(None, map(METHODS.get, methods)):
        if spec.unmergeable:
            raise RecipeError(
                f"{spec.label} cannot be merged: {spec.unmergeable}; use it as an adapter, without merging",
                key="adapter.method",
            )


def untie_if_adapted(base: Any) -> bool:
    """Gives a tied head weights of its own if the adapter in ``base`` changes it or the embeddings; returns whether it is still
    tied."""
    if not _tied_head(base):
        return False
    if _is_adapted(base):
        _untie(base)
        return False
    return True


def is_tied(model: Any) -> bool:
    """Whether the head of a model is its embeddings."""
    head, embedding = _ends(model)
    return head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()


def _ends(model: Any) -> tuple[Any, Any]:
    """The output head and the input embeddings of a model, adapted or not; None for one that it does not have."""
    try:
        return model.get_output_embeddings(), model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None, None


def _tied_head(base: Any) -> bool:
    """Whether the head is the input embeddings, without what an adapter puts around them; the head of an encoder-decoder of two
    models is tied to the embeddings of its decoder, which are others."""
    head, embedding = map(_original, _ends(base))
    return head is not None and embedding is not None and head.weight is embedding.weight


def _original(module: Any) -> Any:
    """A layer without an adapter's wrapper."""
    module = getattr(module, "original_module", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _is_adapted(base: Any) -> bool:
    """Whether the adapter changes the head or the embeddings, so that they need separate tensors."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    # Trained rows of a tied pair are the same rows.
    others = [m for m in _ends(base) if not isinstance(m, TrainableTokensLayer | TrainableTokensWrapper)]
    if any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in others):
        return True
    # A head that is trained in full as part of a larger module, such as the new head of a masked LM.
    whole = [m for m in base.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return any(inner is m for wrapper in whole for inner in wrapper.modules() for m in others if m is not None)


def _untie(base: Any) -> None:
    """Gives the head a separate tensor, so that an update of head or embedding does not change the other."""
    head = _original(_ends(base)[0])
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False
