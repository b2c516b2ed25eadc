"""Control tokens such as <|im_end|> that stand in the data itself: encodes them as plain text, not as the tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peftlab.errors import DataError

# A mark has the length of its token, so that no offset changes: a private-use character that numbers the token, and
# fillers. One kind of mark is for tokens in the data, the other for those that a template wrote.
_OF_DATA, _OF_TEMPLATE, _FILL_DATA, _FILL_TEMPLATE = 0x100000, 0x108000, "\U0010fffc", "\U0010fffd"
_MOST = 0x7FF0
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")
_MARKED = re.compile(f"[{chr(_OF_DATA)}-{chr(_OF_DATA + _MOST - 1)}]{_FILL_DATA}*")

Spans = tuple[tuple[int, int], ...]


class Pieces(NamedTuple):
    """One encoded text, with the attributes of ``tokenizers.Encoding`` that are used here."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    special_tokens_mask: Sequence[int]


class ControlTokens:
    """The special tokens of a tokenizer as they occur in texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @functools.cached_property
    def _added(self) -> dict[str, tuple[int, Any]]:
        """Each control token with its id and its ``AddedToken``."""
        return {str(token): (i, token) for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    @functools.cached_property
    def names(self) -> list[str]:
        """The control tokens, longest first, as tokenizers look for them."""
        names = sorted(self._added, key=lambda name: (-len(name), name))
        assert len(names) <= _MOST
        return names

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.names)) or r"(?!)")

    def within(self, text: str) -> bool:
        """Whether ``text`` has a control token."""
        return self._pattern.search(text) is not None

    def protect(self, value: Any, where: str) -> Any:
        """``value`` (text, or a list or object with texts) with marks in place of control tokens; the same object if it has
        none. Raises: DataError if it has the characters of marks besides."""
        protected = self._protected(value)
        if protected is not value and (odd := _private(value)):
            raise DataError(
                f"{where}: the text has both a control token and U+{ord(odd):X}, a private-use character that peftlab "
                "needs itself; remove one of them"
            )
        return protected

    def _protected(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(self._data_mark, value) if self.within(value) else value
        if isinstance(value, Mapping):
            changed = {self._protected(k): self._protected(v) for k, v in value.items()}
            same = all(
                a is b for pair in zip(changed.items(), value.items(), strict=True) for a, b in zip(*pair, strict=True)
            )
            return value if same else changed
        if isinstance(value, list):
            items = [self._protected(v) for v in value]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    def _data_mark(self, match: re.Match[str]) -> str:
        return self._mark(match.group(), _OF_DATA, _FILL_DATA)

    def restore(self, text: str) -> tuple[str, Spans]:
        """What a template made of protected values, with control tokens in place of marks, and the characters [start, end)
        of each."""
        spans: list[tuple[int, int]] = []

        def name(match: re.Match[str]) -> str:
            spans.append(match.span())
            return self.names[ord(match.group()[0]) - _OF_DATA]

        return _MARKED.sub(name, text), tuple(spans)

    def encode(self, texts: Sequence[str], plain: Sequence[Spans], *, add_special_tokens: bool) -> list[Pieces]:
        """The tokens of each text. Args: plain: the control tokens in each text that are encoded as text.

        Raises: DataError if the tokenizer has no other way to write one of them.
        """
        ordinary = [text for text, spans in zip(texts, plain, strict=True) if not spans]
        encoded: Iterable[Any] = ()
        if ordinary:
            batch = self._tokenizer(
                ordinary,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                truncation=False,
                verbose=False,
            )
            encoded = batch.encodings or ()
        rest = iter(encoded)
        return [
            self._encode_plain(text, spans, add_special_tokens) if spans else next(rest)
            for text, spans in zip(texts, plain, strict=True)
        ]

    def _encode_plain(self, text: str, plain: Spans, add_special_tokens: bool) -> Pieces:
        """The tokens of one text. A copy of the tokenizer reads control tokens as text, and marks as control tokens."""
        encoder, ids = self._plain_encoder
        starts = {start for start, _ in plain}
        marked = self._pattern.sub(
            lambda m: m.group() if m.start() in starts else self._mark(m.group(), _OF_TEMPLATE, _FILL_TEMPLATE), text
        )
        encoding = encoder.encode(marked, add_special_tokens=add_special_tokens)
        found = [ids.get(i, i) for i in encoding.ids]
        special = {i for i, _ in self._added.values()}
        for i, token, (start, end) in zip(encoding.ids, found, encoding.offsets, strict=True):
            if token in special and i not in ids and any(start < b and a < end for a, b in plain):
                raise DataError(
                    f"this tokenizer cannot write {self._tokenizer.convert_ids_to_tokens(token)!r} as plain text; remove it "
                    "from the data, or set data.control_tokens=keep to encode it as the control token",
                    key="data.control_tokens",
                )
        return Pieces(found, encoding.offsets, encoding.special_tokens_mask)

    @functools.cached_property
    def _plain_encoder(self) -> tuple[Any, dict[int, int]]:
        """A tokenizer that reads marks of a template as control tokens and nothing else, and the ids of both."""
        from tokenizers import AddedToken, Tokenizer

        encoder = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        encoder.no_truncation()
        encoder.no_padding()
        marks = []
        for name in self.names:
            token = self._added[name][1]
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            mark = self._mark(name, _OF_TEMPLATE, _FILL_TEMPLATE)
            marks.append(AddedToken(mark, special=False, **flags))
        encoder.add_tokens(marks)
        encoder.encode_special_tokens = True
        ids = {encoder.token_to_id(m.content): self._added[name][0] for m, name in zip(marks, self.names, strict=True)}
        return encoder, {int(i or 0): token for i, token in ids.items()}

    def _mark(self, name: str, first: int, fill: str) -> str:
        return chr(first + self._number[name]) + fill * (len(name) - 1)


def _private(value: Any) -> str | None:
    """The first private-use character of marks in ``value``."""
    if isinstance(value, str):
        found = _PRIVATE.search(value)
        return found and found.group()
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next(filter(None, map(_private, values)), None)
