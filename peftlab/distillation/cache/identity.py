"""The identity of a cache: the key of an example, and the differences between two captures as text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftlab.errors import ArtifactError

Identity = Mapping[str, str | int | float | None]


def example_key(ids: NDArray[np.integer], trained: NDArray[np.bool_] | None = None) -> int:
    """A 64-bit key of an example: the first bits of blake2b over its ids and its trained mask.

    Args: ids: token ids, of any integer type, without padding. trained: bool, of the same length; None if the task has none.
    """
    digest = hashlib.blake2b(
        ids.astype("<i8").tobytes(), digest_size=8, person=b"plain" if trained is None else b"trained"
    )
    if trained is not None:
        digest.update(trained.astype(np.uint8).tobytes())
    return int.from_bytes(digest.digest(), "little")


def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], reasons: Mapping[str, str] | None = None
) -> list[str]:
    """One phrase for each key with different values or on one side only; empty if all are equal.

    Args: reasons: the meaning of a difference in a key, such as {"data": "made for other data"}.
    """
    mismatches = []
    for key in dict.fromkeys([*expected, *found]):
        if key in found and key in expected and found[key] == expected[key]:
            continue
        reason = (reasons or {}).get(key, f"made with another {key.replace('_', ' ')}")
        cached, current = (_shown(side[key]) if key in side else "nothing" for side in (found, expected))
        mismatches.append(f"{reason}: {key} is {cached} in the cache, {current} here")
    return mismatches


def unfit(title: str, mismatches: list[str]) -> ArtifactError:
    """The error for a complete or unfinished cache that was made for something else."""
    return ArtifactError(
        f"{title}: {'; '.join(mismatches)}. Restore what it was made with, choose another folder, or overwrite it with `peftlab "
        "teach --replace`"
    )


def _shown(value: object) -> str:
    """The value as text; a hash is shortened."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value):
        return f"{value[:8]}..."
    return repr(value)
