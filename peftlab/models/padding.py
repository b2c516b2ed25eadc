"""Padding: the token that fills a batch, the side a family needs, and the ids that a model's config shares with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

Padding = Literal["right", "left", "none"]

# Their outputs of a padded row differ from those of the row alone: they mix positions without a mask (FNet,
# Nystromformer), hash them (Reformer, YOSO), or convolve over the padding (ConvBERT).
_NO_PADDING = {"canine", "convbert", "fnet", "nystromformer", "reformer", "yoso"}
# Their positions are counted from the padding id of the config, so it cannot change.
COUNTED_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "mluke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def padding_of(config: Any, *, whole_rows: bool) -> Padding:
    """How the rows of a batch are padded so that each gets the outputs that it gets alone; ``none``: only rows of one
    length share a forward pass.

    Args: whole_rows: see ``TaskSpec.reads_whole_rows``.
    """
    if config.model_type in _NO_PADDING:
        return "none"
    if config.model_type == "funnel" and not whole_rows:
        return "none"  # it pools pairs of positions, and the last of a row may be paired with padding
    summary = getattr(config, "summary_type", None)
    if config.model_type == "xlnet" and whole_rows:
        return {"last": "left", "first": "right"}.get(str(summary), "none")  # type: ignore[return-value]
    return "right"


def padding_token(tokenizer: Any, config: Any) -> tuple[str | None, str | None]:
    """The token that fills a batch, always one that the model has, and why if it is not the tokenizer's own.

    In this order: the tokenizer's padding token, that of the model's config, a special token whose name contains ``pad``,
    the end of text, the unknown token, and the first token of the vocabulary. Args: config: None if there is none.
    """
    num_ids = None if config is None else vocabulary_rows(config)
    own, of_config = tokenizer.pad_token_id, None if config is None else pad_id(config)

    def fits(token_id: int | None) -> bool:
        return token_id is not None and 0 <= token_id < min(num_ids or len(tokenizer), len(tokenizer))

    if own is not None and fits(own):
        return tokenizer.pad_token, None
    candidates = [
        (of_config, "the padding token of the model's config"),
        *((i, "a special token for padding") for i in _named_padding(tokenizer)),
        (tokenizer.eos_token_id, "the end of text"),
        (tokenizer.unk_token_id, "the unknown token"),
        (0, "the first token of the vocabulary"),
    ]
    chosen, what = next((i, what) for i, what in candidates if fits(i))
    token = str(tokenizer.convert_ids_to_tokens(chosen))
    if own is None:
        why = "the tokenizer has no padding token"
    else:
        why = f"the padding token {tokenizer.pad_token!r} has the id {own:,}, but the model has {num_ids:,} embedding rows"
    return token, f"{why}: batches are padded with {token!r} (id {chosen}), {what}"


def reconcile(model: Any, tokenizer: Any) -> None:
    """Sets the ids that ``model`` reads from its config to those of ``tokenizer``: padding, where the head of a decoder
    skips it, and for an encoder-decoder the end of text, where its head reads, and the start of the decoder.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, value in _reconciled(config, tokenizer):
            setattr(config, name, value)
    for module in model.modules():
        if isinstance(getattr(module, "pad_index", None), int):  # XLM masks this id in a batch without padding
            module.pad_index = tokenizer.pad_token_id


def reconciled_ids(config: Any, tokenizer: Any) -> dict[str, tuple[int | None, int]]:
    """Name in the config -> ``(id now, id that reconcile sets)``, for each id that changes."""
    text = config.get_text_config()
    return {name: (getattr(text, name, None), value) for name, value in _reconciled(text, tokenizer)}


def _reconciled(config: Any, tokenizer: Any) -> Iterator[tuple[str, int]]:
    if config.model_type in COUNTED_FROM_PADDING:
        return
    pad = tokenizer.pad_token_id
    if getattr(config, "pad_token_id", None) != pad:
        yield "pad_token_id", pad
    if not getattr(config, "is_encoder_decoder", False):
        return
    eos = tokenizer.eos_token_id
    if eos is not None and getattr(config, "eos_token_id", None) != eos:
        yield "eos_token_id", eos
    if getattr(config, "decoder_start_token_id", None) is None:
        yield "decoder_start_token_id", pad


def pad_id(config: Any) -> int | None:
    """The padding id of a config; None if it has none, or one that is no id."""
    value = getattr(config.get_text_config(), "pad_token_id", None)
    return value if isinstance(value, int) and value >= 0 else None


def vocabulary_rows(config: Any) -> int | None:
    """The number of rows of a model's input embeddings; None for a model without a vocabulary."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def _named_padding(tokenizer: Any) -> list[int]:
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return sorted(i for i in special if "pad" in str(tokenizer.convert_ids_to_tokens(i)).lower())
