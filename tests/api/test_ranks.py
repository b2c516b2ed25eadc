"""Two ranks on the CPU, from the command line: one run, one voice, the weights and metrics of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_launch
from peftlab.cli.app import run as command
from peftlab.errors import RecipeError
from peftlab.recipe import load_recipe
from tests.run_examples import contents, recipe, write_data

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # what accelerate launch sets
}
# 36 rows in micro-batches of 5, 3 to a step: the last step has 2, of 5 rows and 1.
UNEVEN = {
    "adapter": {"dropout": 0.0},
    "train": {"max_steps": None, "epochs": 1, "batch_size": 5, "accumulate": 3, "grouping": "none"},
    "eval": {"every": 1, "best": "loss", "batch_tokens": 128},
    "run": {"merge": "original", "save_every": 1},
}


class Ended(NamedTuple):
    codes: list[int | None]
    out: list[str]
    err: list[str]


def launched(
    process: Any, folder: Path, arguments: list[Any], *, env: Mapping[str, str] | None = None, ends_others: bool = False
) -> Ended:
    """Args: ends_others: end rank 1 when rank 0 has ended, as a launcher does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels"])), **(env or {})}
    with process.start_ranks(arguments, cwd=folder, env=environment) as ranks:
        deadline = time.monotonic() + 120
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if ends_others and ranks[0].poll() is not None:
                ranks[1].send_signal(signal.SIGTERM)
                ends_others = False
            time.sleep(0.02)
        return Ended([r.poll() for r in ranks], [r.stdout for r in ranks], [r.stderr for r in ranks])


def prepared(folder: Path, **sections: Any) -> Path:
    write_data(folder)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(**sections)))
    return path


def largest_difference(one: Path, other: Path) -> float:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unfinish(folder: Path, after: int) -> None:
    """Leaves what a run has that was killed after a step."""
    for name in ("adapter", "merged", "witness.safetensors"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > after:
            shutil.rmtree(path)
    summary = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**summary, "status": "interrupted"}))


@pytest.fixture(scope="module")
def both(process: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run of two ranks in ``two``, one of a single process in ``one``."""
    folder = tmp_path_factory.mktemp("ranks")
    prepared(folder, **UNEVEN)
    ended = launched(process, folder, ["-m", "peftlab", "train", "recipe.yaml", "run.dir=two", "--json"])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process.run(["-m", "peftlab", "train", "recipe.yaml", "run.dir=one"], cwd=folder, env=env)
    return folder, ended


def test_ranks_write_one_run_and_one_document(both: tuple[Path, Ended]) -> None:
    folder, ended = both
    assert ended.codes == [0, 0], ended.err
    assert [ended.out[1], ended.err[1]] == ["", ""]
    summary = json.loads(ended.out[0])
    assert summary["status"] == "finished"
    assert summary["merge"]["verified"]
    assert ended.err[0].count("training for 3 steps") == 1
    assert sorted(p.name for p in folder.iterdir()) == ["data.csv", "one", "recipe.yaml", "two"]


def test_ranks_train_each_row_once_as_one_process_does(both: tuple[Path, Ended]) -> None:
    folder, _ = both
    steps = [line for line in metrics_of(folder / "two") if "rows" in line]
    assert [line["rows"] for line in steps] == [15, 15, 6]
    one = [line for line in metrics_of(folder / "one") if "rows" in line]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in steps] == pytest.approx([line[key] for line in one], rel=1e-4)
    # Float32 sums in another order, which Adam's normalisation can magnify where a gradient is nearly 0.
    assert largest_difference(folder / "two" / ADAPTER, folder / "one" / ADAPTER) < 1e-3


def test_ranks_evaluate_each_row_once(both: tuple[Path, Ended]) -> None:
    """Before training the models are the same, so the metrics are, to the bit."""
    folder, _ = both
    two, one = (json.loads((folder / name / "run.json").read_text()) for name in ("two", "one"))
    assert two["before"] == one["before"]
    assert two["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-4)
    assert len(two["after"]) == len(one["after"])


@pytest.mark.slow
def test_ranks_resume_to_the_bit(process: Any, tmp_path: Path) -> None:
    prepared(tmp_path, **{**UNEVEN, "adapter": {"dropout": 0.2}, "eval": {"before": False}, "run": {"save_every": 1}})
    whole = launched(process, tmp_path, ["-m", "peftlab", "train", "recipe.yaml", "run.dir=whole"])
    assert whole.codes == [0, 0], whole.err
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "merged").mkdir()
    unfinish(tmp_path / "cut", after=1)
    resumed = launched(process, tmp_path, ["-m", "peftlab", "train", "cut", "--resume"])
    assert resumed.codes == [0, 0], resumed.err
    assert "resuming after step 1" in resumed.err[0]
    assert contents(tmp_path / "cut" / "adapter") == contents(tmp_path / "whole" / "adapter")


def test_ranks_say_an_error_of_the_run_folder_once(both: tuple[Path, Ended], process: Any) -> None:
    folder, _ = both
    before = contents(folder / "two")
    ended = launched(process, folder, ["-m", "peftlab", "train", "recipe.yaml", "run.dir=two", "--json"])
    assert ended.codes == [2, 2]
    assert ended.err[0].startswith("error: `run.dir` (command line): two contains another run")
    assert len(ended.err[0].splitlines()) == 1
    assert [ended.out[1], ended.err[1]] == ["", ""]
    assert json.loads(ended.out[0])["error"]["exit_code"] == 2
    assert contents(folder / "two") == before


def test_ranks_say_a_misspelt_key_once(process: Any, tmp_path: Path) -> None:
    prepared(tmp_path)
    ended = launched(process, tmp_path, ["-m", "peftlab", "train", "recipe.yaml", "train.lrr=1"], ends_others=True)
    # The launcher may end the other rank before it has met the mistake.
    assert ended.codes[0] == 2
    assert ended.codes[1] in (2, -signal.SIGTERM)
    assert "did you mean `lr`?" in ended.err[0]
    assert ended.err[1] == ""


ALONE = """
import sys
import peftlab.cli.failures
from peftlab.cli import main
from peftlab.errors import ResourceError
from peftlab.ranks import rank
from peftlab.training.loop import TrainingLoop

peftlab.cli.failures._ALIKE_S = 1.0
right = TrainingLoop._one_step

def full(loop):
    if rank() == 1 and loop._step == 1:
        raise ResourceError("the card of this rank is full")
    right(loop)

TrainingLoop._one_step = full
main()
"""


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_so_and_ends_the_others(process: Any, tmp_path: Path) -> None:
    prepared(tmp_path, eval={"before": False})
    (tmp_path / "alone.py").write_text(ALONE)
    started = time.monotonic()
    ended = launched(process, tmp_path, ["alone.py", "train", "recipe.yaml"])
    assert ended.codes == [1, 4], ended.err
    assert ended.err[1].strip() == "process 1 of 2: error: the card of this rank is full"
    assert "another of the 2 processes of this launch has ended" in ended.err[0]
    assert "Traceback" not in ended.err[0]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"self_training": {"unlabelled": "data.csv"}}}, "train.self_training"),
        (
            {"distill": {"teacher": "run", "on_policy": {"phases": 1}, "cache": "c"}, "eval": {"choices": None}},
            "distill.on_policy",
        ),
        ({"distill": {"teacher": "run", "answers": "teacher"}, "eval": {"choices": None}}, "distill.answers"),
    ],
)
def test_check_launch_refuses_what_one_process_does(
    sections: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    task = "seq_cls" if "self_training" in key else "causal_lm"
    assembly = Assembly(load_recipe(recipe(task, **sections)))
    check_launch(assembly)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="runs in one process, but the launch has 2") as caught:
        check_launch(assembly)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("sections", "changes", "words"),
    [
        ({}, {"FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params is not supported"),
        ({"model": {"quantize": "nf4"}}, {}, "does not shard nf4"),
        ({"adapter": {"method": "vera", "alpha": None}}, {}, "trains lora or none, found vera"),
    ],
)
def test_check_launch_refuses_what_fsdp2_does_not_shard(
    sections: dict[str, Any], changes: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    assembly = Assembly(load_recipe(recipe(**sections)))
    for name, value in {"WORLD_SIZE": "2", **FSDP2, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=words):
        check_launch(assembly)


def test_other_verbs_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(["merge", "run"]) == 2
    assert "peftlab merge runs in one process, but the launch has 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "none"])
def test_fsdp2_trains_as_ddp_and_resumes(method: str, process: Any, tmp_path: Path) -> None:
    adapter = {"method": "none", "rank": None, "alpha": None, "dropout": None} if method == "none" else {"dropout": 0.2}
    task = "seq_cls" if method == "none" else "causal_lm"
    sections = {**UNEVEN, "adapter": adapter, "run": {"save_every": 1}}
    path = prepared(tmp_path, task=task, **sections)
    for name, env in (("ddp", {}), ("fsdp", FSDP2)):
        ended = launched(process, tmp_path, ["-m", "peftlab", "train", path, f"run.dir={name}"], env=env)
        assert ended.codes == [0, 0], ended.err
        assert ended.err[1] == ""
    file = ADAPTER if method == "lora" else "model/model.safetensors"
    assert largest_difference(tmp_path / "fsdp" / file, tmp_path / "ddp" / file) < 1e-4
    state = "checkpoints/step-00000002/optimizer.safetensors"
    assert largest_difference(tmp_path / "fsdp" / state, tmp_path / "ddp" / state) < 1e-4
    both = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("ddp", "fsdp")]
    assert both[0]["after"]["loss"] == pytest.approx(both[1]["after"]["loss"], rel=1e-4)

    shutil.copytree(tmp_path / "fsdp", tmp_path / "cut")
    saved = (tmp_path / "cut" / file).parent
    (tmp_path / "cut" / "merged").mkdir()
    if method == "none":
        saved.rename(tmp_path / "cut" / "adapter")
    unfinish(tmp_path / "cut", after=2)
    best = json.loads((tmp_path / "cut/checkpoints/step-00000002/state.json").read_text())["best_step"]
    shutil.copytree(tmp_path / f"cut/checkpoints/step-{best:08d}", tmp_path / "cut/best")
    resumed = launched(process, tmp_path, ["-m", "peftlab", "train", "cut", "--resume"], env=FSDP2)
    assert resumed.codes == [0, 0], resumed.err
    assert largest_difference(tmp_path / "fsdp" / file, tmp_path / "cut" / file) == 0


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_ranks_distill(env: dict[str, str], process: Any, tmp_path: Path) -> None:
    prepared(tmp_path, train={"max_steps": 4, "accumulate": 2})
    ended = launched(process, tmp_path, ["-m", "peftlab", "train", "recipe.yaml", "run.dir=teacher"])
    assert ended.codes == [0, 0], ended.err
    settings = {"distill.teacher": "teacher", "distill.seeds": 1, "run.dir": "run"}
    arguments = ["-m", "peftlab", "distill", "recipe.yaml", *(f"{k}={v}" for k, v in settings.items()), "--json"]
    ended = launched(process, tmp_path, arguments, env=env)
    assert ended.codes == [0, 0], ended.err
    assert [ended.out[1], ended.err[1]] == ["", ""]
    assert json.loads(ended.out[0])["status"] == "finished"
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "accelerate-fsdp2", "torchrun"])
def test_ctrl_c_ends_the_launch_with_a_checkpoint(launcher: str, tmp_path: Path) -> None:
    """The commands of docs/several-gpus.md, on the CPU, stopped and resumed."""
    prepared(tmp_path, eval={"before": False}, train={"accumulate": 2})
    scripts = Path(sys.executable).parent
    accelerate = [scripts / "accelerate", "launch", "--num_processes", "2", "--main_process_port", "0"]
    start = {
        "accelerate": [*accelerate, "--multi_gpu"],
        "accelerate-fsdp2": [
            *accelerate, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"
        ],
        "torchrun": [scripts / "torchrun", "--standalone", "--nproc_per_node", "2"],
    }[launcher]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels"]))}
    train = [*map(str, start), "-m", "peftlab", "train"]
    long = [*train, "recipe.yaml", "train.max_steps=5000"]
    with (tmp_path / "err").open("w") as err:
        running = subprocess.Popen(long, cwd=tmp_path, env=env, stderr=err, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while "step 5/" not in (tmp_path / "err").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = psutil.Process(running.pid).children(recursive=True)
        assert len(ranks) >= 2
        running.send_signal(signal.SIGINT)
        assert running.wait(60) != 0
    said = (tmp_path / "err").read_text()
    assert said.count("is saved in run/checkpoints") == 1, said
    done = json.loads(next((tmp_path / "run/checkpoints").glob("step-*/state.json")).read_text())["step"]
    assert done >= 5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
