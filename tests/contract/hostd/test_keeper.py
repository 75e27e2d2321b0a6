"""The keeper with ordinary programs in the VMM's place: what it starts, with what, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mvm.core.errors import Conflict, VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd import keeper
from mvm.hostd.bounded_log import LOG_BYTES
from mvm.hostd.jail import Jail
from mvm.hostd.recovery import read_exit
from mvm.linux import capabilities
from mvm.linux.pidfd import is_alive
from mvm.linux.process import wait_readable

pytestmark = pytest.mark.root
UID = 1_900_123_456

Start = Callable[..., tuple[ProcessIdentity, ProcessIdentity]]


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runtime"
    (folder / "logs").mkdir(parents=True)
    yield folder
    keeper.end_leftovers(folder)


@pytest.fixture
def start(runtime: Path) -> Start:
    def run(
        script: str,
        fds: dict[int, int] | None = None,
        argv: Sequence[str] | None = None,
        jail: Jail | None = None,
        cgroup: Path | None = None,
    ) -> tuple[ProcessIdentity, ProcessIdentity]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            return keeper.launch(
                keeper.Program(
                    argv or ["/bin/sh", "-c", script],
                    {4: theirs.fileno(), **(fds or {})},
                    UID,
                    UID,
                    (),
                    jail=jail,
                    cgroup=cgroup,
                ),
                runtime=runtime,
                console=ours,
                errors=runtime / "logs" / "vmm.log",
            )

    return run


@pytest.mark.req("L3")
@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 3", 3 << 8), ("kill -9 $$", 9), ("kill -15 $$", 15)]
)
def test_it_writes_down_how_the_vmm_ended(runtime: Path, start: Start, script: str, status: int) -> None:
    vmm, parent = start(f"sleep 0.05; {script}")
    assert keeper.await_end(runtime)
    assert read_exit(runtime) == status
    assert not is_alive(vmm)
    until = time.monotonic() + 10
    while is_alive(parent):
        assert time.monotonic() < until


@pytest.mark.req("L3")
def test_one_that_ended_before_anybody_looked_is_named_all_the_same(
    runtime: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keeper had reaped it: the number may be anybody's by then."""

    def late(fd: int, timeout: float) -> bool:
        return wait_readable(fd, timeout) and keeper.await_end(runtime)

    monkeypatch.setattr(keeper, "wait_readable", late)
    vmm, parent = start("exit 3")
    assert vmm.pid != parent.pid
    assert not is_alive(vmm)
    assert not is_alive(parent)
    assert read_exit(runtime) == 3 << 8


@pytest.mark.req("L3")
def test_a_program_that_is_not_there_is_an_error_with_its_words(runtime: Path, start: Start) -> None:
    with pytest.raises(VmmError) as caught:
        start("", argv=["/no/such/vmm"])
    assert "/no/such/vmm: [Errno 2]" in caught.value.details
    assert keeper.await_end(runtime)
    assert read_exit(runtime) == 127 << 8
    assert "/no/such/vmm" in (runtime / "logs" / "vmm.log").read_text()


@pytest.mark.req("L3")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", "the VMM was ended by signal 9 (Killed)\n"),
        ("exit 3", "the VMM ended with exit code 3\n"),
        ("", ""),
    ],
)
def test_an_end_that_was_not_orderly_is_in_the_log(
    runtime: Path, start: Start, script: str, said: str
) -> None:
    start(f"sleep 0.1; {script}")
    assert keeper.await_end(runtime)
    assert (runtime / "logs" / "vmm.log").read_text() == said


@pytest.mark.req("H4")
def test_it_can_make_no_file_larger_than_it_may(runtime: Path, tmp_path: Path) -> None:
    image = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT, 0o600)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.truncate(image, 65536)
            program = keeper.Program(
                ["/bin/sh", "-c", "head -c 65536 /dev/zero >&9; echo full >&4; exec head -c 1 /dev/zero >&9"],
                {4: theirs.fileno(), 9: image}, UID, UID, (), file_max=65536,
            )  # fmt: skip
            keeper.launch(program, runtime=runtime, console=ours, errors=runtime / "logs" / "vmm.log")
        finally:
            os.close(image)
    assert keeper.await_end(runtime)
    assert read_exit(runtime) == 1 << 8, "File too large"
    assert (tmp_path / "image").stat().st_size == 65536
    assert "full" in (runtime / "logs" / "console.log").read_text()


@pytest.mark.req("H4")
def test_the_program_gets_what_it_was_given_and_nothing_else(runtime: Path, start: Start) -> None:
    os.environ["A_SECRET_OF_OURS"] = "x"
    secret, extra = os.pipe()
    os.set_inheritable(extra, True)
    try:
        start(
            "exec 1>&4; echo fds $(ls /proc/self/fd); env; id -u; id -G; umask; ulimit -c; pwd", {9: secret}
        )
    finally:
        del os.environ["A_SECRET_OF_OURS"]
        os.close(secret)
        os.close(extra)
    assert keeper.await_end(runtime)
    said = (runtime / "logs" / "console.log").read_text()
    listed = said.splitlines()[0].split()[1:]
    assert set(listed) - {"3"} == {"0", "1", "2", "4", "7", "9"}, "3 is the directory that ls reads"
    assert "A_SECRET_OF_OURS" not in said
    assert f"\n{UID}\n{UID}\n0077\n0\n/\n" in said


@pytest.mark.req("H3", "H4")
@pytest.mark.parametrize("jailed", [True, False])
def test_it_gives_up_its_rights_once_the_vmm_runs(
    runtime: Path, start: Start, tmp_path: Path, jailed: bool
) -> None:
    """In every thread; and it still ends its VMM, turns logs over and writes down how the VMM ended."""
    jail = Jail(root=tmp_path / "jail", pivot=False) if jailed else None
    (tmp_path / "jail").mkdir()
    vmm, parent = start("head -c 1500000 /dev/zero >&4; exec sleep 100", jail=jail)
    ours = capabilities.status().bounding
    for thread in os.listdir(f"/proc/{parent.pid}/task"):
        held = capabilities.status(int(thread))
        # A parent that is in no PID namespace with its VMM ends it by a signal, which takes a right.
        kept = frozenset() if jailed else frozenset({"KILL"})
        assert held.permitted == held.effective == held.bounding == kept < ours
        assert not held.inheritable
        assert not held.ambient
        assert held.no_new_privs
        assert held.seccomp == 2
    until = time.monotonic() + 10
    while not (runtime / "logs" / "console.log.1").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(vmm.pid, signal.SIGKILL)
    assert keeper.await_end(runtime)
    assert read_exit(runtime) == signal.SIGKILL


@pytest.mark.req("L3", "H3")
@pytest.mark.parametrize("jailed", [True, False])
def test_a_vmm_ends_with_its_keeper(runtime: Path, start: Start, tmp_path: Path, jailed: bool) -> None:
    (tmp_path / "jail").mkdir()
    vmm, parent = start("exec sleep 100", jail=Jail(root=tmp_path / "jail", pivot=False) if jailed else None)
    os.kill(parent.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while is_alive(vmm):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.req("L7")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP])
def test_a_terminals_signals_are_not_for_the_vm(runtime: Path, start: Start, number: int) -> None:
    vmm, parent = start("exec sleep 100")
    assert os.getsid(parent.pid) != os.getsid(0)
    os.kill(parent.pid, number)
    time.sleep(0.05)
    assert is_alive(parent)
    assert is_alive(vmm)


@pytest.mark.req("L3")
def test_a_place_is_taken_until_both_are_gone(runtime: Path, start: Start) -> None:
    assert keeper.anything_left(runtime) is None
    _, parent = start("exec sleep 100")
    assert keeper.anything_left(runtime) == parent.pid
    with pytest.raises(Conflict, match="there already"):
        start("exec sleep 100")
    assert keeper.end_leftovers(runtime)
    assert keeper.anything_left(runtime) is None
    assert not keeper.end_leftovers(runtime)
    start("exec sleep 100")


LET_GO = """
import fcntl, os, struct, time
for fd in map(int, os.listdir("/proc/self/fd")):
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        pass
os.write(4, b"let go")
time.sleep(100)
"""


@pytest.mark.req("L3", "H4")
def test_a_vmm_cannot_let_go_of_its_place(runtime: Path, start: Start) -> None:
    """One that was taken over has the descriptor of its lock. Another VM would get the same disk."""
    vmm, parent = start("", argv=[sys.executable, "-c", LET_GO])
    until = time.monotonic() + 10
    while "let go" not in (runtime / "logs" / "console.log").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert keeper.anything_left(runtime) == parent.pid
    with pytest.raises(Conflict, match="there already"):
        start("exec sleep 100")
    assert keeper.end_leftovers(runtime)
    until = time.monotonic() + 10
    while is_alive(vmm):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.req("L3")
def test_who_asks_is_in_nobodys_way(runtime: Path, start: Start) -> None:
    """Of many who ask at once nobody takes another for a VM."""
    (runtime / keeper.ALIVE_FILE).touch()
    asking = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                os._exit(any(keeper.anything_left(runtime) is not None for _ in range(3000)))
            finally:
                os._exit(2)
        asking.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in asking] == [0, 0]


@pytest.mark.req("L3")
def test_a_pid_file_with_a_strangers_pid_ends_no_stranger(runtime: Path, start: Start) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    vmm, _ = start("exec sleep 0.3")
    (runtime / keeper.PID_FILE).write_text(str(child))
    assert keeper.end_leftovers(runtime), "it waits until those who hold the lock are gone"
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the stranger lives"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_alive(vmm)


@pytest.mark.req("L1")
def test_a_console_that_cannot_be_written_does_not_cost_the_vm(runtime: Path, start: Start) -> None:
    log = runtime / "logs" / "console.log"
    (runtime / "logs" / "console.log.1").mkdir()  # so that the rename at the bound fails
    (runtime / "logs" / "console.log.1" / "x").touch()
    vmm, _ = start("head -c 3000000 /dev/zero >&4; exec sleep 100")
    until = time.monotonic() + 20
    while not log.exists() or log.stat().st_size < LOG_BYTES // 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)
    assert is_alive(vmm)
    assert log.stat().st_size <= LOG_BYTES


@pytest.mark.req("L1", "H2")
@pytest.mark.parametrize(("where", "name"), [(">&4", "console.log"), (">&2", "vmm.log")])
def test_what_a_hostile_guest_makes_said_is_bounded(
    runtime: Path, start: Start, where: str, name: str
) -> None:
    """QEMU prints a line for every malformed request of a guest, which can send them for ever."""
    vmm, parent = start(f"head -c 5000000 /dev/zero {where}; sleep 0.2")
    until = time.monotonic() + 20
    while is_alive(parent):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not is_alive(vmm)
    sizes = [(runtime / "logs" / file).stat().st_size for file in (name, f"{name}.1")]
    assert all(0 < size <= LOG_BYTES for size in sizes), sizes


@pytest.mark.req("L3")
def test_the_command_may_be_gone_before_the_vmm_runs(runtime: Path, start: Start) -> None:
    """A command killed at any moment of `launch` leaves both or none, and what is left can be ended."""
    for delay in (0, 0.0005, 0.001, 0.002, 0.004, 0.008):
        child = os.fork()
        if child == 0:
            try:
                start("exec sleep 100")
            finally:
                time.sleep(10)
                os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        keeper.end_leftovers(runtime)
        assert keeper.anything_left(runtime) is None
