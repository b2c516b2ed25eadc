"""Two results of ``peftlab bench`` side by side: which cells are faster in the second, beyond noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peftlab.bench.summary import per_second, ratio
from peftlab.errors import ArtifactError
from peftlab.measuring.intervals import ratio_of_medians
from peftlab.measuring.journal import differences

# Of a header: what makes a step other work, so that a ratio of speeds would mean nothing.
_WORK = ("task", "fingerprint", "precision", "new_tokens")
# What may differ, and is said first.
_SAID = ("machine", "versions", "commit", "protocol")


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """``speed`` (above 1: b is faster) and ``memory_ratio`` (below 1: b is smaller) of every cell that both measured.

    The two were not measured side by side, so their repetitions are drawn apart: what slowed the machine down during one
    of them is not in the interval.

    Args: a, b: contents of bench.json. names: theirs, for messages.
    Returns: ``said``: how machine, versions, commit and protocol differ; ``cells``: common ones; ``only_a``, ``only_b``:
        keys of the others, with the status of those that have no figures.
    Raises: ArtifactError when the two did different work.
    """
    unlike = [
        f"{name}: {a['header']['unit'][name]!r} and {b['header']['unit'][name]!r}"
        for name in _WORK
        if a["header"]["unit"][name] != b["header"]["unit"][name]
    ]
    if unlike:
        raise ArtifactError(
            f"{names[0]} and {names[1]} did different work ({'; '.join(unlike)}): a ratio of their speeds would mean nothing. "
            "Measure both with the same model, task, precision and --new-tokens"
        )
    left, right = ({cell["key"]: cell for cell in one["cells"]} for one in (a, b))
    common = [key for key in left if _measured(left[key]) and key in right and _measured(right[key])]
    return {
        "a": names[0],
        "b": names[1],
        "unit": dict(b["header"]["unit"]),
        "said": list(_said(a["header"], b["header"])),
        "cells": [_compared(left[key], right[key]) for key in common],
        "only_a": _others(left, common),
        "only_b": _others(right, common),
    }


def _measured(cell: Mapping[str, Any]) -> bool:
    return bool(cell["status"] == "ok")


def _said(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for name in _SAID:
        for line in differences({name: a.get(name)}, {name: b.get(name)}):
            yield line.replace(" there, ", " in A, ").removesuffix(" now") + " in B"


def _others(cells: Mapping[str, Mapping[str, Any]], common: list[str]) -> list[dict[str, str]]:
    return [{"key": key, "status": cell["status"]} for key, cell in cells.items() if key not in common]


def _compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    peaks = [[float(r["memory"]["peak_bytes"]) for r in cell["runs"]] for cell in (b, a)]
    names = ("what", "method", "rank", "quantize", "kernels", "batch", "length", "adapters")
    return {
        "key": a["key"],
        **{name: a[name] for name in names},
        "tokens_per_s": [a["tokens_per_s"]["median"], b["tokens_per_s"]["median"]],
        "peak_bytes": [a["peak_bytes"]["median"], b["peak_bytes"]["median"]],
        "speed": ratio(ratio_of_medians(per_second(b), per_second(a), paired=False)),
        "memory_ratio": ratio(ratio_of_medians(*peaks, paired=False)),
    }
