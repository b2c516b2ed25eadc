"""Sections and descriptions of docstrings in numpy's format."""

from __future__ import annotations

import re

_SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
# The indented lines under a head such as ``axis : int``, up to an empty line.
_DESCRIPTION = re.compile(r"^\S.*\n((?:[ \t]+\S.*(?:\n|\Z))+)", re.MULTILINE)


def sections(context: str) -> dict[str, tuple[int, int]]:
    """The name of each section, and where its text is; ``context`` is a docstring without its indentation."""
    found = list(_SECTION.finditer(context))
    starts = [*(match.start() for match in found), len(context)]
    return {match[1].strip(): (match.end(), end) for match, end in zip(found, starts[1:], strict=True)}


def descriptions(context: str, start: int, end: int) -> list[str]:
    """The first paragraph under each head in this section, on one line."""
    return [" ".join(match[1].split()) for match in _DESCRIPTION.finditer(context, start, end)]
