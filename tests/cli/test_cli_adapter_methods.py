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
    assert capsys.readouterr().out.startswith(name)


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
