"""CPU time of a fused layer's call on tiny inputs with little arithmetic, in units of an empty autograd Function.

    python -m bench.studies.call_overhead [--before COMMIT] [--processes 5] [--rounds 9] [--calls 200] [--out DIR]

The code of a commit and the working tree take turns, one process each. Within a process the contestants take turns. A ratio is
the ratio of the medians over its rounds. Outputs and gradients must equal those of PEFT (exit code 6 otherwise).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A process with another commit's code runs this file, so its top imports nothing of bench: that commit may have its own bench.
ROOT = Path(__file__).resolve().parent.parent.parent
STORAGES = ("dense", "nf4", "int8")
ROWS = (1, 8)
WIDTH, RANK = 64, 8
BEFORE = "4870f3b"  # the last commit whose layers read their state through nn.Module attributes
AGREEMENT = 1e-4  # relative to the largest element
_MISMATCH = 6


def layers(storage: str) -> tuple[Any, Any]:
    """A fused layer and PEFT's own layer, with the same weights, in training mode."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from peftlab.adapters.fused import register
    from peftlab.models.bnb import import_bitsandbytes

    bnb = import_bitsandbytes()
    made = []
    for prepare in (register, lambda config: config):
        torch.manual_seed(0)
        plain = nn.Linear(WIDTH, WIDTH)
        linear: Any = {
            "dense": lambda: nn.Linear(WIDTH, WIDTH),
            "nf4": lambda: bnb.nn.Linear4bit(WIDTH, WIDTH, quant_type="nf4"),
            "int8": lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False),
        }[storage]()
        linear.load_state_dict(plain.state_dict())
        config = LoraConfig(r=RANK, target_modules=["linear"], init_lora_weights=False)
        model: Any = nn.Sequential()
        model.add_module("linear", linear.to("cpu"))
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = storage == "nf4", storage == "int8"
        made.append(get_peft_model(model, prepare(config)).base_model.model.linear.train())
    return made[0], made[1]


def contestants(storage: str, rows: int) -> dict[str, Callable[[], Any]]:
    """The contestants' calls by name. Exits if the fused layer and PEFT differ."""
    import torch

    from peftlab import ops
    from peftlab.adapters.fused import FusedLora

    fused, peft = layers(storage)
    assert [isinstance(layer, FusedLora) for layer in (fused, peft)] == [True, False]
    x = torch.randn(rows, WIDTH, requires_grad=True)
    factors = [fused.lora_A["default"].weight, fused.lora_B["default"].weight]
    ready = [torch.zeros_like(factor) for factor in factors]
    ones = torch.ones(rows, WIDTH)

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, A: Any, B: Any, bias: Any, seed: Any, call: Any) -> Any:  # noqa: N803
            return x.detach()

        @staticmethod
        def backward(ctx: Any, dY: Any) -> Any:  # noqa: N803
            return dY, *ready, None, None, None

    def empty() -> Any:
        return Empty.apply(x, *factors, fused.base_layer.bias, None, None)

    def gradients(forward: Callable[[], Any], layer: Any) -> Any:
        inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return lambda: torch.autograd.grad(forward(), inputs, ones)

    operation = ops.lora_linear

    def until_the_operation() -> Any:
        ops.lora_linear = lambda x, *_, **__: x
        try:
            return fused(x)
        finally:
            ops.lora_linear = operation

    ways: dict[str, Callable[[], Any]] = {
        "empty": empty,
        "until": until_the_operation,
        "fused": lambda: fused(x),
        "peft": lambda: peft(x),
        "empty, backward": gradients(empty, fused),
        "fused, backward": gradients(lambda: fused(x), fused),
        "peft, backward": gradients(lambda: peft(x), peft),
    }
    pairs = [(ways["fused"](), ways["peft"]())]
    pairs += zip(ways["fused, backward"](), ways["peft, backward"](), strict=True)
    if fused.kept_slow or any((a - b).abs().max().item() > AGREEMENT * b.abs().max().item() for a, b in pairs):
        raise SystemExit(_MISMATCH)
    return ways


def measure(rounds: int, calls: int) -> list[dict[str, Any]]:
    """Median microseconds of a call per storage, rows and contestant, in this process."""
    import torch

    torch.set_num_threads(1)
    measured = []
    for storage in STORAGES:
        for rows in ROWS:
            ways = contestants(storage, rows)
            times: dict[str, list[float]] = {name: [] for name in ways}
            gc.disable()
            for repetition in range(rounds + 1):  # the first warms up
                for name in list(ways)[:: 1 if repetition % 2 else -1]:
                    call, start = ways[name], time.process_time()
                    for _ in range(calls):
                        call()
                    times[name].append(1e6 * (time.process_time() - start) / calls)
                gc.collect()
            gc.enable()
            us = {name: statistics.median(values[1:]) for name, values in times.items()}
            measured.append({"storage": storage, "rows": rows, "us": us})
    return measured


def in_turns(before: str, processes: int, arguments: list[str]) -> dict[str, list[Any]]:
    """Results of ``measure`` in each process, by side."""
    from bench.commits import unpacked

    sides: dict[str, list[Any]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        unpacked(before, Path(folder))
        for repetition in range(processes):
            for side in list(sides)[:: 1 if repetition % 2 == 0 else -1]:
                root = folder if side == "before" else str(ROOT)
                env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, f"{root}/kernels"])}
                command = [sys.executable, "-P", __file__, "--measure", *arguments]
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.returncode)
                sides[side].append(json.loads(done.stdout))
                print(f"{side}, process {repetition + 1} of {processes}", file=sys.stderr)
    return sides


def ratio(result: dict[str, Any], side: str, case: int, name: str) -> str:
    from bench import tables

    backward = ", backward" if name.endswith(", backward") else ""
    times = [process[case]["us"] for process in result["sides"][side]]
    values = [us[name] / us[f"empty{backward}"] for us in times]
    return tables.spread({"median": statistics.median(values), "min": min(values), "max": max(values)}, 1)


def table(result: dict[str, Any]) -> str:
    from bench import tables

    empty = statistics.median(row["us"]["empty"] for process in result["sides"]["now"] for row in process)
    lines = [
        f"Before: {result['before']}. N = K = {WIDTH}, rank {RANK}, float32, a bias, no dropout, one thread; an empty Function "
        f"takes {empty:.0f} us. Median of {len(result['sides']['now'])} processes (their range). {tables.where(result)}. "
        f"`{result['command']}`",
        "",
        "| weight | rows | until the operation, before | now | forward, before | now | PEFT | forward and backward, before "
        "| now | PEFT |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in enumerate(result["sides"]["now"][0]):
        cells = [row["storage"], str(row["rows"])]
        for name in ("until", "fused", "fused, backward"):
            cells += [ratio(result, side, case, name) for side in ("before", "now")]
            cells += [] if name == "until" else [ratio(result, "now", case, name.replace("fused", "peft"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    parser.add_argument("--processes", type=int, default=5, help="per side")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        json.dump(measure(options.rounds, options.calls), sys.stdout)
        return 0
    from bench import records

    sizes = ["--rounds", str(options.rounds), "--calls", str(options.calls)]
    command = " ".join(["python -m bench.studies.call_overhead", *sys.argv[1:]])
    report = {"before": options.before, **records.provenance(command)}
    report["sides"] = in_turns(options.before, options.processes, sizes)
    records.write_json(options.out / "call_overhead.json", report)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
