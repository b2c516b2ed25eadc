"""Sections and entries of docstrings in numpy's format."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
_PARAMETER = re.compile(r"^(\*{0,2}\w+)[ \t]?:[ \t]*(\S.*)$", re.MULTILINE)
_ENTRY_END = re.compile(r"^\S", re.MULTILINE)


def sections(context: str) -> dict[str, tuple[int, int]]:
    """The name of each section, and where its text is; ``context`` is a docstring without its indentation."""
    found = list(_SECTION.finditer(context))
    starts = [*(match.start() for match in found), len(context)]
    return {match[1].strip(): (match.end(), end) for match, end in zip(found, starts[1:], strict=True)}


def parameters(context: str, start: int, end: int) -> Iterator[tuple[re.Match[str], int]]:
    """The declaration of each parameter in this section (groups: name, what follows the colon), and where its description ends."""
    for match in _PARAMETER.finditer(context, start, end):
        after = _ENTRY_END.search(context, match.end() + 1, end) if match.end() < end else None
        yield match, after.start() if after else end
