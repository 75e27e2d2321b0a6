"""Facts about processes of this machine, ourselves among them."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.hostd.inspect.process import holders, is_persistent, read_process
from mvm.hostd.inspect.text import Mount, parse_mounts

MEMORY = Path("/dev/shm")


@pytest.fixture
def mounts() -> tuple[Mount, ...]:
    return parse_mounts(Path("/proc/self/mountinfo").read_text())


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"], env={"LANG": "C"}, stdin=subprocess.DEVNULL) as child:
        try:
            yield child.pid
        finally:
            child.kill()


@pytest.mark.req("O6")
def test_a_process_as_it_was_started(sleeper: int, mounts: tuple[Mount, ...]) -> None:
    seen = read_process(sleeper, mounts, "")
    assert seen is not None
    assert seen.argv == ("sleep", "60")
    assert seen.environ == ("LANG=C",)
    assert len(seen.threads) == 1
    assert seen.threads[0].uids == (os.getuid(),) * 4
    assert seen.own_namespaces == ()
    assert seen.root == "/"
    assert seen.network_sockets == 0
    assert len(seen.core_limit.split()) == 2


@pytest.mark.req("O6", "L6")
def test_sockets_of_the_network_are_told_from_others(mounts: tuple[Mount, ...]) -> None:
    def count() -> int:
        seen = read_process(os.getpid(), mounts, "")
        assert seen is not None
        return seen.network_sockets

    before = count()
    with socket.socket(socket.AF_UNIX), socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        # A socket enters the kernel's tables when it is bound.
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        assert count() == before + 2
    assert count() == before


@pytest.mark.req("O6", "S3")
def test_files_and_mappings_on_a_disk_are_told_from_memory(tmp_path: Path, mounts: tuple[Mount, ...]) -> None:
    disk = tmp_path / "memory.raw"
    disk.write_bytes(b"x" * 8192)
    ram = os.memfd_create("mvm-test")
    os.ftruncate(ram, 8192)
    with open(disk, "r+b") as file, mmap.mmap(file.fileno(), 8192), mmap.mmap(ram, 8192):
        seen = read_process(os.getpid(), mounts, "")
        assert seen is not None
        here = os.stat(disk)
        device = f"{os.major(here.st_dev)}:{os.minor(here.st_dev)}"
        on_disk = is_persistent(device, here.st_ino, str(disk), mounts)
        opened = [f for f in seen.files if f.target == str(disk) and f.writable]
        assert opened
        assert all(f.persistent is on_disk for f in opened)
        mapped = [m for m in seen.plain_maps if m.path == str(disk)]
        assert [m.shared for m in mapped] == ([True] if on_disk else [])
        secrets = [f for f in seen.files if f.target.startswith("/memfd:mvm-test")]
        assert secrets
        assert not any(f.persistent for f in secrets)
        assert not [m for m in seen.plain_maps if "memfd" in m.path]
    os.close(ram)


@pytest.mark.req("S3")
def test_a_file_in_shared_memory_is_in_memory(mounts: tuple[Mount, ...]) -> None:
    if not any(mount.point == str(MEMORY) and mount.kind == "tmpfs" for mount in mounts):
        pytest.skip("no tmpfs to try it on")
    seen = os.stat(MEMORY)
    assert not is_persistent(
        f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}", seen.st_ino, str(MEMORY), mounts
    )


def test_a_device_that_mountinfo_names_otherwise_is_found_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    made = (Mount("/", "0:1", "btrfs"), Mount(str(tmp_path), "0:2", "tmpfs"))
    assert is_persistent("0:99", file.stat().st_ino, str(file), made[:1])
    assert not is_persistent("0:99", file.stat().st_ino, str(file), made)
    assert not is_persistent("0:99", file.stat().st_ino + 1, str(file), made[:1]), "another file of that name"


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert read_process(child.pid, (), "") is None


@pytest.mark.req("K1")
def test_who_has_a_file_open(tmp_path: Path) -> None:
    path = tmp_path / "data.img"
    path.touch()
    assert holders([str(path)])[0] == []
    with open(path):
        assert holders([str(path)])[0] == [(str(path), os.getpid())]
