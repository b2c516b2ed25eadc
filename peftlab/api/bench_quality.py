"""``bench --quality``: the adapter methods trained on the recipe, equally long and with equal seeds, and scored."""

from __future__ import annotations

import datetime
import math
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peftlab.api import bench_cells, build
from peftlab.api.parts import check_settings
from peftlab.bench import files, journal, quality
from peftlab.bench.machine import describe_machine, git_commit, size_of_machine, versions
from peftlab.bench.processes import launch
from peftlab.bench.runner import Launch, Tell
from peftlab.bench.sweep import make_sweep
from peftlab.errors import Interrupted, RecipeError
from peftlab.recipe import LoadedRecipe, Recipe, load_recipe

SEEDS = 3
_WORKER = "peftlab.api.bench_worker"
_Variant = tuple[str, int | None]


def benchmark_quality(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    seeds: int = SEEDS,
    learning_rates: Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    replace: bool = False,
    plan: bool = False,
    progress: Tell = lambda done, total, text: None,
    start: Launch | None = None,
) -> dict[str, Any]:
    """Trains each method and rank with ``seeds`` seeds and writes quality.json, quality.csv and a picture.

    All have the recipe's steps, batches and held-out rows, and are scored at the end. Alpha stays the recipe's. A learning rate
    that is right for one method is wrong for another: with the first seed each tries all of ``learning_rates``, and goes on
    to the other seeds with the best. That choice looks at the held-out rows, of all methods alike.

    Args: methods: default lora, rslora, dora and full. ranks: default the recipe's. learning_rates: default a tenth of the
        recipe's, which full fine-tuning often needs, and the recipe's. out: default runs/quality-NAME. plan: train nothing.
        resume, replace, progress: as for ``benchmark``. start: runs one job; default in a process of its own.
    Returns: the contents of quality.json, ``header`` and ``methods`` (see ``bench.quality``), with ``folder``.
    Raises: RecipeError, DataError, ArtifactError, Interrupted.
    """
    if resume and replace:
        raise RecipeError("--resume goes on with a benchmark and --replace removes it: give one of them")
    if seeds < 1:
        raise RecipeError(f"--seeds: expected at least 1, found {seeds}")
    if learning_rates is not None and (not learning_rates or not all(0 < r < math.inf for r in learning_rates)):
        raise RecipeError(f"--learning-rates: expected numbers above 0, found {list(learning_rates) or 'none'}")
    build.prepare_libraries()
    loaded = load_recipe(recipe, overrides)
    with build.located(loaded):
        bench_cells.check_recipe(loaded)
        check_settings(loaded.recipe)
        variants, reasons = _variants(loaded.recipe, methods, ranks)
        alive = [v for v in variants if v not in reasons]
        if not alive:
            raise RecipeError(
                f"nothing to train: none of {len(variants)} methods can be: {next(iter(reasons.values()))}"
            )
        rates = learning_rates if learning_rates is not None else _rates(loaded.recipe)
        rates = list(dict.fromkeys(map(float, rates)))
        header = _header(loaded, overrides, variants, seeds, rates, given=(methods, ranks, learning_rates))
        if plan:
            rows = quality.quality_rows(variants, reasons, [], header["metric"], rates)
            return {
                "folder": None,
                "picture": None,
                "trainings": _trainings(alive, rates, seeds),
                "header": header,
                "methods": rows,
            }
        folder = Path(out) if out is not None else Path("runs") / f"quality-{loaded.name}"
        opened = journal.open_journal(folder, header, resume=resume, replace=replace)
        try:
            _train_all(alive, header, opened, progress, start or partial(launch, _WORKER))
        except KeyboardInterrupt:
            done = len(opened.of("quality"))
            raise Interrupted(
                f"interrupted; {done} trainings are in {opened.path}. Go on with the same command and --resume"
            ) from None
        finally:
            opened.close()
        return _write(folder, opened, variants, reasons)


def _variants(
    recipe: Recipe, methods: Sequence[str] | None, ranks: Sequence[int] | None
) -> tuple[list[_Variant], dict[_Variant, str]]:
    names = ["lora", "rslora", "dora", "full"] if methods is None else methods
    sweep = make_sweep(
        what=["train"],
        methods=names,
        ranks=[recipe.adapter.rank] if ranks is None else ranks,
        quantize=[recipe.model.quantize],
        kernels=["auto"],
        batch=[1],
        length=[2],
    )
    variants = list(dict.fromkeys((m, None if m == "full" else r) for m in sweep.methods for r in sweep.ranks))
    stored = recipe.model.quantize
    reason = f"{stored} weights cannot be trained: full fine-tuning needs model.quantize=none"
    return variants, {v: reason for v in variants if v[0] == "full" and stored != "none"}


def _rates(recipe: Recipe) -> list[float]:
    lr = recipe.train.lr
    return [float(f"{lr / 10:.6g}"), lr]


def _trainings(alive: Sequence[_Variant], rates: Sequence[float], seeds: int) -> int:
    return len(alive) * (len(rates) + seeds - 1)


def metric_of(recipe: Recipe) -> str:
    return "accuracy" if recipe.spec.classifies or recipe.eval.choices else "loss"


def _header(
    loaded: LoadedRecipe,
    overrides: Sequence[str],
    variants: Sequence[_Variant],
    seeds: int,
    rates: Sequence[float],
    *,
    given: tuple[Sequence[str] | None, Sequence[int] | None, Sequence[float] | None],
) -> dict[str, Any]:
    recipe = loaded.recipe
    device, metric = build.pick_device(recipe.run.device), metric_of(recipe)
    command = ["peftlab", "bench", loaded.name, *overrides, "--quality"]
    for option, values in zip(("--methods", "--ranks", "--learning-rates"), given, strict=True):
        command += [option, ",".join(map(str, values))] if values is not None else []
    command += ["--seeds", str(seeds)] if seeds != SEEDS else []
    return {
        "format": journal.FORMAT,
        "mode": "quality",
        "name": loaded.name,
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device) | size_of_machine(),
        "versions": versions(),
        "commit": git_commit(Path(__file__).parent),
        "unit": {
            "task": recipe.task,
            "model": recipe.model.name,
            "fingerprint": build.pretrained_of(recipe).fingerprint,
        },
        "metric": metric,
        "smaller_is_better": quality.smaller_is_better(metric),
        "protocol": {"seeds": seeds, "learning_rates": list(rates)},
        "variants": [list(v) for v in variants],
        "recipe": bench_cells.settings_of(recipe),
    }


def _train_all(
    alive: Sequence[_Variant],
    header: Mapping[str, Any],
    opened: journal.Journal,
    tell: Tell,
    start: Launch,
) -> None:
    """Seed by seed, there and back, so that what an interrupted run has is one training more or less of each."""
    seeds, rates = header["protocol"]["seeds"], header["protocol"]["learning_rates"]
    total = _trainings(alive, rates, seeds)
    first_seed = int(header["recipe"].get("run", {}).get("seed", 0))
    for turn in range(seeds):
        for method, rank in alive if turn % 2 == 0 else list(reversed(alive)):
            name, seed = quality.name_of(method, rank), first_seed + turn
            done = {(r["turn"], r["lr"]): r["status"] for r in opened.of("quality", name)}
            chosen = quality.chosen_rate(opened.records, name, rates, header["metric"]) if turn else None
            for lr in rates if turn == 0 else [] if chosen is None else [chosen]:
                if (turn, lr) in done or (turn and any(s != "ok" for (_, r), s in done.items() if r == lr)):
                    continue
                tell(len(opened.of("quality")), total, f"{name}, lr {lr:g}, seed {seed} ({turn + 1} of {seeds})")
                recipe = training_settings(header["recipe"], method, rank, seed, lr)
                found = start({"job": "quality", "recipe": recipe})
                opened.write({"kind": "quality", "cell": name, "seed": seed, "turn": turn, "lr": lr, **found})
    tell(total, total, "")


def training_settings(base: Mapping[str, Any], method: str, rank: int | None, seed: int, lr: float) -> dict[str, Any]:
    """The recipe of one training: the same held-out rows for every seed, scored once, at the end of all steps."""
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
    settings["adapter"] = bench_cells.adapter_settings(base, method, rank)
    return settings


def train_once(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a training in this process gives: the metrics, what is trained, and what it took."""
    from peftlab.api.bench_jobs import Timing
    from peftlab.api.training import train

    recipe = load_recipe(settings).recipe
    progress = Timing(build.pick_device(recipe.run.device))
    with tempfile.TemporaryDirectory(prefix="peftlab-bench-") as folder:
        run = train({**settings, "run": {**settings["run"], "dir": f"{folder}/run"}}, progress=progress)
        summary = run.summary
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
    rates = header["protocol"]["learning_rates"]
    rows = quality.quality_rows(variants, reasons, opened.records, header["metric"], rates)
    document = {"header": header, "methods": rows}
    files.write_result(folder / quality.RESULT, document)
    files.write_text(folder / quality.TABLE, quality.csv_text(rows))
    picture = folder / quality.PICTURE
    drawn = quality.draw_quality(document, picture, folder / quality.VECTOR)
    return {"folder": str(folder), "picture": str(picture) if drawn else None, **document}
