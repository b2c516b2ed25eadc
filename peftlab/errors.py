"""The errors that a user can cause, each with its exit code on the command line.

A message says what was expected, what was found, where, and what to do. Any other exception is an internal error:
exit code 1.
"""

from __future__ import annotations

from collections.abc import Collection

_MOST_CHARACTERS = 60


def listed(values: Collection[object], *, most: int = 8) -> str:
    """``'a', 'b' and 2,998 more``: the first values for a message, each cut to 60 characters."""
    shown = [_clipped(repr(value)) for _, value in zip(range(most), values, strict=False)]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _clipped(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 4]}...{text[-1]}"


class PeftlabError(ValueError):
    """Base class of errors shown without a traceback.

    Args:
        message: what was expected, what was found, what to do.
        key: the recipe key to correct, such as ``data.columns.text``; the public functions add its file and line.
    """

    exit_code = 1

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class RecipeError(PeftlabError):
    """Wrong usage or a wrong recipe: unknown key, wrong type, unknown model, folder already in use."""

    exit_code = 2


class DataError(PeftlabError):
    """Wrong data: missing or empty file, wrong column, missing label, zero trained tokens."""

    exit_code = 3


class ResourceError(PeftlabError):
    """Does not fit: out of memory, or the disk is full."""

    exit_code = 4


class ArtifactError(PeftlabError):
    """A checkpoint, adapter or model file is damaged, refused, or mismatched."""

    exit_code = 5


class VerificationError(PeftlabError):
    """A check of a result failed: merge beyond its thresholds, non-finite loss."""

    exit_code = 6


class Interrupted(PeftlabError):
    """Stopped by Ctrl-C after saving a checkpoint; the message says how to resume."""

    exit_code = 130


class FailedElsewhere(PeftlabError):
    """The first of several processes failed, and has said why; the others end with its exit code.

    Args: message: that of the first process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
