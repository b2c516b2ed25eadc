"""What works with each kind of adapter and each storage of the weights, on one model of each build and for each of its tasks.

Part of docs/families.md, which ``python -m tests.family_table`` writes; docs/adapters.md has every method on one model.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peftlab
from peftlab.errors import PeftlabError
from peftlab.training.progress import SilentProgress
from tests.family_examples import FAMILIES, wide_values, write_family
from tests.family_table import ADAPTERS as HEADING
from tests.family_table import PAGE, REPEATED, family_recipe, title, write_rows

STORAGES = {"plain": "none", "nf4": "nf4", "int8": "int8"}
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "bottleneck": {"method": "bottleneck"},
    "IA3": {"method": "ia3"},
    "full": {"method": "none"},
}
# An encoder, a decoder, two encoder-decoders, a transformer for images and a convolution net.
MODELS = ("BertConfig", "LlamaConfig", "T5Config", "BartConfig", "ViTConfig", "ResNetConfig")
_CLOSE = 1e-4
_INTRODUCTION = f"""\
{HEADING}

One model of each build, for each of its tasks: the storages of the weights (`model.quantize`;
plain: none) with which the adapter trains and the opened run finds the loss that training ended
with (embedding: the mrr). An empty cell is refused. `full` trains the weights themselves, which
quantized weights do not allow. A convolution net has no linear layers to quantize: there, nf4 and
int8 change nothing.
"""


def rows() -> Iterator[tuple[str, str]]:
    """Config class and task of every row."""
    yield from ((name, task) for name in MODELS for task, families in FAMILIES.items() if name in families)


def measure(name: str, task: str) -> dict[str, str]:
    """The cells of a row, by adapter. Writes into the current directory, which is empty."""
    write_family(Path("model"), name, task, **wide_values(name, task))
    write_rows(Path())
    return {adapter: _cell(task, adapter) for adapter in ADAPTERS}


def _cell(task: str, adapter: str) -> str:
    parts = (_result(task, ADAPTERS[adapter], storage, f"{adapter}-{storage}") for storage in STORAGES)
    return ", ".join(filter(None, parts))


def _result(task: str, adapter: Mapping[str, Any], storage: str, folder: str) -> str:
    """The storage if the recipe trains and the run evaluates the same again; empty if it is refused; else what is wrong."""
    document = family_recipe(task, adapter=adapter, model={"quantize": STORAGES[storage]}, run={"dir": folder})
    document["train"]["max_steps"] = 2
    metric = REPEATED.get(task, "loss")
    try:
        value = peftlab.train(document, progress=SilentProgress()).summary["after"][metric]
    except PeftlabError:
        return ""
    except Exception as error:
        return f"**{storage}: {type(error).__name__}**"
    again = peftlab.evaluate(folder, progress=SilentProgress())["metrics"][metric]
    return storage if abs(again - value) < _CLOSE * value else f"**{storage}: other {metric}**"


def section(measured: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    """The section of docs/families.md, by title of the model and task; empty if nothing is measured."""
    if not measured:
        return ""
    head = ["model", "task", *ADAPTERS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (name, task), cells in measured.items():
        lines.append("| " + " | ".join([f"`{name}`", task, *(cells[a] for a in ADAPTERS)]) + " |")
    return "\n".join([_INTRODUCTION, *lines]) + "\n"


def read_section(text: str) -> dict[tuple[str, str], list[str]]:
    """The cells of the section in the text of docs/families.md, by model and task."""
    found = {}
    for line in re.findall(r"^\| `.*$", text.partition(HEADING)[2], flags=re.MULTILINE):
        model, task, *cells = (cell.strip(" `") for cell in line.split("|")[1:-1])
        found[model, task] = cells
    return found


def read_cells() -> dict[tuple[str, str], dict[str, str]]:
    """The measured cells of the page."""
    found = read_section(PAGE.read_text())
    return {key: dict(zip(ADAPTERS, cells, strict=True)) for key, cells in found.items()}


def measure_all() -> dict[tuple[str, str], dict[str, str]]:
    measured = {}
    for name, task in rows():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            measured[title(name, task), task] = measure(name, task)
        print(name, task, measured[title(name, task), task], flush=True)
    return measured
