"""``peftlab bench RECIPE``: order, gate, resume, errors and files, with jobs that answer at once; a few jobs are real."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from peftlab import ops
from peftlab.api.benchmark import benchmark
from peftlab.bench import speed_run
from peftlab.bench.worker import run_job
from peftlab.cli.app import run
from peftlab.cli.bench_options import bench_progress
from peftlab.errors import ArtifactError, Interrupted, PeftlabError, RecipeError
from peftlab.measuring import machine, subprocesses
from tests.bench.bench_examples import FakeJobs

OUT = Path("runs/bench-smoke")
RIGHT_LORA_LINEAR = ops.lora_linear


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    """Replaces the processes, also for the command line."""
    fake = FakeJobs()
    monkeypatch.setattr(speed_run, "launch_worker", fake)
    monkeypatch.setattr("peftlab.bench.figure.draw_picture", lambda document, png, svg: True)
    return fake


def bench(**options: Any) -> dict[str, Any]:
    return benchmark("smoke", **{"batch": [2], "length": [16], "repeats": 3, **options})


def test_gates_come_first_then_the_cells_in_turns(jobs: FakeJobs) -> None:
    bench()
    order = ["none/reference", "none/auto", "nf4/reference", "nf4/auto"]
    assert jobs.asked[0][0] == "ceilings"
    assert jobs.asked[1:5] == [("gate", cell) for cell in order]
    runs = [cell for job, cell in jobs.asked[5:] if job == "run"]
    assert runs == [*order, *reversed(order), *order]


def test_header_describes_machine_versions_and_command(jobs: FakeJobs) -> None:
    header = bench()["header"]
    assert header["machine"]["device"] == "cpu" and header["machine"]["cores"] >= 1
    assert {"torch", "peft", "transformers", "bitsandbytes", "python"} <= set(header["versions"])
    assert header["command"] == "peftlab bench smoke --batch 2 --length 16 --repeats 3"
    assert header["protocol"] == {"repeats": 3, "steps": 4, "warm_up": 1}


def test_figures_equal_those_worked_out_by_hand(jobs: FakeJobs) -> None:
    jobs.step_s = {("reference", "none"): 0.2, ("auto", "none"): 0.1}
    cells = {c["key"]: c for c in bench(quantize=["none"])["cells"]}
    slow, fast = cells["train/lora/r8/none/reference/2x16/1"], cells["train/lora/r8/none/auto/2x16/1"]
    assert fast["step_s"]["median"] == pytest.approx(0.101, rel=0.02)
    assert fast["tokens_per_s"]["median"] == pytest.approx(2 * 16 / fast["step_s"]["median"])
    assert fast["examples_per_s"]["median"] == pytest.approx(2 / fast["step_s"]["median"])
    assert fast["tflops"]["median"] == pytest.approx(1e9 / fast["step_s"]["median"] / 1e12)
    assert fast["share_of_peak"]["median"] == pytest.approx(1e9 / fast["step_s"]["median"] / 2e11)
    # The peak is the fastest matmul of the benchmark, twice what the first measurement gave.
    assert fast["baseline"] == slow["key"] and slow["speed"] is None
    assert fast["speed"]["value"] == pytest.approx(2, rel=0.03) and fast["speed"]["differs"]
    assert fast["pareto"] and not slow["pareto"]


def test_red_gate_has_no_figures_and_exit_code_6(jobs: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.broken["gate", "auto"] = {"status": "red", "reason": "the gradient of q_proj differs"}
    command = ["bench", "smoke", "--batch", "2", "--length", "16", "--repeats", "3"]
    assert run([*command, "--json"]) == 6
    document = json.loads(capsys.readouterr().out)
    status = {c["kernels"]: c["status"] for c in document["cells"]}
    assert status == {"reference": "ok", "auto": "red"}
    assert all("tokens_per_s" not in c for c in document["cells"] if c["status"] == "red")
    assert ("run", "none/auto") not in jobs.asked
    assert run([*command, "--replace"]) == 6
    shown = capsys.readouterr()
    assert "RED" in shown.out and "q_proj differs" in shown.out and "do not match PEFT's path" in shown.err
    assert max(map(len, shown.out.splitlines())) <= 80


def test_first_losses_that_differ_are_red_after_timing(jobs: FakeJobs) -> None:
    jobs.first_loss["auto"] = 2.001
    cells = bench(quantize=["none"])["cells"]
    assert [c["status"] for c in cells] == ["ok", "red"]
    assert cells[1]["reason"].startswith("its first loss is 2.001, and 2 on PEFT's path")
    assert "runs" not in cells[1]


def test_gate_finds_a_fault_in_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, scale: float, **options: Any) -> Any:
        return RIGHT_LORA_LINEAR(*args, scale=0.9 * scale, **options)

    monkeypatch.setattr(ops, "lora_linear", wrong)

    def here(spec: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"status": "ok", **run_job(json.loads(json.dumps(spec)))}
        except PeftlabError as error:
            reply = {"error": {"kind": type(error).__name__, "message": str(error), "known": True}}
            return subprocesses.outcome(reply, 1, "")

    monkeypatch.setattr(speed_run, "launch_worker", here)
    cells = bench(quantize=["none"], repeats=1, steps=1, what=["train", "generate"], new_tokens=2)["cells"]
    assert [(c["what"], c["kernels"], c["status"]) for c in cells] == [
        ("train", "reference", "ok"),
        ("train", "auto", "red"),
        ("generate", "reference", "ok"),
        ("generate", "auto", "red"),
    ]
    assert "the logits of a prompt differ" in cells[3]["reason"]
    assert "by 0.10" in cells[3]["reason"]
    assert cells[0]["losses"][0] == pytest.approx(5.54, abs=0.1)
    assert cells[2]["tokens_per_step"] == 4, "two rows, two new tokens each"


def test_killed_cell_is_a_row_and_is_not_retried(jobs: FakeJobs) -> None:
    jobs.broken["run", "auto"] = subprocesses.outcome(None, -9, "")
    cells = bench(quantize=["none"])["cells"]
    assert [c["status"] for c in cells] == ["ok", "memory"]
    assert "killed by the system (signal 9)" in cells[1]["reason"]
    assert jobs.asked.count(("run", "none/auto")) == 1 and jobs.asked.count(("run", "none/reference")) == 3


def test_internal_error_has_exit_code_1_and_keeps_other_cells(
    jobs: FakeJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.broken["run", "auto"] = subprocesses.outcome(None, 1, "Traceback\nKeyError: 'x'\n")
    assert run(["bench", "smoke", "--batch", "2", "--length", "16", "--quantize", "none"]) == 1
    assert "exit code 1: KeyError: 'x'" in capsys.readouterr().err
    assert [c["status"] for c in json.loads((OUT / "bench.json").read_text())["cells"]] == ["ok", "failed"]


@pytest.mark.parametrize("stop_after", [0, 1, 3, 8, 16])
def test_resume_after_an_interrupt_loses_and_repeats_nothing(
    jobs: FakeJobs, stop_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.stop_after = stop_after
    with pytest.raises(Interrupted, match="--resume"):
        bench()
    jobs.stop_after = None
    (OUT / "measurements.jsonl").open("a").write('{"kind": "run", "cell')  # a kill in the middle of a line
    cells = bench(resume=True)["cells"]
    assert len(jobs.asked) == 1 + 4 + 12
    assert [[r["repetition"] for r in c["runs"]] for c in cells] == [[0, 1, 2]] * 4
    lines = (OUT / "measurements.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(jobs.asked) and all(json.loads(line) for line in lines)
    bench(resume=True)
    assert len(jobs.asked) == 17, "what is finished is not measured again"


def test_resume_refuses_another_version_recipe_or_sweep(jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    bench()
    with pytest.raises(ArtifactError, match=r"protocol.repeats: 3 there, 4 now"):
        bench(resume=True, repeats=4)
    with pytest.raises(ArtifactError, match=r"sweep.ranks: \[8\] there, \[4\] now"):
        bench(resume=True, ranks=[4])
    with pytest.raises(ArtifactError, match=r"recipe.train.lr: 0.01 there, 0.1 now"):
        benchmark("smoke", ["train.lr=0.1"], batch=[2], length=[16], repeats=3, resume=True)
    monkeypatch.setattr(speed_run, "versions", lambda: {**machine.versions(), "torch": "1.0"})
    with pytest.raises(ArtifactError, match=r'versions.torch: ".*" there, "1.0" now'):
        bench(resume=True)


def test_damaged_journal_is_refused(jobs: FakeJobs) -> None:
    bench()
    path = OUT / "measurements.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
    with pytest.raises(ArtifactError, match="line 2 is damaged"):
        bench(resume=True)


@pytest.mark.parametrize(
    ("override", "options", "says"),
    [
        ("model.quantize=int8", {}, "because --quantize decides it; use that instead"),
        ("run.kernels=reference", {}, "because --kernels decides it"),
        ("run.dir=x", {}, "because --out decides it"),
        ("adapter.rank=4", {"ranks": [2]}, "because --ranks decides it"),
        ("train.batch_size=4", {}, "because --batch decides it"),
        ("train.epochs=3", {}, "has no effect on the steps that bench measures; remove it"),
        ("eval.every=1", {}, "has no effect on the steps"),
        ("run.merge=original", {}, "has no effect on the steps"),
    ],
)
def test_override_that_no_cell_uses_is_refused(
    jobs: FakeJobs, override: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        bench(overrides=[override], **options)
    assert caught.value.key == override.partition("=")[0]
    assert not jobs.asked
    bench(overrides=["adapter.rank=4", "train.lr=0.1", "eval.every=null"])


def test_folder_with_other_content_is_refused(jobs: FakeJobs) -> None:
    with pytest.raises(RecipeError, match="no benchmark in"):
        bench(resume=True)
    bench()
    with pytest.raises(RecipeError, match="already has a benchmark"):
        bench()
    assert len(bench(replace=True)["cells"]) == 4
    with pytest.raises(RecipeError, match="exclude each other"):
        bench(replace=True, resume=True)
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("do not remove")
    with pytest.raises(RecipeError, match="contains other files and no benchmark"):
        bench(out="other", replace=True)


def test_csv_and_json_agree(jobs: FakeJobs) -> None:
    jobs.broken["gate", "auto"] = {"status": "memory", "reason": "out of memory, with a comma"}
    document = bench()
    assert json.loads((OUT / "bench.json").read_text()) == {k: document[k] for k in ("header", "ceilings", "cells")}
    rows = list(csv.DictReader((OUT / "bench.csv").open()))
    assert len(rows) == len(document["cells"])
    for row, cell in zip(rows, document["cells"], strict=True):
        assert (row["status"], row["method"], row["quantize"]) == (cell["status"], cell["method"], cell["quantize"])
        if cell["status"] == "ok":
            assert float(row["tokens_per_s_median"]) == cell["tokens_per_s"]["median"]
            assert float(row["peak_bytes_q3"]) == cell["peak_bytes"]["q3"]
        else:
            assert row["reason"] == "out of memory, with a comma" and row["tokens_per_s_median"] == ""


def test_plan_measures_nothing(jobs: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "smoke", "--plan", "--methods", "lora,full", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [c["status"] for c in cells] == ["pending"] * 6 + ["impossible"] * 2
    assert run(["bench", "smoke", "--plan"]) == 0
    assert "4 of 4 cells, 25 processes; nothing was measured" in capsys.readouterr().out
    assert not jobs.asked and not OUT.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["smoke", "--methods", "lorra"], 2, "did you mean 'lora'?"),
        (["smoke", "--ranks", "8,x"], 2, "--ranks: expected whole numbers such as 8,16, found '8,x'"),
        (["smoke", "--ranks", ""], 2, "nothing to measure: --ranks is empty"),
        (["smoke", "--repeats", "0"], 2, "--repeats: expected at least 1, found 0"),
        (["smok"], 2, "did you mean `smoke`?"),
        (["smoke", "model.name=shape:smollm2-135"], 2, "did you mean 'shape:smollm2-135m'?"),
        (
            ["smoke", "--adapters", "2"],
            2,
            "nothing to measure: all 4 cells are impossible; first: training uses one adapter",
        ),
        (["minilm-student"], 2, "learns from a teacher"),
        (["smoke", "adapter.beside=[{method: ia3, targets: [k_proj]}]"], 2, "this recipe trains others beside it; add"),
        (["smoke", "adapter.start=runs/first"], 2, "this recipe continues one; add adapter.start= to the command"),
        (["tune-kernel"], 2, "did you mean 'tune-kernels'?"),
        (["smoke", "data.train=absent.csv"], 3, "absent.csv"),
    ],
)
def test_bench_reports_bad_input(
    jobs: FakeJobs, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not jobs.asked and not Path("runs").exists()


def test_table_fits_80_columns(jobs: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--methods", "lora,dora", "smoke", "--ranks", "8,64", "--batch", "2,4", "--length", "16"]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "baseline" in shown.out and "runs/bench-smoke/bench.png" in shown.out
    assert "about" in shown.err or "measuring 1 of" in shown.err


def test_worker_process_returns_its_errors() -> None:
    recipe = {"task": "causal_lm", "model": {"name": "shape:none"}, "data": {"train": "x"}}
    spec = {"job": "run", "recipe": recipe, "texts": None, "batch": 1, "steps": 1}
    result = subprocesses.launch("peftlab.bench.worker", spec)
    assert result["status"] == "impossible" and "unknown shape" in result["reason"]


def test_progress_estimates_time_left_from_later_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    """Four gates take 10 s each, then runs 30 s each. Before the first run the estimate is too low; after the third it
    is right."""
    now = [0.0]
    with bench_progress(lambda: now[0]) as tell:
        for done, now[0] in enumerate((0, 10, 20, 30, 40, 70, 100, 130)):
            tell(done, 20, f"job {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "measuring 1 of 20: job 0"
    assert lines[-1] == "measuring 8 of 20: job 7, about 6 min 30 s left"
