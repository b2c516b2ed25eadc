"""Whether engines train the same: a few steps of each, loss by loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.processes import measure

GATE_STEPS, FIRST_LIMIT, LATER_LIMIT = 5, 1e-4, 1e-3
LIMITS = {"cpu": (FIRST_LIMIT, LATER_LIMIT), "cuda": (2e-2, 2e-2)}


def loss_differences(ours: list[float], theirs: list[float]) -> list[float]:
    """Relative difference per step."""
    return [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)]


def gate(engines: Sequence[str], settings: dict[str, Any], work: Path, device: str) -> dict[str, Any]:
    """Trains a few steps with every engine, without dropout, and compares each peer with peftlab, loss by loss."""
    train = {k: v for k, v in settings["train"].items() if k != "epochs"} | {"max_steps": GATE_STEPS}
    short = {**settings, "train": train}
    measure("init", short, work, no_dropout=True)
    results = {engine: measure(engine, short, work, no_dropout=True) for engine in engines}
    first_limit, later_limit = LIMITS[device]
    peers = {}
    for engine in engines[1:]:
        differences = loss_differences(results["peftlab"]["losses"], results[engine]["losses"])
        first, largest = differences[0], max(differences)
        passed = first <= first_limit and largest <= later_limit
        peers[engine] = {"differences": differences, "first": first, "largest": largest, "passed": passed}
    return {
        "losses": {engine: result["losses"] for engine, result in results.items()},
        "held_out_loss_before": {engine: result["before"]["loss"] for engine, result in results.items()},
        "limits": {"first": first_limit, "largest": later_limit},
        "peers": peers,
    }
