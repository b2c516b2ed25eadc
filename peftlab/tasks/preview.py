"""A text preview of one row as it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from peftlab.data import Tokens


@dataclass(frozen=True)
class Preview:
    """One row as it is trained.

    Attributes:
        segments: ``(text, role, trained)`` of neighbouring tokens with the same role and ``trained``. label: the label of a
            classification row.
        cut: number of tokens that truncation removes at its end. follows: number of tokens in its further blocks.
    """

    where: str
    segments: list[tuple[str, str, bool]]
    label: str | None = None
    cut: int = 0
    follows: int = 0


def preview(
    where: str,
    tokens: Tokens,
    tokenizer: Any,
    *,
    max_length: int,
    label: str | None = None,
    keep_last: bool = False,
    used: np.ndarray | None = None,
) -> Preview:
    """The preview of the only row of ``tokens``; see ``Ledger`` for ``keep_last``. Args: used: [T] bool, the tokens to keep."""
    kept = np.arange(min(max_length, len(tokens.ids))) if used is None else np.flatnonzero(used)
    if keep_last:
        kept[-1] = len(tokens.ids) - 1
    ids, trained, roles = tokens.ids[kept], tokens.trained[kept], tokens.roles[kept]
    changes = np.flatnonzero((np.diff(trained.astype(np.int8)) != 0) | (np.diff(roles) != 0)) + 1
    segments, shown = [], ""
    for part in np.split(np.arange(len(ids)), changes):
        if len(part):
            # Decoded together with all tokens before: alone, a token may lose the space in front of it.
            text = tokenizer.decode(ids[: part[-1] + 1], clean_up_tokenization_spaces=False)
            segments.append((text[len(shown) :], tokens.role_names[roles[part[0]]], bool(trained[part[0]])))
            shown = text
    return Preview(where, segments, label, len(tokens.ids) - len(ids))
