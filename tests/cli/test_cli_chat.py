"""The chat loop with a fake model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from peftlab.cli.app import run
from peftlab.cli.chat import talk


class FakeChat:
    """A chat that answers word by word and is interrupted after "stop"."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.closed = 0
        self.max_new_tokens = 256
        self.notes: list[str] = []

    def reset(self) -> None:
        self.messages = []

    def reply(self, text: str) -> Iterator[str]:
        self.messages.append({"role": "user", "content": text})
        try:
            yield "well, "
            if text == "stop":
                raise KeyboardInterrupt
            yield text
        finally:
            self.closed += 1


def test_chat_streams_resets_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    session, stream = FakeChat(), io.StringIO()
    lines = "hello\n/reset\n\nstop\nagain\n/help\n/what\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    talk(session, stream, interactive=False)
    output = stream.getvalue()
    assert output.startswith("well, hello\n")
    assert "well,  [stopped]\n" in output
    assert "well, again\n" in output
    assert "Ctrl-D" in output and "unknown command /what" in output
    assert [m["content"] for m in session.messages] == ["stop", "again"]
    assert session.closed == 3


@pytest.mark.parametrize("leaving", [EOFError, KeyboardInterrupt])
def test_chat_ends_with_ctrl_d_or_ctrl_c_at_the_prompt(
    leaving: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["hello"])

    def ask(_: str = "") -> str:
        for text in answers:
            return text
        raise leaving

    monkeypatch.setattr("builtins.input", ask)
    stream = io.StringIO()
    talk(FakeChat(), stream, interactive=True)
    assert "well, hello\n" in stream.getvalue()


def test_chat_json_prints_the_messages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("peftlab.api.chat.Chat", FakeChat)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert run(["chat", "runs/x", "--json", "--system", "Be brief."]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["messages"] == [{"role": "user", "content": "hello"}]
    assert "well, hello" in shown.err
