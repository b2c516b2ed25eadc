"""``bench --quality``: trains and scores the adapter methods on one recipe, with equal steps and seeds."""

from __future__ import annotations

import datetime
import math
import shlex
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_settings
from peftlab.assembly.fit import fit
from peftlab.assembly.process import located
from peftlab.bench import cells, quality, result_files
from peftlab.bench.job import Timing
from peftlab.bench.runner import Launch, Tell, launch_worker
from peftlab.bench.sweep import make_sweep
from peftlab.errors import Interrupted, RecipeError
from peftlab.evaluation.metrics import default_metrics
from peftlab.measuring import journal
from peftlab.measuring.machine import describe_machine, git_commit, size_of_machine, versions
from peftlab.measuring.memory import frozen_heap
from peftlab.recipe import Recipe
from peftlab.specs.methods import COMPARED, VARIANTS, rank_of
from peftlab.specs.protocol import SEEDS

_Variant = tuple[str, int | None]


@dataclass(frozen=True)
class QualityRequest:
    """The requested settings; None: the default of ``api.benchmark_quality``."""

    methods: Sequence[str] | None
    ranks: Sequence[int] | None
    seeds: int
    learning_rates: Sequence[float] | None


def run_quality(
    assembly: Assembly,
    overrides: Sequence[str],
    request: QualityRequest,
    *,
    folder: Path,
    resume: bool,
    replace: bool,
    plan: bool,
    progress: Tell,
    start: Launch | None = None,
) -> dict[str, Any]:
    """See ``api.benchmark_quality``. Args: start: runs one job; default: in a separate process."""
    if resume and replace:
        raise RecipeError("--resume and --replace exclude each other")
    if request.seeds < 1:
        raise RecipeError(f"--seeds: expected at least 1, found {request.seeds}")
    rates = request.learning_rates
    if rates is not None and (not rates or not all(0 < r < math.inf for r in rates)):
        raise RecipeError(f"--learning-rates: expected numbers above 0, found {list(rates) or 'none'}")
    cells.check_recipe(assembly.recipe)
    check_settings(assembly)
    variants, reasons = _variants(assembly.recipe, request.methods, request.ranks)
    possible = [v for v in variants if v not in reasons]
    if not possible:
        raise RecipeError(
            f"nothing to train: all {len(variants)} methods are impossible: {next(iter(reasons.values()))}"
        )
    rates = list(dict.fromkeys(map(float, rates if rates is not None else first_rates(assembly.recipe))))
    header = _header(assembly, overrides, variants, rates, request)
    if plan:
        rows = quality.quality_rows(variants, reasons, [], header["metric"], rates)
        trainings = _trainings(possible, rates, request.seeds)
        return {"folder": None, "picture": None, "trainings": trainings, "header": header, "methods": rows}
    opened = journal.open_journal(folder, header, resume=resume, replace=replace)
    try:
        _train_all(possible, header, opened, progress, start or launch_worker)
    except KeyboardInterrupt:
        done = len(opened.of("quality"))
        raise Interrupted(
            f"interrupted; {done} trainings are in {opened.path}. Resume with the same command and --resume"
        ) from None
    finally:
        opened.close()
    return _write(folder, opened, variants, reasons)


def _variants(
    recipe: Recipe, methods: Sequence[str] | None, ranks: Sequence[int] | None
) -> tuple[list[_Variant], dict[_Variant, str]]:
    names = list(COMPARED) if methods is None else methods
    recipe_method = recipe.adapter.method if ranks is None else None
    sweep = make_sweep(
        what=["train"],
        methods=names,
        ranks=[recipe.adapter.rank] if ranks is None else ranks,
        quantize=[recipe.model.quantize],
        kernels=["auto"],
        batch=[1],
        length=[2],
    )
    variants = list(dict.fromkeys((m, rank_of(m, r, recipe_method)) for m in sweep.methods for r in sweep.ranks))
    stored = recipe.model.quantize
    dense_only = [v for v in variants if not VARIANTS[v[0]][0].trains_on(stored)]
    reason = f"{stored} weights cannot be trained: {{}} needs model.quantize=none"
    return variants, {v: reason.format(VARIANTS[v[0]][0].label) for v in dense_only}


def first_rates(recipe: Recipe) -> list[float]:
    """The learning rates that a search begins with: the recipe's, a third and three times it."""
    return [float(f"{recipe.train.lr * factor:.2g}") for factor in (1 / 3, 1, 3)]


def _trainings(possible: Sequence[_Variant], rates: Sequence[float], seeds: int) -> int:
    return len(possible) * (len(rates) + seeds - 1)


def metric_of(assembly: Assembly) -> str:
    """The metric for comparing methods: the headline of a task with classes, else the loss."""
    spec = assembly.spec
    if assembly.recipe.eval.choices and spec.headline_with_classes:
        return spec.headline_with_classes
    if spec.predicts == "vectors":  # the headline compares with a teacher
        return default_metrics(spec, has_choices=False)[0]
    return "loss" if spec.predicts == "tokens" else spec.headline


def _header(
    assembly: Assembly,
    overrides: Sequence[str],
    variants: Sequence[_Variant],
    rates: Sequence[float],
    request: QualityRequest,
) -> dict[str, Any]:
    recipe, device, metric = assembly.recipe, assembly.device, metric_of(assembly)
    command = ["peftlab", "bench", assembly.name, *overrides, "--quality"]
    given = {"--methods": request.methods, "--ranks": request.ranks, "--learning-rates": request.learning_rates}
    for option, values in given.items():
        command += [option, ",".join(map(str, values))] if values is not None else []
    command += ["--seeds", str(request.seeds)] if request.seeds != SEEDS else []
    return {
        "format": journal.FORMAT,
        "mode": "quality",
        "name": assembly.name,
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device) | size_of_machine(),
        "versions": versions(),
        "commit": git_commit(Path(__file__).parent),
        "unit": {
            "task": recipe.task,
            "model": recipe.model.name,
            "fingerprint": assembly.pretrained.fingerprint,
        },
        "metric": metric,
        "smaller_is_better": quality.smaller_is_better(metric),
        "protocol": {
            "seeds": request.seeds,
            "learning_rates": list(rates),
            "search": request.learning_rates is None,
        },
        "variants": [list(v) for v in variants],
        "recipe": cells.settings_of(recipe),
    }


def _train_all(
    possible: Sequence[_Variant],
    header: Mapping[str, Any],
    opened: journal.Journal,
    tell: Tell,
    start: Launch,
) -> None:
    """Trains seed by seed in alternating order, so that an interrupted run has about equally many trainings per method."""
    protocol, metric = header["protocol"], header["metric"]
    seeds, rates, search = protocol["seeds"], protocol["learning_rates"], protocol["search"]
    first_seed = int(header["recipe"].get("run", {}).get("seed", 0))

    def train(method: str, rank: int | None, turn: int, lr: float) -> None:
        name, seed = quality.name_of(method, rank), first_seed + turn
        records = opened.of("quality")
        tried = Counter(r["cell"] for r in records if r["turn"] == 0)
        beyond = sum(max(0, n - len(rates)) for n in tried.values()) + (turn == 0 and tried[name] >= len(rates))
        total = _trainings(possible, rates, seeds) + beyond
        tell(len(records), total, f"{name}, lr {lr:g}, seed {seed} ({turn + 1} of {seeds})")
        result = start({"job": "quality", "recipe": training_settings(header["recipe"], method, rank, seed, lr)})
        opened.write({"kind": "quality", "cell": name, "seed": seed, "turn": turn, "lr": lr, **result})

    for turn in range(seeds):
        for method, rank in possible if turn % 2 == 0 else list(reversed(possible)):
            name = quality.name_of(method, rank)
            if turn == 0:
                while (lr := quality.rate_to_try(opened.records, name, rates, metric, search=search)) is not None:
                    train(method, rank, turn, lr)
                continue
            chosen = quality.chosen_rate(opened.records, name, rates, metric, search=search)
            done = {(r["turn"], r["lr"]): r["status"] for r in opened.of("quality", name)}
            failed = any(status != "ok" for (_, lr), status in done.items() if lr == chosen)
            if chosen is not None and not failed and (turn, chosen) not in done:
                train(method, rank, turn, chosen)
    tell(len(opened.of("quality")), len(opened.of("quality")), "")


def training_settings(base: Mapping[str, Any], method: str, rank: int | None, seed: int, lr: float) -> dict[str, Any]:
    """Returns the recipe of one training: the same held-out rows for every seed, scored once, after the last step."""
    settings = {name: dict(part) if isinstance(part, Mapping) else part for name, part in base.items()}
    run = settings.setdefault("run", {})
    settings["data"].setdefault("seed", run.get("seed", 0))
    for name in ("dir", "log", "save_every"):
        run.pop(name, None)
    run |= {"seed": seed, "merge": "none"}
    settings["train"] = {**settings.get("train", {}), "lr": lr}
    scoring = settings.setdefault("eval", {})
    for name in ("every", "best", "patience", "prompts"):
        scoring.pop(name, None)
    scoring["before"] = False
    settings["adapter"] = cells.adapter_settings(base, method, rank)
    return settings


def train_once(assembly: Assembly) -> dict[str, Any]:
    """Runs one training in this process; returns its metrics, trained parameters and costs."""
    progress = Timing(assembly.device)
    with tempfile.TemporaryDirectory(prefix="peftlab-bench-") as folder, located(assembly.loaded), frozen_heap():
        check_settings(assembly)
        summary = fit(assembly, Path(folder) / "run", progress).summary
    metrics = {k: v for k, v in summary["after"].items() if isinstance(v, int | float)}
    training = summary["training"]
    return {
        "metrics": metrics,
        "num_trained": summary["adapter"]["num_trained"],
        "memory": progress.watch.memory(),
        **{name: training[name] for name in ("steps", "seconds", "tokens", "last_loss")},
    }


def _write(
    folder: Path,
    opened: journal.Journal,
    variants: Sequence[_Variant],
    reasons: Mapping[_Variant, str],
) -> dict[str, Any]:
    header = {k: v for k, v in opened.records[0].items() if k != "kind"}
    rates, search = header["protocol"]["learning_rates"], header["protocol"]["search"]
    rows = quality.quality_rows(variants, reasons, opened.records, header["metric"], rates, search=search)
    document = {"header": header, "methods": rows}
    result_files.write_result(folder / quality.RESULT, document)
    result_files.write_text(folder / quality.TABLE, quality.csv_text(rows))
    picture = folder / quality.PICTURE
    drawn = quality.draw_quality(document, picture, folder / quality.VECTOR)
    return {"folder": str(folder), "picture": str(picture) if drawn else None, **document}
