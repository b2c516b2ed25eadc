"""Tokens that a recipe adds to a model: in its tokenizer, and as rows of its embeddings and its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftlab.errors import RecipeError
from peftlab.models.load_errors import quiet

_KEY = "adapter.tokens"


def add_tokens(tokenizer: Any, tokens: Sequence[str] | Mapping[str, str]) -> None:
    """Adds the tokens at the end of the vocabulary, as ordinary tokens: decoded text keeps them.

    Raises: RecipeError for an empty token, and for one that the tokenizer has.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    if twice := [token for token in dict.fromkeys(tokens) if list(tokens).count(token) > 1]:
        raise RecipeError(f"{twice[0]!r} is listed twice", key=_KEY)
    for token in tokens:
        if not token.strip():
            raise RecipeError(f"expected a token of visible characters, found {token!r}", key=_KEY)
        if token in vocabulary:
            raise RecipeError(
                f"the tokenizer has {token!r} already, with the id {vocabulary[token]:,}; remove it here, and train its row with "
                f"adapter.trainable_token_indices=[{vocabulary[token]}]",
                key=_KEY,
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def token_rows(model: Any, tokenizer: Any, tokens: Sequence[str]) -> dict[str, list[int]]:
    """The rows of the tokens, by name of the module that has them: the input embeddings, and a head with weights of its own."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(end)]: list(ids) for end in ends}


@torch.no_grad()
def start_rows(model: Any, tokenizer: Any, tokens: Sequence[str] | Mapping[str, str]) -> None:
    """Gives each token a row in embeddings and head: the mean of the rows of its description's tokens, or without a description
    the mean of all rows that the model had.

    Args: tokens: names, or a mapping of names to descriptions; an empty description is none.
    Raises: RecipeError for a model without a vocabulary.
    """
    try:
        first = len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError) as error:
        raise RecipeError(f"{type(model).__name__} has no vocabulary to add tokens to", key=_KEY) from error
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    known = min(first, min(ids.values()))
    if max(ids.values()) >= first:
        with quiet():
            model.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(end.weight): end.weight for end in ends if end is not None}
    for weight in weights.values():
        mean = weight[:known].float().mean(0)
        for token, row in ids.items():
            described = _described(tokenizer, tokens[token]) if isinstance(tokens, Mapping) else []
            like = [i for i in described if i < known]
            weight[row] = (weight[like].float().mean(0) if like else mean).to(weight.dtype)
    for end in ends:
        if end is not None and getattr(end, "bias", None) is not None and len(end.bias) > known:
            end.bias[known:] = 0


def _described(tokenizer: Any, description: str) -> list[int]:
    return [int(i) for i in tokenizer(description, add_special_tokens=False)["input_ids"]] if description else []
