"""Runs each measurement in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import ROOT


class RunFailed(Exception):
    """A measured process ended with an error."""


def device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(engine: str, settings: dict[str, Any], work: Path, *, no_dropout: bool) -> dict[str, Any]:
    """Runs one engine in its own process and returns its printed result."""
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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
