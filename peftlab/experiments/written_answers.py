"""The student's answers in a phase of on-policy distillation, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from peftlab.adapters import load_adapter, load_state, train_all
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
        row: index among the training rows. where: its place in the data. answer: the text without the end token.
        tokens: the generated tokens, including the end token. ended: whether there is one.
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
        """Whether the answer has no text; from such an answer a student only learns to stop at once."""
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
    """Generates the student's answers to the prompts of the ``chosen`` rows, stores them in ``folder`` and returns them.

    Sampling depends only on run.seed and the phase, so that an interrupted phase generates the same answers again.

    Args:
        assembly: that of the student; its task generates. checkpoint: the current student; None: the initial one. folder: that
            of the phase.
    Raises: ArtifactError if the checkpoint is damaged.
    """
    recipe, settings, task = assembly.recipe, assembly.distill.on_policy, cast(Generates, assembly.task)
    assert settings is not None
    prompts, written = rows.select(chosen), {}
    with run_accelerator(assembly, folder) as accelerator:
        progress.stage(f"loading {recipe.model.name} to write answers")
        student = _open_student(assembly, checkpoint)
        progress.stage(f"phase {phase}: the student answers {len(prompts):,} prompts")
        progress.start(len(prompts), 0)
        torch.manual_seed(int(np.random.default_rng([recipe.run.seed, phase]).integers(2**62)))
        with accelerator.autocast():
            for i, tokens in task.write_answers(
                student,
                prompts,
                batch_tokens=recipe.eval.batch_tokens,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
            ):
                written[i] = WrittenAnswer(
                    phase,
                    int(chosen[i]),
                    prompts.where(i),
                    task.prompt_text(prompts, i),
                    task.text_of(tokens),
                    task.ends(tokens),
                    tokens.tolist(),
                )
                progress.step(len(written), {})
        progress.stop()
        del student
    release_memory()
    answers = [written[i] for i in range(len(prompts))]
    _store(answers, folder)
    return answers


def read_answers(folder: Path) -> list[WrittenAnswer]:
    """Reads the answers that ``write_answers`` stored in ``folder``. Raises: ArtifactError for a damaged file."""
    path = folder / ROWS_NAME
    try:
        return [WrittenAnswer(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}; delete it to generate the answers again, unless training on this phase has started"
        ) from error


def _store(answers: Sequence[WrittenAnswer], folder: Path) -> None:
    """Writes the file and publishes it by a rename, so that an existing file is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ROWS_NAME}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / ROWS_NAME)


def _open_student(assembly: Assembly, checkpoint: Path | None) -> Any:
    """Loads the student in eval mode with plain sampling: many models ship a top_k or a repetition penalty, and would then
    not sample from the distribution that is trained."""
    from transformers import GenerationConfig

    recipe, model = assembly.recipe, assembly.model()
    model.generation_config = GenerationConfig()
    if checkpoint is not None:
        check_checkpoint(checkpoint)
        if not assembly.method.adapts:
            train_all(model, freeze=recipe.adapter.freeze)
            load_state(model, checkpoint)
        else:
            model = load_adapter(model, checkpoint, kernels=recipe.run.kernels)
    return model.eval()
