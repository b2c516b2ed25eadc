"""Compares two results of ``peftlab bench``: which cells are faster in the second, beyond noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peftlab.bench.summary import per_second, ratio
from peftlab.errors import ArtifactError
from peftlab.measuring.intervals import ratio_of_medians
from peftlab.measuring.journal import differences

# Header entries that define the workload: if they differ, a ratio of speeds is meaningless.
_WORK = ("task", "fingerprint", "precision", "new_tokens")
# Header entries that may differ; the differences are reported.
_REPORTED = ("machine", "versions", "commit", "protocol")


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """Returns ``speed`` (above 1: b is faster) and ``memory_ratio`` (below 1: b is smaller) of every cell in both results.

    The results were measured at different times, so their repetitions are resampled independently: the interval does not
    cover a slowdown of the machine during one of them.

    Args: a, b: contents of bench.json. names: their names in messages.
    Returns: ``said``: differences in machine, versions, commit and protocol; ``cells``: common cells; ``only_a``,
        ``only_b``: keys and status of the others.
    Raises: ArtifactError if the workloads differ.
    """
    mismatches = [
        f"{name}: {a['header']['unit'][name]!r} and {b['header']['unit'][name]!r}"
        for name in _WORK
        if a["header"]["unit"][name] != b["header"]["unit"][name]
    ]
    if mismatches:
        raise ArtifactError(
            f"{names[0]} and {names[1]} cannot be compared, their workloads differ ({'; '.join(mismatches)}). "
            "Measure both with the same model, task, precision and --new-tokens"
        )
    left, right = ({cell["key"]: cell for cell in one["cells"]} for one in (a, b))
    common = [key for key in left if _measured(left[key]) and key in right and _measured(right[key])]
    return {
        "a": names[0],
        "b": names[1],
        "unit": dict(b["header"]["unit"]),
        "said": list(_differences(a["header"], b["header"])),
        "cells": [_compared(left[key], right[key]) for key in common],
        "only_a": _others(left, common),
        "only_b": _others(right, common),
    }


def _measured(cell: Mapping[str, Any]) -> bool:
    return bool(cell["status"] == "ok")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for name in _REPORTED:
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
