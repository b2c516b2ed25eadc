"""An assembly finds what its recipe names once. A derived assembly shares exactly what its changes do not touch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftlab
from peftlab.assembly import Assembly
from peftlab.assembly import assembly as assembly_module
from peftlab.errors import RecipeError
from peftlab.models import fingerprints, load_tokenizer, tokenizer_fingerprint
from peftlab.recipe import load_recipe
from peftlab.training.progress import SilentProgress

LINES = [{"text": f"{word} number {i}", "kind": kind} for i in range(12) for word, kind in
         (("cat", "animal"), ("red", "colour"), ("dog", "animal"), ("seven", "number"))]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, lines in (("a", LINES), ("b", LINES[:30]), ("c", LINES[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    return tmp_path


def classifier(**sections: Any) -> dict[str, Any]:
    data = {"train": "a.jsonl", "columns": {"label": "kind"}}
    return {"task": "seq_cls", "model": {"name": "tiny:bert"}, "data": data, "run": {"device": "cpu"}, **sections}


def writer(**sections: Any) -> dict[str, Any]:
    template = {"user": "{text}", "assistant": "{kind}"}
    data = {"train": "a.jsonl", "template": template}
    return {"task": "causal_lm", "model": {"name": "tiny:llama"}, "data": data, "run": {"device": "cpu"}, **sections}


def all_of(assembly: Assembly) -> dict[str, Any]:
    """Everything that an assembly finds, as plain values."""

    def rows(encoded: Any) -> list[Any]:
        return [
            (e.row, e.ids.tolist(), e.weight, e.label, None if e.trained is None else e.trained.tolist())
            for e in encoded.examples
        ]

    return {
        "model": assembly.pretrained,
        "classes": assembly.task.class_names,
        "limit": assembly.limit,
        "data": (assembly.data.fingerprints, len(assembly.data.train), len(assembly.data.labelled)),
        "train": rows(assembly.train),
        "held out": rows(assembly.held_out),
        "metrics": assembly.metrics,
        "fingerprints": assembly.fingerprints,
    }


def test_assembly_finds_each_thing_once_for_all_derived_assemblies(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("load_data", "find_pretrained", "load_tokenizer", "task_class", "read_class_labels"):
        right = getattr(assembly_module, name)
        monkeypatch.setattr(
            assembly_module, name, lambda *a, _right=right, _name=name, **k: (calls.append(_name), _right(*a, **k))[1]
        )
    assembly = Assembly(load_recipe(classifier()))
    arms = [assembly.derive({"run.seed": i, "data.seed": 0, "train.max_steps": 3 + i}) for i in range(5)]
    for one in (assembly, assembly, *arms):
        all_of(one)
    assert sorted(calls) == sorted(
        ["load_data", "find_pretrained", "load_tokenizer", "task_class", "read_class_labels"]
    )
    assert all(arm.train is assembly.train and arm.task is assembly.task for arm in arms)


def test_assembly_fingerprint_of_a_tokenizer_does_not_change_with_encoding(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding turns off the truncation that a tokenizer's file sets. MiniLM's file sets it."""

    def truncating(*args: Any, **options: Any) -> Any:
        tokenizer = load_tokenizer(*args, **options)
        tokenizer.backend_tokenizer.enable_truncation(16)
        return tokenizer

    monkeypatch.setattr(assembly_module, "load_tokenizer", truncating)
    assembly = Assembly(load_recipe(classifier()))
    expected = tokenizer_fingerprint(truncating(assembly.pretrained))
    assert len(assembly.train.examples) > 0
    assert tokenizer_fingerprint(assembly.reader) != expected, "this tokenizer does not show the fault"
    assert assembly.fingerprints["tokenizer"] == expected
    again = assembly.derive({"model.chat_template": None, "run.seed": 3})
    assert again.fingerprints["tokenizer"] == expected


CHANGES: list[tuple[Any, dict[str, Any]]] = [
    (classifier, {"data.train": "b.jsonl"}),
    (classifier, {"data.eval": "c.jsonl"}),
    (classifier, {"data.eval_fraction": 0.5}),
    (classifier, {"data.eval_rows": 5}),
    (classifier, {"data.seed": 7}),
    (classifier, {"run.seed": 7}),
    (classifier, {"data.exclude": {"kind": ["number"]}}),
    (classifier, {"data.balance": True}),
    (classifier, {"data.label_names": {"animal": "beast", "colour": "hue", "number": "sum"}}),
    (classifier, {"data.columns": {"label": "kind", "text": "kind"}}),
    (classifier, {"data.max_length": 8, "data.too_long": "truncate"}),
    (classifier, {"train.class_weights": "balanced"}),
    (classifier, {"eval.metrics": ["accuracy"]}),
    (writer, {"data.template": {"prompt": "{text}:", "completion": " {kind}"}}),
    (writer, {"data.columns": {"label": "kind"}}),
    (writer, {"model.chat_template": "template.jinja", "data.allow": ["untrained_terminator"]}),
    (writer, {"eval.choices": ["animal", "colour", "number"]}),
    (writer, {"data.packing": True}),
    (writer, {"data.max_length": 200}),
    (writer, {"run.kernels": "reference"}),
]


@pytest.mark.parametrize(
    ("make", "changes"), CHANGES, ids=lambda value: value.__name__ if callable(value) else ",".join(value)
)
def test_derived_assembly_equals_a_new_one(files: Path, make: Any, changes: dict[str, Any]) -> None:
    base = Assembly(load_recipe(make()))
    before = all_of(base)
    derived = base.derive(changes)
    assert all_of(derived) == all_of(Assembly(derived.loaded))
    assert all_of(base) == before


def test_derived_assembly_comparison_catches_a_forgotten_dependency(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deliberate fault in the test above: the split no longer depends on the seed."""
    monkeypatch.setattr(
        Assembly, "_data_key", property(lambda self: [self.recipe.task, self.recipe.data.model_dump(exclude={"seed"})])
    )
    base = Assembly(load_recipe(classifier()))
    all_of(base)
    derived = base.derive({"data.seed": 7})
    assert all_of(derived) != all_of(Assembly(derived.loaded))


def test_derive_checks_the_changed_recipe(files: Path) -> None:
    assembly = Assembly(load_recipe(classifier()))
    with pytest.raises(RecipeError, match=r"data\.packing: has no effect for task: seq_cls"):
        assembly.derive({"data.packing": True})
    with pytest.raises(RecipeError, match="below"):
        assembly.derive({"data.eval_fraction": 1.5})


def test_assembly_without_teachers_has_no_distill(files: Path) -> None:
    with pytest.raises(RecipeError, match="has no section distill"):
        _ = Assembly(load_recipe(classifier())).distill


def test_check_reads_no_weights(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"max_steps": 1}
    peftlab.train(
        writer(train=train, run={"device": "cpu", "dir": "run", "merge": "original"}), progress=SilentProgress()
    )

    def read(paths: list[Path]) -> str:
        raise AssertionError(f"{paths} are read")

    monkeypatch.setattr("peftlab.models.source.weights_fingerprint", read)
    recipe = writer()
    recipe["model"] = {"name": "run/merged"}
    assert peftlab.check(recipe, progress=SilentProgress())["ok"]


def test_weights_fingerprint_hashes_unchanged_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    right, read = fingerprints.sha256_of_files, []
    monkeypatch.setattr(fingerprints, "sha256_of_files", lambda paths: (read.append(paths), right(paths))[1])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(np.arange(100).tobytes())
    first = fingerprints.weights_fingerprint([weights], cached_from=0)
    assert fingerprints.weights_fingerprint([weights], cached_from=0) == first == right([weights]) and len(read) == 1
    weights.write_bytes(np.arange(1, 101).tobytes())
    assert fingerprints.weights_fingerprint([weights], cached_from=0) not in (first, "") and len(read) == 2
    (tmp_path / "cache" / "file-hashes.json").write_text("{damaged")
    assert fingerprints.weights_fingerprint([weights], cached_from=0) == right([weights])
    monkeypatch.setenv("PEFTLAB_CACHE", "/proc/no-such-folder")  # no cache can be written there
    assert fingerprints.weights_fingerprint([weights], cached_from=0) == right([weights])
