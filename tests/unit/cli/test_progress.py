"""What is shown while something takes long."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from mvm.cli.app import App, aligned, printable
from mvm.cli.progress import Progress


class Terminal:
    """A standard error that is a file pretending to be a terminal."""

    def __init__(self, fd: int, monkeypatch: pytest.MonkeyPatch, *, tty: bool) -> None:
        self.fd = fd
        monkeypatch.setattr("mvm.cli.progress._stderr", lambda: fd)
        monkeypatch.setattr("mvm.cli.progress._terminal", lambda _: tty)

    @property
    def shown(self) -> str:
        return os.pread(self.fd, 1 << 16, 0).decode()


@pytest.fixture
def scratch() -> Iterator[int]:
    fd = os.memfd_create("stderr")
    os.set_blocking(fd, True)
    yield fd
    os.close(fd)


def app(**fields: bool) -> App:
    made = App()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def tick() -> None:
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.req("L5")
def test_lines_appear_only_for_what_is_slow(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(scratch, monkeypatch, tty=False)
    now = [0.0]
    with Progress(app(), "waking acme", clock=lambda: now[0]) as progress:
        progress.phase("restore")
        assert terminal.shown == ""
        tick()
        now[0] = 1.5
        progress.phase("await guest")
        progress.phase("await guest")
        progress.line("a line of a log")
    assert terminal.shown == "waking acme: restore\nwaking acme: await guest\n"


@pytest.mark.req("L5")
def test_the_spinner_is_drawn_by_the_timer_and_gone_afterwards(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(scratch, monkeypatch, tty=True)
    with Progress(app(), "building acme") as progress:
        progress.step("kernel", 0.25)
        progress.line("cc \x1b[2Jmain.c")
        tick()
        drawn = terminal.shown
        assert "building acme: kernel 25 % (0 s)  cc ?[2Jmain.c" in drawn
    assert terminal.shown.endswith("\r\x1b[K")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.req("L5")
def test_what_is_quick_draws_nothing(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(scratch, monkeypatch, tty=True)
    with Progress(app(), "x") as progress:
        progress.phase("y")
    assert terminal.shown == ""


def test_quiet_is_silent_and_verbose_streams(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(scratch, monkeypatch, tty=True)
    with Progress(app(quiet=True, verbose=True), "x", clock=lambda: 9.0) as progress:
        progress.phase("y")
        progress.line("z")
    assert terminal.shown == ""
    with Progress(app(verbose=True), "x") as progress:
        progress.line("z\x07")
    assert terminal.shown == "z?\n"


@pytest.mark.req("L5")
def test_with_json_every_line_is_an_object(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(scratch, monkeypatch, tty=False)
    with Progress(app(json=True, verbose=True), "waking acme") as progress:
        progress.phase("restore")
        tick()
        progress.line('say "x"')
    assert [json.loads(line) for line in terminal.shown.splitlines()] == [
        {"progress": "waking acme: restore"},
        {"log": 'say "x"'},
    ]


def test_it_survives_a_standard_error_that_is_gone(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(scratch, monkeypatch, tty=True)
    other = os.memfd_create("x")
    monkeypatch.setattr("mvm.cli.progress._stderr", lambda: other)
    os.close(other)
    with Progress(app(), "x"):
        tick()
    assert terminal.shown == ""


def test_printable() -> None:
    assert printable("a\tb\nc\x1b[0m") == "a b?c?[0m"


def test_columns() -> None:
    assert aligned([("A", "LONG"), ("abc", "x")]) == ["A    LONG", "abc  x"]
