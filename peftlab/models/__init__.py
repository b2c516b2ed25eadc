"""Backbones: finding, loading, quantizing."""

from peftlab.models.load import (
    Pretrained,
    find_pretrained,
    load_model,
    load_tokenizer,
    quiet,
    resolve_dtype,
    tokenizer_fingerprint,
)

__all__ = [
    "Pretrained",
    "find_pretrained",
    "load_model",
    "load_tokenizer",
    "quiet",
    "resolve_dtype",
    "tokenizer_fingerprint",
]
