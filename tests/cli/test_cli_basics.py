"""Help, recipes, usage errors, exit codes, and one JSON document per command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftlab import errors
from peftlab.cli import options
from peftlab.cli.app import run
from peftlab.recipe import recipe_names, recipe_schema

VERBS = ["train", "eval", "predict", "chat", "merge", "adapters", "bench", "doctor", "recipes"]


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def doctor() -> Any:
        print("a library greets")
        raise error

    monkeypatch.setattr("peftlab.api.doctor.doctor", doctor)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_plain_and_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out
    assert not shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "--json" in shown.out and "--debug" in shown.out
    assert ("Example: peftlab " + verb if verb else "peftlab train smoke") in shown.out


def test_main_help_lists_verbs_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    assert all(f" {code}  " in shown for code in (0, 1, 2, 3, 4, 5, 6, 130))


def test_cli_without_arguments_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert "Usage: peftlab" in shown.err


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_recipes_lists_all_recipes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown


def test_recipes_show_copy_and_schema_print_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["recipes", "show", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#")
    assert run(["recipes", "copy", "quickstart", str(tmp_path)]) == 0
    assert str(tmp_path / "quickstart.yaml") in capsys.readouterr().out
    assert (tmp_path / "quickstart.yaml").read_text() == text
    assert run(["recipes", "copy", "quickstart", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert run(["recipes", "schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipes", "--json"],
        ["recipes", "list", "--json"],
        ["recipes", "show", "quickstart", "--json"],
        ["recipes", "show", "quikstart", "--json"],
        ["--json", "recipes"],
        ["trian", "--json"],
        ["train", "--json"],
        ["train", "no-such-recipe", "--json"],
        ["train", "smoke", "trian.lr=1", "--json"],
    ],
)
def test_json_is_one_document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = run(arguments)
    document = json.loads(capsys.readouterr().out)
    assert ("error" in document) == (code != 0)
    if code:
        assert set(document["error"]) == {"type", "message", "exit_code", "key"}
        assert document["error"]["exit_code"] == code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RecipeError("wrong", key="train.lr"), 2),
        (errors.DataError("wrong"), 3),
        (errors.ResourceError("wrong"), 4),
        (MemoryError("wrong"), 4),
        (errors.ArtifactError("wrong"), 5),
        (errors.VerificationError("wrong"), 6),
        (errors.Interrupted("wrong"), 130),
        (KeyboardInterrupt(), 130),
        (RuntimeError("wrong"), 1),
    ],
)
def test_exit_codes_follow_the_error_class(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_with(monkeypatch, error)
    assert run(["doctor"]) == code
    shown = capsys.readouterr()
    assert not shown.out
    assert "Traceback" not in shown.err
    assert ("interrupted" if isinstance(error, KeyboardInterrupt) else "wrong") in shown.err
    assert "\x1b" not in shown.err

    assert run(["doctor", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err

    assert run(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["exit_code"] == code
    assert document["error"]["key"] == getattr(error, "key", None)


def test_internal_error_asks_for_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _fail_with(monkeypatch, ZeroDivisionError("[/red] oh"))
    run(["doctor"])
    message = capsys.readouterr().err
    assert message.endswith(
        "internal error: ZeroDivisionError: [/red] oh. This is a bug in peftlab; run again with --debug for the traceback\n"
    )


def test_unknown_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian", "smoke"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "smoke", "more"], "section.key=value"),
        (["eval", "runs/x", "more"], "section.key=value"),
        (["train", "train.lr=1"], "expected a name before the settings"),
        (["train"], "missing argument 'RECIPE'"),
        (["train", "smoke", "--train.lr=3"], "no such option"),
        (["train", "smoke", "--resume", "--replace"], "--resume and --replace exclude each other"),
        (["chat", "runs/x", "hello"], "unexpected argument 'hello'"),
        (["merge", "runs/x", "--base", "other"], "other"),
        (["predict", "runs/x", "text", "--file", "f.csv"], "not both"),
        (["predict", "runs/x", "text", "-"], "cannot be combined with texts"),
        (["predict", "runs/x", "text", "--output", "f.txt"], ".jsonl or .csv"),
    ],
)
def test_usage_errors_exit_with_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert not shown.out


def test_cli_sections_are_those_of_the_schema() -> None:
    kept = {name for name, spec in recipe_schema()["properties"].items() if "$ref" in json.dumps(spec)}
    assert set(options.SECTIONS) == kept - {"task", "lock"}


def test_split_overrides_separates_texts_from_overrides() -> None:
    overrides, texts = options.split_overrides(["eval.max_new_tokens=3", "a.b=c", "x=1", "model.name is = y", "hi"])
    assert overrides == ["eval.max_new_tokens=3"]
    assert texts == ["a.b=c", "x=1", "model.name is = y", "hi"]


def test_python_m_peftlab_survives_a_closed_pipe() -> None:
    command = [sys.executable, "-m", "peftlab"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("peftlab ")
    shell = f"{sys.executable} -m peftlab recipes schema | head -c 5; echo ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert piped.stderr == ""
    assert piped.stdout.startswith('{\n  "')
