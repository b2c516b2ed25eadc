"""Self-training: the model labels rows without labels, the sure ones join the training rows, and training starts again.

Round 0 is trained on the labelled rows. In each later round the newest model labels all unlabelled rows anew, and a model is
trained from the base on the labelled rows and the sure ones. Sources: Lee 2013, "Pseudo-Label"; Xie et al. 2020, "Self-training
with Noisy Student", arXiv 1911.04252, where each student starts again, so that it does not carry on its teacher's errors.

Each round is a training of its own in ``rounds/N/run``, with the labels that it was trained on in ``rounds/N/labels.json``. The
last one is the run's result.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.assembly.data import read_class_labels
from peftlab.assembly.finish import complete
from peftlab.assembly.fit import Fit
from peftlab.assembly.prepare import Phase, prepare
from peftlab.assembly.target import find_target, open_target
from peftlab.data import Rows
from peftlab.errors import Interrupted
from peftlab.experiments.linking import link_tree
from peftlab.experiments.unlabelled import Unlabelled, find_unlabelled, joined_rows
from peftlab.measuring.memory import release_memory
from peftlab.recipe import check_lock, write_lock
from peftlab.recipe.data import SelfTrainingSection
from peftlab.runs import LOCK_NAME, RUN_NAME, Run, open_run, write_json
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.progress import Progress

_LABELS_NAME = "labels.json"
# Rows that are labelled at a time.
_WINDOW = 1024


class SelfTraining:
    """All trainings of a recipe with ``train.self_training``.

    Args: resume: resume the run in the folder: keep finished rounds, continue an interrupted one from its newest checkpoint.
    """

    def __init__(self, assembly: Assembly, folder: Path, progress: Progress, *, resume: bool = False) -> None:
        settings = assembly.recipe.train.self_training
        assert settings is not None
        self._settings: SelfTrainingSection = settings
        self._assembly, self._folder, self._progress, self._resume = assembly, folder, progress, resume
        # Only the last round's model is merged.
        self._early = assembly.derive({"run.merge": "none"}, name=assembly.name)

    def run(self, *, replace: bool = False) -> Run:
        """Trains the rounds that are not finished. Raises: as ``Fit``; DataError, RecipeError before an earlier run is removed."""
        assembly, folder = self._assembly, self._folder
        self._progress.stage("reading data")
        unlabelled = find_unlabelled(assembly)
        fingerprints = assembly.fingerprints | {"unlabelled data": unlabelled.rows.fingerprint}
        locked = open_run(folder).recipe() if self._resume else assembly.loaded
        for line in check_lock(locked, fingerprints=fingerprints, resumed=self._resume):
            self._progress.note(line)
        for line in unlabelled.lines():
            self._progress.note(line)
        if not self._resume:
            if replace and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_lock(folder / LOCK_NAME, assembly.loaded, fingerprints=fingerprints, environment=assembly.kept)
        with self._status():
            rounds = list(self._rounds(unlabelled))
            self._publish(unlabelled, rounds)
        return open_run(folder)

    def _rounds(self, unlabelled: Unlabelled) -> Iterator[dict[str, Any]]:
        """Yields the notes on each round."""
        before: float | None = None
        for number in range(self._settings.rounds + 1):
            labels: list[list[Any]] = []
            note: dict[str, Any] = {"round": number, "rows": 0}
            if number:
                labels = self._labels(number, unlabelled)
                note |= self._counted(labels, unlabelled)
                if not labels:
                    self._progress.warn(
                        f"round {number}: no row has a label with a probability of {self._settings.confidence:g}; the model of "
                        f"round {number - 1} is the result (train.self_training.confidence)"
                    )
                    return
                self._progress.note(f"round {number} of {self._settings.rounds}: {_joins(note)}")
            with self._progress.quietly() if number else contextlib.nullcontext():
                run = self._train(number, labels, unlabelled)
            release_memory()
            note |= {"training_rows": run.summary["train_rows"], "metrics": run.summary["after"]}
            name = self._assembly.spec.headline
            after = run.summary["after"].get(name)
            if after is not None:
                was = "" if before is None else f", {before:.4g} the round before"
                self._progress.note(f"round {number}: held-out {name} {after:.4g}{was}")
            before = after
            yield note

    def _labels(self, number: int, unlabelled: Unlabelled) -> list[list[Any]]:
        """The rows that join in a round: index, label and probability of each. Stored, so that a resumed run has the same."""
        path = self._folder / "rounds" / str(number) / _LABELS_NAME
        if path.is_file():
            stored: list[list[Any]] = json.loads(path.read_text(encoding="utf-8"))
            return stored
        target = find_target(self._run(number - 1))
        # A run without an adapter is a whole model, and not the recipe's.
        own = self._early if target.adapter is not None else None
        opened = open_target(target, self._progress, assembly=own, check=False)
        rows, recipe = unlabelled.rows, self._assembly.recipe
        self._progress.stage(f"round {number}: labelling {len(rows):,} rows")
        sure: list[list[Any]] = []
        for start in range(0, len(rows), _WINDOW):
            window = rows.select(range(start, min(start + _WINDOW, len(rows))))
            with opened.autocast():
                results = opened.task.predict(
                    opened.model, window, batch_tokens=recipe.eval.batch_tokens, max_length=self._assembly.limit
                )
                sure += [
                    [start + i, result["label"], result["probability"]]
                    for i, result in enumerate(results)
                    if result["probability"] >= self._settings.confidence
                ]
        self._progress.done()
        del opened
        release_memory()
        chosen = sure if self._settings.per_class == "all" else balanced(sure, self._assembly.classes or [])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, chosen)
        return chosen

    def _counted(self, labels: Sequence[Sequence[Any]], unlabelled: Unlabelled) -> dict[str, Any]:
        """How many rows join, of each class, and how many labels are right where the right ones are known."""
        known = [(label, unlabelled.known[i]) for i, label, _ in labels if unlabelled.known[i] is not None]
        counts = Counter(label for _, label, _ in labels)
        return {
            "rows": len(labels),
            "per_class": {name: counts[name] for name in self._assembly.classes or []},
            "known": len(known),
            "accuracy": sum(label == right for label, right in known) / len(known) if known else None,
        }

    def _train(self, number: int, labels: Sequence[Sequence[Any]], unlabelled: Unlabelled) -> Run:
        """Trains a round on the labelled rows and those of ``labels``; a finished one is read from its folder."""
        folder = self._run(number)
        assembly = self._assembly if number == self._settings.rounds else self._early
        if (folder / LOCK_NAME).is_file() and open_run(folder).is_finished:
            self._progress.note(f"{folder} is already finished")
            return open_run(folder)
        if (folder / LOCK_NAME).is_file() and open_run(folder).is_trained:
            return complete(assembly, folder, self._progress)
        rows = self._training_rows(labels, unlabelled)
        checkpoints = list_checkpoints(folder / "checkpoints")
        with run_accelerator(assembly, folder) as accelerator:
            phase = Phase(rows, assembly.encode(rows, training=True))
            parts = prepare(assembly, accelerator, self._progress, phase=phase)
            return Fit(
                parts,
                accelerator,
                folder,
                self._progress,
                checkpoint=checkpoints[-1] if checkpoints else None,
                replace=not checkpoints,
                resume_hint=self._hint,
            ).run()

    def _training_rows(self, labels: Sequence[Sequence[Any]], unlabelled: Unlabelled) -> Rows:
        labelled = self._assembly.data.train
        if not labels:
            return labelled
        column = self._assembly.recipe.data.columns.get("label", "label")
        names = read_class_labels(self._assembly.recipe, labelled, all_names_used=False)
        # A value that the file gives each class: data.label_names or data.bins may name it.
        values = dict(zip(names, labelled.column(column), strict=True))
        joining = unlabelled.rows.select([i for i, _, _ in labels])
        return joined_rows(labelled, joining, {column: [values[label] for _, label, _ in labels]})

    def _publish(self, unlabelled: Unlabelled, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Makes the last round's run the result, by hard links; its rounds stay."""
        last = self._run(rounds[-1]["round"])
        if rounds[-1]["round"] < self._settings.rounds and self._assembly.recipe.run.merge != "none":
            complete(self._assembly, last, self._progress)
        for path in last.iterdir():
            if path.name not in (LOCK_NAME, RUN_NAME, "checkpoints"):
                link_tree(path, self._folder / path.name)
        kept = {**self._assembly.kept, **_environment(last)}
        fingerprints = self._assembly.fingerprints | {"unlabelled data": unlabelled.rows.fingerprint}
        write_lock(self._folder / LOCK_NAME, self._assembly.loaded, fingerprints=fingerprints, environment=kept)
        report = {"unlabelled": unlabelled.counts, "rounds": list(rounds)}
        write_json(self._folder / RUN_NAME, {**open_run(last).summary, "self_training": report})

    def _run(self, number: int) -> Path:
        return self._folder / "rounds" / str(number) / "run"

    @property
    def _hint(self) -> str:
        return f"peftlab train {shlex.quote(str(self._folder))} --resume"

    @contextlib.contextmanager
    def _status(self) -> Iterator[None]:
        """Keeps the status in run.json; removes a new folder if no round reached a checkpoint."""
        head = {"name": self._assembly.name, "task": self._assembly.recipe.task}
        try:
            write_json(self._folder / RUN_NAME, {**head, "status": "running"})
            yield
        except BaseException as error:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            if not self._resume and not self._run(0).is_dir():
                shutil.rmtree(self._folder, ignore_errors=True)
                raise
            with contextlib.suppress(OSError):
                write_json(self._folder / RUN_NAME, {**head, "status": "interrupted" if stopped else "failed"})
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted. Resume with: {self._hint}") from None
            raise


def self_train(assembly: Assembly, folder: Path, progress: Progress, *, resume: bool, replace: bool) -> Run:
    """Trains a recipe with ``train.self_training``. Raises: as ``SelfTraining.run``."""
    return SelfTraining(assembly, folder, progress, resume=resume).run(replace=replace)


def balanced(sure: Sequence[Sequence[Any]], classes: Sequence[str]) -> list[list[Any]]:
    """Of each class as many of the rows ``(index, label, probability)`` as of the rarest, the surest first, in their order."""
    of_class = {name: [row for row in sure if row[1] == name] for name in classes}
    fewest = min(map(len, of_class.values()), default=0)
    kept = {row[0] for rows in of_class.values() for row in sorted(rows, key=lambda row: -row[2])[:fewest]}
    return [list(row) for row in sure if row[0] in kept]


def _joins(note: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in note["per_class"].items())
    right = ""
    if note["known"]:
        right = f"; {note['accuracy']:.1%} of the {note['known']:,} with a known label are right"
    return f"{note['rows']:,} rows join ({counts}){right}"


def _environment(folder: Path) -> dict[str, Any]:
    stored = (open_run(folder).recipe().recipe.lock or {}).get("environment")
    return dict(stored) if isinstance(stored, dict) else {}
