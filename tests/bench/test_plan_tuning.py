"""`peftlab bench tune-kernels`: what it measures, what it writes, and that later runs use it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peftlab_kernels.lora_linear import plan as plans

from peftlab import ops
from peftlab.assembly.process import prepare_libraries
from peftlab.bench import plan_tuning
from peftlab.bench.kernel_cases import candidates, make_case, make_weight
from peftlab.cli.app import run
from peftlab.diagnosing import facts
from peftlab.measuring import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMMAND = ["bench", "tune-kernels", "--rows", "100", "--dropout", "0"]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The default file in a temporary cache. One small shape, the fewest rounds, and equal times."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_tuning, "linear_shapes", lambda name: [(64, 128)])
    monkeypatch.setattr(timing, "LIMIT_S", {"cpu": 0.0, "cuda": 0.0})
    fake_times(monkeypatch)
    yield tmp_path / "cache" / "kernel-plans.json"
    ops.use_plans(None)


def fake_times(monkeypatch: pytest.MonkeyPatch, *fast: str) -> None:
    """Candidates take 1 ms. Those in ``fast`` (such as "forward merged") take half of it."""

    def time_round(runs: Any, device: str, calls: int) -> dict[str, float]:
        return {how: 0.5 if f"{call.func.__name__} {how}" in fast else 1.0 for how, call in runs.items()}

    monkeypatch.setattr(timing, "time_round", time_round)


def key(kind: str = "dense", M: int = 100, N: int = 64, K: int = 128, dropout: bool = False) -> ops.PlanKey:
    return ops.plan_key(kind, DEVICE, M=M, N=N, K=K, dropout=dropout)


def chosen(kind: str = "dense", M: int = 100, dropout: bool = False) -> ops.Plan:
    """The plan that a call uses."""
    return plans.choose(kind, DEVICE, M=M, N=64, K=128, dropout=dropout, on_grid=False, backend="torch")


def written(path: Path) -> dict[ops.PlanKey, tuple[str, str]]:
    rows = json.loads(path.read_text())["plans"]
    return {ops.PlanKey(*(r[f] for f in ops.PlanKey._fields)): (r["forward"], r["backward"]) for r in rows}


def test_tune_writes_faster_plans_and_later_runs_use_them(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_libraries()
    rule = {kind: chosen(kind) for kind in plan_tuning.KINDS}
    other = {kind: "split" if rule[kind].backward == "merged" else "merged" for kind in rule}
    fake_times(monkeypatch, *(f"{part} {other['dense']}" for part in ("forward", "backward")))
    assert run([*COMMAND, "--kinds", "dense"]) == 0
    assert written(file) == {key(): (other["dense"], other["dense"])}
    assert chosen() == rule["dense"], "nothing changes within the process that measures"
    prepare_libraries()
    assert chosen() == chosen(M=65) == ops.Plan(other["dense"], other["dense"])
    assert chosen(M=64) == ops.plan_by_rule(key(M=64)), "another bucket"
    shown = capsys.readouterr()
    assert "1 plans, 1 differ from the rule" in shown.out and str(file) in shown.out
    assert "64 x 128" in shown.err and f"{other['dense']} *" in shown.err
    assert max(map(len, shown.err.splitlines())) <= 80

    fake_times(monkeypatch)
    assert run([*COMMAND, "--kinds", "dense"]) == 0
    prepare_libraries()
    assert chosen() == rule["dense"], "the row of the same key is replaced"
    file.unlink()
    fake_times(monkeypatch, f"backward {other['nf4']}")
    assert run([*COMMAND, "--kinds", "nf4"]) == 0
    prepare_libraries()
    assert chosen("nf4") == ops.Plan(rule["nf4"].forward, other["nf4"]), "each direction is chosen by its own time"
    file.unlink()
    prepare_libraries()
    assert chosen("nf4") == rule["nf4"], "without the file plans are by rule again"


def test_tune_keeps_rows_of_other_keys(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [
        key(M=4096)._asdict() | {"forward": "merged", "backward": "merged", "note": "older"},
        key()._asdict() | {"device": "sm_123", "forward": "split", "backward": "merged"},
        key()._asdict() | {"forward": "merged", "backward": "split"},
    ]
    file.parent.mkdir()
    file.write_text(json.dumps({"plans": old}))
    report = plan_tuning.tune(rows=[100], dropout=[0.0], kinds=["dense"])
    assert report["kept"] == 2
    rule = ops.plan_by_rule(key())
    assert written(file) == {
        key(M=4096): ("merged", "merged"),
        key()._replace(device="sm_123"): ("split", "merged"),
        key(): (rule.forward, rule.backward),
    }
    document = json.loads(file.read_text())
    assert old[0] in document["plans"]
    assert set(document) == {"plans", "machine", "versions", "date"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["device"] == key().device
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_tune_measures_every_candidate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PEFTLAB_CACHE", str(file.parent))
    monkeypatch.setattr(plan_tuning, "linear_shapes", lambda name: [(64, 128), (48, 64)])
    monkeypatch.setattr(timing, "LIMIT_S", {"cpu": 0.0, "cuda": 0.0})
    seen: list[tuple[int, int, str]] = []
    report = plan_tuning.tune(
        rows=[5, 100, 100], rank=3, dropout=[0.0, 0.2], progress=lambda *event: seen.append(event)
    )
    count = 0
    for kind in plan_tuning.KINDS:
        for dropout in (False, True):
            forward, backward = candidates(
                kind, DEVICE.type, dropout=dropout, dtype=plan_tuning.resolve_precision("auto", DEVICE.type)
            )
            tuned = [p for p in report["plans"] if p["kind"] == kind and p["dropout"] == dropout]
            choices = len(forward) > 1 or len(backward) > 1
            assert len(tuned) == (4 if choices else 0)
            assert bool([n for n in report["notes"] if n.startswith(f"{kind}, dropout {0.2 * dropout:g}:")]) != choices
            count += len(tuned)
            for plan in tuned:
                assert list(plan["forward_ms"]) == (forward if len(forward) > 1 else [])
                assert list(plan["backward_ms"]) == (backward if len(backward) > 1 else [])
                assert plan["forward"] in forward and plan["backward"] in backward
                for ms in [*plan["forward_ms"].values(), *plan["backward_ms"].values()]:
                    assert 0 < ms["low"] <= ms["median"] <= ms["high"]
    assert len(written(file)) == count
    assert [done for done, _, _ in seen] == list(range(count + 1))
    assert all(total == count for _, total, _ in seen)
    ops.use_plans(file)


def test_measure_interleaves_candidates_for_five_rounds_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(timing, "LIMIT_S", {"cpu": 0.0})
    order: list[str] = []
    times = timing.measure({name: lambda name=name: order.append(name) for name in "ABC"}, "cpu")
    assert "".join(order) == "ABC" * (timing.WARM_UPS["cpu"] + 5)
    assert {name: len(ms) for name, ms in times.items()} == dict.fromkeys("ABC", 5)
    monkeypatch.setattr(timing, "LIMIT_S", {"cpu": 60.0})
    assert len(timing.measure({"A": lambda: None}, "cpu")["A"]) == timing.MAX_ROUNDS


@pytest.mark.parametrize(
    ("split", "merged", "winner"),
    [
        ([1.0] * 5, [0.9] * 5, "merged"),
        ([1.0] * 5, [0.98] * 5, "split"),  # less than 3 %
        ([1.0] * 5, [0.5, 0.5, 0.5, 0.5, 1.1], "split"),  # one of five rounds says the opposite
        ([1.0] * 20, [0.5] * 16 + [1.1] * 4, "merged"),
        ([1.0, 2.0, 9.0, 1.0, 1.0], [0.9, 1.8, 8.1, 0.9, 0.9], "merged"),  # a busy machine slows down whole rounds
    ],
)
def test_fastest_must_be_faster_beyond_noise(split: list[float], merged: list[float], winner: str) -> None:
    assert timing.fastest({"merged": merged, "split": split}, "split") == winner


def test_upper_bound_of_the_median_is_exact() -> None:
    """By hand: P(at least 59 of 100 fair coins) < 5 % <= P(at least 58). Four values give no bound."""
    assert timing._upper_bound([float(v) for v in range(1, 101)]) == 59
    assert timing._upper_bound([3.0, 1.0, 2.0, 5.0, 4.0]) == 5
    assert timing._upper_bound([1.0] * 4) == float("inf")


def test_fastest_is_the_quickest_of_those_that_beat_the_rule() -> None:
    times = {"merged": [0.8] * 5, "split": [1.0] * 5, "library": [0.5] * 5}
    assert timing.fastest(times, "split") == "library"
    assert timing.fastest({}, "split") == "split"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", plan_tuning.KINDS)
def test_candidates_equal_the_formula_in_bfloat16(kind: str, dropout: float) -> None:
    """A GPU uses bfloat16. The tolerances have room: half of each is enough."""
    values = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(DEVICE)
    weight = make_weight(kind, values, torch.bfloat16)
    options: dict[str, Any] = {"rows": 64, "rank": 8, "dropout": dropout, "dtype": torch.bfloat16}
    case = make_case(weight, **options, device=DEVICE.type)
    want = tuple(t * 1.0 for t in case.formula())
    forward, backward = candidates(kind, "cuda", dropout=dropout > 0, dtype=torch.bfloat16)
    for plan in [ops.Plan(f, b) for f in forward for b in backward]:
        assert case.fault(plan, want) == ""
        y = case.forward(plan)
        for actual, wanted in zip((y.detach(), *case.backward(y)), want, strict=True):
            rounds_x = kind == "int8" and plan.forward == "library"
            assert (actual.float() - wanted).norm() <= (0.02 if rounds_x else 0.005) * wanted.norm()


def _wrong_scale(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: right(*args, **options | {"scale": 1.05 * options["scale"]})


def _wrong_gradient(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **options: Any) -> Any:
        y = right(*args, **options)
        y.register_hook(lambda gradient: 1.05 * gradient)
        return y

    return wrong


@pytest.mark.parametrize(
    ("fault", "part", "difference"),
    [
        (_wrong_scale, "forward", "y differs from the formula in float32 by 0.0"),
        (_wrong_gradient, "backward", "dx differs from the formula in float32 by 0.05 "),
    ],
)
def test_wrong_candidate_is_an_error(
    fault: Any,
    part: str,
    difference: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = ops.lora_linear

    def lora_linear(*args: Any, **options: Any) -> Any:
        merged = getattr(plans._forced[-1], part) == "merged"
        return (fault(right) if merged else right)(*args, **options)

    monkeypatch.setattr(ops, "lora_linear", lora_linear)
    assert run([*COMMAND, "--kinds", "dense"]) == 6
    message = " ".join(capsys.readouterr().err.split())
    for text in ("dense, 100 rows, 64 x 128, dropout 0", f"{part} merged", difference, "run.kernels=reference"):
        assert text in message
    assert not file.exists()


def test_failing_candidate_is_noted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.lora_linear

    def lora_linear(*args: Any, **options: Any) -> Any:
        if plans._forced[-1].forward == "library":
            raise NotImplementedError("no such product")
        return right(*args, **options)

    monkeypatch.setattr(ops, "lora_linear", lora_linear)
    report = plan_tuning.tune(rows=[100], dropout=[0.0], kinds=["nf4"])
    assert any("does not run here: NotImplementedError: no such product" in note for note in report["notes"])
    assert "library" not in report["plans"][0]["forward_ms"]


DAMAGED = {
    "empty": "",
    "not a table": '{"plans": 5}',
    "a list": "[]",
    "deep": "[" * 100_000,
    "a row of another type": '{"plans": [5]}',
    "a row without a key": json.dumps({"plans": [{"forward": "split", "backward": "split"}]}),
    "a wrong type": json.dumps({"plans": [key()._asdict() | {"m": "64", "forward": "split", "backward": "split"}]}),
    "an unknown plan": json.dumps({"plans": [key()._asdict() | {"forward": "magic", "backward": "split"}]}),
    "a dense library product": json.dumps({"plans": [key()._asdict() | {"forward": "library", "backward": "split"}]}),
    "merged dropout": json.dumps({"plans": [key(dropout=True)._asdict() | {"forward": "split", "backward": "merged"}]}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_stops_a_run_and_is_rewritten(
    content: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert run(["train", "smoke"]) == 5
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("error: ")
    assert str(file) in message and "run `peftlab bench tune-kernels` to rewrite it, or delete it" in message
    assert not Path("runs").exists()
    fact = facts._plans(torch, ops, DEVICE.type)
    assert (fact["value"], fact["status"]) == ("damaged", "problem")
    assert str(file) in fact["detail"]
    assert run([*COMMAND, "--kinds", "dense"]) == 0
    assert "was damaged and has been replaced" in " ".join(capsys.readouterr().err.split())
    prepare_libraries()


def test_doctor_counts_the_plans_of_this_device(file: Path) -> None:
    def plans_fact() -> dict[str, Any]:
        return next(fact for fact in facts._kernels(torch) if fact["name"] == "plans")

    assert plans_fact()["value"] == "by rule" and str(file) in plans_fact()["detail"]
    row = {"forward": "split", "backward": "split"}
    elsewhere = key()._replace(device="sm_123")._asdict() | row
    file.parent.mkdir()
    file.write_text(json.dumps({"plans": [elsewhere]}))
    assert plans_fact()["value"] == "by rule" and key().device in plans_fact()["detail"]
    file.write_text(json.dumps({"plans": [elsewhere, key()._asdict() | row, key(M=9)._asdict() | row]}))
    assert plans_fact() == {"name": "plans", "value": "2 measured plans", "status": "ok", "detail": str(file)}


BAD = {
    # name: arguments, exit code, parts of the message
    "unknown kind": (["--kinds", "nf5"], 2, ["--kinds", "'nf5'", "did you mean 'nf4'?"]),
    "rows in words": (["--rows", "many"], 2, ["--rows", "512,2048", "'many'"]),
    "half a row": (["--rows", "1.5"], 2, ["--rows", "'1.5'"]),
    "no rows at all": (["--rows", "0"], 2, ["--rows", "at least 1", "found 0"]),
    "negative rows": (["--rows=-8"], 2, ["--rows", "found -8"]),
    "rows of one bucket": (["--rows", "65,100"], 2, ["--rows", "65 and 100", "128"]),
    "too many rows": (["--rows", "1000000000000"], 4, ["GiB", "lower --rows"]),
    "rank 0": (["--rank", "0"], 2, ["--rank", "found 0"]),
    "rank in words": (["--rank", "high"], 2, ["--rank"]),
    "too large a rank": (["--rank", "1000000000000"], 4, ["GiB"]),
    "dropout 1": (["--dropout", "1"], 2, ["--dropout", "[0, 1)", "found 1"]),
    "negative dropout": (["--dropout=-0.1"], 2, ["--dropout", "-0.1"]),
    "dropout that is no number": (["--dropout", "nan"], 2, ["--dropout", "nan"]),
    "dropout in words": (["--dropout", "some"], 2, ["--dropout", "'some'"]),
    "two dropouts": (["--dropout", "0.1,0.2"], 2, ["--dropout", "0.1 and 0.2"]),
    "unknown shape": (["--model", "shape:lama-3-8b"], 2, ["--model", "did you mean 'shape:llama-3-8b'?"]),
    "a hub id": (["--model", "org/name"], 2, ["--model", "org/name"]),
    "no kinds": (["--kinds", ""], 2, ["--kinds is empty"]),
    "no rows given": (["--rows", ","], 2, ["--rows is empty"]),
    "no dropout given": (["--dropout", ""], 2, ["--dropout is empty"]),
    "nothing to choose": (["--kinds", "dense", "--dropout", "0.1"], 2, ["nothing to measure", "split"]),
    "a folder": (["--out", "."], 2, ["cannot write", "folder", "--out"]),
    "an empty name": (["--out", ""], 2, ["cannot write", "--out"]),
    "a folder that cannot be": (["--out", "note.txt/plans.json"], 2, ["cannot write note.txt/plans.json", "--out"]),
    "a file of something else": (["--out", "note.txt"], 2, ["note.txt", "another --out"]),
    "an argument": (["nf4"], 2, ["nf4"]),
}


@pytest.mark.parametrize("name", BAD)
def test_tune_kernels_reports_bad_input(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(timing, "time_round", never)
    Path("note.txt").write_text("mine")
    arguments, code, parts = BAD[name]
    assert run(["bench", "tune-kernels", *arguments]) == code
    shown = capsys.readouterr()
    message = " ".join(shown.err.split())
    assert message.startswith("error: ") and message.count("error:") == 1
    assert "Traceback" not in message and not shown.out
    for part in parts:
        assert part in message
    assert Path("note.txt").read_text() == "mine"
    assert not file.exists()


def test_bench_without_a_command_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 2
    assert "missing command" in capsys.readouterr().err
    assert run(["bench", "tune-kernel"]) == 2
    assert "did you mean 'tune-kernels'?" in capsys.readouterr().err


def test_json_is_one_document_and_the_table_goes_to_stderr(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "plans.json"
    assert run([*COMMAND, "--kinds", "dense,int8", "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["file"] == str(out)
    assert document["plans"] == json.loads(out.read_text())["plans"]
    assert {p["kind"] for p in document["plans"]} == {"dense", "int8"}
    assert "measuring 1 of 2: dense, 100 rows" in shown.err and "chosen" in shown.err

    assert run([*COMMAND, "--kinds", "dense", "--out", str(out)]) == 0
    assert f"runs read plans from {file} only" in " ".join(capsys.readouterr().err.split())
    assert run([*COMMAND, "--kinds", "magic", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("moment", ["while measuring", "while writing"])
def test_ctrl_c_keeps_the_old_file(
    moment: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*COMMAND, "--kinds", "dense"]) == 0
    before = file.read_bytes()

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((timing, "time_round") if moment == "while measuring" else (os, "replace")), stop)
    capsys.readouterr()
    assert run([*COMMAND, "--kinds", "dense,nf4"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert not plans._forced


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 4), (errno.EACCES, 2)])
def test_file_that_cannot_be_replaced_is_reported(
    number: int, code: int, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    assert run([*COMMAND, "--kinds", "dense"]) == code
    assert f"cannot write {file}" in " ".join(capsys.readouterr().err.split())
    assert list(file.parent.iterdir()) == []


def test_run_notes_that_its_plans_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan adds in another order, so the repeated adapter may differ in its last bits. The run notes it."""
    import peftlab
    from peftlab import ops
    from peftlab.training.progress import SilentProgress

    class Notes(SilentProgress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    monkeypatch.chdir(tmp_path)
    overrides = ["train.epochs=", "train.max_steps=1", "eval.before=false", "run.merge=none", "eval.prompts=[]"]
    run = peftlab.train("smoke", [*overrides, "run.dir=first"], progress=SilentProgress())
    assert run.recipe().recipe.lock["environment"]["kernel_plans"] == "by rule"
    monkeypatch.setattr("peftlab.assembly.prepare.ops.plans_in_use", lambda: "0123456789ab")
    assert ops.plans_in_use() == "0123456789ab"
    notes = Notes()
    peftlab.train("first/recipe.lock.yaml", ["run.dir=second"], progress=notes)
    assert "kernel plans: by rule when the run was made, 0123456789ab now: the last bits may differ" in notes.lines
