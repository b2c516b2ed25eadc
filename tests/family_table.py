"""What works on each family of models, measured on a tiny random model of it.

``python -m tests.family_table`` measures every family and writes docs/families.md.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import Interrupted, PeftlabError
from peftlab.models import find_pretrained, linear_widths, load_tokenizer, reconciled_ids
from peftlab.tasks import Example
from peftlab.training.progress import SilentProgress
from tests.family_examples import (
    AUTO_CLASSES,
    CLASSIFIERS,
    FAMILIES,
    FILLERS,
    FINDERS_OF_OBJECTS,
    OTHER_CLASSES,
    READERS_OF_IMAGES,
    READERS_OF_QUESTIONS,
    SEGMENTERS,
    TAGGERS,
    TRANSLATORS,
    WITH_HEAD,
    WRITERS,
    make_config,
    wide_values,
    write_family,
)
from tests.processes import Processes
from tests.run_examples import Stopper

PAGE = Path(__file__).resolve().parent.parent / "docs/families.md"
COLUMNS = ("train", "eval again", "plain PEFT", "merge", "batch = alone", "resume", "nf4", "int8")
STORAGES = ("nf4", "int8")
ADAPTERS = "## Adapters and storages"  # the heading of the other table
# Decoders with a head for classes; the others differ from these only in their body.
_DECODERS = ("LlamaConfig", "Qwen2Config", "GPT2Config")
_EMBEDDING_DECODERS = (*_DECODERS, "Qwen3Config", "MistralConfig", "Gemma3TextConfig")
# The metric that a second evaluation repeats, if it is not the loss, and the columns of the rows.
REPEATED = {"embedding": "mrr"}
_COLUMNS = {
    "seq2seq": {"source": "text", "target": "label"},
    "embedding": {"anchor": "text", "positive": "other"},
    "reranking": {"query": "text", "document": "other", "score": "right"},
}
_NOTED = ("reach", "padding", "padding_token", "config_ids")
_WORDS = {"good": "pos", "fine": "pos", "bad": "neg", "poor": "neg"}
_CLOSE = 1e-4
_INTRODUCTION = """\
# Families of models

Each row is a tiny random model of a family of transformers, trained with the defaults of a recipe
(LoRA on all linear layers) on a CPU. `python -m tests.family_table` measures all of them and writes
this page. A test measures each row again and compares it with the page. Families without linear
layers, of which a note says so, are trained on their convolutions.

- **train**: the recipe trains.
- **eval again**: `peftlab eval` in a new process finds the loss that training ended with.
- **plain PEFT**: transformers and PEFT alone open the adapter and give the same outputs.
- **merge**: the merged folder gives the outputs that were trained, and `peftlab eval` finds in it
  the loss that training ended with.
- **batch = alone**: a row gives the same outputs in a batch and alone.
- **resume**: a run that is stopped and resumed ends with the same bytes.
- **nf4**, **int8**: the recipe with `model.quantize` trains, and a second look at the run finds the
  loss that training ended with; `-` for a model without linear layers in its body, refused if
  `check` says that its weights cannot be quantized.
"""
_NOTES = """\
`peftlab check` says each of these lines when you bring a model of the family. Counts and ids are
those of the tiny model."""


def families() -> Iterator[tuple[str, str]]:
    """Config class and task of every row."""
    yield from ((name, "causal_lm") for name in WRITERS)
    yield from ((name, "masked_lm") for name in FILLERS)
    yield from ((name, "seq_cls") for name in CLASSIFIERS if name not in WRITERS or name in _DECODERS)
    yield from ((name, "token_cls") for name in TAGGERS)
    yield from ((name, "extractive_qa") for name in READERS_OF_QUESTIONS)
    yield from ((name, "image_cls") for name in READERS_OF_IMAGES)
    yield from ((name, "seq2seq") for name in TRANSLATORS)
    yield from ((name, "object_detection") for name in FINDERS_OF_OBJECTS)
    yield from ((name, "image_segmentation") for name in SEGMENTERS)
    yield from ((name, "embedding") for name in CLASSIFIERS if name not in WRITERS or name in _EMBEDDING_DECODERS)
    yield from ((name, "reranking") for name in CLASSIFIERS if name not in WRITERS or name in _DECODERS)


@dataclass
class Row:
    """A row of the table. cells: by column. notes: lines that ``check`` says of the family."""

    family: str
    task: str
    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.line()} {'; '.join(self.notes)}"

    def line(self, notes: str = "") -> str:
        """The row in Markdown, with the numbers of its notes."""
        return "| " + " | ".join([f"`{self.family}`", self.task, *(self.cells[name] for name in COLUMNS), notes]) + " |"


def measure(name: str, task: str, folder: Path, *, evaluate: Callable[[str, str], float]) -> Row:
    """Trains the family in ``folder``, the current directory, and fills its row.

    Args: evaluate: returns a metric of the run in another process.
    """
    write_family(folder / "model", name, task)
    write_rows(folder)
    row = Row(title(name, task), task)
    try:
        checked = peftlab.check(family_recipe(task), progress=SilentProgress())
    except PeftlabError as error:
        row.notes.append(_line(str(error), folder))
        row.cells = dict.fromkeys(COLUMNS, "refused")
        return row
    row.notes += [_line(f["message"], folder) for f in checked["findings"] if f["kind"] in _NOTED]
    run = peftlab.train(family_recipe(task), progress=SilentProgress())
    row.cells["train"] = "yes"
    metric = REPEATED.get(task, "loss")
    value = run.summary["after"][metric]
    row.cells["eval again"] = _yes(abs(evaluate("run", metric) - value) < _CLOSE * value, f"other {metric}")
    opened = open_target(find_target("run"), SilentProgress())
    examples = opened.target.assembly(reads_data=True).held_out.examples[:4]
    row.cells["plain PEFT"] = _yes(_difference(opened, examples, _plain_peft(task)) < _CLOSE, "other outputs")
    row.cells["batch = alone"] = _yes(_difference(opened, examples) < _CLOSE, "other outputs")
    verified = peftlab.merge("run", progress=SilentProgress())["verified"]
    same_again = abs(evaluate("run/merged", metric) - value) < _CLOSE * value
    row.cells["merge"] = _yes(verified and same_again, "not verified" if not verified else f"other {metric}")
    document = family_recipe(task, run={"dir": "other", "save_every": 2})
    try:
        peftlab.train(document, progress=Stopper(at=3))
    except Interrupted:
        peftlab.train("other", resume=True, progress=SilentProgress())
    same = Path("run/adapter/adapter_model.safetensors").read_bytes()
    row.cells["resume"] = _yes(Path("other/adapter/adapter_model.safetensors").read_bytes() == same, "other bytes")
    for storage in STORAGES:
        row.cells[storage] = _quantized(name, task, folder, storage)
    return row


def _quantized(name: str, task: str, folder: Path, storage: str) -> str:
    """The cell of a storage, measured on a model whose sizes bitsandbytes reads rightly on a CPU."""
    if not linear_widths(make_skeleton(name, task)):
        return "-"
    wide = f"wide-{storage}"
    write_family(folder / wide, name, task, **wide_values(name, task))
    document = family_recipe(task, model={"name": wide, "quantize": storage}, run={"dir": storage})
    document["train"]["max_steps"] = 2
    metric = REPEATED.get(task, "loss")
    try:
        value = peftlab.train(document, progress=SilentProgress()).summary["after"][metric]
        again = peftlab.evaluate(storage, progress=SilentProgress())["metrics"][metric]
    except PeftlabError as error:
        if error.key == "model.quantize":
            return "refused"
        return f"**no: {_line(str(error), folder)[:120]}**"
    return _yes(abs(again - value) < _CLOSE * value, f"other {metric}")


def make_skeleton(name: str, task: str) -> Any:
    """The model of a row on the meta device."""
    with torch.device("meta"):
        return getattr(transformers, AUTO_CLASSES[task]).from_config(make_config(name, FAMILIES[task]))


def page(rows: Sequence[Row], adapters: str) -> str:
    """docs/families.md. Args: adapters: its section on adapters and storages, of ``adapter_table``."""
    numbers: dict[str, int] = {}
    lines = [row.line(", ".join(str(numbers.setdefault(note, len(numbers) + 1)) for note in row.notes)) for row in rows]
    header = ["family", "task", *COLUMNS, "notes"]
    table = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines]
    notes = [
        textwrap.fill(f"{number}. {note}", 100, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
        for note, number in numbers.items()
    ]
    return "\n".join([_INTRODUCTION, *table, "", adapters, "## Notes", "", _NOTES, "", *notes]) + "\n"


def read_page() -> dict[tuple[str, str], tuple[list[str], list[str]]]:
    """Cells and notes of docs/families.md, by family and task."""
    text = PAGE.read_text()
    found = re.findall(r"^(\d+)\. (.+(?:\n   .+)*)", text, flags=re.MULTILINE)
    notes = {number: " ".join(note.split()) for number, note in found}
    rows = {}
    for line in re.findall(r"^\| `.*$", text.partition(ADAPTERS)[0], flags=re.MULTILINE):
        family, task, *cells, numbers = (cell.strip(" `") for cell in line.split("|")[1:-1])
        rows[family, task] = (cells, [notes[number] for number in re.findall(r"\d+", numbers)])
    return rows


def title(name: str, task: str) -> str:
    return str(make_config(name, FAMILIES[task]).model_type)


def family_recipe(task: str, **sections: Any) -> dict[str, Any]:
    sources = {"image_cls": "sklearn:digits", "token_cls": "entities.jsonl", "extractive_qa": "questions.jsonl"}
    sources |= dict.fromkeys(OTHER_CLASSES, "shapes:60")
    data: dict[str, Any] = {"train": sources.get(task, "rows.jsonl"), "eval_rows": 8}
    if task == "causal_lm":
        data["template"] = {"user": "{text}", "assistant": "{label}"}
    if task in _COLUMNS:
        data["columns"] = _COLUMNS[task]
    document: dict[str, Any] = {
        "task": task,
        "model": {"name": "model"},
        "data": data,
        "train": {"max_steps": 4, "batch_size": 4},
        "eval": {"before": False},
        "run": {"dir": "run"},
    }
    return {**document, **{name: {**document.get(name, {}), **values} for name, values in sections.items()}}


def write_rows(folder: Path) -> None:
    rows = [
        {
            "text": f"{word} film {'so ' * (i % 3)}{i}",
            "label": label,
            "other": f"a film {i} that is {word}",
            "right": int(label == "pos"),
        }
        for i in range(8)
        for word, label in _WORDS.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entities = [{"text": row["text"], "spans": [[0, len(row["text"].split()[0]), row["label"]]]} for row in rows]
    (folder / "entities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entities))
    questions = [
        {
            "question": f"What is {i}?",
            "context": f"{word} film {'so ' * (i % 3)}{i}",
            "answers": [word] if i % 4 else [],
        }
        for i in range(8)
        for word in _WORDS
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def _line(text: str, folder: Path) -> str:
    return " ".join(text.replace(str(folder.resolve()), "").split())


def _yes(holds: bool, otherwise: str) -> str:
    return "yes" if holds else f"**no: {otherwise}**"


def _plain_peft(task: str) -> Any:
    """The run in plain transformers and PEFT, with the ids in the config that ``check`` says are needed."""
    from peft import PeftModel

    classes = task not in ("extractive_qa", "embedding", "reranking") and (
        task not in WITH_HEAD or task in OTHER_CLASSES
    )
    options: dict[str, Any] = {"num_labels": len(_classes())} if classes else {}
    if task == "reranking":
        options["num_labels"] = 1
    if task in OTHER_CLASSES:
        options["ignore_mismatched_sizes"] = True  # its head is for other categories
    base = getattr(transformers, AUTO_CLASSES[task]).from_pretrained("model", dtype="float32", **options)
    if task in ("seq_cls", "token_cls", "extractive_qa", "masked_lm", "seq2seq", "reranking"):
        tokenizer = load_tokenizer(find_pretrained("model"))
        for name, (_, wanted) in reconciled_ids(base.config, tokenizer).items():
            setattr(base.config, name, wanted)
    return PeftModel.from_pretrained(base, "run/adapter").eval()


def _classes() -> list[str]:
    import yaml

    document = yaml.safe_load(Path("run/recipe.lock.yaml").read_text())
    names: list[str] = document["lock"]["environment"]["class_names"]
    return names


@torch.no_grad()
def _difference(opened: Any, examples: list[Example], other: Any = None) -> float:
    """The largest difference to the outputs of ``other``, or of the same model in one batch, one row at a time; relative to
    the largest output."""

    def outputs(model: Any, rows: list[Example]) -> torch.Tensor:
        found = opened.task.outputs(model, opened.task.collate(rows, "cpu"))
        return found.values if found.vectors else found.logits()

    torch.manual_seed(0)
    wanted = torch.cat([outputs(opened.model, [e]) for e in examples])
    torch.manual_seed(0)
    alone = other is not None
    compared = torch.cat([outputs(other, [e]) for e in examples]) if alone else outputs(opened.model, examples)
    exists = wanted > -math.inf
    if not torch.equal(exists, compared > -math.inf):
        return math.inf
    return float((wanted - compared)[exists].abs().max() / wanted[exists].abs().max())


def measure_in(folder: Path, name: str, task: str, process: Processes) -> Row:
    """``measure`` in an empty folder, with another process for the second evaluation."""

    def evaluate(run: str, metric: str) -> float:
        done = process.run(["-m", "peftlab", "eval", run, "--json"], cwd=folder, check=True)
        return float(json.loads(done.stdout)["metrics"][metric])

    with contextlib.chdir(folder):
        return measure(name, task, folder, evaluate=evaluate)


def main(chosen: Sequence[str]) -> None:
    """Measures the rows whose task or ``CONFIG-TASK`` is chosen, or all, and keeps the others of the page."""
    from tests import adapter_table  # it imports this file

    process, measured = Processes(), dict[tuple[str, str], Row]()
    os.environ["PYTHONPATH"] = str(PAGE.parent.parent)
    for name, task in families():
        if chosen and not {task, f"{name}-{task}"} & set(chosen):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure_in(Path(folder), name, task, process)
        measured[row.family, task] = row
        print(row, file=sys.stderr, flush=True)
    adapters = adapter_table.measure_all() if not chosen or "adapters" in chosen else adapter_table.read_cells()
    old = {
        key: Row(*key, dict(zip(COLUMNS, cells, strict=True)), notes)
        for key, (cells, notes) in read_page().items()
        if len(cells) == len(COLUMNS)
    }
    keys = [(title(name, task), task) for name, task in families()]
    rows = [measured.get(key) or old.get(key) for key in keys]
    PAGE.write_text(page([row for row in rows if row is not None], adapter_table.section(adapters)))


if __name__ == "__main__":
    main(sys.argv[1:])
