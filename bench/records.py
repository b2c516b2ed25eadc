"""Provenance of a result file: machine, versions and code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import ROOT

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "numpy")
_CODE = ("peftlab", "kernels", "bench/*.py")


def provenance(command: str) -> dict[str, Any]:
    """Hardware, versions and commit, in the form of the files in results/; no host name and no path."""
    from peftlab.measuring import machine  # imports torch, which the tables do not need

    commit = machine.git_commit(ROOT / "peftlab", *_CODE)
    return {
        "command": command,
        "hardware": {"cpu": machine.processor(("avx2", "avx512f", "amx_bf16")), **machine.size_of_machine()},
        "versions": machine.versions(_PACKAGES),
        "commit": commit.rstrip("+") if commit else "",
        "changed_files": machine.changed_files(ROOT, *_CODE) if commit else 0,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
