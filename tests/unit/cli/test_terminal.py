"""What a guest wrote reaches the operator's terminal as text, never as commands to it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.cli.app import App, aligned, to_json
from mvm.cli.failures import human, report
from mvm.core.errors import MvmError

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m \x7f\u202egnp.exe\r"
LOOKS = "?]0;owned??[2J?31m ??gnp.exe"


def error(text: str) -> MvmError:
    return MvmError(
        f"it failed: {text}", details=f"its console says:\n{text}\nend", resolution=f"see\n{text}"
    )


@pytest.mark.req("S5")
def test_an_error_that_quotes_a_console_is_text() -> None:
    shown = human(error(EVIL.rstrip("\r"))).split("\n")
    assert shown == [
        f"error: it failed: {LOOKS}", "  its console says:", f"  {LOOKS}", "  end", "next: see", f"  {LOOKS}",
    ]  # fmt: skip


@pytest.mark.req("S5")
def test_so_it_is_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    app = App()
    app.json = True
    report(error(EVIL), app)
    said = capsys.readouterr().err.removesuffix("\n")
    assert said.isprintable()
    assert json.loads(said)["error"]["brief"] == f"it failed: {EVIL}"


@given(st.text())
def test_nothing_commands_the_terminal(text: str) -> None:
    assert all(line.isprintable() for line in human(error(text)).split("\n"))
    assert all(line.isprintable() for line in aligned([["instance", "state"], [text, f"failed: {text}"]]))
    written = to_json({"last_error": text})
    assert written.isprintable()
    assert json.loads(written) == {"last_error": text}


@pytest.mark.req("S5")
def test_so_are_sentences_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    app = App()
    app.say(EVIL)
    app.warn(EVIL)
    shown = capsys.readouterr()
    assert shown.out == f"{LOOKS}?\n"
    assert shown.err == f"warning: {LOOKS}?\n"
