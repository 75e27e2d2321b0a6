"""exec, ssh, cp and logs, as far as no real guest is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.conftest import Run
from tests.unit.standalone.fakes import FakeNode

from mvm.cli.console_log import ConsoleLog, LineSplitter, visible
from mvm.core.ids import InstanceId
from mvm.hostd.console import read_console
from mvm.wire.guest_api import ExitStatus

ONE = InstanceId("acme", "default", 0)


@pytest.fixture
def running(run: Run) -> Run:
    run("tenant", "create", "acme", "--flake", "nix/embedded")
    run("tenant", "run", "acme", "--build")
    return run


@pytest.fixture
def pumped(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been run in the guest; each ends with 7."""
    calls: list[dict[str, Any]] = []

    def pump(channel: Any, argv: Any, stdin: int, stdout: int, stderr: int, **options: Any) -> ExitStatus:
        calls.append({"argv": tuple(argv), "fds": (stdin, stdout, stderr), **options})
        return ExitStatus(0, 9) if "killed" in argv else ExitStatus(7)

    monkeypatch.setattr("mvm.hostd.guest_channel.terminal.pump", pump)
    return calls


@pytest.mark.req("L6")
def test_exec_exits_with_the_programs_code(running: Run, pumped: list[dict[str, Any]]) -> None:
    result = running(
        "tenant",
        "exec",
        "acme",
        "--env",
        "A=b=c",
        "--cwd",
        "/data",
        "--user",
        "me",
        "--",
        "ls",
        "-l",
        "--env",
    )
    assert result.exit_code == 7
    (call,) = pumped
    assert call["argv"] == ("ls", "-l", "--env")
    assert (call["env"], call["cwd"], call["user"], call["tty"]) == ({"A": "b=c"}, "/data", "me", False)
    assert call["fds"][0] > 2  # our input stays ours without -i
    assert running("tenant", "exec", "acme", "-i", "--", "cat").exit_code == 7
    assert pumped[1]["fds"] == (0, 1, 2)
    assert running("instance", "exec", "acme/default-0", "--", "killed").exit_code == 137


@pytest.mark.req("L6", "O2")
def test_what_is_run_is_in_the_log_without_its_arguments(
    running: Run, fake: FakeNode, pumped: list[dict[str, Any]]
) -> None:
    running("tenant", "exec", "acme", "--env", "TOKEN=hunter2", "--", "curl", "hunter2")
    line = (fake.store.tenant_dir(ONE.tenant) / "audit.log").read_bytes().splitlines()[-1]
    assert json.loads(line)["command"] == ["mvm", "exec", "acme/default-0", "--", "curl", "(1 arguments)"]
    assert fake.entries("acme")[-1] == ("instance.exec", "done")


@pytest.mark.req("L6")
def test_detached(running: Run, fake: FakeNode) -> None:
    result = running("tenant", "exec", "acme", "--detach", "--env", "A=1", "--", "worker", "x")
    assert (result.exit_code, result.stdout) == (0, "77\n")
    assert fake.host.fake_channel.calls == [("spawn", ("worker", "x"), {"A": "1"}, "", "")]
    shown = running("tenant", "exec", "acme", "-d", "--output", "json", "--", "worker")
    assert json.loads(shown.stdout) == {"instance": "acme/default-0", "pid": 77}


@pytest.mark.req("L6", "L5")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("acme",), "there is no command to run"),
        (("acme", "--"), "there is no command to run"),
        (("acme", "-d", "-i", "--", "x"), "--detach goes with neither"),
        (("acme", "-t", "--", "x"), "--tty needs a terminal here too"),
        (("acme", "--env", "=x", "--", "x"), "is not NAME=VALUE"),
        (("acme", "--env", "x", "--", "x"), "is not NAME=VALUE"),
        (("acme", "--instance", "default-9", "--", "x"), "there is no instance acme/default-9"),
        (("acme", "--instance", "nonsense", "--", "x"), "is not an instance id"),
        (("acme", "ls", "--long"), "there is no option --long"),
    ],
)
def test_mvms_own_failures_exit_with_125(
    running: Run, pumped: list[dict[str, Any]], words: tuple[str, ...], says: str
) -> None:
    result = running("tenant", "exec", *words)
    assert result.exit_code == 125
    assert says in result.stderr
    assert pumped == []


@pytest.mark.req("L6", "L5")
def test_a_guest_that_does_not_run(running: Run) -> None:
    running("tenant", "sleep", "acme")
    result = running("tenant", "exec", "acme", "--", "ls")
    assert result.exit_code == 125
    assert "mvm tenant wake acme" in result.stderr
    assert running("tenant", "cp", "acme:/x", "y").exit_code == 11


@pytest.mark.req("L6", "L1")
def test_with_several_instances_one_must_be_named(running: Run, pumped: list[dict[str, Any]]) -> None:
    running("pool", "create", "acme", "web", "--count", "2")
    running("tenant", "run", "acme")
    unclear = running("tenant", "exec", "acme", "--", "ls")
    assert unclear.exit_code == 125
    assert "default-0, web-0, web-1" in unclear.stderr
    assert running("tenant", "exec", "acme", "--instance", "web-1", "--", "ls").exit_code == 7
    assert running("tenant", "exec", "acme", "--instance", "acme/web-0", "--", "ls").exit_code == 7


@pytest.mark.req("L6")
def test_a_shell_that_reads_from_a_pipe(running: Run, pumped: list[dict[str, Any]]) -> None:
    assert running("tenant", "ssh", "acme").exit_code == 7
    (call,) = pumped
    assert (call["argv"], call["tty"], call["fds"]) == (("/bin/sh",), False, (0, 1, 2))


@pytest.mark.req("L6")
def test_copies(running: Run, fake: FakeNode) -> None:
    calls = fake.host.fake_channel.calls
    assert "Copied 3145728 bytes in 1 file." in running("tenant", "cp", "./here", "acme:/data/").stdout
    out = running("tenant", "cp", "acme/default-0:/var/log", "logs")
    assert "Copied 10 bytes in 2 files." in out.stdout
    assert "1 links or special files were left out" in out.stderr
    value = json.loads(running("tenant", "cp", "./a:b", "acme:/x", "--output", "json").stdout)
    assert value == {"instance": "acme/default-0", "entries": 1, "bytes": 3 << 20, "skipped": 0}
    assert calls == [
        ("copy_in", "here", "/data/"),
        ("copy_out", "/var/log", "logs"),
        ("copy_in", "a:b", "/x"),
    ]
    relative = running("tenant", "cp", "x", "acme:data")
    assert relative.exit_code == 2
    assert "is not an absolute path" in relative.stderr
    assert [a for a, _ in fake.entries("acme")][-4:] == [
        "instance.copy-in", "instance.copy-out", "instance.copy-in", "instance.copy-in",
    ]  # fmt: skip


@pytest.fixture
def console(running: Run, fake: FakeNode) -> Path:
    path = fake.store.instance_paths(ONE).console_log
    path.with_name("console.log.1").write_bytes(b"one\r\ntwo\n")
    path.write_bytes(b"three\n\x1b[31mfour\x1b[0m\nfive")
    return path


@pytest.mark.req("L5")
def test_logs(running: Run, console: Path) -> None:
    assert running("tenant", "logs", "acme").stdout_bytes == b"one\r\ntwo\nthree\n\x1b[31mfour\x1b[0m\nfive"
    assert (
        running("instance", "logs", "acme/default-0", "-n", "2").stdout_bytes == b"\x1b[31mfour\x1b[0m\nfive"
    )
    assert running("tenant", "logs", "acme", "-n", "0").stdout_bytes == b""
    lines = running("tenant", "logs", "acme", "--output", "json").stdout.splitlines()
    assert [json.loads(line)["line"] for line in lines][:2] == ["one", "two"]
    assert running("tenant", "logs", "acme", "-n", "-1").exit_code == 2


def test_logs_of_what_never_started(run: Run) -> None:
    run("tenant", "create", "acme", "--flake", "nix/embedded")
    assert run("tenant", "logs", "acme").stdout == ""


@pytest.mark.req("L5")
def test_following_survives_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(lambda lines, place: read_console(path, lines, place))
    assert list(log.tail(None)) == []
    older = tmp_path / "console.log.1"

    def append_and_rotate() -> None:
        path.write_bytes(b"abc")
        path.rename(older)
        path.write_bytes(b"d")

    def steps() -> Iterator[object]:
        yield path.write_bytes(b"a")
        yield path.write_bytes(b"ab")
        append_and_rotate()
        yield None
        yield path.rename(older)
        yield path.write_bytes(b"e")

    plan = steps()

    def sleep(_: float) -> None:
        if next(plan, plan) is plan:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    seen = b""
    with pytest.raises(KeyboardInterrupt):
        for chunk in log.follow():
            seen += chunk
    assert seen == b"abcde"


@pytest.mark.req("L6")
def test_a_guest_cannot_command_the_terminal() -> None:
    hostile = b"\x1b]0;title\x07\x1b[2Jred\x1b[31m \x9b31m\x00\x7f\ttab \xff"
    shown = visible(hostile)
    assert all(c.isprintable() or c == "\t" for c in shown)
    assert "red" in shown


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    splitter = LineSplitter()
    lines = [line for _ in range(40) for line in splitter.feed(b"x" * 5000)]
    assert lines
    assert max(map(len, lines)) < 80_000
    assert splitter.feed(b"") != []
    assert splitter.feed(b"") == []
