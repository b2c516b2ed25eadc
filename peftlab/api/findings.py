"""What the ledgers of training and held-out rows have to say together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftlab.data import Finding, Ledger, find
from peftlab.tasks import Preview, Task

# Found in held-out rows too; the others are about the template, and told once.
_OF_EACH_SET = {
    "too_long", "zero_trained", "no_rows", "repeated", "contradicting", "answer_cut", "empty_answer", "inner_end", "doubled_bos",
}  # fmt: skip


def findings(train: Ledger, held_out: Ledger, *, allow: Sequence[str]) -> list[dict[str, Any]]:
    """What the ledgers have to say: ``level`` is ``error``, ``allowed`` (an error the recipe allows) or ``note``."""
    found = [_plain(f, train, "train", allow) for f in find(train)]
    # What is wrong with the template is wrong for both: it is told once.
    found += [_plain(f, held_out, "held out", allow) for f in find(held_out) if f.kind in _OF_EACH_SET]
    levels = ("error", "allowed", "note")
    return sorted(found, key=lambda f: levels.index(f["level"]))


def _plain(finding: Finding, ledger: Ledger, data: str, allow: Sequence[str]) -> dict[str, Any]:
    level = "note" if not finding.error else "allowed" if finding.kind in allow else "error"
    where = [] if finding.rows is None else [ledger.rows.where(i) for i in sorted(set(finding.rows.tolist()))]
    return {
        "kind": finding.kind,
        "level": level,
        "data": data,
        "message": finding.message,
        "key": finding.key,
        "where": where,
    }


def shared_rows(train: Ledger, held_out: Ledger) -> list[dict[str, str]]:
    """The held-out rows that are also training rows, with the first such training row."""
    return [{"held_out": held_out.rows.where(a), "train": train.rows.where(b)} for a, b in held_out.shared_with(train)]


def previews(task: Task, ledger: Ledger, count: int) -> list[Preview]:
    """The first ``count`` training rows that are kept; without labels where the ledger has none."""
    labelled = ledger.style != "labels" or ledger.has_labels
    return [
        task.preview(ledger.rows, int(i), max_length=ledger.max_length, labelled=labelled)
        for i in ledger.kept_rows[:count]
    ]
