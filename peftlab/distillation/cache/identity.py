"""What a cache belongs to: the key of an example, and what differs between two captures, in words."""

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
    """64 bits that stand for an example: the first of blake2b over its ids and over which of them are trained.

    Args: ids: token ids, of any integer type and without padding. trained: bool, as long; None where the task has no such.
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
    """One phrase for each key whose value differs or that only one side has; empty when all agree.

    Args: reasons: what it means that a key differs, such as {"data": "made for other data"}.
    """
    told = []
    for key in dict.fromkeys([*expected, *found]):
        if key in found and key in expected and found[key] == expected[key]:
            continue
        reason = (reasons or {}).get(key, f"made with another {key.replace('_', ' ')}")
        there, here = (_shown(side[key]) if key in side else "nothing" for side in (found, expected))
        told.append(f"{reason}: {key} is {there} in the cache, {here} here")
    return told


def unfit(title: str, told: list[str]) -> ArtifactError:
    """The error for a cache, complete or begun, that was made for something else."""
    return ArtifactError(
        f"{title}: {'; '.join(told)}. Go back to what it was made with, choose another folder, or make it anew with `peftlab "
        "teach --replace`"
    )


def _shown(value: object) -> str:
    """The value; of a hash its beginning."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value):
        return f"{value[:8]}..."
    return repr(value)
