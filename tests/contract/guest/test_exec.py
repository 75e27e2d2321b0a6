"""Programs in the guest through the real agent: exit, signals, streams, terminals, back-pressure."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvm.core.errors import GuestError, InvalidInput
from mvm.hostd.guest_channel import ExitStatus, GuestChannel, GuestRefusal
from mvm.hostd.guest_channel.terminal import pump

Eventually = Callable[[Callable[[], bool]], None]
SIZE = 50_000_000


class Collected:
    def __init__(self) -> None:
        self.out = bytearray()
        self.err = bytearray()

    def run(self, channel: GuestChannel, script: str, **options: object) -> ExitStatus:
        return channel.exec(
            ["sh", "-c", script],
            stdout=self.out.extend,
            stderr=self.err.extend,
            **options,  # type: ignore[arg-type]
        )


@pytest.fixture
def got() -> Collected:
    return Collected()


@pytest.mark.req("L6")
@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_exit_codes(channel: GuestChannel, code: int) -> None:
    assert channel.exec(["sh", "-c", f"exit {code}"]) == ExitStatus(code)


@pytest.mark.req("L6")
def test_death_by_signal_is_told_from_exit(channel: GuestChannel) -> None:
    assert channel.exec(["sh", "-c", "kill -TERM $$"]) == ExitStatus(0, signal.SIGTERM)


@pytest.mark.req("L6")
def test_streams_stay_apart_and_arrive_whole(channel: GuestChannel, got: Collected) -> None:
    assert got.run(channel, "echo out; echo err >&2; cat; echo end", stdin=b"in\n") == ExitStatus(0)
    assert (bytes(got.out), bytes(got.err)) == (b"out\nin\nend\n", b"err\n")


@pytest.mark.req("L6")
def test_without_input_a_reader_sees_the_end_at_once(channel: GuestChannel) -> None:
    assert channel.exec(["cat"]) == ExitStatus(0)
    assert channel.exec(["cat"], stdin=b"") == ExitStatus(0)


@pytest.mark.req("L6")
def test_environment_directory_and_user(channel: GuestChannel, got: Collected, tmp_path: Path) -> None:
    got.run(
        channel, 'echo "$GREETING $HOME"; pwd', env={"GREETING": "hi=there"}, cwd=str(tmp_path), user="root"
    )
    assert got.out.decode().splitlines() == ["hi=there /root", str(tmp_path)]
    with pytest.raises(GuestRefusal, match="no such user"):
        channel.exec(["true"], user="nobody-of-that-name")


@pytest.mark.req("L6")
@pytest.mark.root
def test_another_user_runs_without_roots_groups(channel: GuestChannel, got: Collected) -> None:
    got.run(channel, "id -un; id -Gn", user="nobody", cwd="/")
    assert got.out.split() == [b"nobody", b"nogroup"]


@pytest.mark.req("L6")
def test_what_cannot_start_is_refused_and_the_channel_goes_on(channel: GuestChannel, tmp_path: Path) -> None:
    with pytest.raises(GuestRefusal, match="No such file"):
        channel.exec(["no-such-program"])
    plain = tmp_path / "plain"
    plain.touch(0o600)
    with pytest.raises(GuestRefusal, match="Permission denied"):
        channel.exec([str(plain)])
    with pytest.raises(GuestRefusal, match="No such file"):
        channel.exec(["true"], cwd=str(tmp_path / "absent"))
    with pytest.raises(InvalidInput):
        channel.exec([])
    with pytest.raises(InvalidInput, match="too long"):
        channel.exec(["true", *["x" * 60000] * 2])
    assert channel.exec(["true"]) == ExitStatus(0)


@pytest.mark.req("L6")
def test_a_large_output_through_a_slow_reader_in_bounded_memory(agent: Any, channel: GuestChannel) -> None:
    channel.exec(["true"])
    before = agent.resident_kib()
    reader, writer = os.pipe()
    held = 0
    seen = 0
    peak = 0

    def slow() -> None:
        nonlocal held, seen, peak
        while chunk := os.read(reader, 1 << 16):
            seen += len(chunk)
            held = max(held, channel.buffered)
            if seen % (1 << 20) < len(chunk):
                peak = max(peak, agent.resident_kib())

    thread = threading.Thread(target=slow)
    thread.start()
    status = channel.exec(["head", "-c", str(SIZE), "/dev/zero"], stdout=writer)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert status == ExitStatus(0)
    assert seen == SIZE
    assert held < 1 << 20
    assert peak - before < 8192


@pytest.mark.req("L6")
def test_a_large_input_comes_back_unchanged(channel: GuestChannel, got: Collected) -> None:
    data = os.urandom(1 << 16) * 80
    assert got.run(channel, "cat", stdin=data) == ExitStatus(0)
    assert bytes(got.out) == data


@pytest.mark.req("L6")
def test_input_nobody_reads_does_not_hold_the_program_up(channel: GuestChannel) -> None:
    assert channel.exec(["true"], stdin=bytes(3_000_000)) == ExitStatus(0)
    assert channel.exec(["head", "-c", "1"], stdin=bytes(3_000_000)) == ExitStatus(0)


@pytest.mark.req("L6")
def test_a_background_child_does_not_keep_the_session(channel: GuestChannel, got: Collected) -> None:
    assert got.run(channel, "sleep 1000 & echo $!") == ExitStatus(0)
    os.kill(int(got.out), signal.SIGKILL)


@pytest.mark.req("L6")
def test_a_reader_that_goes_away_ends_the_program(channel: GuestChannel) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert channel.exec(["cat", "/dev/zero"], stdout=writer).signal == signal.SIGPIPE
    os.close(writer)
    assert channel.exec(["true"]) == ExitStatus(0)


@pytest.mark.req("L6")
def test_a_failing_callback_stops_the_program_and_is_raised(channel: GuestChannel) -> None:
    def fail(_data: bytes) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        channel.exec(["cat", "/dev/zero"], stdout=fail)
    assert channel.exec(["true"]) == ExitStatus(0)


@pytest.mark.req("L6")
def test_time_running_out_kills_the_program_and_keeps_the_channel(channel: GuestChannel) -> None:
    with pytest.raises(GuestError, match="in time"):
        channel.exec(["sleep", "1000"], timeout=0.2)
    assert channel.status().sessions == 0


@pytest.mark.req("L6")
def test_two_requests_at_once_on_one_connection(channel: GuestChannel) -> None:
    first, second = bytearray(), bytearray()
    reader, writer = os.pipe()
    waiting = channel.start_exec(["sh", "-c", "read line; echo $line"], stdin=reader, stdout=first.extend)
    assert channel.exec(["echo", "second"], stdout=second.extend) == ExitStatus(0)
    assert channel.status().sessions == 1
    assert not first
    assert second == b"second\n"
    os.write(writer, b"first\n")
    assert channel.wait(waiting) == ExitStatus(0)
    assert first == b"first\n"
    os.close(reader)
    os.close(writer)


@pytest.mark.req("L6")
def test_a_terminal_with_size_resize_and_interrupt(channel: GuestChannel) -> None:
    out = bytearray()
    script = "stty size; trap 'stty size' WINCH; while :; do echo tick; sleep 0.05; done"
    operation = channel.start_exec(["sh", "-c", script], stdin=b"", stdout=out.extend, tty=(33, 99))

    def seen(text: bytes) -> None:
        while text not in out:
            channel._turn(time.monotonic() + 20, "output")

    seen(b"33 99\r\ntick")  # the trap is set
    operation.resize(40, 120)
    seen(b"40 120\r\n")
    operation.signal(signal.SIGINT)
    assert channel.wait(operation) == ExitStatus(0, signal.SIGINT)


@pytest.mark.req("L6")
def test_a_terminals_interrupt_character_reaches_the_foreground(channel: GuestChannel) -> None:
    out = bytearray()
    reader, writer = os.pipe()
    operation = channel.start_exec(
        ["sh", "-c", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"],
        stdin=reader,
        stdout=out.extend,
        tty=(24, 80),
    )
    while b"ready" not in out:
        channel._turn(time.monotonic() + 20, "output")
    os.write(writer, b"\x03")
    assert channel.wait(operation) == ExitStatus(5)
    assert b"caught" in out
    os.close(reader)
    os.close(writer)


@pytest.mark.req("L6")
def test_the_end_of_input_reaches_a_terminal(channel: GuestChannel, got: Collected) -> None:
    assert got.run(channel, "cat; echo over", stdin=b"", tty=(24, 80)) == ExitStatus(0)
    assert b"over" in got.out


@pytest.mark.req("L6")
def test_pump_forwards_window_changes_and_signals(agent: Any, eventually: Eventually) -> None:
    """A client process on a pseudo-terminal of ours, as the command line runs it."""
    source = Path(__file__).resolve().parents[3] / "src"
    client = (
        "import sys, time, tty; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from mvm.hostd.guest_channel import connect\n"
        "from mvm.hostd.guest_channel.terminal import pump\n"
        "tty.setraw(0)\n"
        "with connect(Path(sys.argv[1]), deadline=time.monotonic() + 10) as channel:\n"
        "    script = \"trap 'stty size' WINCH; trap 'echo term; exit 9' TERM; echo ready; \"\n"
        "    script += 'while :; do sleep 0.05; done'\n"
        "    status = pump(channel, ['sh', '-c', script], 0, 1, 2, tty=True)\n"
        "sys.exit(status.shell_code)\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", client, str(agent.path), str(source)], stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    seen = bytearray()

    def shows(text: bytes) -> Callable[[], bool]:
        def look() -> bool:
            if select.select([master], [], [], 0.01)[0]:
                seen.extend(os.read(master, 4096))
            return text in seen

        return look

    try:
        eventually(shows(b"ready"))
        # The kernel signals the terminal's foreground group; the client has no controlling terminal, so we do it.
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
        process.send_signal(signal.SIGWINCH)
        eventually(shows(b"50 132"))
        process.send_signal(signal.SIGTERM)
        eventually(shows(b"term"))
        assert process.wait(20) == 9
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.req("L6")
def test_pump_without_a_terminal_keeps_streams_apart(channel: GuestChannel, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"some input\n")
    stdin = os.open(tmp_path / "in", os.O_RDONLY)
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    err = os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT)
    before = signal.getsignal(signal.SIGINT)
    status = pump(channel, ["sh", "-c", "cat; echo err >&2; exit 4"], stdin, out, err, tty=False)
    for fd in (stdin, out, err):
        os.close(fd)
    assert status == ExitStatus(4)
    assert (tmp_path / "out").read_bytes() == b"some input\n"
    assert (tmp_path / "err").read_bytes() == b"err\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.req("L6")
def test_a_detached_program_survives_the_channel(agent: Any, tmp_path: Path, eventually: Eventually) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    with agent.channel() as channel:
        pid = channel.spawn(["sh", "-c", f"while [ ! -e {go} ]; do sleep 0.02; done; touch {done}"])
        with pytest.raises(GuestRefusal, match="No such file"):
            channel.spawn(["no-such-program"])
    assert Path(f"/proc/{pid}").exists()
    go.touch()
    eventually(done.exists)


@pytest.mark.req("L6")
def test_sessions_leave_no_descriptors_behind(
    agent: Any, channel: GuestChannel, eventually: Eventually
) -> None:
    channel.exec(["true"])
    before = agent.descriptors()
    for _ in range(5):
        channel.exec(["cat"], stdin=b"x")
        channel.exec(["true"], tty=(24, 80))
        with pytest.raises(GuestRefusal):
            channel.exec(["no-such-program"])
    eventually(lambda: agent.descriptors() == before)
