"""Rows with marked words: a text with spans, or a list of words with a tag each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.data.entities import OUTSIDE, Entity, begins_inside, entities_of, has_prefix
from peftlab.data.labels import label_text
from peftlab.data.rows import Rows
from peftlab.data.spans import as_list, label_of, read_spans, shown
from peftlab.data.values import is_empty, is_null, plain_text
from peftlab.data.words import Span, joined_words, words_of
from peftlab.errors import DataError, RecipeError, listed

# Names of a column if data.columns does not give it.
_NAMES = {"tags": ("tags", "ner_tags"), "spans": ("spans", "entities")}
_OF_WORDS, _OF_TEXT = ("tokens", "tags", "word_tags"), ("text", "spans")


@dataclass(frozen=True)
class Annotated:
    """One row.

    Attributes:
        text: the text, or the words with a space between them. words: the characters of each word.
        entities: in characters; None without labels, and with a tag per word. tags: one per word; None otherwise.
        is_list: whether the row is a list of words. notes: see ``Rendered.notes``.
    """

    text: str
    words: list[Span]
    entities: list[Entity] | None = None
    tags: list[str] | None = None
    is_list: bool = False
    notes: tuple[str, ...] = ()


class Annotations:
    """Reads the columns of a task that labels words.

    Args:
        columns: role -> column, of text, spans, tokens, tags and word_tags.
        label_names: tag or label as it is in the data -> its name; if not empty, every one must be in it.
        per_word: whether each word has a tag of its own; otherwise tags mark entities.

    Raises: RecipeError: columns for both forms.
    """

    def __init__(self, columns: Mapping[str, str], label_names: Mapping[str, str], *, per_word: bool) -> None:
        self._columns, self._label_names, self._per_word = columns, label_names, per_word
        self._tag_role = "word_tags" if per_word else "tags"
        of_words, of_text = ([part for part in parts if part in columns] for parts in (_OF_WORDS, _OF_TEXT))
        if of_words and of_text:
            raise RecipeError(
                f"a row is a list of words with tags or a text with spans, not both: found {listed([*of_words, *of_text])}",
                key=f"data.columns.{of_text[0]}",
            )
        self._form: Literal["words", "text"] | None = "words" if of_words else "text" if of_text else None

    @property
    def text_column(self) -> str:
        return self._columns.get("text", "text")

    @property
    def tokens_column(self) -> str:
        return self._columns.get("tokens", "tokens")

    def has_lists(self, available: Sequence[str], *, labelled: bool = True) -> bool:
        """Whether rows with these columns are lists of words. Rows without labels may have the other form than the recipe's."""
        lists, texts = self.tokens_column in available, self.text_column in available
        if self._form is None or (not labelled and lists != texts):
            return lists
        return self._form == "words"

    def label_column(self, available: Sequence[str]) -> str:
        """The column with the spans or tags."""
        role = self._tag_role if self.has_lists(available) else "spans"
        if role in self._columns:
            return self._columns[role]
        names = _NAMES.get(role, (role,))
        return next((name for name in names if name in available), names[0])

    def words_column(self, available: Sequence[str], *, labelled: bool = True) -> str:
        """The column with the text or the words."""
        return self.tokens_column if self.has_lists(available, labelled=labelled) else self.text_column

    def blank_rows(self, rows: Rows, *, labelled: bool) -> dict[int, str]:
        """Why rows lack something, by index. Raises: DataError: a column is missing."""
        available = list(rows.columns)
        words, is_list = (
            self.words_column(available, labelled=labelled),
            self.has_lists(available, labelled=labelled),
        )
        reasons = {}
        if labelled:
            what = "there are no tags" if is_list else "there are no spans"
            values = self._column(rows, self.label_column(available), self._key(is_list))
            reasons = {i: what for i, v in enumerate(values) if (_is_nothing(v) if is_list else is_null(v) or v == "")}
        reasons |= {i: "there are no words" for i, v in enumerate(self._column(rows, words)) if _is_nothing(v)}
        return dict(sorted(reasons.items()))

    def reader(self, rows: Rows, *, labelled: bool) -> Callable[[Mapping[str, Any], str], Annotated]:
        """Returns a function that reads a row of ``rows``, given with its place. The function raises DataError with the place.

        Raises: DataError: a column is missing.
        """
        available = list(rows.columns)
        is_list = self.has_lists(available, labelled=labelled)
        words = self.words_column(available, labelled=labelled)
        self._column(rows, words)
        if not labelled:
            return lambda row, where: self._unlabelled(where, row[words], is_list)
        labels = self.label_column(available)
        marks = self._column(rows, labels, self._key(is_list))
        if not is_list:
            return lambda row, where: self._with_spans(where, self._text(where, row[words]), row[labels])
        prefixed = self._prefixed(marks)
        return lambda row, where: self._with_tags(where, self._tokens(where, row[words]), row[labels], prefixed)

    def labels(self, rows: Rows) -> list[str]:
        """The entity labels or tags of ``rows``, sorted. Raises: DataError: data.label_names names others than there are."""
        read = self.reader(rows, labelled=True)
        found: set[str] = set()
        for i in range(len(rows)):
            row = read(rows.row(i), rows.where(i))
            found.update(row.tags if row.tags is not None else (e.label for e in row.entities or ()))
        available = list(rows.columns)
        is_list = self.has_lists(available)
        values = self._column(rows, self.label_column(available), self._key(is_list))
        there = {label_text(v if is_list else label_of(v)) for value in values for v in as_list(value) or ()}
        if self._label_names:
            self._require_used(rows, there)
        if is_list and not self._per_word:
            self._require_entities(rows, there)
        return sorted(found)

    def _require_entities(self, rows: Rows, there: set[str]) -> None:
        """Raises DataError unless tags mark entities: there is a prefix, or a word outside."""
        tags = {self._renamed(tag) for tag in there}
        if OUTSIDE in tags or any(map(has_prefix, tags)):
            return
        remedy = "for a tag per word, such as a part of speech, name the column data.columns.word_tags"
        if all(tag.isdigit() for tag in tags):
            remedy = "name the numbers, such as data.label_names={0: O, 1: B-PER, 2: I-PER}"
        raise DataError(
            f"{rows.name}: no tag is {OUTSIDE!r} or has a prefix such as B-, so that every word would be in an entity; found "
            f"{listed(sorted(there))}; {remedy}",
            key="data.columns.tags",
        )

    def _require_used(self, rows: Rows, there: set[str]) -> None:
        if unused := [name for name in self._label_names if name not in there]:
            raise DataError(
                f"{rows.name}: no row has {listed(unused)}, found {listed(sorted(there))}; remove it from data.label_names or "
                "correct it",
                key="data.label_names",
            )

    def _key(self, is_list: bool) -> str:
        return f"data.columns.{self._tag_role if is_list else 'spans'}"

    def _column(self, rows: Rows, name: str, key: str = "data.columns") -> list[Any]:
        if key == "data.columns":
            key = f"data.columns.{'tokens' if name == self.tokens_column else 'text'}"
        return rows.column(name, key=key)

    def _prefixed(self, marks: Sequence[Any]) -> bool:
        """Whether any tag has a prefix."""
        if self._per_word:
            return False
        return any(has_prefix(self._renamed(label_text(tag))) for tags in marks for tag in as_list(tags) or ())

    def _renamed(self, value: str) -> str:
        return self._label_names.get(value, value)

    def _unlabelled(self, where: str, value: Any, is_list: bool) -> Annotated:
        if is_list:
            return Annotated(*joined_words(self._tokens(where, value)), is_list=True)
        text = self._text(where, value)
        return Annotated(text, words_of(text))

    def _text(self, where: str, value: Any) -> str:
        key = "data.columns.text"
        if is_empty(value):
            raise DataError(f"{where}: the text is empty; data.empty=drop leaves such rows out", key=key)
        if (text := plain_text(value)) is None:
            raise DataError(f"{where}: expected text, found {shown(value)}", key=key)
        return text

    def _tokens(self, where: str, value: Any) -> list[str]:
        key = "data.columns.tokens"
        items = as_list(value)
        if items is None:
            if is_null(value) or value == "":
                raise DataError(f"{where}: there are no words; data.empty=drop leaves such rows out", key=key)
            raise DataError(
                f"{where}: expected a list of words, found {shown(value)}; a text has data.columns.text and spans",
                key=key,
            )
        if not items:
            raise DataError(f"{where}: there are no words; data.empty=drop leaves such rows out", key=key)
        tokens = [plain_text(item) for item in items]
        for i, token in enumerate(tokens):
            if token is None:
                raise DataError(f"{where}: word {i + 1}: expected text, found {shown(items[i])}", key=key)
        return [token for token in tokens if token is not None]

    def _with_tags(self, where: str, tokens: list[str], value: Any, prefixed: bool) -> Annotated:
        key = self._key(True)
        text, words = joined_words(tokens)
        items = as_list(value)
        if items is None:
            raise DataError(f"{where}: expected a list of tags, one per word, found {shown(value)}", key=key)
        if len(items) != len(tokens):
            raise DataError(f"{where}: {len(tokens):,} words but {len(items):,} tags; a word has one tag", key=key)
        tags = [self._name(where, item, f"word {i + 1} ({tokens[i]!r})", key) for i, item in enumerate(items)]
        if self._per_word:
            return Annotated(text, words, tags=tags, is_list=True)
        for i, tag in enumerate(tags):
            if prefixed and tag != OUTSIDE and not has_prefix(tag):
                raise DataError(
                    f"{where}: word {i + 1} ({tokens[i]!r}): the tag {tag!r} has no prefix such as B- or I-, as other tags "
                    f"have; the tag of a word outside is {OUTSIDE!r}",
                    key=key,
                )
        found = entities_of(tags)
        notes = (
            ("begins_inside",) if prefixed and begins_inside(tags) else ("no_prefix",) if found and not prefixed else ()
        )
        entities = [Entity(words[e.start][0], words[e.end - 1][1], e.label) for e in found]
        return Annotated(text, words, entities=entities, is_list=True, notes=notes)

    def _name(self, where: str, value: Any, of: str, key: str) -> str:
        """The name of a tag or label."""
        if isinstance(value, list | dict):
            raise DataError(f"{where}: {of}: expected a label, found {shown(value)}", key=key)
        text = label_text(value)
        if not text:
            raise DataError(f"{where}: {of} has no label", key=key)
        if self._label_names and text not in self._label_names:
            raise DataError(
                f"{where}: {of} has {text!r}, which is missing in data.label_names; it has {listed(self._label_names)}",
                key="data.label_names",
            )
        return self._renamed(text)

    def _with_spans(self, where: str, text: str, value: Any) -> Annotated:
        entities, notes = read_spans(where, text, value, name_of=self._name, key=self._key(False))
        return Annotated(text, words_of(text), entities=entities, notes=notes)


def _is_nothing(value: Any) -> bool:
    return is_empty(value) or as_list(value) == []
