"""The tokenizer of a model."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError
from peftlab.models.config import load_config
from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.padding import COUNTED_FROM_PADDING, pad_id, padding_token
from peftlab.models.presets import preset_tokenizer
from peftlab.models.pretrained import Pretrained
from peftlab.models.tiny import tiny_tokenizer

UNLIMITED = 2**31
# Families with relative positions or a state, whose config may still have a number of positions.
_RELATIVE = {"bloom", "funnel", "mamba", "mamba2", "falcon_mamba", "mt5", "rwkv", "t5", "umt5", "xlnet"} | {
    "longt5",
    "switch_transformers",
}


def load_tokenizer(pretrained: Pretrained, *, chat_template: str | None = None, offsets: bool = True) -> Any:
    """The tokenizer, with a padding token (never a new vocabulary entry) and the given template file, if any.

    Args: offsets: whether the task needs the characters of each token, which only fast tokenizers give.

    ``padding_note`` of the result is the reason for a padding token that is not its own, or None. Raises: RecipeError.
    """
    from transformers import AutoTokenizer

    if pretrained.source.kind == "tiny":
        tokenizer = tiny_tokenizer(pretrained.source.name)
    elif pretrained.source.kind == "shape":
        tokenizer = preset_tokenizer(pretrained.source.path)
    else:
        with quiet(), load_errors(pretrained, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(pretrained.location, **pretrained.hub_kwargs)
    if offsets and not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer of {pretrained.source.name!r} has no fast (Rust) version, which the loss mask needs",
            key="model.name",
        )
    # Padding is masked by position, so any existing token works and the vocabulary does not change.
    config = None
    with contextlib.suppress(RecipeError):  # without a config the model cannot be loaded, which says so
        config = load_config(pretrained)
    token, tokenizer.padding_note = padding_token(tokenizer, config)
    if tokenizer.pad_token != token:
        tokenizer.pad_token = token
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


@dataclass(frozen=True)
class LengthLimit:
    """The longest input in tokens. Attributes: note: where an unusual limit comes from; None for the model's positions."""

    tokens: int
    note: str | None = None


def length_limit(pretrained: Pretrained, tokenizer: Any) -> LengthLimit:
    """The longest input that the model's positions and its tokenizer allow; ``UNLIMITED`` if neither has a limit."""
    of_model, why = _positions(load_config(pretrained))
    of_tokenizer = _sensible(tokenizer.model_max_length)
    if of_tokenizer is not None and of_tokenizer < (of_model or UNLIMITED):
        beyond = f"the model's positions hold {of_model:,}" if of_model else "the model's positions have no limit"
        return LengthLimit(of_tokenizer, f"its tokenizer says so (model_max_length); {beyond}")
    if of_model is None:
        return LengthLimit(UNLIMITED, "neither the model's positions nor its tokenizer set a limit")
    return LengthLimit(of_model, None if of_model == of_tokenizer else why)


def target_limit(pretrained: Pretrained, tokenizer: Any) -> int:
    """The longest target of an encoder-decoder in tokens; ``UNLIMITED`` if it has no limit."""
    config = load_config(pretrained)
    own = _sensible(getattr(config, "max_decoder_position_embeddings", None))
    if own is None and hasattr(config, "decoder"):
        own = _positions(config.decoder)[0]
    return model_max_length(pretrained, tokenizer) if own is None else own


def model_max_length(pretrained: Pretrained, tokenizer: Any) -> int:
    """The tokens of ``length_limit``."""
    return length_limit(pretrained, tokenizer).tokens


def _positions(config: Any) -> tuple[int | None, str | None]:
    """The tokens that a model's positions hold, and why if its config says another number. None: relative positions."""
    text = config.encoder if config.model_type == "encoder-decoder" else config.get_text_config()
    if text.model_type in _RELATIVE or getattr(text, "alibi", False):
        return None, None
    names = ("max_encoder_position_embeddings", "max_position_embeddings", "max_seq_len")
    positions = next((n for name in names if (n := _sensible(getattr(text, name, None)))), None)
    counts = (
        text.model_type in COUNTED_FROM_PADDING and getattr(text, "position_embedding_type", "absolute") == "absolute"
    )
    first = (pad_id(text) or 0) + 1
    if positions is None or not counts or positions <= first:
        return positions, None
    return positions - first, f"its {positions:,} positions start at {first}, after the padding id"


def _sensible(limit: Any) -> int | None:
    """A limit in tokens; None for -1, 0, 1e30 and the like, which mean that there is none."""
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < UNLIMITED:
        return None
    return int(limit)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the tokenizer's serialisation and its chat template, or the fingerprint of an ``ImageReader``."""
    if hasattr(tokenizer, "fingerprint"):
        return str(tokenizer.fingerprint)
    if not tokenizer.is_fast:
        return _of_files(tokenizer)
    text = tokenizer.backend_tokenizer.to_str() + "\0" + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def _of_files(tokenizer: Any) -> str:
    """sha256 over the files that a tokenizer without a fast version writes."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
