"""Combines the loss ledgers of training and held-out rows, and reports them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from peftlab.data import Finding, Ledger, find
from peftlab.data.findings import unread_columns
from peftlab.data.ledger_text import PreviewText, finding_line, opening_lines, shared_line
from peftlab.tasks import Preview, Task
from peftlab.training.progress import Progress

# Rows listed in run.json per reason for dropping rows; `check --json` lists all.
MOST_PLACES = 20
# Findings reported for held-out rows too; the others concern the template and are reported once.
_OF_EACH_SET = {
    "too_long", "zero_trained", "no_rows", "repeated", "contradicting", "answer_cut", "empty_answer", "inner_end", "doubled_bos",
    "masked_turns", "control_as_text", "control_kept",
    "unknown_ids",
    "absent_label", "encoding", "format", "delimiter", "split", "folder", "odd_characters",
}  # fmt: skip


def report_ledger(
    task: Task,
    train: Ledger,
    held_out: Ledger,
    progress: Progress,
    *,
    allow: Sequence[str],
    unread: Sequence[str] = (),
    of_model: Sequence[Finding] = (),
    num_embeddings: int | None = None,
) -> dict[str, Any]:
    """Reports what is trained, with one example row; returns the ledgers for the run's summary. Args: see ``findings``."""
    reports = {"train": train.report(most_places=MOST_PLACES), "held_out": held_out.report(most_places=MOST_PLACES)}
    for line in [
        *opening_lines("train", reports["train"], counts=True),
        *opening_lines("held out", reports["held_out"], counts=False),
    ]:
        progress.note(line)
    shared = shared_rows(train, held_out)
    if shared:
        progress.warn(f"{shared_line(shared)}: the metrics include training rows")
    reported = findings(train, held_out, allow=allow, unread=unread, of_model=of_model, num_embeddings=num_embeddings)
    for finding in reported:
        progress.note(finding_line(finding))
    for row in previews(task, train, 1):
        progress.show(PreviewText(asdict(row), longest=160))
    return {**reports, "findings": {"kinds": [f["kind"] for f in reported], "shared": len(shared)}}


def findings(
    train: Ledger,
    held_out: Ledger,
    *,
    allow: Sequence[str],
    unread: Sequence[str] = (),
    of_model: Sequence[Finding] = (),
    num_embeddings: int | None = None,
) -> list[dict[str, Any]]:
    """The findings of both ledgers: ``level`` is ``error``, ``allowed`` (an error the recipe allows) or ``note``.

    Args: unread: columns of the data that nothing reads. of_model: findings about the model, whose ``data`` is ``model``.
        num_embeddings: see ``data.find``.
    """
    reported = [_plain(f, train, "train", allow) for f in find(train, num_embeddings=num_embeddings)]
    # Template problems concern both data sets; report them once.
    # Notes on a file that both sets come from are the same.
    read = {note.message for note in train.rows.notes}
    reported += [
        _plain(f, held_out, "held out", allow)
        for f in find(held_out, num_embeddings=num_embeddings)
        if f.kind in _OF_EACH_SET and f.message not in read
    ]
    reported += [_plain(f, train, "model", allow) for f in of_model]
    if (note := unread_columns(unread)) is not None:
        reported.append(_plain(note, train, "train", allow))
    levels = ("error", "allowed", "note")
    return sorted(reported, key=lambda f: levels.index(f["level"]))


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
    """Previews of the first ``count`` kept training rows; without labels if the ledger has none."""
    labelled = ledger.style not in ("labels", "words") or ledger.has_labels
    shown = [
        task.preview(ledger.rows, int(i), max_length=ledger.max_length, labelled=labelled)
        for i in ledger.kept_rows[:count]
    ]
    return [replace(p, cut=0, follows=p.cut) if ledger.too_long == "split" else p for p in shown]
