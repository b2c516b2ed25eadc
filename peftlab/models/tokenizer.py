"""The tokenizer of a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError
from peftlab.models.config import load_config
from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.presets import preset_tokenizer
from peftlab.models.pretrained import Pretrained
from peftlab.models.tiny import tiny_tokenizer


def load_tokenizer(pretrained: Pretrained, *, chat_template: str | None = None) -> Any:
    """The tokenizer, with a padding token (never a new vocabulary entry) and the given template file, if any.

    Raises: RecipeError.
    """
    from transformers import AutoTokenizer

    if pretrained.source.kind == "tiny":
        tokenizer = tiny_tokenizer()
    elif pretrained.source.kind == "shape":
        tokenizer = preset_tokenizer(pretrained.source.path)
    else:
        with quiet(), load_errors(pretrained, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(pretrained.location, **pretrained.hub_kwargs)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer of {pretrained.source.name!r} has no fast (Rust) version, which the loss mask needs",
            key="model.name",
        )
    if tokenizer.pad_token_id is None:
        # Padding is always masked by position, so any existing token works and the vocabulary does not change.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise RecipeError(f"no such file: {chat_template!r}", key="model.chat_template")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read as utf-8 text: {error}", key="model.chat_template") from None
        if not tokenizer.chat_template.strip():
            raise RecipeError(f"{path} is empty; expected a Jinja chat template", key="model.chat_template")
    return tokenizer


def model_max_length(pretrained: Pretrained, tokenizer: Any) -> int:
    """The longest input in tokens that the model's position embeddings and its tokenizer allow."""
    positions = getattr(load_config(pretrained).get_text_config(), "max_position_embeddings", None)
    return min(int(positions or 2**31), int(min(tokenizer.model_max_length, 2**31)))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the tokenizer's serialisation and its chat template, or the fingerprint of an ``ImageReader``."""
    if hasattr(tokenizer, "fingerprint"):
        return str(tokenizer.fingerprint)
    text = tokenizer.backend_tokenizer.to_str() + "\0" + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()
