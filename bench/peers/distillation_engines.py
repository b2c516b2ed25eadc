"""One measured distillation with one engine: ``python -m bench.peers.distillation_engines SPEC.json`` prints one JSON line.

All engines get the same student folder, adapter file, teacher, rows per optimizer step and optimizer settings.

- ``init``: writes the shared files: the student cut from its teacher, its first adapter, and the stored targets.
- ``online``, ``cached``: one arm of ``peftlab.api.distill.distill``, with a progress object that records times. The teacher runs
  online, or its 50 most likely classes and the mass of the others are read from disk.
- ``gkd``: TRL's ``GKDTrainer`` on the rows' own completions (``lmbda`` 0). It builds the full logits of both models.
- ``distillation``: TRL's ``DistillationTrainer``. It computes its loss chunk by chunk and always lets the student write the
  completions. Here it gets those of the rows instead; everything after that is its own code.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import peftlab
from bench.peers.engines import (
    Prepared,
    TimingProgress,
    figures_of,
    ordered,
    prepare,
    train_recorded,
    trainer_arguments,
    write_initial_adapter,
)
from peftlab.adapters import load_trained, train_all
from peftlab.assembly import Assembly
from peftlab.assembly.fit import fit
from peftlab.assembly.process import prepare_libraries
from peftlab.experiments.student import cut_student
from peftlab.models import find_pretrained, load_model
from peftlab.teaching.capture import capture_all, taught_examples
from peftlab.teaching.teachers import Teachers
from peftlab.training.progress import SilentProgress


def write_shared(settings: dict[str, Any], spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """Writes the student, its adapter and the targets. settings: the student's; its folder does not exist yet."""
    whole = {**settings, "model": settings["distill"]["teacher"]}
    cut = {**whole, "distill": {**settings["distill"], "student_init": {"num_layers": spec["num_layers"]}}}
    whole_model = Assembly(peftlab.load_recipe(cut), transfer=True)
    seed = whole_model.recipe.run.seed
    notes = cut_student(whole_model, Path(settings["model"]["name"]), SilentProgress(), seed=seed)
    if settings["adapter"].get("method") != "none":
        alone = {name: value for name, value in settings.items() if name != "distill"}
        write_initial_adapter(alone, work, Path(spec["adapter"]))
    cached = {**settings, "distill": {**settings["distill"], "cache": spec["cache"]}}
    examples = taught_examples(Assembly(peftlab.load_recipe(cached), transfer=True))
    (captured,) = capture_all(examples, SilentProgress())
    kept = ("positions", "bytes", "bytes_per_position", "seconds")
    return {
        "student": {"layers": notes["layers"], "parameters": notes["parameters"], "of": notes["parameters_before"]},
        "captured": {name: captured[name] for name in kept},
    }


def run_peftlab(settings: dict[str, Any], work: Path) -> dict[str, Any]:
    prepare_libraries()
    loaded = peftlab.load_recipe({**settings, "run": {**settings["run"], "dir": str(work / "run")}})
    folder, progress = work / "run", TimingProgress()
    assembly = Assembly(loaded, transfer=True)
    run = fit(assembly, folder, progress, make_loss=Teachers(assembly, progress).loss)
    return figures_of(run, progress, prepare(settings))


def run_gkd(settings: dict[str, Any], adapter: Path, work: Path) -> dict[str, Any]:
    p = prepare(settings)

    def build_trainer(recording: type, timer: type) -> Any:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        rows = ordered(p)
        trainer_class = type("RecordingTrainer", (recording, GKDTrainer), {})
        return _with_adapter(
            adapter,
            trainer_class(
                **_models(p, adapter),
                args=GKDConfig(
                    **trainer_arguments(p, work), gradient_checkpointing=False, lmbda=0.0, beta=0.0, temperature=1.0
                ),
                data_collator=lambda features: _padded([rows[f["row"]] for f in features], p.tokenizer.pad_token_id),
                train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
                callbacks=[timer],
            ),
        )

    return train_recorded(p, build_trainer)


def _padded(rows: list[Any], pad_token_id: int) -> dict[str, Any]:
    """Rows padded on the right to the longest, with labels on the completions."""
    import torch

    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row.ids.astype(np.int64))
        mask[i, : len(row)] = 1
        trained = torch.as_tensor(row.trained)
        labels[i, : len(row)][trained] = ids[i, : len(row)][trained]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run_distillation(settings: dict[str, Any], adapter: Path, work: Path) -> dict[str, Any]:
    p = prepare(settings)
    rows = ordered(p)

    def sides(prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of the prompts and of the completions. A prompt is the number of its row."""
        prompts_and_answers: tuple[list[list[int]], list[list[int]]] = ([], [])
        for prompt in prompts:
            row = rows[int(prompt)]
            first = int(row.trained.argmax())
            assert row.trained[first:].all(), "the trained tokens are not a completion"
            prompts_and_answers[0].append(row.ids[:first].tolist())
            prompts_and_answers[1].append(row.ids[first:].tolist())
        return prompts_and_answers

    def build_trainer(recording: type, timer: type) -> Any:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        def recorded(self: Any, prompts: list[str]) -> Any:
            return *sides(prompts), None, None, None

        trainer_class = type("RecordingTrainer", (recording, DistillationTrainer), {"_generate": recorded})
        config = {"gradient_checkpointing": False, "beta": 0.0, "temperature": 1.0, "shuffle_dataset": False}
        return _with_adapter(
            adapter,
            trainer_class(
                **_models(p, adapter),
                args=DistillationConfig(**trainer_arguments(p, work), **config),
                train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(rows))]}),
                callbacks=[timer],
            ),
        )

    def padded_tokens(inputs: list[dict[str, str]]) -> int:
        both = sides([row["prompt"] for row in inputs])
        return len(inputs) * sum(max(map(len, side)) for side in both)

    return train_recorded(p, build_trainer, padded_tokens=padded_tokens)


def _models(p: Prepared, adapter: Path) -> dict[str, Any]:
    """Student, teacher, tokenizer and adapter for a TRL trainer."""
    assert p.recipe.distill is not None and p.recipe.distill.teacher is not None
    student = p.assembly.model()
    arguments = {"processing_class": p.tokenizer}
    if p.recipe.adapter.method == "none":
        train_all(student, freeze=[])
    else:
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig.from_pretrained(str(adapter))
        arguments["peft_config"].inference_mode = False
    teacher = load_model(
        find_pretrained(p.recipe.distill.teacher.name), auto_class=p.task.spec.auto_class, device="cpu"
    )
    return {"model": student, "teacher_model": teacher, **arguments}


def _with_adapter(adapter: Path, trainer: Any) -> Any:
    """The trainer, with the adapter from which all engines start."""
    if adapter.is_dir():
        load_trained(trainer.model, adapter)
    return trainer


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    settings, adapter, engine = spec["recipe"], Path(spec["adapter"]), spec["engine"]
    import torch

    # Trainer prints its log to stdout, which is reserved for the result.
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        work = Path(temporary)
        if engine == "init":
            result = write_shared(settings, spec, work)
        elif engine == "online":
            result = run_peftlab(settings, work)
        elif engine == "cached":
            result = run_peftlab({**settings, "distill": {**settings["distill"], "cache": spec["cache"]}}, work)
        elif engine == "gkd":
            result = run_gkd(settings, adapter, work)
        else:
            assert engine == "distillation"
            result = run_distillation(settings, adapter, work)
    print(json.dumps({"engine": engine, "threads": torch.get_num_threads(), **result}, default=float))


if __name__ == "__main__":
    main(sys.argv[1])
