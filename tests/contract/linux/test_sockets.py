"""Unix sockets with long paths, peers and descriptors; sealed memory files; locks between processes."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from mvm.core.errors import Busy, Conflict, IntegrityError
from mvm.linux import files, memfd, process, sockets


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A directory whose path is longer than a socket address can be."""
    path = tmp_path / ("d" * 100) / ("e" * 100)
    path.mkdir(parents=True)
    return path


@pytest.mark.req("H2")
def test_a_long_path_works_and_is_private(deep: Path) -> None:
    path = deep / "s.sock"
    old = os.umask(0)
    try:
        server = sockets.listen_unix(path)
    finally:
        os.umask(old)
    with server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with sockets.connect_unix(path, 5) as client, server.accept()[0] as served:
            assert sockets.peer(served) == (os.getpid(), os.getuid(), os.getgid())
            client.sendall(b"x")
            assert served.recv(10) == b"x"


def test_the_mode_asked_for_survives_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        with sockets.listen_unix(tmp_path / "s", mode=0o660):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
    finally:
        os.umask(old)


def test_only_a_dead_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sockets.listen_unix(path).close()
    with sockets.listen_unix(path), pytest.raises(Conflict):
        sockets.listen_unix(path)
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(Conflict):
        sockets.listen_unix(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"precious"
    with pytest.raises(FileNotFoundError):
        sockets.connect_unix(tmp_path / "none", 1)


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_travel_and_do_not_leak() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    sent = memfd.of_bytes("m", b"content")
    with left, right:
        before = _open_fds()
        sockets.send_fds(left, b"take these", [sent, sent])
        data, fds = sockets.recv_fds(right, 100)
        assert data == b"take these"
        assert [os.pread(fd, 10, 0) for fd in fds] == [b"content"] * 2
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)
        for count, limit in ((2, 1), (5, 2), (1, 0), (40, 3)):
            sockets.send_fds(left, b"x", [sent] * count)
            with pytest.raises(IntegrityError):
                sockets.recv_fds(right, 1, limit)
        assert _open_fds() == before
        sockets.send_fds(left, b"none", [])
        assert sockets.recv_fds(right, 10) == (b"none", [])
        left.close()
        assert sockets.recv_fds(right, 10) == (b"", [])
    os.close(sent)


@pytest.mark.req("K3")
def test_a_sealed_memfd_cannot_be_changed_by_who_inherits_it() -> None:
    fd = memfd.of_bytes("m", b"content")
    try:
        assert memfd.seals(fd) == memfd.SEAL_ALL
        target = memfd.proc_path(fd)
        script = f"echo x 2>/dev/null > {target}; echo x 2>/dev/null 1<> {target}; cat {target}"
        assert process.run(["sh", "-c", script], pass_fds=[fd], timeout=10).stdout == b"content"
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
    finally:
        os.close(fd)


_HOLD = """
import sys, time
from pathlib import Path
from mvm.linux import files
with files.locked(Path(sys.argv[1]), wait=5):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.mark.req("L5", "L3")
def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    env = {"PYTHONPATH": str(Path(files.__file__).parents[2])}
    path = tmp_path / "lock"
    with process.start([sys.executable, "-c", _HOLD, str(path)], stdout=writer, env=env) as child:
        os.close(writer)
        assert os.read(reader, 10) == b"held\n"
        os.close(reader)
        with pytest.raises(Busy) as caught, files.locked(path, wait=0.05):
            pass
        assert str(child.pid) in caught.value.details
        child.stop(grace=0)
    with files.locked(path, wait=0):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with files.locked(tmp_path / "lock", wait=0):
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        with files.locked(tmp_path / "lock", wait=0):
            pass
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)
