"""Texts for cells, machines and protocols, shared by tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.storages import STORAGES

# Dimensions of a sweep: columns of the table if their values differ, else part of the line above it.
DIMENSIONS = {
    "what": "work",
    "method": "method",
    "rank": "rank",
    "quantize": "weights",
    "kernels": "path",
    "batch": "rows",
    "length": "tokens",
    "adapters": "adapters",
}
CAPTIONS = {"train": "Training", "generate": "Generation (tokens written)"}


def dimensions(cells: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Returns the names of the varying dimensions, and a text for each fixed one."""
    varying = [name for name in DIMENSIONS if len({cell[name] for cell in cells}) > 1]
    if {"method", "rank"} & set(varying) and {cell["rank"] for cell in cells} - {None}:
        varying = [n for n in DIMENSIONS if n in varying or (n == "rank" and len({c["method"] for c in cells}) > 1)]
    fixed = [_fixed(name, cells[0][name]) for name in DIMENSIONS if name not in varying]
    return varying, [text for text in fixed if text]


def _fixed(name: str, value: Any) -> str:
    if (name == "adapters" and value == 1) or (name == "rank" and value is None):
        return ""
    text = value_text(name, value)
    forms = {"what": text, "method": text, "rank": f"rank {text}", "length": f"{text} tokens each"}
    return forms.get(name, f"{text} {DIMENSIONS[name]}")


def value_text(name: str, value: Any) -> str:
    if name == "kernels":
        return KERNEL_MODES[value].label
    if name == "quantize":
        return STORAGES[value].label
    return "-" if value is None else str(value)


def cell_label(cell: Mapping[str, Any], varying: Sequence[str]) -> str:
    """The values of the ``varying`` dimensions, such as ``lora r8 nf4 fused 4x64``."""
    parts = []
    for name in varying:
        if name == "rank":
            parts.append("" if cell["rank"] is None else f"r{cell['rank']}")
        elif name == "batch":
            rows = f"{cell['batch']} row{'s' if cell['batch'] != 1 else ''}"
            parts.append(f"{cell['batch']}x{cell['length']}" if "length" in varying else rows)
        elif name == "length":
            parts.append("" if "batch" in varying else f"{cell['length']} tokens")
        elif name == "adapters":
            parts.append(f"{cell['adapters']} adapter{'s' if cell['adapters'] != 1 else ''}")
        else:
            parts.append(value_text(name, cell[name]))
    return " ".join(part for part in parts if part) or "the only cell"


def memory_unit(values: Sequence[float]) -> tuple[float, str]:
    """Returns the bytes and the name of a unit for ``values``; decimal, as everywhere."""
    return (1e9, "GB") if max(values) >= 999.5e6 else (1e6, "MB")


def machine_text(header: Mapping[str, Any]) -> str:
    machine, versions = header["machine"], header["versions"]
    threads = (
        f", {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}" if machine["device"] == "cpu" else ""
    )
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "peft", "bitsandbytes") if name in versions)
    return f"{machine['name']}{threads}; {libraries}"


def protocol_text(header: Mapping[str, Any]) -> str:
    p = header["protocol"]
    processes = f"{p['repeats']} process{'es' if p['repeats'] != 1 else ''}"
    steps = f"{p['steps']} step{'s' if p['steps'] != 1 else ''}"
    return f"{processes} per cell in turns, each {steps} after {p['warm_up']} warm-up"
