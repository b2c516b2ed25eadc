"""The README, CONTRIBUTING.md and docs/ against the code: commands, recipes, keys, links, functions, tables and format."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

import peftlab
from peftlab.cli.app import run
from peftlab.cli.card_tables import show_card
from peftlab.cli.failures import EXIT_CODES
from peftlab.cli.output import Output
from peftlab.cli.verbs import VERBS, Group
from peftlab.recipe import Recipe, load_recipe, recipe_names
from peftlab.recipe.keys import known_keys, spec_at
from peftlab.recipe.reference import reference
from peftlab.runs import Run
from tests.test_imports import ALLOWED

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SECTIONS = [name for name in known_keys()[""] if name not in ("task", "lock")]
GROUPED = {name for verb in VERBS.values() if isinstance(verb, Group) for name in verb.verbs}
# Longest line of prose. Tables, code and generated sections keep the lines they need.
WIDTH = 100

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def code_lines(text: str) -> Iterator[str]:
    """Lines of the code blocks, both indented and fenced."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def prose(text: str) -> str:
    """The text without its code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def inline_code(text: str) -> list[str]:
    """The code spans of the prose, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every peftlab command, without comments and redirections."""
    for line in [*code_lines(text), *inline_code(text)]:
        if line.startswith("peftlab "):
            line = re.split(r" [>|] ", line)[0]
            yield shlex.split(line, comments=True)[1:]


def wrong_command(words: list[str]) -> str | None:
    """What is wrong with a command, by its own parser. Nothing runs, because --help ends the parsing."""
    if run([*words, "--help"]) != 0:
        return "does not parse"
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"[a-z_]+(\.\w+)+", key) and spec_at(key.split(".")) is None:
            return f"sets an unknown key {key}"
    return None


@pages
def test_commands_all_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {shlex.join(words): problem for words in commands(page.read_text()) if (problem := wrong_command(words))}
    assert not wrong, capsys.readouterr().err


def test_commands_that_are_wrong_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = "    peftlab trian x\n\nor `peftlab train x --resum` and `peftlab train x train.lrr=1`, `peftlab bench x --plan`"
    assert [wrong_command(words) for words in commands(text)] == [
        "does not parse",
        "does not parse",
        "sets an unknown key train.lrr",
        None,
    ]


def test_readme_lists_every_verb() -> None:
    table = README.read_text().partition("| command |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z]+)", table, flags=re.MULTILINE)) == set(VERBS)


def test_shipped_recipes_are_named_right() -> None:
    """A word without a dot or slash after these verbs is a shipped recipe."""
    named = {
        words[1]
        for page in PAGES
        for words in commands(page.read_text())
        if len(words) > 1 and words[0] in ("train", "check", "distill", "teach", "bench")
    }
    assert {word for word in named if re.fullmatch(r"[a-z][a-z0-9-]+", word)} - GROUPED <= set(recipe_names())


def unknown_keys(text: str) -> list[str]:
    """Recipe keys in code spans that the schema does not have, such as ``train.lrr`` or ``run.seed: 1``."""
    unknown = []
    for span in inline_code(text):
        key = re.match(rf"((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?=$|[:= ])", span)
        if key and span != "run.json" and spec_at(key[1].split(".")) is None:
            unknown.append(span)
    return unknown


@pages
def test_recipe_keys_all_exist(page: Path) -> None:
    attributes = {f"run.{name}" for name in [*dir(Run), *Run.__dataclass_fields__]}
    assert not [span for span in unknown_keys(page.read_text()) if span not in attributes]


def test_recipe_keys_that_are_unknown_are_found() -> None:
    assert unknown_keys("`train.lrr=1` `run.json` `data.columns.text` `model.quantise: nf4` `train.lr: 1`") == [
        "train.lrr=1",
        "model.quantise: nf4",
    ]


@pages
def test_recipes_are_valid(page: Path) -> None:
    (whole,) = blocks(README.read_text(), "yaml")
    base = yaml.safe_load(whole)
    for block in blocks(page.read_text(), "yaml"):
        part = yaml.safe_load(block)
        distills = {"run": {}} if "distill" in part else {}
        load_recipe(part if "task" in part else base | distills | part)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pages
def test_paths_exist(page: Path) -> None:
    """Files of the repository in code spans. NAME and other capitals stand for a file of the reader's."""
    spans = [s.partition("::")[0] for s in inline_code(page.read_text())]
    paths = [s for s in spans if re.fullmatch(r"(peftlab|kernels|tests|bench|recipes|docs|\.ci)/[\w./-]*", s)]
    assert not [s for s in paths if not re.search(r"[A-Z]{3}", s) and not (ROOT / s).exists()]


@pages
def test_lines_are_short_and_ascii(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    assert not [line for line in prose(text).splitlines() if len(line) > WIDTH and not line.startswith("|")]


def test_recipe_reference_equals_the_schema() -> None:
    assert (DOCS / "recipe.md").read_text() == reference(), "python -m peftlab.recipe.reference > docs/recipe.md"
    keys = re.findall(r"^- \*\*`([\w.]+)`\*\* \(", reference(), flags=re.MULTILINE)
    assert set(Recipe.model_fields) <= set(keys) and len(keys) == len(set(keys)) > 100
    assert all(spec_at(key.split(".")) is not None for key in keys)


def test_exit_codes_are_all_listed() -> None:
    table = (DOCS / "run-folder.md").read_text().partition("| code |")[2]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)] == sorted(EXIT_CODES)


def test_allowed_errors_are_all_listed() -> None:
    table = (DOCS / "data.md").read_text().partition("| error |")[2].partition("\n\n")[0]
    allowed = spec_at(["data", "allow", 0])
    assert allowed is not None
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(get_args(allowed.kind))


def test_rooms_are_all_listed() -> None:
    table = (DOCS / "architecture.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    rooms = {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)}
    assert rooms == set(ALLOWED) - {"__main__", "<root>"}


def test_report_card_equals_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    card = json.loads((ROOT / "bench" / "results" / "distillation.json").read_text())["digits-few-labels"]["card"]
    show_card(Output(), card)
    printed = capsys.readouterr().out.replace("\u2500", "-").rstrip().splitlines()
    page = (DOCS / "distillation.md").read_text()
    assert "\n".join(f"    {line}".rstrip() for line in printed) in page


def calls_of_peftlab(code: str) -> Iterator[tuple[str, ast.Call | None]]:
    """(name, its call) of everything that Python code uses from peftlab."""
    tree = ast.parse(code)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "peftlab":
            yield node.attr, called.get(id(node))


def test_python_examples_fit_the_functions() -> None:
    used = set()
    for block in blocks((DOCS / "python.md").read_text(), "python"):
        compile(block, "docs/python.md", "exec")
        for name, call in calls_of_peftlab(block):
            assert name in peftlab.__all__
            used.add(name)
            if call is not None:
                keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                inspect.signature(getattr(peftlab, name)).bind(*call.args, **keywords)
    text = (DOCS / "python.md").read_text()
    assert set(peftlab.__all__) - {"__version__", "Run"} == used and "`Run`" in text


@pytest.mark.parametrize("heading", ["Recipes", "Errors"])
def test_python_examples_run_when_quick(heading: str) -> None:
    section = (DOCS / "python.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (block,) = blocks(section, "python")
    exec(compile(block, "docs/python.md", "exec"), {"peftlab": peftlab})
