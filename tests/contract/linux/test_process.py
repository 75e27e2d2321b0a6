"""Starting, feeding, bounding and ending programs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mvm.core.errors import Busy, CommandFailed, MissingPrerequisite
from mvm.linux import memfd, pidfd, process
from mvm.linux.files import locked


def test_output_is_separate_and_the_environment_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAK", "1")
    done = process.run(["sh", "-c", "env; echo problem >&2; exit 3"], ok=(3,), timeout=10, env={"GIVEN": "x"})
    names = {line.split("=")[0] for line in done.stdout.decode().splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "LANG", "HOME", "GIVEN"}
    assert done.stderr == b"problem\n"
    assert done.code == 3


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_stdin_of_any_size_goes_through(size: int) -> None:
    data = os.urandom(size)
    assert process.run(["cat"], stdin=data, timeout=10).stdout == data


def test_a_program_that_does_not_read_is_no_failure() -> None:
    assert process.run(["true"], stdin=b"x" * (1 << 20), timeout=10).code == 0


def test_a_failure_shows_command_and_end_of_output() -> None:
    with pytest.raises(CommandFailed) as caught:
        process.run(["sh", "-c", "seq 100; echo 'the reason' >&2; exit 7"], timeout=10)
    assert "exited with 7" in caught.value.brief
    assert "sh -c 'seq 100" in caught.value.details
    assert caught.value.details.endswith("the reason")
    with pytest.raises(CommandFailed) as caught:
        process.run(["sh", "-c", "echo why; kill -9 $$"], timeout=10)
    assert "signal 9" in caught.value.brief
    assert "why" in caught.value.details


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPrerequisite) as caught:
        process.run(["qemu-img", "--version"], timeout=10, env={"PATH": "/nonexistent"})
    assert "qemu-utils" in caught.value.resolution


def test_a_missing_directory_is_not_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed):
        process.run(["true"], timeout=10, cwd=tmp_path / "gone")


def _members(group: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(entry))
    return found


def test_a_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    # The shell ignores SIGTERM and has a child: both must be gone.
    script = f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 300 & wait; sleep 300"
    with pytest.raises(CommandFailed, match="did not finish"):
        process.run(["sh", "-c", script], timeout=0.3)
    group = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _members(group) == []


def test_a_daemon_holding_the_pipe_does_not_hold_us(tmp_path: Path) -> None:
    script = f"(echo $BASHPID > {tmp_path}/pid; exec sleep 300) & echo ok"
    assert process.run(["bash", "-c", script], timeout=60).stdout == b"ok\n"
    identity = pidfd.identify(int((tmp_path / "pid").read_text()))
    assert identity is not None, "and it is left alone"
    assert pidfd.terminate(identity, 5) == "terminated"


def test_too_much_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_OUTPUT", 100_000)
    with pytest.raises(CommandFailed, match="more than 100000 bytes"):
        process.run(["yes"], timeout=30)


def test_lines_are_streamed_merged() -> None:
    seen: list[str] = []
    done = process.run(["sh", "-c", "echo a; echo b >&2; printf c"], timeout=10, on_line=seen.append)
    assert sorted(seen) == ["a", "b", "c"]
    assert done.stderr == b""


def test_an_error_in_the_callback_ends_the_program() -> None:
    def fail(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError):
        process.run(["sh", "-c", "echo x; sleep 300"], timeout=400, on_line=fail)


@pytest.mark.req("K2")
def test_only_the_given_descriptors_are_inherited() -> None:
    secret, other = memfd.of_bytes("one", b"given"), memfd.of_bytes("two", b"not given")
    os.set_inheritable(other, True)
    try:
        script = f"cat /proc/self/fd/{secret}; ls /proc/self/fd/{other} || true"
        done = process.run(["sh", "-c", script], pass_fds=[secret], timeout=10)
        assert done.stdout == b"given"
        assert b"No such file" in done.stderr
    finally:
        os.close(secret)
        os.close(other)


def test_start_gives_a_child_that_can_be_waited_for_and_ended() -> None:
    with process.start(["sh", "-c", "exit 5"]) as child:
        assert child.wait(10) == 5
        assert child.wait(0) == 5
    with process.start(["sleep", "300"]) as child:
        assert child.wait(0.01) is None
        assert os.getsid(child.pid) == child.pid
        assert child.stop() == -signal.SIGTERM
        child.send_signal(signal.SIGTERM)
    with process.start(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], new_session=True) as child:
        time.sleep(0.1)
        assert child.stop(grace=0.2) == -signal.SIGKILL


def test_start_connects_the_given_descriptors() -> None:
    reader, writer = os.pipe()
    try:
        with process.start(["sh", "-c", "pwd; cat"], stdout=writer, cwd=Path("/")) as child:
            assert child.wait(10) == 0
        assert os.read(reader, 100) == b"/\n", "stdin is /dev/null"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.root
@pytest.mark.req("H4")
def test_start_drops_every_id() -> None:
    reader, writer = os.pipe()
    try:
        argv = ["grep", "-E", "^(Uid|Gid|Groups|CapEff):", "/proc/self/status"]
        with process.start(argv, stdout=writer, uid=12345, gid=12346) as child:
            assert child.wait(10) == 0
        lines = [line.split() for line in os.read(reader, 1000).decode().splitlines()]
        assert lines == [
            ["Uid:", *["12345"] * 4],
            ["Gid:", *["12346"] * 4],
            ["Groups:"],
            ["CapEff:", "0" * 16],
        ]
    finally:
        os.close(reader)
        os.close(writer)


def test_identity_of_an_ended_process_is_dead_and_unsignalled() -> None:
    with process.start(["sleep", "300"]) as child:
        identity = pidfd.identify(child.pid)
        assert identity is not None
        assert pidfd.is_alive(identity)
        fd = pidfd.open_pidfd(identity)
        assert fd is not None
        os.close(fd)
        os.kill(child.pid, signal.SIGKILL)
        assert process.wait_readable(child.pidfd, 10)
        assert not pidfd.is_alive(identity), "a zombie is dead"
        assert pidfd.terminate(identity, 1) == "gone"
        assert child.wait(10) == -signal.SIGKILL


def test_terminate_goes_from_asking_to_killing() -> None:
    with process.start(["sleep", "300"]) as child:
        identity = pidfd.identify(child.pid)
        assert identity is not None
        assert pidfd.terminate(identity, 10) == "terminated"
        assert pidfd.terminate(identity, 10) == "gone"
    with process.start(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]) as child:
        identity = pidfd.identify(child.pid)
        assert identity is not None
        time.sleep(0.1)
        assert pidfd.terminate(identity, 0.2) == "killed"
    with process.start(["sleep", "300"]) as child:
        identity = pidfd.identify(child.pid)
        assert identity is not None
        assert pidfd.terminate(identity, 0) == "killed"


def test_run_works_in_a_forked_child() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if process.run(["echo", "x"], timeout=10).stdout == b"x\n" else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.req("L3")
def test_a_program_of_a_killed_command_keeps_its_locks(tmp_path: Path) -> None:
    """Whoever recovers what the command was at must not begin while its program still changes the host."""
    ran, killer = tmp_path / "ran", os.getpid()
    if (child := os.fork()) == 0:
        try:
            with locked(tmp_path / "lock", wait=0):
                process.run(["sh", "-c", f"touch {ran}.begun; sleep 0.5; touch {ran}"], timeout=10)
        finally:
            os._exit(int(os.getpid() != killer))
    until = time.monotonic() + 10
    while not Path(f"{ran}.begun").exists():
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(Busy), locked(tmp_path / "lock", wait=0):
        pass
    assert not ran.exists()
    with locked(tmp_path / "lock", wait=10):
        assert ran.exists()


def test_a_lock_that_was_closed_is_nobodys(tmp_path: Path) -> None:
    """As in a forked child that closed what it inherited: the number may be another file's by now."""
    with locked(tmp_path / "lock", wait=0) as fd:
        kept = os.dup(fd)
        try:
            os.close(fd)
            process.run(["true"], timeout=10)
            assert os.open("/dev/null", os.O_RDONLY) == fd
            done = process.run(["ls", "/proc/self/fd"], timeout=10)
            assert str(fd) not in done.stdout.decode().split()
        finally:
            os.dup2(kept, fd)
            os.close(kept)
