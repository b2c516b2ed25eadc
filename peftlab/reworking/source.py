"""The adapter that a rework starts from: opened, with its held-out rows and the outputs to compare with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.adapters import refuse_beside
from peftlab.adapters.lora_files import other_tensors
from peftlab.adapters.updates import Update, changed_base, read_updates
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.target import Opened, RecipeSource, Target, find_target, open_target
from peftlab.assembly.witness import Witness, check_witness, read_witness
from peftlab.data import require
from peftlab.errors import RecipeError
from peftlab.evaluation.loop import evaluate_examples
from peftlab.evaluation.metrics import default_metrics
from peftlab.runs import LOCK_NAME
from peftlab.tasks import Encoded
from peftlab.training.progress import Progress


def find_adapter(
    name: str | os.PathLike[str], recipe: RecipeSource | None = None, overrides: Sequence[str] = ()
) -> Target:
    """The target of a run or adapter folder. Raises: RecipeError if it is none, or has no adapter."""
    path = Path(name)
    if not path.exists():
        raise RecipeError(f"no such run or adapter folder: {path}")
    if not (path / "adapter_config.json").is_file() and not (path / LOCK_NAME).is_file():
        raise RecipeError(
            f"{path} is neither a run folder (it has no {LOCK_NAME}) nor an adapter (no adapter_config.json)"
        )
    if (path / "student" / "config.json").is_file():
        raise RecipeError(f"{path} has no adapter: its student is a whole model; name a run with an adapter")
    target = find_target(path, recipe, overrides)
    if target.adapter is not None:
        refuse_beside(target.adapter, "this command takes an adapter of one method")
    if target.adapter is None:
        what = "a merged model, whose weights contain its adapter" if target.kind == "merged" else "full fine-tuning"
        raise RecipeError(f"{path} has no adapter: it is {what}; name a run with an adapter")
    return target


def check_new(folder: Path) -> None:
    """Raises RecipeError if ``folder`` exists: a rework never overwrites."""
    if folder.exists():
        raise RecipeError(f"{folder} exists; choose another --to")
    if not folder.absolute().parent.is_dir():
        raise RecipeError(f"{folder.absolute().parent} is no folder; make it first, or choose another --to")


@dataclass(frozen=True)
class Source:
    """held_out: the encoded held-out rows. opened: base and adapter. reference: what was trained, on some of the rows;
    of_training: whether the training itself wrote that."""

    target: Target
    assembly: Assembly
    held_out: Encoded
    opened: Opened
    reference: Witness
    of_training: bool

    @classmethod
    def open(cls, target: Target, progress: Progress) -> Source:
        """Opens a target and checks that it is what was trained. Raises: as ``evaluate``."""
        progress.stage("reading data")
        assembly = target.assembly(reads_data=True)
        held_out = held_out_rows(assembly)
        opened = open_target(target, progress, assembly=assembly)
        check_witness(opened, progress)
        assert target.adapter is not None
        witness = read_witness(target.adapter)
        if witness is None:
            progress.stage("running base + adapter on held-out rows")
            reference = Witness.take(opened.model, assembly.task, held_out.examples, **runs_of(assembly))
            return cls(target, assembly, held_out, opened, reference, False)
        return cls(target, assembly, held_out, opened, witness, True)

    @property
    def config(self) -> Any:
        """PEFT's configuration of the adapter."""
        return self.opened.model.peft_config["default"]

    @property
    def method(self) -> str:
        """PEFT's name of the method, such as ``LORA``."""
        return str(self.config.peft_type.value)

    def others(self) -> dict[str, Any]:
        """The tensors of the adapter that are no update, to keep."""
        assert self.target.adapter is not None
        return other_tensors(self.target.adapter, self.method)

    def metrics(self, progress: Progress) -> dict[str, float | None]:
        """The task's metrics on the held-out rows; empty for a task without labels."""
        return metrics_of(self.opened, self.held_out, progress)

    def updates(self) -> list[Update]:
        """The updates, which a plain LoRA adapter can hold. Raises: RecipeError with the first that it cannot."""
        refuse_unplain(self.config)
        found = list(read_updates(self.opened.model))
        for update in found:
            if update.reason is not None:
                raise RecipeError(
                    f"{update.name} has no update that a LoRA matrix can hold: {update.reason}; use the adapter as it is"
                )
        return found


def refuse_unplain(config: Any) -> None:
    """Raises RecipeError for an adapter that is more than updates of the published weights."""
    if config.is_prompt_learning:
        raise RecipeError(f"an adapter of {config.peft_type.value} adds virtual tokens and updates no weight")
    if (name := changed_base(config)) is not None:
        raise RecipeError(
            f"the adapter was initialised with {name}, which changes the base weights when it is loaded, so its factors are no "
            "update of the published weights; merge it instead, or train without init"
        )
    if getattr(config, "bias", "none") != "none":
        raise RecipeError(
            f"the adapter trains biases (bias={config.bias}), which belong to no update; merge it instead"
        )
    if getattr(config, "layer_replication", None):
        raise RecipeError(
            "the adapter replicates layers (layer_replication), whose updates share one weight; merge it instead"
        )


def held_out_rows(assembly: Assembly) -> Encoded:
    """The held-out rows, with labels if the task learns from them."""
    if assembly.spec.learns_from_labels:
        return assembly.held_out
    encoded = assembly.task.encode(
        assembly.data.eval, max_length=assembly.limit, too_long="truncate", training=False, labelled=False
    )
    require(encoded.ledger, training=False)
    return encoded


def metrics_of(opened: Opened, held_out: Encoded, progress: Progress) -> dict[str, float | None]:
    """As ``Source.metrics``."""
    assembly = opened.assembly
    settings = assembly.recipe
    if not assembly.spec.learns_from_labels:
        return {}
    progress.stage(f"evaluating on {held_out.num_rows:,} rows")
    return evaluate_examples(
        opened.model,
        opened.task,
        held_out,
        metrics=settings.eval.metrics or default_metrics(settings.spec, bool(settings.eval.choices)),
        batch_tokens=settings.eval.batch_tokens,
        device=assembly.device,
        autocast=opened.autocast,
    )


def runs_of(assembly: Assembly) -> dict[str, Any]:
    """How ``Witness`` runs a model."""
    return {"batch_tokens": assembly.recipe.eval.batch_tokens, "device": assembly.device}
