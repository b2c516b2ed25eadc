"""``--resume`` in every state of a run: finished, trained without its merge, stopped early, without a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_examples import Stopper, contents, recipe, write_data
from safetensors.torch import load_file

import peftlab
from peftlab.assembly import finish as finish_module
from peftlab.assembly import fit as fit_module
from peftlab.errors import ArtifactError, DataError, Interrupted, RecipeError
from peftlab.training.progress import SilentProgress

# Accuracy has few values, so that an early step stays the best one and patience runs out.
STOPS_EARLY = {
    "train": {"max_steps": 16, "lr": 0.1, "schedule": "constant"},
    "eval": {"every": 2, "best": "accuracy", "patience": 1},
    "run": {"dir": "run", "save_every": 2},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(document: Any, *overrides: str, **options: Any) -> Any:
    return peftlab.train(document, overrides, **{"progress": SilentProgress(), **options})


def weights(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def test_resume_of_a_finished_run_touches_nothing(here: Path) -> None:
    run = train(recipe(**STOPS_EARLY))
    assert run.summary["training"]["stopped_early"] and run.summary["training"]["best_step"] < 16
    before = contents(here / "run")
    assert any("checkpoints" in name for name in before)
    for source in ("run", recipe(**STOPS_EARLY)):
        with pytest.raises(RecipeError, match="run: the run is finished and cannot be resumed"):
            train(source, resume=True)
        with pytest.raises(RecipeError, match="the run is finished"):
            train(source, "run.merge=original", resume=True)
    assert contents(here / "run") == before


def test_resume_of_a_finished_run_names_a_later_one_that_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch, trained: Any
) -> None:
    folder = trained(recipe(), write_data) / "run"
    for name in ("mine", "mine-2", "mine-3"):
        shutil.copytree(folder, here / "runs" / name)
    (here / "runs/mine-3/run.json").write_text('{"status": "interrupted"}')
    with pytest.raises(RecipeError, match=r"not finished: peftlab train runs/mine-3 --resume"):
        train("runs/mine", resume=True)


def test_resume_merges_a_trained_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merging = {"run": {"dir": "run", "save_every": 2, "merge": "original"}}

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "merge_run", interrupted)
        with pytest.raises(Interrupted, match=r"the training is complete. Resume with: peftlab train run --resume"):
            train(recipe(**merging))
    stopped = peftlab.open_run("run")
    assert stopped.summary["status"] == "trained"
    before = weights(here / "run")
    with monkeypatch.context() as patch:
        patch.setattr(fit_module.TrainingLoop, "run", interrupted)
        run = train("run", resume=True)
    assert run.summary["status"] == "finished" and run.summary["merge"]["verified"]
    assert {k: v for k, v in run.summary.items() if k in ("before", "after", "training", "samples")} == {
        k: v for k, v in stopped.summary.items() if k in ("before", "after", "training", "samples")
    }
    assert weights(here / "run") == before
    assert (run.merged / "config.json").is_file()


@pytest.mark.parametrize("moment", ["after the early stop", "after the best step is restored"])
def test_resume_of_a_run_that_stopped_early_trains_no_further_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = train(recipe(**{**STOPS_EARLY, "run": {"dir": "whole", "save_every": 2}}))
    assert whole.summary["training"]["stopped_early"]

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stopped = (fit_module.Fit, "_save_result") if moment == "after the early stop" else (fit_module, "_figures")
        patch.setattr(*stopped, killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(**STOPS_EARLY))
    assert (here / "run/best").is_dir(), "the run needs it to resume"
    (here / "run/checkpoints/.partial-00000099-1").mkdir()
    resumed = train("run", resume=True)
    assert resumed.summary["training"]["steps"] == whole.summary["training"]["steps"]
    assert resumed.summary["training"]["best_step"] == whole.summary["training"]["best_step"]
    assert resumed.summary["after"] == whole.summary["after"]
    assert weights(here / "run") == weights(here / "whole")
    assert not (here / "run/best").exists()
    assert not list((here / "run/checkpoints").glob(".partial*"))


def test_resume_without_the_best_weights_is_refused(here: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe(**STOPS_EARLY), progress=Stopper(3))
    shutil.rmtree(here / "run/best")
    with pytest.raises(ArtifactError, match=r"run/best is missing, which has the weights of step \d+, the best so far"):
        train("run", resume=True)


def test_resume_without_a_checkpoint_names_the_trained_weights(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise DataError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "evaluate_examples", failing)
        with pytest.raises(DataError):
            train(recipe(eval={"before": False}))
    assert peftlab.open_run("run").summary["status"] == "failed"
    with pytest.raises(
        RecipeError, match=r"no checkpoint \(run.save_every\); run/adapter has the weights after the last"
    ):
        train("run", resume=True)


def test_resume_of_a_recipe_refuses_changed_data(here: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe(), progress=Stopper(3))
    path = here / "data.csv"
    path.write_text(path.read_text().replace("cow", "pig"))
    with pytest.raises(ArtifactError, match=r"the train data has changed.*To resume the run, restore"):
        train(recipe(), resume=True)


def test_resume_with_an_8_bit_optimizer_gives_the_same_bytes(here: Path) -> None:
    # Some tensors have 4,096 elements and more.
    document = {"train": {"optimizer": "adamw_8bit", "max_steps": 24}, "adapter": {"rank": 64}}
    run = train(recipe(**document, run={"dir": "whole"}))
    other = train(recipe(**document, run={"dir": "exact"}), "train.optimizer=adamw")
    loss, exact = (each.summary["training"]["last_loss"] for each in (run, other))
    fall = run.summary["before"]["loss"] - exact
    assert fall > 0.5 and 0 < abs(loss - exact) < 0.05 * fall
    with pytest.raises(Interrupted):
        train(recipe(**document), progress=Stopper(3))
    stored = load_file(str(here / "run/checkpoints/step-00000003/optimizer.safetensors"))
    assert {t.dtype for k, t in stored.items() if k.endswith("/state1")} == {torch.uint8, torch.float32}
    train("run", resume=True)
    assert weights(here / "run") == weights(here / "whole")


def test_paged_optimizer_on_a_cpu_is_refused_before_anything_is_read(here: Path) -> None:
    (here / "data.csv").unlink()
    for verb in (peftlab.check, train):
        with pytest.raises(
            RecipeError, match=r"paged_adamw_8bit moves its state .* on the CPU; use adamw_8bit"
        ) as caught:
            verb(recipe(train={"optimizer": "paged_adamw_8bit"}, run={"device": "cpu"}))
        assert caught.value.exit_code == 2
