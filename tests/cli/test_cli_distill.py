"""Mistakes with teachers, students and caches give an exit code and one helpful message, and leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftlab.cli.app import run as cli
from peftlab.experiments import card_figures as comparing
from peftlab.recipe import load_recipe, write_lock
from peftlab.runs import LOCK_NAME

ROWS = [("red", "colour"), ("cat", "animal"), ("blue", "colour"), ("dog", "animal")]
TEMPLATE = {"user": "{text}", "assistant": "{label}"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "_TIMED_SECONDS", 0.05)
        yield


def save_classifier(folder: Path, labels: list[str], tokenizer: Any) -> None:
    from transformers import BertForSequenceClassification

    from peftlab.models.tiny import tiny_config

    ids = dict(enumerate(labels))
    config = tiny_config("tiny:bert", num_labels=len(labels), id2label=ids, label2id={n: i for i, n in ids.items()})
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reversed_alphabet() -> Any:
    """The tiny tokenizer with the ids of its letters reversed. It has the same ids with other meanings."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from peftlab.models.tiny import tiny_tokenizer

    ours = tiny_tokenizer()
    document = json.loads(ours.backend_tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {token: i if i < 4 else 263 - i for token, i in vocabulary.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        model_max_length=512,
    )
    tokenizer.chat_template = ours.chat_template
    return tokenizer


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, good teachers and bad teachers. ``lm`` and ``run`` fit their tasks."""
    from transformers import BertModel, LlamaForCausalLM

    from peftlab.models.tiny import tiny_config, tiny_tokenizer

    folder = tmp_path_factory.mktemp("school")
    rows = [(f"{word} {i}", kind) for i in range(6) for word, kind in ROWS]
    (folder / "data.csv").write_text("text,label\n" + "".join(f"{t},{k}\n" for t, k in rows))
    (folder / "more.csv").write_text("text\nred 77\ncat 78\n")
    (folder / "empty.csv").write_text("")
    (folder / "other.csv").write_text("words\nred 77\n")
    tokenizer = tiny_tokenizer()
    save_classifier(folder / "classifier", ["animal", "colour"], tokenizer)
    save_classifier(folder / "permuted", ["colour", "animal"], tokenizer)
    save_classifier(folder / "others", ["a", "b", "c"], tokenizer)
    save_classifier(folder / "damaged", ["animal", "colour"], tokenizer)
    weights = folder / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    BertModel(tiny_config("tiny:bert")).save_pretrained(folder / "headless")
    tokenizer.save_pretrained(folder / "headless")
    LlamaForCausalLM(tiny_config("tiny:llama")).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    shutil.copytree(folder / "lm", folder / "reversed")
    reversed_alphabet().save_pretrained(folder / "reversed")
    longer = tiny_config("tiny:llama")
    longer.vocab_size = 261
    LlamaForCausalLM(longer).save_pretrained(folder / "longer")
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder / "longer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli(["train", write(folder, "causal_lm", run={"dir": "run"})]) == 0
        assert cli(["teach", write(folder, "causal_lm", distill={"teacher": "lm", "cache": "cache"})]) == 0
    (folder / "r.yaml").unlink()
    return folder


@pytest.fixture
def here(school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(school, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, task: str, **sections: Any) -> str:
    """The name of a recipe for one short training. A section that is None is left out."""
    lm = task == "causal_lm"
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name": "tiny:llama" if lm else "tiny:bert"},
        "adapter": {"rank": 4},
        "data": {"train": "data.csv"} | ({"template": TEMPLATE} if lm else {}),
        "train": {"max_steps": 2, "batch_size": 4},
        "eval": {"before": False},
        "run": {"dir": "mine"},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values} if values is not None else None
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return "r.yaml"


def lock(folder: Path, recipe: str) -> None:
    """Writes a run folder as it is before the first checkpoint."""
    folder.mkdir()
    write_lock(folder / LOCK_NAME, load_recipe(recipe), fingerprints={}, environment={})


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "r.yaml"}


def routed(**second: Any) -> dict[str, Any]:
    return {"teachers": [{"name": "classifier", "rows": {"label": "animal"}}, {"name": "permuted", **second}]}


TEACHER, KEY = "distill.teacher.name` (r.yaml:", "distill` (r.yaml:"
# name: verb, task, section distill, other sections, overrides, exit code, parts of the message
Case = tuple[str, str, dict[str, Any], dict[str, Any], list[str], int, list[str]]
CASES: dict[str, Case] = {
    "another tokenizer": (
        "distill", "causal_lm", {"teacher": "reversed"}, {}, [], 2,
        [TEACHER, "student and teacher have different tokenizers", "The quick brown fox", "cross_tokenizer: uld"],
    ),
    "a token that the teacher has not": (
        "distill", "causal_lm", {"teacher": "lm"},
        {"model": {"name": "longer"}, "data": {"template": {**TEMPLATE, "user": "{text}<|more|>"}}}, [], 3,
        [KEY, "data.csv:2", "the teacher's tokenizer has no '<|more|>' (id 260)"],
    ),
    "no head": ("distill", "seq_cls", {"teacher": "headless"}, {}, [], 2, [TEACHER, "'LABEL_0', 'LABEL_1'", "not trained for this task"]),
    "the backbone has no head": (
        "distill", "seq_cls", {"teacher": "self"}, {"model": {"name": "headless"}}, [], 2, [TEACHER, "not trained for this task"],
    ),
    "other labels": ("distill", "seq_cls", {"teacher": "others"}, {}, [], 2, [TEACHER, "'a', 'b', 'c'", "'animal', 'colour'"]),
    "another task": (
        "distill", "seq_cls", {"teacher": "run"}, {}, [], 2, [TEACHER, "'run'", "task: causal_lm", "task: seq_cls"],
    ),
    "unknown teacher": (
        "distill", "seq_cls", {"teacher": "clasifier"}, {}, [], 2,
        [TEACHER, "'clasifier' is neither a local folder", "did you mean 'classifier'?"],
    ),
    "damaged teacher": ("distill", "seq_cls", {"teacher": "damaged"}, {}, [], 5, [TEACHER, "'damaged'", "copy them again"]),
    "no adapter there": (
        "distill", "causal_lm", {"teacher": {"name": "self", "adapter": "nowhere"}}, {}, [], 5,
        ["distill.teacher.adapter` (r.yaml:", "nowhere/adapter_config.json"],
    ),
    "check: no adapter there": (
        "check", "causal_lm", {"teacher": {"name": "lm", "adapter": "nowhere"}}, {}, [], 5,
        ["distill.teacher.adapter` (r.yaml:", "nowhere/adapter_config.json"],
    ),
    "an adapter of another model": (
        "distill", "seq_cls", {"teacher": {"name": "classifier", "adapter": "run/adapter"}}, {}, [], 5,
        ["distill.teacher.adapter` (r.yaml:", "the adapter in run/adapter was made for another model (tiny:llama)"],
    ),
    "an adapter of another model beside the student's": (
        "distill", "seq_cls", {"teacher": {"name": "self", "adapter": "run/adapter"}}, {"model": {"name": "classifier"}}, [], 5,
        ["distill.teacher.adapter` (r.yaml:", "the adapter in run/adapter was made for another model (tiny:llama)"],
    ),
    "self without an adapter": (
        "distill", "seq_cls", {"teacher": "self"}, {"adapter": {"rank": 8, "method": "none"}}, [], 2,
        ["distill.teacher: self is the backbone without its adapter", "set the teacher to the model's name"],
    ),
    "no section": ("distill", "seq_cls", {}, {}, [], 2, ["no section distill", "peftlab train"]),
    "train": ("train", "seq_cls", {"teacher": "classifier"}, {}, [], 2, [KEY, "run peftlab distill"]),
    "no teacher": ("distill", "seq_cls", {"hard_weight": 0.1}, {}, [], 2, ["has no teacher: set teacher"]),
    "temperature 0": (
        "distill", "seq_cls", {"teacher": "classifier", "temperature": 0}, {}, [], 2,
        ["line", "distill.temperature: expected a number above 0 and of at most 1000, found 0"],
    ),
    "labels of rows that have none": (
        "distill", "seq_cls", {"teacher": "classifier", "transfer": "more.csv", "hard_weight": 0.5}, {}, [], 2,
        ["line", "distill.hard_weight", "remove hard_weight or transfer"],
    ),
    "empty transfer": (
        "distill", "seq_cls", {"teacher": "classifier", "transfer": "empty.csv"}, {}, [], 3,
        ["distill.transfer` (r.yaml:", "empty.csv has no rows"],
    ),
    "transfer without the text": (
        "distill", "seq_cls", {"teacher": "classifier", "transfer": "other.csv"}, {}, [], 3,
        ["other.csv: no column 'text'; found the columns 'words'"],
    ),
    "transfer without the answer": (
        "distill", "causal_lm", {"teacher": "lm", "transfer": "more.csv"}, {}, [], 3,
        ["data.template` (r.yaml:", "more.csv:2: no column 'label'; found the column 'text'"],
    ),
    "transfer absent": (
        "distill", "seq_cls", {"teacher": "classifier", "transfer": "mor.csv"}, {}, [], 3,
        ["distill.transfer` (r.yaml:", "'mor.csv'", "did you mean 'more.csv'"],
    ),
    "a teacher of no row": (
        "distill", "seq_cls", routed(rows={"label": "plant"}), {}, [], 3,
        ["distill.teachers.1.rows` (r.yaml:", "no training row has label: plant", "the values are animal, colour"],
    ),
    "a row of no teacher": (
        "distill", "seq_cls", routed(rows={"text": ["red 1"]}), {}, [], 3,
        ["distill.teachers` (r.yaml:", "data.csv:", "no teacher for this row and"],
    ),
    "rows of no column": (
        "distill", "seq_cls", routed(rows={"labl": "x"}), {}, [], 3,
        ["distill.teachers.1.rows.labl` (r.yaml:", "no column 'labl'", "did you mean 'label'?"],
    ),
    "no trained token": (
        "distill", "causal_lm", {"teacher": "lm"},
        {"data": {"template": {"prompt": "{text}", "completion": "{label}"}, "max_length": 4, "too_long": "truncate"}},
        [], 3, ["zero trained tokens"],
    ),
    "more classes than there are": (
        "teach", "causal_lm", {"teacher": "lm", "cache": "new", "targets": {"k": 300}}, {}, [], 2,
        ["distill.targets.k` (r.yaml:", "1 to 260 classes per token, found 300"],
    ),
    "check: more classes than there are": (
        "check", "seq_cls", {"teacher": "classifier", "cache": "new", "targets": {"k": 3}}, {}, [], 2,
        ["distill.targets.k` (r.yaml:", "1 to 2 classes per token, found 3"],
    ),
    "teach: a teacher of no row": (
        "teach", "seq_cls", {**routed(rows={"label": "plant"}), "cache": "new"}, {}, [], 3,
        ["distill.teachers.1.rows` (r.yaml:", "no training row has label: plant"],
    ),
    "teach: the second teacher has other labels": (
        "teach", "seq_cls", {"teachers": ["classifier", "others"], "cache": "new"}, {}, [], 2,
        ["distill.teachers.1.name` (r.yaml:", "'a', 'b', 'c'", "'animal', 'colour'"],
    ),
    "a loss that needs all classes": (
        "distill", "causal_lm", {"teacher": "lm", "cache": "new", "losses": ["reverse_kl"]}, {}, [], 2,
        ["distill.losses: reverse_kl needs", "fill: hidden"],
    ),
    "layers that are not there": (
        "distill", "seq_cls", {"teacher": "classifier", "student_init": {"layers": [7]}}, {}, [], 2,
        ["distill.student_init.layers` (r.yaml:", "found 7: the model has 2 layers"],
    ),
    "random weights of a width that heads do not divide": (
        "distill", "causal_lm", {"teacher": "lm", "student_init": {"weights": "random", "hidden_size": 33}}, {}, [], 2,
        ["distill.student_init` (r.yaml:", "hidden size (33) is not a multiple of the number of attention heads (4)"],
    ),
    "teach without a cache": ("teach", "causal_lm", {"teacher": "lm"}, {}, [], 2, ["distill.cache", "such as caches/mine"]),
    "a cache that is a file": (
        "distill", "causal_lm", {"teacher": "lm", "cache": "data.csv"}, {}, [], 2,
        ["distill.cache` (r.yaml:", "data.csv is a file, not a folder"],
    ),
    "check: a cache that is a file": (
        "check", "causal_lm", {"teacher": "lm", "cache": "data.csv"}, {}, [], 2,
        ["distill.cache` (r.yaml:", "data.csv is a file, not a folder"],
    ),
    "check: a cache that is a model": (
        "check", "causal_lm", {"teacher": "lm", "cache": "classifier"}, {}, [], 2,
        ["distill.cache` (r.yaml:", "classifier contains other files", "choose another folder"],
    ),
    "a cache that is a model": (
        "teach", "causal_lm", {"teacher": "lm", "cache": "classifier"}, {}, [], 2,
        ["distill.cache` (r.yaml:", "classifier contains other files", "choose another folder"],
    ),
    "misspelt key of a teacher": (
        "distill", "seq_cls", {"teacher": {"name": "classifier", "quantise": "nf4"}}, {}, [], 2,
        ["line", "distill.teacher.quantise: unknown key; did you mean `quantize`?"],
    ),
    "misspelt key of a second teacher": (
        "distill", "seq_cls", routed(wieght=2), {}, [], 2,
        ["line", "distill.teachers.1.wieght: unknown key; did you mean `weight`?"],
    ),
    "misspelt key of a loss": (
        "distill", "seq_cls", {"teacher": "classifier", "losses": [{"kind": "forward_kl", "wait": 1}]}, {}, [], 2,
        ["distill.losses.0.wait: unknown key; did you mean `weight`?"],
    ),
    "misspelt loss": (
        "distill", "seq_cls", {"teacher": "classifier", "losses": ["forwardkl"]}, {}, [], 2,
        ["distill.losses.0.kind", "did you mean `forward_kl`?"],
    ),
    "misspelt key of the student": (
        "distill", "seq_cls", {"teacher": "classifier", "student_init": {"nlayers": 1}}, {}, [], 2,
        ["distill.student_init.nlayers: unknown key; did you mean `layers`?"],
    ),
    "misspelt key of the targets": (
        "distill", "seq_cls", {"teacher": "classifier", "cache": "new", "targets": {"fil": "topk"}}, {}, [], 2,
        ["distill.targets.fil: unknown key; did you mean `fill`?"],
    ),
    "misspelt key": (
        "distill", "seq_cls", {"teacher": "classifier", "temprature": 2}, {}, [], 2,
        ["distill.temprature: unknown key; did you mean `temperature`?"],
    ),
    "targets of no cache": (
        "distill", "seq_cls", {"teacher": "classifier", "targets": {"k": 2}}, {}, [], 2,
        ["distill.targets: has no effect without distill.cache"],
    ),
    "override: unknown teacher": (
        "distill", "seq_cls", {"teacher": "classifier"}, {}, ["distill.teacher=runs/x"], 2,
        ["distill.teacher.name` (command line)", "'runs/x'"],
    ),
    "override: a key beside a name": (
        "distill", "seq_cls", {"teacher": "others"}, {},
        ["distill.teacher=classifier", "distill.teacher.quantize=nf3"], 2,
        ["1 problem", "command line", "distill.teacher.quantize", "did you mean `nf4`?"],
    ),
    "override: a teacher and teachers": (
        "distill", "seq_cls", {"teacher": "classifier"}, {}, ["distill.teacher=classifier", "distill.teachers=[classifier]"], 2,
        ["command line", "distill.teacher: set either teacher or teachers"],
    ),
    "override: none left": (
        "distill", "seq_cls", {"teacher": "classifier"}, {}, ["distill.teacher="], 2, ["has no teacher"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_distill_mistake_gives_one_message(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    verb, task, distill, sections, overrides, code, parts = CASES[name]
    before = files(here)
    recipe = write(here, task, **({"distill": distill} if distill else {}), **sections)
    assert_error(capsys, cli([verb, recipe, *overrides]), code, parts)
    assert files(here) == before, "something was left or changed"


def assert_error(capsys: pytest.CaptureFixture[str], exit_code: int, code: int, parts: list[str]) -> None:
    out, err = capsys.readouterr()
    assert exit_code == code, err
    assert "Traceback" not in err + out
    message = " ".join(err[err.index("error:") :].split())
    assert message.count("error:") == 1
    for part in parts:
        assert part in message, message
    assert not re.search(r"[0-9a-f]{20}", message), "a hash for nobody"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_teacher(folder: Path) -> None:
    flip(folder / "lm/model.safetensors", -3)


def change_data(folder: Path) -> None:
    with (folder / "data.csv").open("a") as file:
        file.write("green 1,colour\n")


def damage_shard(folder: Path) -> None:
    flip(folder / "cache/train-00000.bin", 50)


def remove_shard(folder: Path) -> None:
    (folder / "cache/train-00000.bin").unlink()


def begin(folder: Path) -> None:
    """Leaves the cache as a kill before the last file does."""
    document = json.loads((folder / "cache/manifest.json").read_text())
    (folder / "cache/manifest.json").unlink()
    begun = {name: document[name] for name in ("format", "version", "fill", "identity")}
    (folder / "cache/capture.json").write_text(json.dumps({**begun, "splits": {"train": 22}}))


def begin_with_other_data(folder: Path) -> None:
    begin(folder)
    change_data(folder)


def damage_capture(folder: Path) -> None:
    begin(folder)
    (folder / "cache/capture.json").write_text("{")


def damage_manifest(folder: Path) -> None:
    (folder / "cache/manifest.json").write_text("{")


# name: change of the files, recipe sections that differ from those of the cache, parts of the message
STALE: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any], list[str]]] = {
    "other data": (change_data, {}, ["made for other data"]),
    "another teacher": (change_teacher, {}, ["made by another teacher"]),
    "another storage": (
        None,
        {"distill": {"teacher": {"name": "lm", "dtype": "bfloat16"}}},
        ["in another storage", "bfloat16"],
    ),
    "another tokenizer": (
        None,
        {"model": {"name": "reversed"}, "distill": {"teacher": "reversed"}},
        ["made with another tokenizer"],
    ),
    "another template": (
        None,
        {"data": {"template": {**TEMPLATE, "user": "{text}!"}}},
        ["made with another template or other columns"],
    ),
    "another truncation": (
        None,
        {"data": {"max_length": 100}},
        ["another truncation: max_length is 512 in the cache, 100"],
    ),
    "another split": (None, {"data": {"eval_rows": 5}}, ["made for another split of the data"]),
    "another temperature": (None, {"distill": {"temperature": 2.0}}, ["temperature is 1.0 in the cache, 2.0 here"]),
    "another k": (None, {"distill": {"targets": {"k": 8}}}, ["k is 50 in the cache, 8 here"]),
    "other targets": (
        None,
        {"distill": {"targets": {"fill": "hidden"}}},
        ["fill is 'topk' in the cache, 'hidden' here"],
    ),
    "other data, and begun": (begin_with_other_data, {}, ["unfinished teacher cache in cache", "made for other data"]),
    "another temperature, and begun": (
        begin,
        {"distill": {"temperature": 2.0}},
        ["unfinished teacher cache in cache", "temperature is 1.0 in the cache, 2.0 here"],
    ),
    "a damaged begin": (damage_capture, {}, ["damaged: capture.json cannot be read"]),
    "a damaged shard": (damage_shard, {}, ["damaged: train-00000.bin", "restore the file"]),
    "no shard": (remove_shard, {}, ["damaged: train-00000.bin is missing"]),
    "a damaged manifest": (damage_manifest, {}, ["damaged: manifest.json cannot be read"]),
}


@pytest.mark.parametrize("name", STALE)
def test_distill_cache_mismatch_is_refused_by_all_verbs(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """All verbs give the same message, and its advice works."""
    change, sections, parts = STALE[name]
    if change:
        change(here)
    sections = {
        **sections,
        "distill": {"teacher": "lm", "cache": "cache", "baseline": False, **sections.get("distill", {})},
    }
    recipe, before = write(here, "causal_lm", **sections), files(here)
    for verb in ("check", "teach", "distill"):
        expected = ["distill.cache` (r.yaml:", "peftlab teach --replace", *parts]
        assert_error(capsys, cli([verb, recipe]), 5, expected)
        assert files(here) == before
    assert cli(["teach", recipe, "--replace"]) == 0
    assert cli(["check", recipe]) == 0


def test_distill_completes_an_interrupted_cache(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a kill before the last file, distill reuses what is stored and adds the rest."""
    begin(here)
    written = (here / "cache/train-00000.bin").stat().st_mtime_ns
    recipe = write(here, "causal_lm", distill={"teacher": "lm", "cache": "cache", "baseline": False})
    assert cli(["check", recipe]) == 0
    assert "cache: cache, not complete" in capsys.readouterr().out
    assert cli(["distill", recipe]) == 0
    assert "22 of 22 examples are already stored" in capsys.readouterr().err
    assert (here / "cache/train-00000.bin").stat().st_mtime_ns == written
    assert (here / "cache/manifest.json").is_file() and (here / "mine/student/config.json").is_file()


def test_distill_teacher_with_reordered_labels_gives_the_same_student(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher equals the model whose head has the rows swapped."""
    from safetensors.torch import load_file, save_file

    weights = load_file(here / "classifier/model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, here / "permuted/model.safetensors", metadata={"format": "pt"})
    cards = []
    for teacher in ("classifier", "permuted"):
        recipe = write(here, "seq_cls", distill={"teacher": teacher, "baseline": False}, run={"dir": f"of-{teacher}"})
        assert cli(["distill", recipe, "--json"]) == 0
        cards.append(json.loads(capsys.readouterr().out)["card"]["metrics"])
    assert (here / "of-classifier/student/model.safetensors").read_bytes() == (
        here / "of-permuted/student/model.safetensors"
    ).read_bytes()
    assert cards[0] == cards[1]


def test_distill_teacher_self_with_reordered_labels_answers_in_their_order(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault: ``self`` answered in the order of its own head."""
    recipe = write(here, "seq_cls", model={"name": "permuted"}, distill={"teacher": "self", "baseline": False})
    assert cli(["distill", recipe, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["card"]["metrics"]}
    other = write(here, "seq_cls", model={"name": "permuted"}, distill={"teacher": "permuted", "baseline": False})
    assert cli(["distill", other, "run.dir=other", "--json"]) == 0
    others = {row["name"]: row for row in json.loads(capsys.readouterr().out)["card"]["metrics"]}
    assert rows["loss"] == others["loss"]


def test_check_reports_teacher_student_and_cache(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"teacher": "lm", "cache": "cache", "student_init": {"num_layers": 1}, "seeds": 2}
    recipe = write(here, "causal_lm", distill=changes)
    assert cli(["check", recipe]) == 0
    out = capsys.readouterr().out
    assert "teacher: lm (90,688 parameters)\n" in out
    assert re.search(r"\ncache: cache, 2\d examples, [\d.]+ [kM]?B\n", out), out
    assert (
        "student: 1 of 2 layers of tiny:llama (53,696 parameters), and a baseline on the labels alone, with 2 seeds"
        in out
    )
    assert cli(["check", recipe, "distill.cache=new", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["distill"]
    assert report["teachers"] == [
        {"name": "lm", "num_parameters": 90_688, "cache": {"folder": "new", "examples": None, "begun": False}}
    ]
    assert report["student"]["num_parameters"] == 53_696
    assert not (here / "new").exists()
    assert cli(["check", write(here, "causal_lm"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distill"] is None
    assert "larger" not in out
    assert cli(["check", write(here, "causal_lm", model={"name": "longer"}, distill={"teacher": "lm"})]) == 0
    assert "\nthe student is larger than its teacher\n" in capsys.readouterr().out


def test_check_counts_the_parameters_of_a_random_student(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fault: widths required an architecture whose weights can be cut, though random weights keep none."""
    init = {"weights": "random", "hidden_size": 32, "intermediate_size": 64}
    recipe = write(here, "seq_cls", adapter={"rank": 8, "method": "none"}, distill={"teacher": "classifier"})
    data = {"train": "sklearn:digits:train#50", "eval": "sklearn:digits:test"}
    digits = {
        **yaml.safe_load(Path(recipe).read_text()),
        "task": "image_cls",
        "model": {"name": "tiny:vit"},
        "data": data,
    }
    train = {**digits, "distill": None, "run": {"dir": "teacher"}, "adapter": {"method": "none"}}
    Path(recipe).write_text(yaml.safe_dump(train))
    assert cli(["train", recipe]) == 0
    capsys.readouterr()
    distilling = {"teacher": "teacher", "student_init": init}
    Path(recipe).write_text(yaml.safe_dump({**train, "run": {"dir": "mine"}, "distill": distilling}))
    assert cli(["check", recipe, "--json"]) == 0
    num_parameters = json.loads(capsys.readouterr().out)["distill"]["student"]["num_parameters"]
    assert cli(["distill", recipe, "distill.baseline=false", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["card"]["costs"]
    assert num_parameters == costs["student"]["num_parameters"] < costs["teacher"]["num_parameters"]


@pytest.mark.parametrize(
    ("distill", "key", "name"),
    [
        ({"teacher": "run"}, "distill.teacher.name", "run"),
        (
            {"teachers": [{"name": "lm"}, {"name": "lm", "adapter": "run/adapter"}]},
            "distill.teachers.1.adapter",
            "run/adapter",
        ),
        ({"teacher": "lm", "cache": "run/answers"}, "distill.cache", "run/answers"),
    ],
)
def test_replace_refuses_to_remove_what_the_recipe_reads(
    here: Path, capsys: pytest.CaptureFixture[str], distill: dict[str, Any], key: str, name: str
) -> None:
    """The fault: --replace removed the run folder, and the teacher with it, before the teacher was loaded."""
    recipe, before = write(here, "causal_lm", distill=distill, run={"dir": "run"}), files(here)
    parts = [f"{key}` (r.yaml:", f"{name} is in the run folder run, which --replace overwrites"]
    assert_error(capsys, cli(["distill", recipe, "--replace"]), 2, parts)
    assert files(here) == before


@pytest.mark.parametrize(
    "wrong", [{"headline": "recal_animal"}, {"student_init": {"layers": [7]}}, {"cache": "new", "targets": {"k": 3}}]
)
def test_replace_with_a_mistake_keeps_the_earlier_run(
    here: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any]
) -> None:
    """The fault: these keys were checked after the folder was removed."""
    lock(here / "mine", write(here, "seq_cls"))
    recipe, before = write(here, "seq_cls", distill={"teacher": "classifier", **wrong}), files(here)
    assert_error(
        capsys, cli(["distill", recipe, "--replace"]), 2, [f"distill.{next(iter(wrong))}".replace("cache", "targets.k")]
    )
    assert files(here) == before


def test_resume_of_a_distillation_names_peftlab_distill(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Covers an unfinished run as a teacher and a missing run. The fault: the message named `peftlab train`."""
    recipe = write(here, "seq_cls", distill={"teacher": "classifier"})
    assert_error(capsys, cli(["distill", recipe, "--resume"]), 2, ["no run to resume in mine", "peftlab distill RUN"])
    lock(here / "first", recipe)
    assert_error(capsys, cli(["train", "first", "--resume"]), 2, ["this recipe names a teacher; run peftlab distill"])
    recipe = write(here, "seq_cls", distill={"teacher": "first"})
    parts = [TEACHER, "the run in first has no student yet; continue it with: peftlab distill first --resume"]
    assert_error(capsys, cli(["distill", recipe]), 5, parts)


def test_merge_of_a_distillation_names_the_student(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fault: the message named a folder `model`, which a distillation does not write."""
    lock(here / "first", write(here, "seq_cls", distill={"teacher": "classifier"}))
    shutil.copytree("classifier", "first/student")
    assert_error(capsys, cli(["merge", "first"]), 2, ["no adapter to merge: first/student is its trained model"])


def test_teach_proposes_distill_with_the_same_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(here, "seq_cls", distill={"teacher": "classifier"})
    assert cli(["teach", recipe, "distill.cache=my answers"]) == 0
    assert "\nnext     peftlab distill r.yaml 'distill.cache=my answers'\n" in capsys.readouterr().out


def test_check_accepts_the_cache_of_on_policy_phases(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "phases/phase-1-0123").mkdir(parents=True)
    recipe = write(here, "causal_lm", distill={"teacher": "lm", "cache": "phases", "on_policy": {"phases": 1}})
    assert cli(["check", recipe]) == 0
    assert "cache: phases, empty" in capsys.readouterr().out


def test_check_accepts_transfer_rows_without_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(here, "seq_cls", distill={"teacher": "classifier", "transfer": "more.csv"})
    assert cli(["check", recipe]) == 0
    out = capsys.readouterr().out
    assert "data: more.csv, rows of data.train held out" in out and "ready to train" in out


@pytest.mark.parametrize("cached", [False, True])
def test_distill_teacher_can_get_its_head_from_an_adapter(here: Path, cached: bool) -> None:
    """The files of the encoder have no head. The run's adapter has one."""
    model = {"name": "headless"}
    assert cli(["train", write(here, "seq_cls", model=model, run={"dir": "adapted"})]) == 0
    distilling = {"teacher": "adapted", **({"cache": "answers"} if cached else {})}
    assert cli(["distill", write(here, "seq_cls", model=model, distill=distilling)]) == 0
    rows = json.loads((here / "mine/run.json").read_text())["card"]["metrics"]
    teacher = next(row["teacher"]["value"] for row in rows if row["name"] == "loss")
    assert teacher == pytest.approx(json.loads((here / "adapted/run.json").read_text())["after"]["loss"], rel=1e-5)
