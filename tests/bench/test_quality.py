"""``peftlab bench --quality``: equal budgets, figures by hand, resuming, and its picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from peftlab.api.benchmark_quality import benchmark_quality
from peftlab.bench import quality_run
from peftlab.bench.quality import build_figure, chosen_rate
from peftlab.bench.worker import run_job
from peftlab.cli.app import run
from peftlab.errors import ArtifactError, Interrupted, RecipeError
from peftlab.recipe import load_recipe
from peftlab.specs.protocol import MOST_RATES_BEYOND

OUT = Path("runs/quality-smoke")
LR = load_recipe("smoke").recipe.train.lr
RIGHT = {"lora": LR, "dora": LR, "full": LR / 10}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Trainings:
    """Stands for processes. DoRA is right 0.1 more often than LoRA with every seed and takes twice as long. Adapters
    need the recipe's learning rate, full fine-tuning a tenth of it. At the wrong rate each is right 0.2 less often."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, float]] = []
        self.diverged: set[tuple[str, float]] = set()
        self.recipes: list[dict[str, Any]] = []
        self.stop_after: int | None = None
        self.accuracy_at: dict[float, float] = {}
        self.larger_is_better = False

    def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        recipe = spec["recipe"]
        adapter, seed = recipe["adapter"], recipe["run"]["seed"]
        name = "full" if adapter["method"] == "none" else "dora" if adapter["dora"] else "lora"
        lr = recipe["train"]["lr"]
        self.asked.append((name, seed, lr))
        self.recipes.append(recipe)
        if (name, lr) in self.diverged:
            return {"status": "red", "reason": "the loss is nan in step 3"}
        accuracy = 0.5 + 0.1 * seed + (0.1 if name == "dora" else 0.0) - (0.2 if lr != RIGHT[name] else 0.0)
        if self.accuracy_at or self.larger_is_better:
            accuracy = min(self.accuracy_at.items(), key=lambda at: abs(at[0] - lr), default=(0, lr / 100))[1]
        memory = {
            "load_peak_bytes": 1e8,
            "before_bytes": 0,
            "peak_bytes": 2e8,
            "increase_bytes": 0,
            "reserved_bytes": 0,
        }
        return {
            "status": "ok",
            "metrics": {"accuracy": accuracy, "loss": 1.0},
            "num_trained": 1000 * (adapter.get("rank") or 100),
            "memory": memory,
            "steps": 60,
            "seconds": 2.0 if name == "dora" else 1.0,
            "tokens": 10,
            "last_loss": 1.0,
        }


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    fake = Trainings()
    monkeypatch.setattr(quality_run, "launch_worker", fake)
    return fake


def quality(**options: Any) -> dict[str, Any]:
    return benchmark_quality(
        "smoke", **{"methods": ["lora", "dora", "full"], "learning_rates": [LR / 10, LR], **options}
    )


def test_figures_equal_those_worked_out_by_hand(trainings: Trainings) -> None:
    rows = quality()["methods"]
    assert [row["name"] for row in rows] == ["lora r8", "dora r8", "full"]
    lora, dora, _ = rows
    assert lora["metric"]["value"] == pytest.approx(0.6) and lora["difference"] is None
    # Student t with 2 degrees of freedom: 4.3027 x 0.1 / sqrt(3) around the mean.
    assert lora["metric"]["high"] - 0.6 == pytest.approx(0.2484, abs=1e-4)
    assert dora["difference"]["value"] == pytest.approx(0.1) and dora["difference"]["differs"]
    assert rows[2]["difference"]["differs"] is False
    assert (dora["seconds"]["value"], dora["num_trained"]) == (2.0, 8000)


def test_methods_share_budget_and_held_out_rows(trainings: Trainings) -> None:
    quality()
    first = [(name, 0, lr) for name in ("lora", "dora", "full") for lr in (LR / 10, LR)]
    assert trainings.asked[:6] == first, "each tries every learning rate with the first seed"
    assert trainings.asked[6:9] == [(n, 1, RIGHT[n]) for n in ("full", "dora", "lora")], (
        "the best goes on; there and back"
    )
    assert len(trainings.asked) == 12
    assert {r["data"]["seed"] for r in trainings.recipes} == {0}
    assert len({json.dumps({**r["train"], "lr": None}) for r in trainings.recipes}) == 1
    assert all(r["eval"]["before"] is False and "prompts" not in r["eval"] for r in trainings.recipes)


def test_resume_after_an_interrupt_repeats_no_training(trainings: Trainings) -> None:
    trainings.stop_after = 4
    with pytest.raises(Interrupted, match="4 trainings are in"):
        quality()
    trainings.stop_after = None
    assert [row["metric"]["n"] for row in quality(resume=True)["methods"]] == [3, 3, 3]
    assert len(trainings.asked) == len(set(trainings.asked)) == 12
    with pytest.raises(ArtifactError, match=r"protocol\.seeds: 3 there, 4 now"):
        quality(resume=True, seeds=4)


def test_diverged_learning_rate_only_loses(trainings: Trainings) -> None:
    trainings.diverged = {("lora", LR), ("full", LR), ("full", LR / 10)}
    lora, dora, full = quality()["methods"]
    assert (lora["lr"], lora["tried"][f"{LR:g}"]) == (LR / 10, None)
    assert lora["metric"]["value"] == pytest.approx(0.4) and dora["lr"] == LR
    assert (full["status"], full["reason"]) == ("red", "the loss is nan in step 3")
    assert len([a for a in trainings.asked if a[0] == "full"]) == 2, (
        "without a learning rate there is nothing to go on with"
    )


def test_search_goes_beyond_the_end_that_is_best(trainings: Trainings) -> None:
    third, three, nine = (float(f"{LR * factor:.2g}") for factor in (1 / 3, 3, 9))
    trainings.accuracy_at = {third: 0.5, LR: 0.6, three: 0.7, nine: 0.65}
    (row,) = quality(methods=["lora"], learning_rates=None, seeds=2)["methods"]
    tried = [lr for _, seed, lr in trainings.asked if seed == 0]
    assert tried == [third, LR, three, pytest.approx(nine, rel=0.05)], "one more, because three times the rate was best"
    assert (row["lr"], row["at_end"], row["metric"]["n"]) == (three, False, 2)


def test_progress_counts_the_rates_beyond(trainings: Trainings) -> None:
    trainings.larger_is_better = True
    told: list[tuple[int, int]] = []
    quality(
        methods=["lora"], learning_rates=None, seeds=3, progress=lambda done, total, text: told.append((done, total))
    )
    assert [done for done, _ in told] == list(range(3 + MOST_RATES_BEYOND + 2 + 1))
    assert [total for _, total in told][:5] == [5, 5, 5, 6, 7] and told[-1] == (9, 9)


def test_search_is_bounded_and_says_so(trainings: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    trainings.larger_is_better = True
    assert run(["bench", "smoke", "--quality", "--methods", "lora", "--seeds", "1"]) == 0
    assert len(trainings.asked) == 3 + MOST_RATES_BEYOND
    assert "lora r8: the best learning rate is at the end of those tried" in " ".join(capsys.readouterr().out.split())


def test_chosen_rate_has_the_smallest_loss() -> None:
    def record(lr: float, loss: float, turn: int = 0, status: str = "ok") -> dict[str, Any]:
        return {
            "kind": "quality",
            "cell": "lora r8",
            "lr": lr,
            "turn": turn,
            "status": status,
            "metrics": {"loss": loss},
        }

    records = [
        record(1e-4, 2.0),
        record(1e-3, 1.0),
        record(1e-2, 1.0),
        record(1e-1, math.nan),
        record(1e-4, 0.1, turn=1),
    ]
    assert chosen_rate(records, "lora r8", [1e-4, 1e-3, 1e-2, 1e-1], "loss") == 1e-3, (
        "the smaller loss, then the smaller rate"
    )
    assert chosen_rate(records, "lora r8", [1e-4, 5e-4], "loss") is None, "one is still to be tried"
    assert chosen_rate([record(1e-4, 2.0, status="red")], "lora r8", [1e-4], "loss") is None


def test_plan_trains_nothing(trainings: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "smoke", "--quality", "--plan", "--methods", "lora,full", "--seeds", "5"]) == 0
    shown = capsys.readouterr().out
    assert "at least 14 trainings" in shown and "full" in shown and max(map(len, shown.splitlines())) <= 80
    assert not trainings.asked and not OUT.exists()


def test_full_fine_tuning_of_quantized_weights_is_a_row(trainings: Trainings) -> None:
    rows = benchmark_quality("smoke", ["model.quantize=nf4"], methods=["lora", "full"])["methods"]
    assert [row["status"] for row in rows] == ["ok", "impossible"]
    with pytest.raises(RecipeError, match="nothing to train: all 1 methods are impossible"):
        benchmark_quality("smoke", ["model.quantize=nf4"], methods=["full"], out="other")


def test_files_and_table(trainings: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    rates = f"{LR / 10},{LR}"
    assert run(["bench", "smoke", "--quality", "--methods", "lora,dora,full", "--learning-rates", rates]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "+0.1000" in shown.out and "no difference" in shown.out and "baseline" in shown.out
    document = json.loads((OUT / "quality.json").read_text())
    rows = list(csv.DictReader((OUT / "quality.csv").open()))
    for row, method in zip(rows, document["methods"], strict=True):
        assert float(row["metric_value"]) == method["metric"]["value"]
        assert int(row["num_trained"]) == method["num_trained"]
    with Image.open(OUT / "quality.png") as image:
        image.verify()
    figure = build_figure(document)
    assert [len(axes.containers) for axes in figure.axes] == [3, 3, 3]
    assert figure.axes[0].get_ylabel() == "held-out accuracy, larger is better"


def test_bars_of_an_accuracy_end_at_one(trainings: Trainings) -> None:
    assert run(["bench", "smoke", "--quality", "--methods", "lora"]) == 0
    document = json.loads((OUT / "quality.json").read_text())
    document["methods"][0]["metric"] |= {"value": 0.98, "low": 0.92, "high": 1.04}

    def top() -> float:
        *_, (bars,) = build_figure(document).axes[0].containers[0]
        return float(bars.get_segments()[0][:, 1].max())

    assert top() == pytest.approx(1.0)
    document["header"]["smaller_is_better"] = True
    assert top() == pytest.approx(1.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "auto"], "--kernels has no effect with --quality"),
        (["--learning-rates", "0.1,-1"], "--learning-rates: expected numbers above 0, found [0.1, -1.0]"),
        (["--learning-rates", "fast"], "numbers such as 1e-4,1e-3"),
        (["--methods", "dorra"], "did you mean 'dora'?"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
    ],
)
def test_quality_reports_bad_input(
    trainings: Trainings, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "smoke", "--quality", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not trainings.asked


def test_quality_trains_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        quality_run, "launch_worker", lambda spec: {"status": "ok", **run_job(json.loads(json.dumps(spec)))}
    )
    (row,) = benchmark_quality("smoke", ["train.max_steps=2"], methods=["lora"], seeds=1)["methods"]
    assert row["status"] == "ok" and row["steps"] == 2 and 0 <= row["metric"]["value"] <= 1
    assert row["num_trained"] == 16384 and row["peak_bytes"] > 0
