"""The shipped recipes: list, show, copy, schema; and what the package imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftlab.errors import RecipeError
from peftlab.recipe import copy_recipe, load_recipe, recipe_names, recipe_schema, recipe_summary, recipe_text
from peftlab.recipe import shipped as catalog
from peftlab.recipe.keys import known_keys

TEXT = "# Finds spam in text messages.\n# Hardware: CPU\ntask: seq_cls\n"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "sms-spam.yaml").write_text(TEXT, encoding="utf-8")
    (folder / "chat.yaml").write_text("task: causal_lm # not a header\n# later\n", encoding="utf-8")
    (folder / "__init__.py").touch()
    (folder / "data").mkdir()
    monkeypatch.setattr(catalog, "_folder", lambda: folder)
    return folder


def test_recipe_names_texts_and_summaries(shipped: Path) -> None:
    assert recipe_names() == ["chat", "sms-spam"]
    assert recipe_text("sms-spam") == TEXT
    assert recipe_summary("sms-spam") == "Finds spam in text messages."
    assert recipe_summary("chat") == ""
    (shipped / "chat.yaml").write_text("\n#\n## Talks.\ntask: causal_lm\n", encoding="utf-8")
    assert recipe_summary("chat") == "Talks."


def test_recipe_names_without_a_folder_are_empty(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_folder", lambda: shipped / "missing")
    assert recipe_names() == []


def test_recipe_text_refuses_an_unknown_name(shipped: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_text("sms-spm")
    assert str(caught.value) == (
        "no shipped recipe named `sms-spm`; did you mean `sms-spam`? `peftlab recipes` lists the shipped recipes"
    )


def test_copy_recipe_keeps_every_byte(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    assert copy_recipe("sms-spam") == Path("sms-spam.yaml")
    assert copy_recipe("sms-spam", folder) == folder / "sms-spam.yaml"
    assert copy_recipe("sms-spam", f"{folder}/other.yml") == folder / "other.yml"
    assert {p.read_text(encoding="utf-8") for p in [tmp_path / "sms-spam.yaml", *folder.iterdir()]} == {TEXT}


def test_copy_recipe_never_overwrites(shipped: Path, tmp_path: Path) -> None:
    target = tmp_path / "sms-spam.yaml"
    target.write_text("mine", encoding="utf-8")
    for destination in (target, tmp_path):
        with pytest.raises(RecipeError, match=r"sms-spam\.yaml already exists and is not overwritten"):
            copy_recipe("sms-spam", destination)
    assert target.read_text(encoding="utf-8") == "mine"


def test_copy_recipe_refuses_a_missing_folder(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the folder .*nowhere does not exist; create it first"):
        copy_recipe("sms-spam", tmp_path / "nowhere" / "a.yaml")
    with pytest.raises(RecipeError, match="no such folder; create it first"):
        copy_recipe("sms-spam", f"{tmp_path}/nowhere/")
    with pytest.raises(RecipeError, match="Not a directory"):
        copy_recipe("sms-spam", shipped / "chat.yaml" / "a.yaml")
    assert not (tmp_path / "nowhere").exists()


def test_recipe_schema_describes_every_key() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "peftlab recipe"
    assert list(schema["properties"]) == known_keys()[""]
    models = [schema, *schema["$defs"].values()]
    assert all(field["description"] for model in models for field in model["properties"].values())
    assert all(model["additionalProperties"] is False for model in models)


def test_shipped_recipes_load_and_have_a_summary() -> None:
    for name in recipe_names():
        assert recipe_summary(name), name
        assert load_recipe(name).name == name


def _python(code: str, cwd: Path, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_listing_recipes_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from peftlab.recipe import copy_recipe, recipe_names, recipe_summary, recipe_text\n"
        "[recipe_summary(name) for name in recipe_names()]\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    assert _python(code, tmp_path) == "[]"


def test_loading_recipes_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, peftlab.recipe as r\n"
        "assert all(getattr(r, name) for name in r.__all__)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), hasattr(r, 'nonsense'))"
    )
    assert _python(code, tmp_path) == "[] False"


def test_shipped_folder_is_found_in_a_bare_clone(tmp_path: Path) -> None:
    root = Path(catalog.__file__).parents[2]
    (tmp_path / "peftlab").symlink_to(root / "peftlab")
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from peftlab.recipe import shipped as catalog\n"
        "print(type(catalog._folder()).__name__, catalog._folder().name)"
    )
    assert _python(code, tmp_path, "-S") == "PosixPath recipes"


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_takes_another_file_to_evaluate_on(name: str) -> None:
    recipe = load_recipe(name, ["data.eval=other.csv"]).recipe
    assert (recipe.data.eval, recipe.data.eval_rows) == ("other.csv", None)
