"""A tiny BERT with a mask token, and rows of plain text for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peftlab.data import Rows
from peftlab.data.rows import Origin

WORDS = ["red", "green", "blue", "cat", "dog", "cow", "runs", "sleeps"]


def masked_tokenizer() -> Any:
    """The tiny tokenizer with a mask token and, like BERT's, a token before and after every text."""
    from tokenizers.processors import TemplateProcessing

    from peftlab.models.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|unk|> $A <|im_end|>", special_tokens=[("<|unk|>", 3), ("<|im_end|>", 2)]
    )
    return tokenizer


def bert_config(**values: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(**{
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, **values,
    })  # fmt: skip


def make_bert(**values: Any) -> Any:
    import torch
    from transformers import BertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForMaskedLM(bert_config(**values)).eval()


def write_bert(folder: Path, **values: Any) -> None:
    make_bert(**values).save_pretrained(folder)
    masked_tokenizer().save_pretrained(folder)


def rows_of(texts: list[Any]) -> Rows:
    return Rows(
        name="a.txt",
        columns={"text": texts},
        fingerprint="",
        origins=(Origin("a.txt", "line"),),
        origin_index=np.zeros(len(texts), dtype=np.int64),
        positions=np.arange(1, len(texts) + 1),
    )


def write_texts(folder: Path, *, files: int = 6) -> None:
    """Text files of several paragraphs."""
    folder.mkdir(exist_ok=True)
    for i in range(files):
        paragraphs = [
            " ".join([f"{WORDS[(i + j) % 8]} {WORDS[(j * 3) % 8]}"] * (2 + (i + j) % 3)) + f" {i}{j}." for j in range(6)
        ]
        (folder / f"{i}.md").write_text("\n\n".join(paragraphs) + "\n")


def masked_recipe(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "masked_lm",
        "model": {"name": "bert"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": "texts", "eval_rows": 6},
        "train": {"max_steps": 6, "batch_size": 4, "lr": 1e-2},
        "run": {"dir": "run"},
    }
    for name, changes in sections.items():
        base[name] = {**base.get(name, {}), **changes}
    return base
