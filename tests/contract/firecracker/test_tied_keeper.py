"""What Firecracker's jailer needs of the keeper and of the jail: shown with ordinary programs in its place."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvm.core.record import ProcessIdentity
from mvm.hostd import keeper
from mvm.hostd.jail import Copy, Jail
from mvm.hostd.recovery import read_exit
from mvm.linux.pidfd import is_alive
from mvm.linux.process import wait_readable

pytestmark = pytest.mark.root
UID = 1_900_123_457
# What the jailer does: closes everything it was not meant to have, and becomes another user, which clears its death
# signal.
ROOT = "import os, sys; "
BECOME = "import os, sys; os.closerange(3, 4096); os.setresgid({0},{0},{0}); os.setresuid({0},{0},{0}); "
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
        jail: Jail | None = None,
        logs: dict[int, Path] | None = None,
        prelude: str = BECOME.format(UID),
    ) -> tuple[ProcessIdentity, ProcessIdentity]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            program = keeper.Program(
                [sys.executable, "-c", prelude + script],
                {1: theirs.fileno()}, 0, 0, (), jail=jail, owner=(UID, UID), tied=True, lock_fd=0,
            )  # fmt: skip
            return keeper.launch(
                program, runtime=runtime, console=ours, errors=runtime / "logs/vmm.log", logs=logs
            )

    return run


def ends(identity: ProcessIdentity) -> bool:
    until = time.monotonic() + 10
    while is_alive(identity) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_alive(identity)


def said(path: Path, text: str) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if path.exists() and text in path.read_text():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.req("L7")
def test_without_its_keeper_it_dies_although_it_changed_its_uid(runtime: Path, start: Start) -> None:
    vmm, kept = start("print('there', flush=True); import time; time.sleep(100)")
    assert said(runtime / "logs/console.log", "there")
    assert os.stat(f"/proc/{vmm.pid}").st_uid == UID
    assert keeper.anything_left(runtime) == kept.pid, "the number is the host's"
    os.kill(kept.pid, signal.SIGKILL)
    assert ends(vmm)
    assert keeper.anything_left(runtime) is None


@pytest.mark.req("L7")
def test_its_end_is_written_down(runtime: Path, start: Start) -> None:
    start("sys.exit(148)")
    assert keeper.await_end(runtime)
    status = read_exit(runtime)
    assert status is not None
    assert os.waitstatus_to_exitcode(status) == 148


@pytest.mark.req("L7")
def test_it_holds_the_lock_for_as_long_as_it_lives(runtime: Path, start: Start) -> None:
    vmm, _ = start("import time; time.sleep(100)")
    assert os.path.realpath(f"/proc/{vmm.pid}/fd/0") == str(runtime / keeper.ALIVE_FILE)
    handle = os.pidfd_open(vmm.pid)
    os.kill(vmm.pid, signal.SIGKILL)
    assert wait_readable(handle, 10)
    os.close(handle)
    assert keeper.await_end(runtime)
    assert read_exit(runtime) == signal.SIGKILL


@pytest.mark.req("H6")
def test_what_it_logs_through_a_pipe_is_kept_and_bounded(runtime: Path, start: Start) -> None:
    pipe = runtime / "fifo"
    os.mkfifo(pipe)
    os.chown(pipe, UID, UID)
    (runtime.parent).chmod(0o755)
    runtime.chmod(0o755)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(reader, b"first words\n")
        vmm, _ = start("import time; time.sleep(100)", logs={reader: runtime / "logs/extra.log"})
    finally:
        os.close(reader)
    assert said(runtime / "logs/extra.log", "first words")
    assert is_alive(vmm)


@pytest.mark.req("H4", "K2")
def test_a_copy_in_the_jail_is_its_owners_and_nothing_else_is_there(runtime: Path, start: Start) -> None:
    root = runtime.parent / "jail"
    root.mkdir()
    secret = os.memfd_create("secret")
    os.write(secret, b"words" * 1000)
    jail = Jail(
        root=root,
        copies=(Copy(f"/proc/self/fd/{secret}", "/x/root/secret", UID, UID),),
        namespaces=frozenset({"mount", "ipc", "uts"}),
        pivot=False,
    )
    try:
        start(
            f"p='{root}/x/root/secret'; s=os.stat(p); print(open(p).read() == 'words'*1000, oct(s.st_mode), s.st_uid,"
            " flush=True); import time; time.sleep(100)",
            jail,
            prelude=ROOT,
        )
    finally:
        os.close(secret)
    assert said(runtime / "logs/console.log", f"True 0o100400 {UID}")
    assert os.listdir(root) == [], "the host sees none of it"
