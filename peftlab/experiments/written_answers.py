"""What a student writes in a phase of on-policy distillation, and the file that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from peftlab.adapters import load_adapter, load_trained, train_all
from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.data import Rows
from peftlab.errors import ArtifactError
from peftlab.measuring.memory import release_memory
from peftlab.tasks import Generates
from peftlab.training.checkpoint import check_checkpoint
from peftlab.training.progress import Progress

ROWS_NAME = "rows.jsonl"


@dataclass(frozen=True)
class WrittenAnswer:
    """One line of ``rows.jsonl``.

    Attributes:
        row: index among the training rows. where: its place in the data. answer: the words, without the end.
        tokens: what was written, with the end if there is one. ended: whether there is.
    """

    phase: int
    row: int
    where: str
    prompt: str
    answer: str
    ended: bool
    tokens: list[int]

    @property
    def is_empty(self) -> bool:
        """Whether it has no words: there is nothing to learn from it but to stop at once."""
        return not self.answer.strip()


def write_answers(
    assembly: Assembly,
    rows: Rows,
    chosen: Sequence[int],
    *,
    phase: int,
    checkpoint: Path | None,
    folder: Path,
    progress: Progress,
) -> list[WrittenAnswer]:
    """The student's answers to the prompts of the ``chosen`` ones of ``rows``, also stored in ``folder``.

    The draws depend on run.seed and the phase alone, so that a phase which was cut off writes the same answers again.

    Args:
        assembly: of the student, whose task generates. checkpoint: the student as it is by now; None: as it begins. folder: of the phase.
    Raises: ArtifactError when the checkpoint is damaged.
    """
    recipe, settings, task = assembly.recipe, assembly.distill.on_policy, cast(Generates, assembly.task)
    assert settings is not None
    asked, written = rows.select(chosen), {}
    with run_accelerator(assembly, folder) as accelerator:
        progress.stage(f"loading {recipe.model.name} to write answers")
        student = _open_student(assembly, checkpoint)
        progress.stage(f"phase {phase}: the student answers {len(asked):,} prompts")
        progress.start(len(asked), 0)
        torch.manual_seed(int(np.random.default_rng([recipe.run.seed, phase]).integers(2**62)))
        with accelerator.autocast():
            for i, tokens in task.write_answers(
                student,
                asked,
                batch_tokens=recipe.eval.batch_tokens,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
            ):
                prompt = task.formatter.render_prompt(asked.row(i), asked.where(i))
                written[i] = WrittenAnswer(
                    phase,
                    int(chosen[i]),
                    asked.where(i),
                    prompt,
                    task.text_of(tokens),
                    task.ends(tokens),
                    tokens.tolist(),
                )
                progress.step(len(written), {})
        progress.stop()
        del student
    release_memory()
    answers = [written[i] for i in range(len(asked))]
    _store(answers, folder)
    return answers


def read_answers(folder: Path) -> list[WrittenAnswer]:
    """What ``write_answers`` stored in ``folder``. Raises: ArtifactError for a damaged file."""
    path = folder / ROWS_NAME
    try:
        return [WrittenAnswer(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}; remove it, and the student writes these answers again if the phase was not trained "
            "on them yet"
        ) from error


def _store(answers: Sequence[WrittenAnswer], folder: Path) -> None:
    """By a rename: a file that is there is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ROWS_NAME}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / ROWS_NAME)


def _open_student(assembly: Assembly, checkpoint: Path | None) -> Any:
    """The student in eval mode, drawing from what it says and nothing else: many models come with a top_k, a repetition
    penalty or the like of their own, and then do not write what they are trained as."""
    from transformers import GenerationConfig

    recipe, model = assembly.recipe, assembly.model()
    model.generation_config = GenerationConfig()
    if checkpoint is not None:
        check_checkpoint(checkpoint)
        if not assembly.method.adapts:
            train_all(model, freeze=recipe.adapter.freeze)
            load_trained(model, checkpoint)
        else:
            model = load_adapter(model, checkpoint, kernels=recipe.run.kernels)
    return model.eval()
