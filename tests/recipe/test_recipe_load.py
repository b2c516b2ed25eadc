"""Loading, overrides and every message about a wrong recipe (contract C1)."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import DataError, RecipeError
from peftlab.recipe import load_recipe
from peftlab.recipe import shipped as catalog
from peftlab.recipe.keys import _FOREIGN_NAMES, known_keys, nearest_keys, spec_at
from peftlab.recipe.yaml_lines import dump_yaml
from peftlab.specs.tasks import COLUMNS, TASKS

GOOD = """\
# A recipe.
task: seq_cls
model:
  name: tiny:bert
data:
  train: spam.csv
  columns: {text: body, label: is_spam}
train:
  lr: 1e-4
"""
BASE: dict[str, Any] = {"task": "causal_lm", "model": {"name": "tiny:llama"}, "data": {"train": "a.csv"}}

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "sms-spam.yaml").write_text(GOOD, encoding="utf-8")
    (folder / "chat-style.yaml").write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(catalog, "_folder", lambda: folder)
    return folder


def message(source: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def with_section(section: str, **settings: Any) -> dict[str, Any]:
    return BASE | {section: BASE.get(section, {}) | settings}


# What loads


def test_load_recipe_gives_settings_and_their_lines(write: Write) -> None:
    path = write(GOOD)
    loaded = load_recipe(path)
    assert loaded.recipe.train.lr == 1e-4
    assert loaded.recipe.data.columns == {"text": "body", "label": "is_spam"}
    assert (loaded.name, loaded.path) == ("recipe", path)
    assert loaded.origins["train.lr"] == "recipe.yaml:9"
    assert loaded.origins["data.columns.label"] == "recipe.yaml:7"
    assert load_recipe(str(path)) == loaded


def test_where_falls_back_to_the_parent(write: Write) -> None:
    loaded = load_recipe(write(GOOD), ["adapter.targets=[q_proj, v_proj]"])
    assert loaded.where("train.lr") == "recipe.yaml:9"
    assert loaded.where("train.epochs") == "recipe.yaml:8"
    assert loaded.where("adapter.targets.1") == "command line"
    assert loaded.where("adapter.rank") == "command line"
    assert loaded.where("eval.every") is None


def test_locate_puts_key_and_line_in_front(write: Write) -> None:
    loaded = load_recipe(write(GOOD))
    located = loaded.locate(DataError("no column 'body'", key="data.columns.text"))
    assert type(located) is DataError
    assert str(located) == "`data.columns.text` (recipe.yaml:7): no column 'body'"
    assert str(loaded.locate(located)) == str(located)
    assert str(loaded.locate(DataError("too few", key="eval.every"))) == "`eval.every`: too few"
    keyless = DataError("no rows")
    assert loaded.locate(keyless) is keyless


def test_load_recipe_copies_a_dict_without_origins(tmp_path: Path) -> None:
    settings = BASE | {"data": {"train": tmp_path / "a.csv"}, "train": {"betas": (0.9, 0.95)}}
    loaded = load_recipe(settings, ["train.lr=1"])
    assert (loaded.name, loaded.path, loaded.origins) == (
        "recipe",
        None,
        {"train.lr": "command line"},
    )
    assert loaded.recipe.data.train == str(tmp_path / "a.csv")
    assert settings["train"] == {"betas": (0.9, 0.95)}


def test_load_recipe_takes_a_shipped_name(shipped: Path) -> None:
    loaded = load_recipe("sms-spam")
    assert (loaded.name, loaded.path) == ("sms-spam", shipped / "sms-spam.yaml")
    assert loaded.where("train.lr") == "sms-spam.yaml:9"


def test_load_recipe_prefers_a_file_to_a_shipped_name_but_no_folder(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sms-spam").mkdir()
    assert load_recipe("sms-spam").path == shipped / "sms-spam.yaml"
    (tmp_path / "chat-style").write_text(GOOD, encoding="utf-8")
    assert load_recipe("chat-style").path == Path("chat-style")


def test_load_recipe_keeps_the_name_stored_in_a_lock(write: Write) -> None:
    assert load_recipe(write(GOOD + "lock: {name: spam-run, anything: [1]}\n")).name == "spam-run"
    assert load_recipe(write(GOOD + "lock: {anything: 1}\n")).name == "recipe"


def test_load_recipe_removes_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load_recipe(path).recipe.task == "seq_cls"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E-5", 2e-5),
        (".5", 0.5),
        ("1", 1.0),
        ("+3.0e+0", 3.0),
        ("0x10", 16.0),
        ("0o17", 15.0),
        ("010", 10.0),
        ('"1e-3"', 1e-3),
        ("!!float 1", 1.0),
    ],
)
def test_numbers_follow_yaml_1_2(text: str, value: float) -> None:
    assert load_recipe(BASE, [f"train.lr={text}"]).recipe.train.lr == value


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "N", "2024-01-01", "1:30", "1_000", "=", "<<", "none"])
def test_words_that_yaml_1_1_would_convert_stay_text(text: str) -> None:
    assert load_recipe(BASE, [f"model.revision={text}"]).recipe.model.revision == text


def test_keys_stay_text_as_written(write: Write) -> None:
    names = load_recipe(write(GOOD + "  epochs: 1\n"), ["data.label_names={0: no, 1.0: yes, true: maybe, ~: none}"])
    assert names.recipe.data.label_names == {"0": "no", "1.0": "yes", "true": "maybe", "~": "none"}


def test_overrides_read_booleans_and_null() -> None:
    recipe = load_recipe(BASE, ["run.deterministic=false", "adapter.dora=true", "run.dir=", "data.max_length=~"]).recipe
    assert (recipe.run.deterministic, recipe.adapter.dora) == (False, True)
    assert (recipe.run.dir, recipe.data.max_length) == (None, None)


# Overrides


def test_overrides_replace_and_the_last_one_wins(write: Write) -> None:
    overrides = [
        "train.lr=1e-3",
        "adapter.targets=[q_proj,v_proj]",
        "data.columns.text=subject",
        "run.dir=",
        "train.lr=1",
    ]
    loaded = load_recipe(write(GOOD), overrides)
    assert loaded.recipe.train.lr == 1
    assert loaded.recipe.adapter.targets == ["q_proj", "v_proj"]
    assert loaded.recipe.data.columns == {"text": "subject", "label": "is_spam"}
    assert loaded.where("train.lr") == loaded.where("data.columns.text") == "command line"
    assert loaded.where("data.columns.label") == "recipe.yaml:7"


def test_override_of_a_whole_section_drops_its_lines(write: Write) -> None:
    loaded = load_recipe(write(GOOD), ["train={max_steps: 3}"])
    assert (loaded.recipe.train.max_steps, loaded.recipe.train.lr) == (3, 2e-4)
    assert loaded.where("train.lr") == "command line"


def test_override_takes_a_name_with_a_dot_in_a_free_mapping() -> None:
    settings = BASE | {"task": "seq_cls"}
    loaded = load_recipe(settings, ["train.class_weights.not.spam=2", "data.label_names.0.5=half"])
    assert loaded.recipe.train.class_weights == {"not.spam": 2.0}
    assert loaded.recipe.data.label_names == {"0.5": "half"}


TEACHERS = {"teachers": [{"name": "a"}, {"name": "b"}]}
CUT = {"teacher": "a", "student_init": {"num_layers": 2}}
ALTERNATIVES: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    # settings of the file, override, values then, what the note names
    ({"data": {"eval_rows": 12}}, "data.eval=o.csv", {"data.eval": "o.csv", "data.eval_rows": None}, "data.eval_rows"),
    (
        {"data": {"eval_fraction": 0.3}},
        "data.eval=o.csv",
        {"data.eval": "o.csv", "data.eval_fraction": 0.1},
        "data.eval_fraction",
    ),
    ({"data": {"eval": "o.csv"}}, "data.eval_rows=5", {"data.eval": None, "data.eval_rows": 5}, "data.eval"),
    ({"data": {"eval": "o.csv"}}, "data.eval_fraction=0.5", {"data.eval": None}, "data.eval"),
    (
        {"data": {"eval_rows": 12}},
        "data.eval_fraction=0.5",
        {"data.eval_rows": None, "data.eval_fraction": 0.5},
        "data.eval_rows",
    ),
    (
        {"data": {"label_names": {0: "a"}}},
        "data.bins={edges: [1], names: [a, b]}",
        {"data.label_names": {}},
        "data.label_names",
    ),
    (
        {"data": {"bins": {"edges": [1], "names": ["a", "b"]}}},
        "data.label_names={0: a}",
        {"data.bins": None},
        "data.bins",
    ),
    ({"train": {"epochs": 2}}, "train.max_steps=3", {"train.epochs": None, "train.max_steps": 3}, "train.epochs"),
    ({"train": {"max_steps": 3}}, "train.epochs=2", {"train.epochs": 2, "train.max_steps": None}, "train.max_steps"),
    ({"train": {"batch_tokens": 64}}, "train.batch_size=4", {"train.batch_tokens": None}, "train.batch_tokens"),
    ({"train": {"batch_size": 4}}, "train.batch_tokens=64", {"train.batch_size": None}, "train.batch_size"),
    ({"distill": TEACHERS}, "distill.teacher=c", {"distill.teachers": []}, "distill.teachers"),
    ({"distill": {"teacher": "c"}}, "distill.teachers=[a, b]", {"distill.teacher": None}, "distill.teacher"),
    (
        {"distill": CUT},
        "distill.student_init.layers=[0]",
        {"distill.student_init.num_layers": None},
        "distill.student_init.num_layers",
    ),
]


@pytest.mark.parametrize(("sections", "override", "values", "named"), ALTERNATIVES)
def test_override_replaces_the_keys_that_exclude_it(
    tmp_path: Path, sections: dict[str, Any], override: str, values: dict[str, Any], named: str
) -> None:
    settings = BASE | {"task": "seq_cls"} | {name: BASE.get(name, {}) | keys for name, keys in sections.items()}
    (tmp_path / "r.yaml").write_text(dump_yaml(settings))
    line = next(
        n for n, text in enumerate(dump_yaml(settings).splitlines(), 1) if text.strip().startswith(named.split(".")[-1])
    )
    loaded = load_recipe(tmp_path / "r.yaml", [override])
    key = override.partition("=")[0]
    assert loaded.notes == (f"{key} on the command line replaces {named} (r.yaml:{line})",)
    for name, value in values.items():
        assert functools.reduce(getattr, name.split("."), loaded.recipe) == value
    assert load_recipe(tmp_path / "r.yaml").notes == ()


def test_override_replaces_the_other_style_of_a_template() -> None:
    settings = {
        "task": "causal_lm",
        "model": {"name": "tiny:llama"},
        "data": {"train": "a.csv", "template": {"system": "s", "user": "{a}", "assistant": "{b}"}},
    }
    loaded = load_recipe(settings, ["data.template.prompt='{a}'", "data.template.completion='{b}'"])
    assert loaded.recipe.data.template is not None
    assert loaded.recipe.data.template.model_dump(exclude_none=True) == {"prompt": "{a}", "completion": "{b}"}
    names = ", ".join(f"data.template.{name}" for name in ("system", "user", "assistant"))
    assert loaded.notes == (f"data.template.prompt on the command line replaces {names} (the recipe)",)


def test_override_with_two_keys_that_exclude_each_other_is_refused(write: Write) -> None:
    text = message(write(GOOD), "data.eval=o.csv", "data.eval_rows=5")
    assert "data.eval_rows: has no effect when data.eval is given" in text
    text = message(write(GOOD), "train.epochs=1", "train.max_steps=5")
    assert "set epochs or max_steps, not both" in text


def test_override_with_null_replaces_nothing() -> None:
    loaded = load_recipe(BASE | {"train": {"epochs": 2}}, ["train.max_steps=", "data.eval=~"])
    assert (loaded.recipe.train.epochs, loaded.notes) == (2, ())


def test_override_may_drop_the_lock() -> None:
    assert load_recipe(BASE | {"lock": {"name": "x"}}, ["lock="]).recipe.lock is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr", ["1 problem in recipe.yaml:", "  command line  train.lr: expected section.key=value"]),
        ("learning_rate", ["expected section.key=value", "did you mean `train.lr`?"]),
        ("train.lrr=1", ["command line  train.lrr: unknown key; did you mean `lr`? (keys of train: epochs,"]),
        ("trian.lr=1", ["command line  trian: unknown key; did you mean `train`? (top-level keys: task,"]),
        ("lr=1", ["command line  lr: unknown key; did you mean `train.lr`?"]),
        ("train.lr.x=1", ["command line  train.lr: expected a number above 0, found a mapping"]),
        ("data.columns.txt=a", ["command line  data.columns.txt: unknown key; did you mean `text`?"]),
        ("train.lr=fast", ["command line  train.lr: expected a number above 0, found 'fast'"]),
        (
            "adapter.targets=[q",
            ["command line  adapter.targets: '[q' is not valid YAML; check its brackets and quotes"],
        ),
        ("train.betas={a: 1, a: 2}", ["command line  train.betas.a: duplicate key"]),
        ("=3", ["command line  =3: expected section.key=value, such as train.lr=1e-3"]),
    ],
)
def test_overrides_that_are_wrong_are_reported(write: Write, override: str, parts: list[str]) -> None:
    text = message(write(GOOD), override)
    assert all(part in text for part in parts), text


def test_override_does_not_hide_a_damaged_section(write: Write) -> None:
    text = message(write(GOOD.replace("train:\n  lr: 1e-4", "train: 5")), "train.lr=1")
    assert "line 8  train: expected a section with the keys epochs," in text
    assert "found 5" in text


# Files that are no recipe


def test_load_recipe_refuses_an_unknown_path_or_name(shipped: Path) -> None:
    assert message("sms-spm") == (
        "`sms-spm` is neither a file nor the name of a shipped recipe; did you mean `sms-spam`? "
        "`peftlab recipes` lists the shipped recipes"
    )
    assert "did you mean `sms-spam`?" in message(Path("folder/sms-spam.yaml"))
    assert "recipe; `peftlab recipes` lists" in message("qqq")
    assert "neither a file" in message("a\0b")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty; expected sections such as `task:`"]),
        ("# only a comment\n", ["is empty"]),
        ("- task\n- model\n", ["expected sections such as `task:`", "found a list"]),
        ("causal_lm\n", ["found a single value"]),
        ("task: causal_lm\nmodel: {name: a\n", ["recipe.yaml, line 3, column 1: not valid YAML: "]),
        ("task: causal_lm\nmodel: a: b\n", ["recipe.yaml, line 2, column 9: not valid YAML: ", "\n    model: a: b"]),
        ("model:\n\tname: a\n", ["recipe.yaml, line 2, column ", "; indent with spaces, not tabs"]),
        ("task: a\n---\ntask: b\n", ["line 2, column 1", "but found another document"]),
        ("task: a\x01b\n", ["recipe.yaml, line 1, column 8: not valid YAML: "]),
    ],
)
def test_load_recipe_refuses_text_that_is_no_recipe(write: Write, text: str, parts: list[str]) -> None:
    error = message(write(text))
    assert all(part in error for part in parts), error


def test_duplicate_keys_are_reported_with_both_lines(write: Write) -> None:
    text = message(write(GOOD + "  lr: 2e-4\n  lrr: 3\ntrain: {}\n"))
    assert text.startswith("3 problems in recipe.yaml:\n")
    assert "  line 10  train.lr: duplicate key, on line 9 and on line 10\n" in text
    assert "  line 11  train.lrr: unknown key; did you mean `lr`?" in text
    assert "  line 12  train: duplicate key, on line 8 and on line 12" in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "adapter: &a {rank: 4}\nrun: *a\n",
            "line 10  run: YAML aliases (*name) are not supported; write the value out",
        ),
        ("adapter: &a {rank: *a}\n", "line 10  adapter.rank: YAML aliases"),
        (
            "adapter: {rank: !!python/name:os.system x}\n",
            "adapter.rank: the YAML tag !!python/name:os.system is not supported",
        ),
        ("adapter: !mine {rank: 4}\n", "line 10  adapter: the YAML tag !mine is not supported; write a plain value"),
        ("adapter: {rank: !!int four}\n", "line 10  adapter.rank: 'four' is not a number"),
        ("adapter: {rank: !!bool 4}\n", "line 10  adapter.rank: the YAML tag !!bool is not supported"),
        ("adapter: {[a]: 4}\n", "line 10  adapter: a key must be a plain word"),
    ],
)
def test_yaml_features_without_support_are_refused(write: Write, text: str, part: str) -> None:
    error = message(write(GOOD + text))
    assert part in error


def test_load_recipe_refuses_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"task: seq_cls\nname: caf\xe9\n")
    assert message(path) == "latin.yaml, line 2: not UTF-8 text (byte 0xe9); save the file as UTF-8"


def test_load_recipe_refuses_a_folder(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path} is a folder, expected a recipe file; give a recipe file inside it"
    (tmp_path / "recipe.lock.yaml").write_text(GOOD, encoding="utf-8")
    assert message(tmp_path).endswith(f"did you mean {tmp_path / 'recipe.lock.yaml'}?")


def test_load_recipe_refuses_an_unreadable_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert message(path) == f"cannot read {path}: Permission denied"


def test_load_recipe_refuses_a_large_data_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"a" * (1 << 20) + b"b")
    assert "larger than 1 MiB: not a recipe" in message(path)


# Settings that are wrong


def test_problems_are_reported_together_in_the_order_of_the_file(write: Write) -> None:
    text = "tsk: a\ntrain:\n  lr: fast\n  lrr: 1\nmodel:\n  quantize: nf5\ndata: {train: a.csv}\n"
    lines = message(write(text), "adapter.rank=0").splitlines()
    assert lines[0] == "7 problems in recipe.yaml:"
    assert lines[1] == f"  line 1        task: missing; expected one of {', '.join(TASKS)} (what the model learns)"
    assert lines[2].startswith("  line 1        tsk: unknown key; did you mean `task`? (top-level keys: task, model, ")
    assert lines[3] == "  line 3        train.lr: expected a number above 0, found 'fast'"
    assert lines[4].startswith("  line 4        train.lrr: unknown key; did you mean `lr`? (keys of train: epochs, ")
    assert lines[5].startswith("  line 5        model.name: missing; expected text (hub id, local folder,")
    assert lines[6] == (
        "  line 6        model.quantize: expected one of none, nf4, int8, found 'nf5'; did you mean `nf4`?"
    )
    assert lines[7] == "  command line  adapter.rank: expected a whole number of at least 1, found 0"


def test_problems_of_a_dict_have_no_line() -> None:
    assert message(with_section("adapter", rank="many")) == (
        "1 problem in the recipe:\n  adapter.rank: expected a whole number of at least 1, found 'many'"
    )
    assert "  data: missing section (rows, columns and texts)" in message({"task": "seq_cls", "model": {"name": "a"}})


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        ("train", {"lr": 0}, "train.lr: expected a number above 0, found 0"),
        ("train", {"lr": None}, "train.lr: expected a number above 0, found nothing"),
        ("train", {"lr": float("inf")}, "train.lr: expected a number above 0, found inf"),
        ("train", {"lr": float("nan")}, "train.lr: expected a number above 0, found nan"),
        ("train", {"accumulate": True}, "train.accumulate: expected a whole number of at least 1, found true"),
        ("run", {"save_every": True}, "run.save_every: expected a whole number of at least 1, found true"),
        ("adapter", {"dropout": 1}, "adapter.dropout: expected a number of at least 0 and below 1, found 1"),
        ("adapter", {"rank": 1.5}, "adapter.rank: expected a whole number of at least 1, found 1.5"),
        ("adapter", {"dora": "maybe"}, "adapter.dora: expected true or false, found 'maybe'"),
        (
            "adapter",
            {"method": "lorra"},
            "found 'lorra'; did you mean `lora`?",
        ),
        ("adapter", {"targets": 5}, "adapter.targets: expected text or a list of texts, found 5; put it in quotes"),
        ("adapter", {"targets": ["a", 5]}, "adapter.targets.1: expected text, found 5; put it in quotes"),
        ("adapter", {"targets": "("}, "adapter.targets: not a valid regular expression: missing ), "),
        ("train", {"betas": [0.9]}, "train.betas: expected a list of 2 numbers, found the list [0.9]"),
        ("train", {"betas": [0.9, "x"]}, "train.betas.1: expected a number, found 'x'"),
        (
            "train",
            {"class_weights": 5},
            "class_weights: expected none, balanced or a mapping of names to numbers, found 5",
        ),
        ("train", {"class_weights": "balancd"}, "found 'balancd'; did you mean `balanced`?"),
        ("train", {"class_weights": {"a": "x"}}, "train.class_weights.a: expected a number, found 'x'"),
        ("eval", {"choices": []}, "eval.choices: expected a list of texts, at least 2, found an empty list"),
        ("eval", {"metrics": "f1"}, "eval.metrics: expected a list of texts, found 'f1'"),
        ("run", {"log": ["wandbb"]}, "run.log.0: expected one of tensorboard, wandb, trackio, found 'wandbb'"),
        ("run", {"log": "wandb"}, "run.log: expected a list of tensorboard, wandb, trackio, found 'wandb'"),
        ("data", {"columns": {"text": {"q": None}}}, "columns.text: expected text, found a mapping; text with braces"),
        (
            "data",
            {"columns": "body"},
            f"expected a mapping with the keys {', '.join(COLUMNS)}, found",
        ),
        ("data", {"bins": 5}, "data.bins: expected a section with the keys edges, names, found 5"),
        ("data", {"template": {"prompt": "a"}}, "data.template: set either prompt and completion, or user and"),
        ("train", {"epochs": 1, "max_steps": 2}, "train: set epochs or max_steps, not both"),
        ("model", {"double_quant": False}, "model.double_quant: has no effect without quantize: nf4; remove it"),
        ("run", {"merge": "dequantized"}, "run.merge: dequantized needs a quantized model; set run.merge: original"),
        ("model", {"name": "x" * 200}, None),
        ("model", {"name": ["x" * 200]}, "found the list ['" + "x" * 55 + "..."),
    ],
)
def test_values_that_are_wrong_are_reported_once(section: str, settings: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        load_recipe(with_section(section, **settings))
        return
    text = message(with_section(section, **settings))
    assert text.startswith("1 problem in the recipe:\n")
    assert expected in text
    assert "Value error" not in text


def test_settings_without_effect_are_reported_at_their_own_lines(write: Write) -> None:
    text = message(write(GOOD + "eval:\n  every: 5\n  prompts: [Hello]\n  max_new_tokens: 3\n"))
    assert text.splitlines() == [
        "2 problems in recipe.yaml:",
        "  line 12  eval.prompts: has no effect for task: seq_cls; remove it",
        "  line 13  eval.max_new_tokens: has no effect for task: seq_cls; remove it",
    ]


def test_text_keys_refuse_numbers_and_ask_for_quotes(write: Write) -> None:
    text = message(write(GOOD), "model.revision=1234567", "eval.metrics=[1e5]")
    assert "model.revision: expected text, found 1234567; put it in quotes" in text
    assert "eval.metrics.0: expected text, found 100000.0; put it in quotes" in text


# Names that are no keys


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "train.lr"),
        ("train.learning_rate", "lr"),
        ("r", "adapter.rank"),
        ("adapter.r", "rank"),
        ("lora_alpha", "adapter.alpha"),
        ("adapter.target_modules", "targets"),
        ("train.num_train_epochs", "epochs"),
        ("train.per_device_train_batch_size", "batch_size"),
        ("train.gradient_accumulation_steps", "accumulate"),
        ("model.load_in_4bit", "model.quantize: nf4"),
        ("load_in_8bit", "model.quantize: int8"),
        ("lr", "train.lr"),
        ("train.max_length", "data.max_length"),
        ("train.LR", "lr"),
        ("train.max-steps", "max_steps"),
        ("train.learning_rte", "lr"),
        ("gradient_checkpoint", "train.gradient_checkpointing"),
        ("data.prompt", "data.columns.prompt` or `data.template.prompt"),
    ],
)
def test_unknown_keys_of_other_tools_and_sections_get_a_suggestion(key: str, meant: str) -> None:
    section, _, name = key.rpartition(".")
    settings = with_section(section, **{name: 1}) if section else BASE | {name: 1}
    assert f"{key}: unknown key; did you mean `{meant}`?" in message(settings)


def test_unknown_key_near_nothing_gets_the_list_of_keys() -> None:
    assert "train.qqq: unknown key (keys of train: epochs, " in message(with_section("train", qqq=1))


def test_dotted_key_in_a_file_gets_a_hint(write: Write) -> None:
    text = message(write(GOOD + "adapter.rank: 4\n"))
    assert "adapter.rank: unknown key; sections are nested: write `rank:` indented under `adapter:`" in text


def test_foreign_names_lead_to_existing_keys_and_are_no_keys() -> None:
    for target, names in _FOREIGN_NAMES.items():
        key = target.partition(":")[0]
        assert spec_at(key.split(".")) is not None, key
        section = key.rpartition(".")[0]
        assert all(name not in known_keys().get(section, []) for name in names.split()), key
        assert all(nearest_keys(section, name) == [target] for name in names.split()), key
    every = [name for names in _FOREIGN_NAMES.values() for name in names.split()]
    assert len(every) == len(set(every))


ALL_KEYS = [(section, name) for section, names in sorted(known_keys().items()) for name in names]


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str, str]:
    """(section, key, the key with one character deleted, swapped with the next, or added)."""
    section, key = draw(st.sampled_from(ALL_KEYS))
    at = draw(st.integers(0, len(key) - 1))
    extra = draw(st.sampled_from(string.ascii_lowercase + string.digits + "_-"))
    variants = [
        key[:at] + key[at + 1 :],
        key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
        key[:at] + extra + key[at:],
    ]
    wrong = draw(st.sampled_from(variants))
    return section, key, wrong


@given(misspelt(), st.booleans())
def test_misspelt_keys_are_refused_with_the_right_one(case: tuple[str, str, str], as_override: bool) -> None:
    section, key, wrong = case
    if wrong in known_keys()[section] or not wrong:
        return
    dotted = f"{section}.{wrong}" if section else wrong
    settings: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    if not as_override:
        node = settings
        for part in section.split(".") if section else []:
            node = node.setdefault(part, {})
        node[wrong] = 1
    text = message(settings, *([f"{dotted}=1"] if as_override else []))
    row = next(line for line in text.splitlines() if f" {dotted}: unknown key" in line)
    assert key in row


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data": {"train": "a.csv", "balance": True}},
            "data.balance: draws rows by their class; set data.columns.label",
        ),
        (
            {"task": "embedding", "model": {"name": "tiny:bert"}, "data": {"train": "a.csv", "balance": True}},
            "data.balance: has no effect for task: embedding",
        ),
        (
            {
                "task": "seq_cls",
                "model": {"name": "tiny:bert"},
                "data": {"train": "a.csv", "balance": True},
                "distill": {"teacher": "t", "transfer": "b.csv"},
            },
            "data.balance: has no effect with distill.transfer, whose rows are trained on; remove it",
        ),
    ],
)
def test_balance_without_classes_to_draw_from_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in message(BASE | changes)
