"""What a VMM can reach once its guest has taken it over: it has its uid, its descriptors, and nothing else.

Each attempt runs in a child with the uid and groups of `acme`'s VMM, outside its seccomp filter and with the whole
file system in sight, which is more than such a VMM would have.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fake_world import FakeWorld

from mvm.core.plan import InstancePlan
from mvm.hostd import keeper

pytestmark = pytest.mark.root
PTRACE_ATTACH = 16


def reached(plan: InstancePlan, attempts: list[Callable[[], object]]) -> list[int]:
    """Indices of the attempts that were not refused by the kernel."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(plan.gid, plan.gid, plan.gid)
            os.setresuid(plan.uid, plan.uid, plan.uid)
            for number, attempt in enumerate(attempts):
                try:
                    attempt()
                except OSError:
                    continue
                os.write(writer, bytes([number]))
            os.write(writer, b"\xff")
        finally:
            os._exit(0)
    os.close(writer)
    told = b""
    while data := os.read(reader, 4096):
        told += data
    os.close(reader)
    os.waitpid(child, 0)
    assert told.endswith(b"\xff"), "every attempt was made"
    return list(told[:-1])


def vmm_pid(world: FakeWorld, plan: InstancePlan) -> int:
    process = world.record(plan).process
    assert process is not None
    return process.pid


def opening(path: str | Path, flags: int = os.O_RDONLY) -> Callable[[], object]:
    return lambda: os.open(path, flags)


def connecting(path: Path) -> Callable[[], object]:
    return lambda: socket.socket(socket.AF_UNIX).connect(
        str(path)[-100:] if len(str(path)) > 100 else str(path)
    )


def attaching(pid: int) -> Callable[[], object]:
    def attach() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(PTRACE_ATTACH, pid, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    return attach


@pytest.mark.req("H4", "S4")
def test_it_cannot_reach_the_other_tenant(two: FakeWorld) -> None:
    mine, theirs = two.plan("acme"), two.plan("rival")
    pid = vmm_pid(two, theirs)
    base = two.paths(theirs).base
    attempts = [
        *(opening(f"/proc/{pid}/{name}") for name in ("mem", "maps", "environ", "pagemap")),
        lambda: os.listdir(f"/proc/{pid}/fd"),
        *(opening(f"/proc/{pid}/fd/{fd}", os.O_RDWR) for fd in (3, 5, 6, 7)),
        lambda: os.kill(pid, signal.SIGTERM),
        lambda: os.kill(pid, 0),
        attaching(pid),
        lambda: os.listdir(base),
        *(opening(path) for path in base.rglob("*") if path.is_file()),
        *(connecting(path) for path in base.rglob("*.sock")),
    ]
    assert reached(mine, attempts) == []
    assert two.marked(theirs, "memory of rival ")


@pytest.mark.req("H4", "K2", "S3")
def test_it_cannot_reach_its_own_keeper_key_or_files(two: FakeWorld) -> None:
    plan = two.plan("acme")
    paths = two.paths(plan)
    pid = keeper.anything_left(paths.runtime)
    assert pid
    attempts = [
        *(opening(f"/proc/{pid}/{name}") for name in ("mem", "maps", "environ")),
        lambda: os.listdir(f"/proc/{pid}/fd"),
        lambda: os.kill(pid, signal.SIGKILL),
        attaching(pid),
        *(opening(path, os.O_RDWR) for path in two.store.root.rglob("*") if path.is_file()),
        *(opening(path) for path in two.store.root.rglob("*") if path.is_file()),
        *(connecting(path) for path in paths.runtime.glob("*.sock")),
        opening("/dev/fuse", os.O_RDWR),
    ]
    assert reached(plan, attempts[:250]) == []
    assert keeper.anything_left(paths.runtime) == pid


@pytest.mark.req("H4", "S3")
def test_no_memory_file_of_a_pager_can_be_opened_again(two: FakeWorld) -> None:
    """Root itself cannot: the file is its uid's alone. (Root can trace the VMM, which is another matter.)"""
    theirs = two.plan("rival")
    pid = vmm_pid(two, theirs)
    assert "mvm-memory" not in Path("/proc/self/mountinfo").read_text()
    with pytest.raises(PermissionError):
        os.open(f"/proc/{pid}/fd/5", os.O_RDONLY)


@pytest.mark.req("H4")
def test_it_has_no_rights_to_gain(two: FakeWorld) -> None:
    plan = two.plan("acme")

    def as_root() -> None:
        os.setuid(0)

    def tap() -> None:
        import fcntl
        import struct

        fd = os.open("/dev/net/tun", os.O_RDWR)
        name = two.plan("rival").network.tap.encode()
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name, 0x2 | 0x1000 | 0x4000))

    def mount() -> None:
        from mvm.linux.mount import mount as attempt

        attempt("none", "/tmp", "tmpfs", 0, "")

    def raw() -> None:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW)

    assert reached(plan, [as_root, tap, mount, raw]) == []
