"""What works with each adapter method, measured on tiny random models.

``python -m tests.method_table`` measures every method and writes the table in docs/adapters.md; with names of methods, their rows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peftlab
from peftlab.assembly.target import find_target, open_target
from peftlab.errors import Interrupted, PeftlabError
from peftlab.models import find_pretrained, load_model
from peftlab.specs.methods import METHODS
from peftlab.training.progress import SilentProgress
from tests.run_examples import Stopper, recipe, write_data

PAGE = Path(__file__).resolve().parent.parent / "docs/adapters.md"
COLUMNS = ("start", "train", "resume", "plain PEFT", "merge")
TASKS = ("causal_lm", "seq_cls")
STORAGES = ("none", "nf4", "int8")
_BEGIN, _END = "<!-- table: python -m tests.method_table -->", "<!-- end of the table -->"
# Options that are too large for layers of 64 values, and those that a recipe has to give.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "fourierft": {"n_frequency": 50},
    "miss": {"rank": 8},
    "psoft": {"rank": 8},
    "pvera": {"rank": 16},
    "randlora": {"rank": 8},
    "shira": {"rank": 4},
    "trainable_tokens": {"token_indices": list(range(40, 120))},
    "unilora": {"theta_d_length": 64},
    "vblora": {"vector_length": 8, "num_vectors": 16},
    "vera": {"rank": 16},
    "waveft": {"n_frequency": 50},
    "xlora": {"adapters": {"one": "one", "two": "two"}},
}
# Rates at which eight steps lower the loss, for methods and tasks that do not learn at the first.
_RATES = {
    "": 1e-2,
    "p_tuning": 1e-3,
    "prompt_tuning": 0.1,
    "prompt_tuning seq_cls": 1e-3,
    "pvera": 1e-3,
    "randlora": 2e-3,
    "unilora": 1.0,
}
_SAME = 1e-5
_LONGEST = 150


@dataclass
class Row:
    """A row of the table. cells: by column. reason: why a cell says no."""

    method: str
    task: str
    storage: str
    cells: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def line(self) -> str:
        """The row in Markdown."""
        cells = [f"`{self.method}`", self.task, self.storage, *(self.cells[name] for name in COLUMNS), self.reason]
        return "| " + " | ".join(cells) + " |"


def rows() -> Iterator[tuple[str, str, str]]:
    """Method, task and storage of every row."""
    for name, spec in METHODS.items():
        if spec.adapts and not spec.refused:
            yield from ((name, task, storage) for task in TASKS for storage in STORAGES)


def measure(method: str, task: str, storage: str, folder: Path) -> Row:
    """Trains with the method in ``folder``, the current directory, and fills its row."""
    write_data(folder)
    if method == "xlora":
        _write_mixed()
    row = Row(method, task, storage, dict.fromkeys(COLUMNS, "-"))
    document = _recipe(method, task, storage, dir="run")
    try:
        run = peftlab.train(document, progress=SilentProgress())
    except PeftlabError as error:
        row.cells["train"], row.reason = "refused", _reason(error)
        return row
    before, after = run.summary["before"]["loss"], run.summary["after"]["loss"]
    # The run's files over the untouched base give the outputs of the model in memory: nothing else moved.
    alone = run.summary["reopened"]["kl_mean"] < _SAME
    row.cells["start"] = "model" if abs(before - _base_loss(task, storage)) < 1e-5 * before else "elsewhere"
    row.cells["train"] = "yes" if after < before and alone else "**no**"
    row.reason = "" if after < before else "the loss does not fall in eight steps"
    if METHODS[method].peft is not None:
        row.cells["plain PEFT"] = _yes(_plain_difference(task, storage) < _SAME, "other outputs")
    other = _recipe(method, task, storage, dir="other", save_every=3)
    try:
        peftlab.train(other, progress=Stopper(at=5))
    except Interrupted:
        peftlab.train("other", resume=True, progress=SilentProgress())
    files = [Path(name, "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "other")]
    row.cells["resume"] = _yes(files[0] == files[1], "other bytes")
    try:
        row.cells["merge"] = _yes(peftlab.merge("run", progress=SilentProgress())["verified"], "not verified")
    except PeftlabError as error:
        row.cells["merge"], row.reason = "refused", "; ".join(filter(None, [row.reason, _reason(error)]))
    return row


def measure_in(folder: Path, method: str, task: str, storage: str) -> Row:
    """``measure`` in an empty folder."""
    with contextlib.chdir(folder):
        return measure(method, task, storage, folder)


def page(text: str, measured: Sequence[Row]) -> str:
    """``text`` of docs/adapters.md with another table."""
    header = ["method", "task", "weights", *COLUMNS, "reason"]
    table = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *(row.line() for row in measured)]
    before, rest = text.split(_BEGIN)
    return "\n".join([f"{before}{_BEGIN}", "", *table, "", f"{_END}{rest.split(_END)[1]}"])


def read_page() -> dict[tuple[str, str, str], tuple[list[str], str]]:
    """Cells and reason in docs/adapters.md, by method, task and storage."""
    table = PAGE.read_text().split(_BEGIN)[1].split(_END)[0]
    found = {}
    for line in re.findall(r"^\| `.*$", table, flags=re.MULTILINE):
        method, task, storage, *cells, reason = (cell.strip(" `") for cell in line.split("|")[1:-1])
        found[method, task, storage] = (cells, reason)
    return found


def _recipe(method: str, task: str, storage: str, **run: Any) -> dict[str, Any]:
    rate = _RATES.get(f"{method} {task}", _RATES.get(method, _RATES[""]))
    document = recipe(task, train={"max_steps": 8, "lr": rate}, model={"quantize": storage}, run=run)
    return document | {"adapter": {"method": method, **OPTIONS.get(method, {})}}


def _write_mixed() -> None:
    """The adapters that X-LoRA mixes, of two ranks and with other targets."""
    config = find_pretrained("tiny:llama")
    for name, rank, targets in (("one", 4, ["q_proj", "up_proj"]), ("two", 2, ["q_proj", "v_proj"])):
        base = load_model(config, auto_class="AutoModelForCausalLM", device="cpu")
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets, init_lora_weights=False)
            get_peft_model(base, lora).save_pretrained(name)


@functools.cache
def _base_loss(task: str, storage: str) -> float:
    """The loss of the model without an adapter: where LoRA starts, whose B is 0."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_data(Path(folder))
        run = peftlab.train(_recipe("lora", task, storage, dir="run"), progress=SilentProgress())
        return float(run.summary["before"]["loss"])


def _yes(holds: bool, otherwise: str) -> str:
    return "yes" if holds else f"**no: {otherwise}**"


def _reason(error: PeftlabError) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"^1 problem in \S+( recipe)?: ", "", text)
    text = re.sub(r"^`?(adapter|model)\.\w+`?( \([^)]*\))?: ", "", text).replace("|", "\\|")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rpartition(' ')[0]} ..."


@torch.no_grad()
def _plain_difference(task: str, storage: str) -> float:
    """The largest difference of the run's outputs to those of PEFT without peftlab, relative to the largest output."""
    opened = open_target(find_target("run"), SilentProgress())
    examples = opened.target.assembly(reads_data=True).held_out.examples[:4]
    batches = [opened.task.collate([example], "cpu") for example in examples]
    ours = torch.cat([opened.task.outputs(opened.model, batch).logits() for batch in batches])
    base = opened.target.assembly(reads_data=True).model()
    base.config.use_cache = False  # PEFT asks for it with X-LoRA, and nothing is generated here
    plain = PeftModel.from_pretrained(base, "run/adapter").eval()
    theirs = torch.cat([opened.task.outputs(plain, batch).logits() for batch in batches])
    return float((ours - theirs).abs().max() / ours.abs().max())


def _with_others(measured: Sequence[Row]) -> list[Row]:
    """The rows of the page, with those that were measured again."""
    again = {(row.method, row.task, row.storage): row for row in measured}
    known = read_page()
    every = []
    for key in rows():
        cells, reason = known.get(key, (["-"] * len(COLUMNS), ""))
        every.append(again.get(key) or Row(*key, dict(zip(COLUMNS, cells, strict=True)), reason))
    return every


def main() -> None:
    os.environ["PYTHONPATH"] = str(PAGE.parent.parent)
    only, measured = set(sys.argv[1:]), []
    for row in rows():
        if only and row[0] not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            measured.append(measure_in(Path(folder), *row))
        print(measured[-1].line(), file=sys.stderr, flush=True)
    PAGE.write_text(page(PAGE.read_text(), measured if not only else _with_others(measured)))


if __name__ == "__main__":
    main()
