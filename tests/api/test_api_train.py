"""The verbs train, evaluate, predict and merge end to end on tiny models, and the errors that stop them."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from run_examples import Stopper, contents, recipe, write_data
from safetensors.torch import load_file

import peftlab
from peftlab.adapters import formulas, merge_check
from peftlab.assembly import fit as fit_module
from peftlab.assembly import merging as merging_module
from peftlab.errors import (
    ArtifactError,
    DataError,
    Interrupted,
    PeftlabError,
    RecipeError,
    ResourceError,
    VerificationError,
)
from peftlab.recipe import load_recipe
from peftlab.tasks.causal_lm import CausalLM
from peftlab.training.progress import SilentProgress


def train(document: Any, *overrides: str, **options: Any) -> Any:
    return peftlab.train(document, overrides, **{"progress": SilentProgress(), **options})


class Done(NamedTuple):
    folder: Path
    run: Any


@pytest.fixture(scope="module", params=["causal_lm", "seq_cls"])
def done(request: pytest.FixtureRequest, trained: Any) -> Done:
    """One finished run per task. A test that changes it works on a copy."""
    folder = trained(recipe(request.param), write_data)
    return Done(folder, peftlab.open_run(folder / "run"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, in a folder of its own."""
    shutil.copytree(done.folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_train_run_folder_is_complete(done: Done) -> None:
    folder = done.folder / "run"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "metrics.jsonl",
        "recipe.lock.yaml",
        "run.json",
        "witness.safetensors",
    }
    summary = peftlab.open_run(folder).summary
    assert summary["status"] == "finished"
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["training"]["steps"] == 6
    assert (summary["train_rows"], summary["eval_rows"]) == (36, 12)


def test_evaluate_repeats_the_final_metrics_of_the_run(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.folder)
    result = peftlab.evaluate("run", progress=SilentProgress())
    after = done.run.summary["after"]
    assert result["rows"] == 12
    assert result["metrics"].keys() == after.keys() and "accuracy" in after
    for name, value in after.items():
        assert result["metrics"][name] == pytest.approx(value, rel=1e-5), name


def test_evaluate_without_the_adapter_gives_other_metrics(
    done: Done, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy / "adapter/adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({k: v * 0 for k, v in load_file(str(path)).items()}, str(path), metadata={"format": "pt"})
    (copy / "witness.safetensors").unlink()  # with it, evaluating is refused
    result = peftlab.evaluate(copy, progress=SilentProgress())
    assert result["metrics"]["loss"] != pytest.approx(done.run.summary["after"]["loss"], rel=1e-3)


def test_predict_labels_texts_and_files(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.folder)
    texts = ["red 9", "cat 9", "cow 1"]
    results = list(peftlab.predict("run", texts, progress=SilentProgress()))
    assert len(results) == 3
    assert all(r["label"] in ("animal", "colour") and 0 < r["probability"] <= 1 for r in results)
    one_by_one = [next(iter(peftlab.predict("run", t, progress=SilentProgress()))) for t in texts]
    assert [r["label"] for r in one_by_one] == [r["label"] for r in results]
    from_file = list(peftlab.predict("run", Path("data.csv"), progress=SilentProgress()))
    assert len(from_file) == 48
    with pytest.raises(RecipeError, match="nothing to predict"):
        list(peftlab.predict("run", [], progress=SilentProgress()))


def test_predict_agrees_with_evaluate(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy counted from predict on a file equals the accuracy that evaluate reports for it."""
    monkeypatch.chdir(done.folder)
    with Path("data.csv").open() as file:
        truth = [row["kind"] for row in csv.DictReader(file)]
    predicted = [r["label"] for r in peftlab.predict("run", Path("data.csv"), progress=SilentProgress())]
    share = sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(truth)
    overrides = ["data.eval=data.csv", "data.eval_rows="]
    metrics = peftlab.evaluate("run", overrides=overrides, progress=SilentProgress())["metrics"]
    assert metrics["accuracy"] == pytest.approx(share)


def test_lock_file_repeats_the_run_byte_by_byte(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.rand(7)
    again = train(done.folder / "run/recipe.lock.yaml", "run.dir=again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again.adapter / name).read_bytes() == (done.folder / "run/adapter" / name).read_bytes()
    other = train(done.folder / "run/recipe.lock.yaml", "run.dir=other", "run.seed=1")
    name = "adapter/adapter_model.safetensors"
    assert (other.folder / name).read_bytes() != (done.folder / "run" / name).read_bytes()


def test_lock_file_refuses_changed_data(done: Done, copy: Path, tmp_path: Path) -> None:
    lock = copy / "recipe.lock.yaml"
    shutil.copy(done.folder / "data.csv", tmp_path / "data.csv")
    lock.write_text(lock.read_text().replace(str(done.folder / "data.csv"), str(tmp_path / "data.csv")))
    train(lock, "run.dir=same")
    with (tmp_path / "data.csv").open("a") as file:
        file.write("red 99,colour,red 99\n")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="the train data has changed") as caught:
        train(lock, "run.dir=other")
    assert caught.value.exit_code == 5
    assert contents(tmp_path) == before


MERGED = """
import importlib.util, sys
assert importlib.util.find_spec("peftlab") is None
import torch, transformers
from safetensors.torch import save_file
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([tokenizer("red 9")["input_ids"]])
save_file({"logits": model(input_ids=ids).logits.detach().contiguous()}, sys.argv[3])
"""


def test_merge_writes_files_that_plain_transformers_loads(process: Any, done: Done, copy: Path, tmp_path: Path) -> None:
    from peftlab.adapters import load_adapter
    from peftlab.models import find_pretrained, load_model, load_tokenizer

    report = peftlab.merge(copy, progress=SilentProgress())
    assert report["verified"] and report["target"] == "original"
    figures = report["targets"]["original"]
    assert figures["logits"]["top1"] == 1.0 and figures["logits"]["kl_mean"] < 1e-6
    assert figures["layers"]["relative"] < 1e-4 and figures["tokenizer_same"]
    settings = done.run.recipe().recipe
    auto = "AutoModelForCausalLM" if settings.task == "causal_lm" else "AutoModelForSequenceClassification"
    (tmp_path / "elsewhere").mkdir()
    # The process sees neither the repository nor PYTHONPATH. Removing its finder hides the editable install.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n" + MERGED
    arguments = ["-c", code, copy / "merged", auto, tmp_path / "logits"]
    without = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process.run(arguments, cwd=tmp_path / "elsewhere", env=without, timeout=90, check=True)
    pretrained = find_pretrained(settings.model.name)
    base = load_model(pretrained, auto_class=auto, device="cpu")
    model = load_adapter(base, copy / "adapter").eval()
    ids = torch.tensor([load_tokenizer(pretrained)("red 9")["input_ids"]])
    torch.testing.assert_close(
        load_file(str(tmp_path / "logits"))["logits"], model(input_ids=ids).logits, rtol=0, atol=1e-5
    )
    result = peftlab.evaluate(copy / "merged", progress=SilentProgress())
    assert result["kind"] == "merged"
    for name, value in done.run.summary["after"].items():
        assert result["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("limits", [{"max_kl": -1.0}, {"min_top1": 1.01}], ids=str)
def test_merge_beyond_a_threshold_is_not_kept(done: Done, copy: Path, limits: dict[str, float]) -> None:
    before = set(contents(copy))
    with pytest.raises(VerificationError, match="merge verification failed, nothing was written") as caught:
        peftlab.merge(copy, progress=SilentProgress(), **limits)
    assert caught.value.exit_code == 6
    assert set(contents(copy)) - before == {"merge.json"}
    assert sorted(p.name for p in copy.iterdir() if p.is_dir()) == ["adapter"]


def test_merge_that_fails_keeps_the_earlier_merge(done: Done, copy: Path) -> None:
    peftlab.merge(copy, progress=SilentProgress())
    before = contents(copy / "merged")
    with pytest.raises(RecipeError, match="exists; overwrite it with --replace"):
        peftlab.merge(copy, progress=SilentProgress())
    with pytest.raises(VerificationError):
        peftlab.merge(copy, min_top1=1.01, replace=True, progress=SilentProgress())
    assert contents(copy / "merged") == before


def test_merge_that_loses_the_update_is_caught(done: Done, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, *args, **kwargs: None)
    with pytest.raises(VerificationError, match=r"merged layers differ from the layers .*by 100\.0% of what"):
        peftlab.merge(copy, progress=SilentProgress())
    assert not (copy / "merged").exists()


def test_merge_refuses_a_target_that_the_run_does_not_have(done: Done, copy: Path) -> None:
    with pytest.raises(RecipeError, match="original"):
        peftlab.merge(copy, base="dequantized", progress=SilentProgress())


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
def test_merge_of_a_quantized_run_has_two_targets(here: Path, task: str) -> None:
    run = train(recipe(task, model={"quantize": "nf4"}, eval={"before": False}))
    report = peftlab.merge("run", progress=SilentProgress())
    assert report["verified"] and report["target"] == "dequantized"
    assert set(report["targets"]) == {"original", "dequantized"}
    exact, original = (report["targets"][t] for t in ("dequantized", "original"))
    assert exact["logits"]["kl_mean"] < 1e-6
    assert 10 * exact["logits"]["kl_mean"] < original["logits"]["kl_mean"]
    assert exact["layers"]["relative"] < 1e-4
    merged = peftlab.evaluate("run/merged", progress=SilentProgress())["metrics"]
    assert merged["loss"] == pytest.approx(run.summary["after"]["loss"], rel=1e-3)
    other = peftlab.merge("run", base="original", output="other", max_kl=99, min_top1=0, progress=SilentProgress())
    assert other["target"] == "original" and (here / "other/model.safetensors").is_file()


@pytest.mark.parametrize("of", ["weights", "outputs"])
def test_merge_check_against_other_layers_fails_a_right_merge(
    of: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded layers are the check. With an adapter of half the size, a right merge must fail."""
    train(recipe(eval={"before": False}))

    def half_update(down: Any, up: Any, scale: float) -> Any:
        return scale / 2 * (up @ down)

    def half_way(layer: Any, x: Any, outputs: Any = merge_check._outputs) -> Any:
        adapted, plain = outputs(layer, x)
        return (adapted + plain) / 2, plain

    if of == "weights":
        monkeypatch.setattr(formulas, "low_rank", half_update)
    else:
        monkeypatch.setattr(merge_check, "_outputs", half_way)
    with pytest.raises(VerificationError, match="14 of 14 merged layers differ"):
        peftlab.merge("run", progress=SilentProgress())


def test_merge_after_training_is_verified(here: Path) -> None:
    run = train(recipe(run={"dir": "run", "merge": "original"}))
    assert run.summary["status"] == "finished"
    assert run.summary["merge"]["verified"]
    assert (run.merged / "config.json").is_file()


def test_run_dir_in_use_is_not_touched(here: Path) -> None:
    train(recipe(train={"max_steps": 1}))
    before = contents(here)
    with pytest.raises(RecipeError, match="contains another run; resume it with --resume") as caught:
        train(recipe())
    assert caught.value.exit_code == 2 and caught.value.key == "run.dir"
    (here / "papers").mkdir()
    (here / "papers/thesis.txt").write_text("42")
    for replace in (False, True):
        with pytest.raises(RecipeError, match="contains other files but no run"):
            train(recipe(run={"dir": "papers"}), replace=replace)
    with pytest.raises(RecipeError, match="is a file"):
        train(recipe(run={"dir": "data.csv"}))
    assert contents(here) == before | {"papers/thesis.txt": b"42"}


def test_replace_keeps_the_earlier_run_until_the_new_one_is_ready(here: Path) -> None:
    train(recipe(train={"max_steps": 1}))
    before = contents(here / "run")
    with pytest.raises(PeftlabError):
        train(recipe(adapter={"targets": ["nope"]}), replace=True)
    assert contents(here / "run") == before
    train(recipe(train={"max_steps": 2}), replace=True)
    assert peftlab.open_run("run").summary["training"]["steps"] == 2


def test_run_dir_default_is_numbered(here: Path) -> None:
    document = recipe(train={"max_steps": 1}, run={"dir": None})
    one, two = train(document), train(document)
    assert (one.folder, two.folder) == (Path("runs/recipe"), Path("runs/recipe-2"))


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"adapter": {"targets": ["nope"]}}, RecipeError),
        ({"data": {"max_length": 3}}, DataError),
        ({"data": {"max_length": 5000}}, RecipeError),
        ({"eval": {"choices": ["animal", "plant"]}}, DataError),
        ({"eval": {"best": "no_such_metric"}}, RecipeError),
        ({"model": {"name": "tiny:gpt"}}, RecipeError),
        ({"data": {"train": "absent.csv"}}, DataError),
    ],
    ids=str,
)
def test_train_with_a_bad_recipe_leaves_no_folder(here: Path, sections: Any, error: type[PeftlabError]) -> None:
    with pytest.raises(error):
        train(recipe(**sections))
    assert sorted(p.name for p in here.iterdir()) == ["data.csv"]


def test_train_that_fails_in_the_first_step_leaves_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CausalLM.loss_sum
    monkeypatch.setattr(CausalLM, "loss_sum", lambda self, model, batch: right(self, model, batch) * float("nan"))
    with pytest.raises(VerificationError, match=r"data\.csv:\d+"):
        train(recipe())
    assert sorted(p.name for p in here.iterdir()) == ["data.csv"]


def test_train_that_fails_after_the_last_step_keeps_the_weights(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the last evaluation must not throw away the finished steps."""
    right, calls = fit_module.evaluate_examples, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return right(*args, **kwargs)

    monkeypatch.setattr(fit_module, "evaluate_examples", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(recipe())
    assert list((here / "run").rglob("adapter_model.safetensors")), "nothing is left of the training"


def test_resume_ends_with_the_same_bytes(here: Path) -> None:
    whole = train(recipe(run={"dir": "whole"}, eval={"every": 2}))
    with pytest.raises(Interrupted, match="peftlab train run --resume") as caught:
        train(recipe(eval={"every": 2}), progress=Stopper(3))
    assert caught.value.exit_code == 130
    assert peftlab.open_run("run").summary["status"] == "interrupted"
    resumed = train("run", resume=True)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert resumed.summary["after"] == whole.summary["after"]
    assert resumed.summary["before"] == whole.summary["before"]
    assert resumed.summary["status"] == "finished"
    losses = [[r["loss"] for r in run.metrics() if "loss" in r] for run in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    with pytest.raises(RecipeError, match=r"it is finished|cannot be resumed"):
        train("whole", resume=True)


def test_resume_refuses_a_damaged_checkpoint(here: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe(run={"dir": "run", "save_every": 2}), progress=Stopper(5))
    newest = sorted((here / "run/checkpoints").iterdir())[-1]
    path = newest / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    before = contents(here / "run/checkpoints")
    with pytest.raises(ArtifactError, match="resume from step-00000004"):
        train("run", resume=True)
    assert contents(here / "run/checkpoints") == before
    shutil.rmtree(newest)
    assert train("run", resume=True).summary["status"] == "finished"


@pytest.mark.parametrize("change", ["train.batch_size=4", "adapter.rank=8", "run.seed=3", "train.lr=0.5"])
def test_resume_refuses_another_recipe(here: Path, change: str) -> None:
    """A resumed run must end as if it never stopped, so nothing that shapes the steps may change."""
    with pytest.raises(Interrupted):
        train(recipe(eval={"before": False}), progress=Stopper(3))
    with pytest.raises(PeftlabError):
        train("run", change, resume=True)


def test_train_refuses_to_start_with_too_little_disk_space(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"the run needs about .* MiB") as caught:
        train(recipe())
    assert caught.value.exit_code == 4
    assert sorted(p.name for p in here.iterdir()) == ["data.csv"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")], ids=str
)
def test_train_on_a_full_disk_leaves_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def full(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(fit_module, "save_trained", full)
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        train(recipe())
    assert caught.value.exit_code == 4
    assert sorted(p.name for p in here.iterdir()) == ["data.csv"]


def test_merge_on_a_full_disk_leaves_nothing(done: Done, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        args[2].mkdir()
        (args[2] / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging_module, "_save", full)
    before = contents(copy)
    with pytest.raises(ResourceError, match="the disk is full"):
        peftlab.merge(copy, progress=SilentProgress())
    assert contents(copy) == before


def test_evaluate_refuses_an_adapter_on_other_weights(here: Path, tiny: Callable[..., Any], tokenizer_of: Any) -> None:
    """The folder of the base model is replaced after training."""
    model = tiny("tiny:llama", adapter=False)
    model.save_pretrained(here / "base")
    tokenizer_of("tiny:llama").save_pretrained(here / "base")
    train(recipe(model={"name": "base"}, train={"max_steps": 1}))
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(here / "base")
    with pytest.raises(ArtifactError, match="made for another model"):
        peftlab.evaluate("run", progress=SilentProgress())


def test_train_keeps_the_best_step(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate ruins the model late. The result is the adapter of the best evaluation."""
    run = train(recipe(train={"max_steps": 6, "lr": 0.3, "schedule": "constant"}, eval={"every": 1, "best": "loss"}))
    losses = {r["step"]: r["eval"]["loss"] for r in run.metrics() if "eval" in r and not r.get("final")}
    best = run.summary["training"]["best_step"]
    assert run.summary["after"]["loss"] == pytest.approx(min(losses.values()), rel=1e-5) or best == 6
    assert not (run.folder / "best").exists()
    assert peftlab.evaluate(run.folder, progress=SilentProgress())["metrics"]["loss"] == pytest.approx(
        run.summary["after"]["loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("row", "style", "prompt"),
    [
        ({"prompt": "a", "completion": "b"}, "completion", {"prompt": "hi"}),
        ({"instruction": "a", "output": "b"}, "chat", {"instruction": "hi"}),
    ],
)
def test_predict_reads_a_prompt_as_the_run_read_its_rows(
    tmp_path: Path, row: dict[str, str], style: str, prompt: dict[str, str]
) -> None:
    """The recipe names no columns: the lock file says how rows became text, a file says it by its own columns."""
    rows = [{name: f"{text}{i}" for name, text in row.items()} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    document = {
        "task": "causal_lm",
        "model": {"name": "tiny:llama"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval_rows": 1},
        "train": {"max_steps": 1},
        "eval": {"before": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    folder = train(document).folder
    locked = load_recipe(folder / "recipe.lock.yaml").recipe.lock
    assert locked is not None and locked["environment"]["style"] == style
    texts = list(peftlab.predict(folder, ["hi"], max_new_tokens=3, progress=SilentProgress()))
    assert texts == list(peftlab.predict(folder, [prompt], max_new_tokens=3, progress=SilentProgress()))
