"""One measured run: ``python -m bench.peers.engines SPEC.json`` trains with one engine and prints one JSON line.

Each run has its own process, which keeps peak memory clean. All engines get the same recipe:

- ``peftlab``: ``peftlab.train``, the call that users make, with a progress object that records times.
- ``trainer``, ``sft``: transformers ``Trainer`` on a PEFT model, or TRL ``SFTTrainer`` with ``peft_config``. They get the rows of
  each optimizer step of peftlab's batch plan, in that order, and start from the same adapter file.
- ``sft-liger``, ``axolotl``, ``unsloth``: SFTTrainer with Liger's kernels, with Axolotl's LoRA kernels, or on Unsloth's model.
- ``init``: writes that adapter file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peftlab
from peftlab.assembly import Assembly
from peftlab.assembly.plan import make_plan
from peftlab.data import BatchPlan
from peftlab.measuring.stopwatch import Stopwatch
from peftlab.recipe import Recipe
from peftlab.tasks import Encoded, Task
from peftlab.training.metrics_log import read_metrics
from peftlab.training.progress import SilentProgress


class Clock(Stopwatch):
    def figures(self) -> dict[str, Any]:
        """Figures of a run. The first step warms up; the measured time starts at its end."""
        return {
            "seconds": self.times[-1] - self.times[0],
            "cpu_seconds": self.cpu_times[-1] - self.cpu_times[0],
            "step_seconds": self.step_seconds(),
            "peak_rss_bytes": max(self.peak_bytes, self.load_peak_bytes),
            "rss_before_training_bytes": self.before_bytes,
            "training_peak_increase_bytes": max(0, self.peak_bytes - self.before_bytes),
        }


class TimingProgress(SilentProgress):
    """Records the times of peftlab's loop and counts its micro-batches."""

    def __init__(self, device: str = "cpu") -> None:
        self.clock = Clock(device)
        self.micro_batches: list[int] = []
        self._total_steps = 0

    def start(self, total_steps: int, first_step: int = 0) -> None:
        self._total_steps = total_steps
        self.clock.begin()

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self.clock.tick()
        self.micro_batches.append(int(values["micro_batches"] or 0))
        if step == self._total_steps:
            self.clock.end()


@dataclass(frozen=True)
class Prepared:
    """The objects of a recipe, built with the functions that ``peftlab.train`` uses."""

    assembly: Assembly
    train: Encoded
    eval: Encoded
    plan: BatchPlan
    steps: list[list[np.ndarray]]

    @property
    def recipe(self) -> Recipe:
        return self.assembly.recipe

    @property
    def task(self) -> Task:
        return self.assembly.task

    @property
    def tokenizer(self) -> Any:
        return self.assembly.reader

    def work(self) -> dict[str, Any]:
        """Rows and tokens of the measured steps, which are all but the first."""
        rows = np.concatenate([part for step in self.steps[1:] for part in step])
        examples = [self.train.examples[i] for i in rows]
        return {
            "steps": len(self.steps),
            "rows": len(examples),
            "tokens": sum(map(len, examples)),
            "trained_tokens": sum(int(e.trained.sum()) for e in examples if e.trained is not None),
        }


def prepare(settings: dict[str, Any]) -> Prepared:
    """Data, tokenizer, encoded rows and batch plan of a recipe; at most one epoch of steps."""
    assembly = Assembly(peftlab.load_recipe(settings))
    train, held_out = assembly.train, assembly.held_out
    plan = make_plan(assembly, train.lengths)
    planned = [plan.step(i) for i in range(plan.total_steps)]
    if any(p.epoch for p in planned) or len(planned) < 2:
        # Trainer starts a new batch at the end of an epoch, so its steps equal the plan's only within one epoch.
        schedule = f"{len(planned)} steps over {planned[-1].epoch + 1} epochs"
        raise SystemExit(f"expected 2 or more steps within one epoch, found {schedule}: change --steps or --rows")
    steps = [p.micro_batches for p in planned]
    return Prepared(assembly, train, held_out, plan, steps)


def device_of(settings: dict[str, Any]) -> str:
    return str(settings["run"]["device"])


def run_peftlab(settings: dict[str, Any], work: Path) -> dict[str, Any]:
    progress = TimingProgress(device_of(settings))
    run = peftlab.train({**settings, "run": {**settings["run"], "dir": str(work / "run")}}, progress=progress)
    return figures_of(run, progress, prepare(settings))


def figures_of(run: peftlab.Run, progress: TimingProgress, p: Prepared) -> dict[str, Any]:
    """The figures of a peftlab run. Args: p: prepared after the measurement, for the counts."""
    assert progress.micro_batches == [len(step) for step in p.steps], "the plan differs from the trained one"
    return {
        **p.work(),
        **progress.clock.figures(),
        "micro_batches": sum(progress.micro_batches[1:]),
        "padded_tokens": sum(len(part) * max(p.train.lengths[part]) for step in p.steps[1:] for part in step),
        "losses": [r["loss"] for r in read_metrics(run.folder / "metrics.jsonl") if "loss" in r and "lr" in r],
        "before": run.summary["before"],
        "after": run.summary["after"],
    }


def write_initial_adapter(settings: dict[str, Any], work: Path, adapter: Path) -> dict[str, Any]:
    """Writes the adapter from which ``peftlab.train`` starts, by one step with a learning rate that is 0 in float32."""
    run_settings = {**settings["run"], "dir": str(work / "init")}
    train = {**{k: v for k, v in settings["train"].items() if k != "epochs"}, "max_steps": 1, "lr": 1e-300}
    eval_settings = {**settings.get("eval", {}), "before": False}
    run = peftlab.train(
        {**settings, "run": run_settings, "train": train, "eval": eval_settings}, progress=SilentProgress()
    )
    from safetensors.torch import load_file

    shutil.copytree(run.folder / "adapter", adapter)
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    assert not any(t.any() for name, t in tensors.items() if "lora_B" in name), (
        "a learning rate of zero changed the adapter"
    )
    return {"tensors": len(tensors)}


def run_peer(settings: dict[str, Any], adapter: Path, work: Path, engine: str) -> dict[str, Any]:
    p = prepare(settings)
    build_trainer = {
        "trainer": _plain_trainer,
        "sft": _sft_trainer,
        "sft-liger": _liger_trainer,
        "axolotl": _axolotl_trainer,
        "unsloth": _unsloth_trainer,
    }[engine]
    return train_recorded(p, lambda recording, timer: build_trainer(p, adapter, work, recording, timer))


def train_recorded(
    p: Prepared,
    build_trainer: Callable[[type, type], Any],
    *,
    padded_tokens: Callable[[Any], int] = lambda inputs: int(inputs["input_ids"].numel()),
) -> dict[str, Any]:
    """The figures of a Trainer.

    Args:
        build_trainer: builds it from a mixin that records losses and a callback that records times.
        padded_tokens: counts the padded tokens in the inputs of its ``training_step``.
    """
    from transformers import TrainerCallback

    from peftlab.evaluation.loop import evaluate_examples
    from peftlab.evaluation.metrics import default_metrics

    device = p.recipe.run.device
    clock = Clock(device)
    losses: list[torch.Tensor] = []
    padded: list[int] = []

    class Timer(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    class Recording:
        """Mixed into the trainer, because its own log rounds losses and averages them over the logging interval."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            padded.append(padded_tokens(inputs))
            loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
            losses.append(loss.detach())
            return loss

    trainer = build_trainer(Recording, Timer)

    def evaluate() -> dict[str, float | None]:
        return evaluate_examples(
            trainer.model,
            p.task,
            p.eval,
            metrics=default_metrics(p.recipe.spec, False),
            batch_tokens=p.recipe.eval.batch_tokens,
            device=torch.device(device),
            autocast=contextlib.nullcontext if device == "cpu" else lambda: torch.autocast(device, torch.bfloat16),
        )

    before = evaluate()
    trainer.train()
    return {
        **p.work(),
        **clock.figures(),
        "micro_batches": len(padded) - 1,
        "padded_tokens": sum(padded[1:]),
        "losses": [float(x) for x in losses],
        "before": before,
        "after": evaluate(),
    }


def trainer_arguments(p: Prepared, work: Path) -> dict[str, Any]:
    """The recipe's values as ``TrainingArguments``; everything else keeps its default."""
    t = p.recipe.train
    if t.accumulate != 1 or t.batch_size is None or t.schedule != "linear" or t.warmup:
        raise SystemExit("the comparison covers batch_size, no accumulation, a linear schedule and no warm-up")
    return {
        "output_dir": str(work / "trainer"),
        "per_device_train_batch_size": t.batch_size,
        "max_steps": len(p.steps),
        "learning_rate": t.lr,
        "lr_scheduler_type": "linear",
        "weight_decay": t.weight_decay,
        "adam_beta1": t.betas[0],
        "adam_beta2": t.betas[1],
        "max_grad_norm": t.max_grad_norm,
        "seed": p.recipe.run.seed,
        "train_sampling_strategy": "sequential",
        "bf16": p.recipe.run.device == "cuda",
        "use_cpu": p.recipe.run.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def ordered(p: Prepared) -> list[Any]:
    """Examples in training order. Sequential batches are the optimizer steps of the plan."""
    return [p.train.examples[i] for step in p.steps for part in step for i in part]


def _plain_trainer(p: Prepared, adapter: Path, work: Path, recording: type, timer: type) -> Any:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    model = p.assembly.model()
    rows = ordered(p)
    tokens = p.recipe.spec.predicts == "tokens"
    dataset = Dataset.from_dict(
        {
            "input_ids": [e.ids.tolist() for e in rows],
            "attention_mask": [[1] * len(e) for e in rows],
            "labels": [np.where(e.trained, e.ids, -100).tolist() if tokens else e.label for e in rows],
        }
    )
    trainer_class = type("RecordingTrainer", (recording, Trainer), {})
    return trainer_class(
        model=PeftModel.from_pretrained(model, str(adapter), is_trainable=True),
        args=TrainingArguments(**trainer_arguments(p, work)),
        train_dataset=dataset,
        data_collator=(DataCollatorForSeq2Seq if tokens else DataCollatorWithPadding)(p.tokenizer),
        processing_class=p.tokenizer,
        callbacks=[timer],
    )


def _sft_trainer(p: Prepared, adapter: Path, work: Path, recording: type, timer: type) -> Any:
    model = p.assembly.model()
    return _sft(p, model, adapter, work, recording, timer)


def _liger_trainer(p: Prepared, adapter: Path, work: Path, recording: type, timer: type) -> Any:
    model = p.assembly.model()
    return _sft(p, model, adapter, work, recording, timer, use_liger_kernel=True)


def _axolotl_trainer(p: Prepared, adapter: Path, work: Path, recording: type, timer: type) -> Any:
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
    from axolotl.utils.dict import DictDefault

    trainer = _sft_trainer(p, adapter, work, recording, timer)
    patches = DictDefault({"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True})
    trainer.model = apply_lora_kernel_patches(trainer.model, patches)
    return trainer


def _unsloth_trainer(p: Prepared, adapter: Path, work: Path, recording: type, timer: type) -> Any:
    """Runs on the model that peftlab loads, saved as a folder, because Unsloth reads neither GGUF files nor packages."""
    from unsloth import FastLanguageModel  # before trl and transformers, which it patches

    quantized, a = p.recipe.model.quantize == "nf4", p.recipe.adapter
    p.assembly.derive({"run.device": "cpu"}).model(quantize="none").save_pretrained(work / "whole")
    p.tokenizer.save_pretrained(work / "whole")
    model, _ = FastLanguageModel.from_pretrained(
        str(work / "whole"), max_seq_length=max(map(len, p.train.examples)), load_in_4bit=quantized
    )
    model = FastLanguageModel.get_peft_model(
        model, r=a.rank, lora_alpha=a.alpha, lora_dropout=a.dropout, use_gradient_checkpointing=False
    )
    return _sft(p, model, adapter, work, recording, timer, has_adapter=True)


def _sft(
    p: Prepared,
    model: Any,
    adapter: Path,
    work: Path,
    recording: type,
    timer: type,
    *,
    has_adapter: bool = False,
    **options: Any,
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from peftlab.adapters import load_trained

    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    rows = ordered(p)
    dataset = Dataset.from_dict(
        {
            "input_ids": [e.ids.tolist() for e in rows],
            "completion_mask": [e.trained.astype(int).tolist() for e in rows],
        }
    )
    trainer_class = type("RecordingTrainer", (recording, SFTTrainer), {})
    # Gradient checkpointing is TRL's default and peftlab's option. It is off on both sides, since it costs a second forward.
    options |= {"gradient_checkpointing": False, "completion_only_loss": True}
    trainer = trainer_class(
        model=model,
        args=SFTConfig(**trainer_arguments(p, work), **options),
        train_dataset=dataset,
        processing_class=p.tokenizer,
        peft_config=None if has_adapter else config,
        callbacks=[timer],
    )
    load_trained(trainer.model, adapter)
    return trainer


def without_dropout(name: str, folder: Path) -> str:
    """A copy of the model folder without dropout in its config. Masks depend on the batch shapes, so losses would too."""
    from peftlab.models.source import resolve_model

    source = Path(resolve_model(name, None).path)
    if not source.is_dir():  # a GGUF file: its decoders have no dropout
        return name
    shutil.copytree(source, folder, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
    config = json.loads((source / "config.json").read_text())
    config |= {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], int | float)}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    settings, adapter = spec["recipe"], Path(spec["adapter"])
    # Trainer prints its log to stdout, which is reserved for the result.
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        work = Path(temporary)
        if spec["no_dropout"]:
            name = without_dropout(settings["model"]["name"], work / "model")
            settings = {**settings, "model": {**settings["model"], "name": name}}
        if spec["engine"] == "init":
            result = write_initial_adapter(settings, work, adapter)
        elif spec["engine"] == "peftlab":
            result = run_peftlab(settings, work)
        else:
            result = run_peer(settings, adapter, work, spec["engine"])
    print(json.dumps({"engine": spec["engine"], "threads": torch.get_num_threads(), **result}, default=float))


if __name__ == "__main__":
    main(sys.argv[1])
