"""Trains the same model on the same rows with peftlab and with its peers, and compares them.

    python -m bench.peers [CASE ...] [--engines NAME ...] [--repeats 3] [--rows N | --full] [--steps N] [--out DIR]
    python -m bench.peers --split-cost    measures the cost of one more micro-batch, in padded tokens

Peers: PEFT with transformers' Trainer, TRL's SFTTrainer, SFTTrainer with Liger's kernels, SFTTrainer with Axolotl's LoRA kernels,
and Unsloth (the last three on a GPU). Peers that cannot run here are listed with the reason.

For each case the driver writes one initial adapter and runs the gate. Then each repetition runs one process per engine, every
second repetition in the reverse order. All use the same weights, rows per optimizer step, seed, optimizer, clipping and
schedule, in float32 on a CPU and under bfloat16 autocast on a GPU.

The gate: every engine trains 5 steps without dropout (its masks depend on the batch shapes) and its losses must agree with
peftlab's. On a CPU within 1e-4 at the first step (rounding alone gives about 1e-6; another row, normalisation or head gives
more than 1e-2) and within 1e-3 after it (AdamW turns the rounding of near-zero gradients into steps); under bfloat16 within 2e-2.
A peer beyond that is not timed, and the exit code is 6. The timed runs have the model's own dropout, as in use.

Exit codes: 0 done, 1 a run failed, 2 wrong usage, 6 an engine trains differently.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.peers import report
from bench.peers.cases import CASES, PEERS, settings_of
from bench.peers.gate import GATE_STEPS, gate
from bench.peers.processes import RunFailed, device_here, measure, say
from bench.records import provenance, write_json


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Gate and repetitions of one case. ``rows`` has only peers that passed the gate."""
    case, device = CASES[name], device_here()
    chosen = [peer for peer in case.peers if options.engines is None or peer in options.engines]
    missing = {peer: reason for peer in chosen if (reason := PEERS[peer].missing(device))}
    engines = ["peftlab", *(peer for peer in chosen if peer not in missing)]
    for peer, reason in missing.items():
        say(f"{name}: {PEERS[peer].title} is skipped: {reason}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        settings = settings_of(case, work, rows=options.rows, full=options.full, steps=options.steps, device=device)
        say(f"{name}: gate")
        checked = gate(engines, settings, work, device)
        for peer, check in checked["peers"].items():
            verdict = "" if check["passed"] else ": not the same training, so it is not timed"
            say(
                f"{name}: {peer}: losses differ by {check['first']:.1e} at step 1, at most {check['largest']:.1e}{verdict}"
            )
        timed = ["peftlab", *(peer for peer, check in checked["peers"].items() if check["passed"])]
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
        **provenance(_command(options)),
    }


def _command(options: argparse.Namespace) -> str:
    """The command line, without folders."""
    parts = ["python -m bench.peers", *options.cases]
    parts += ["--engines", *options.engines] if options.engines else []
    parts += [f"--{k} {v}" for k in ("repeats", "rows", "steps") if (v := getattr(options, k)) is not None]
    return " ".join(parts + (["--full"] if options.full else []))


def measure_split_cost(out: Path) -> None:
    from bench.peers import split_cost

    result = {"models": split_cost.measure_all(), **provenance("python -m bench.peers --split-cost")}
    write_json(out / "split_cost.json", result)
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
    parser.add_argument("--split-cost", action="store_true", help="measure only the cost of one more micro-batch")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    strange = [name for name in options.engines or [] if name not in PEERS]
    if strange:
        parser.error(f"unknown peer: {', '.join(strange)}; there are {', '.join(PEERS)}")
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
            parser.error(f"{name}: {rows:,} rows are too few for {needed} steps of {size}; one epoch is the limit")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.split_cost:
        measure_split_cost(options.out)
        return 0
    refused = []
    try:
        for name in options.cases or CASES:
            result = run_case(name, options)
            refused += [f"{name} {peer}" for peer, check in result["gate"]["peers"].items() if not check["passed"]]
            if result["rows"]:
                write_json(options.out / f"peers-{name}-{result['device']}.json", result)
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
