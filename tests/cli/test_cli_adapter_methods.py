"""``peftlab adapters list``: the methods, one method, JSON, and a wrong name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from peftlab.cli.app import run
from peftlab.specs.methods import METHODS


@pytest.mark.parametrize("arguments", [["adapters"], ["adapters", "list"]])
def test_adapters_lists_every_method_in_80_columns(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert {line.split()[0] for line in lines if line and not line.startswith(" ")} >= set(METHODS)
    assert max(map(len, lines)) <= 80
    deft = next(line for line in lines if line.startswith("deft "))
    assert deft.split()[1:4] == ["yes", "no", "no"]


def test_adapters_list_of_one_method_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapters", "list", "vera"]) == 0
    out = capsys.readouterr().out
    assert "d_initial" in out and "256" in out and "PEFT's vera_dropout" in out and "2310.11454" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", list(METHODS))
def test_adapters_list_shows_every_method(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapters", "list", name]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(name) and not shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    keys = {line.split()[0] for line in shown.out.split("meaning\n", 1)[1].splitlines() if not line.startswith(" ")}
    assert keys >= {*METHODS[name].keys, *METHODS[name].places, *METHODS[name].options}


def options_of(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Default and meaning of each key in the document of a method."""
    assert run(["adapters", "list", name, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"peft", "name", "label", "merges", "quantized", "refused", "options"} <= set(document)
    return {option["key"]: (option["default"], option["meaning"]) for option in document["options"]}


def test_adapters_list_has_the_defaults_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    lora = options_of("lora", capsys)
    wanted = {"rank": "8", "alpha": "16.0", "dropout": "0.0", "bias": "none", "dora": "false", "layers": ""}
    assert {key: lora[key][0] for key in wanted} == wanted
    assert lora["rank"][1] == "PEFT's r" and lora["patterns"][1].startswith("other settings for some")
    assert options_of("ln_tuning", capsys)["targets"][0] == "all-norms"
    assert options_of("ia3", capsys)["feedforward_modules"][0] == ""


def test_adapters_list_names_no_option_of_peft_for_our_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert "PEFT" not in options_of("bottleneck", capsys)["dropout"][1]
    assert options_of("none", capsys)["freeze"][1].startswith("endings of the names of modules to leave as they are")


def test_adapters_list_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapters", "list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    by_name = {method["name"]: method for method in document["methods"]}
    assert set(by_name) == set(METHODS)
    assert by_name["loha"]["quantized"] == ["int8"] and by_name["lily"]["merges"] is False
    assert run(["adapters", "list", "oft", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert {"key": "oft_block_size", "default": "32"}.items() <= next(
        option for option in options if option["key"] == "oft_block_size"
    ).items()


def test_adapters_list_of_an_unknown_method_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapters", "list", "verra"]) == 2
    assert "there is no adapter method 'verra'" in (error := capsys.readouterr().err) and "did you mean vera?" in error


def test_adapters_list_needs_neither_torch_nor_peft() -> None:
    program = (
        "import sys\nfrom peftlab.cli.app import run\ncode = run(['adapters', 'list', 'vera'])\n"
        "print(code, sorted({'torch', 'peft', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "0 []"
