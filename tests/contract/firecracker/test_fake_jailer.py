"""The fake jailer: its arguments, the jail it makes, and what it leaves."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.fake_firecracker import install
from tests.support.fake_firecracker.client import Answer, message, read_answer

from mvm.linux.process import Child, Completed, run, start
from mvm.linux.sockets import connect_unix

pytestmark = pytest.mark.root
UID = 51234
EVERY_CODE = range(-64, 256)


@pytest.fixture
def base() -> Iterator[Path]:
    """Where a jail's uid may go."""
    with tempfile.TemporaryDirectory(prefix="mvm-jails-") as folder:
        os.chmod(folder, 0o755)
        install(Path(folder) / "programs")
        yield Path(folder)


def argv(base: Path, *more: str, name: str = "vm-1", after: tuple[str, ...] = ()) -> list[str]:
    programs = base / "programs"
    return [
        str(programs / "jailer"), "--id", name, "--exec-file", str(programs / "firecracker"), "--uid", str(UID),
        "--gid", str(UID), "--chroot-base-dir", str(base), *more, "--", *after,
    ]  # fmt: skip


def refused(base: Path, *more: str) -> str:
    found: Completed = run(argv(base, *more), timeout=20, ok=EVERY_CODE)
    assert found.code == 1, found
    return found.stderr.decode()


def ask(socket_path: Path, method: str, path: str) -> Answer:
    until = time.monotonic() + 20
    while True:
        try:
            with connect_unix(socket_path, 5) as sock:
                sock.sendall(message(method, path, None))
                return read_answer(sock)
        except OSError:
            assert time.monotonic() < until, "no API socket"
            time.sleep(0.01)


@contextmanager
def jailed(base: Path, *more: str, after: tuple[str, ...] = ()) -> Iterator[tuple[Path, Child]]:
    root = base / "firecracker" / "vm-1" / "root"
    with start(argv(base, *more, after=after)) as child:
        try:
            yield root, child
        finally:
            child.stop(0)


def test_a_jail(base: Path) -> None:
    secret = os.open("/dev/null", os.O_RDONLY)
    with jailed(base, after=("--api-sock", "/run/api.sock")) as (root, child):
        found = ask(root / "run" / "api.sock", "GET", "/")
        assert found.json["id"] == "vm-1"
        assert (root / "firecracker.pid").read_text() == str(child.pid)
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n" in status
        assert f"Gid:\t{UID}\t{UID}\t{UID}\t{UID}\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        assert "Groups:\t \n" in status
        mounts = Path(f"/proc/{child.pid}/mountinfo").read_text()
        assert str(base) not in Path("/proc/self/mountinfo").read_text(), "the host sees no mounts"
        assert all(" ro" in line for line in mounts.splitlines() if line.split()[4] != "/")
        assert Path(f"/proc/{child.pid}/environ").read_bytes() == b""
        arguments = Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")
        assert b"--start-time-us" in arguments
        assert b"--parent-cpu-time-us" in arguments
        assert (
            "Max open files            2048                 2048"
            in Path(f"/proc/{child.pid}/limits").read_text()
        )
        for name, (major, minor) in {
            "dev/net/tun": (10, 200),
            "dev/kvm": (10, 232),
            "dev/urandom": (1, 9),
        }.items():
            info = (root / name).stat()
            assert stat.S_ISCHR(info.st_mode)
            assert (os.major(info.st_rdev), os.minor(info.st_rdev), info.st_uid) == (major, minor, UID)
        for name in ("", "dev", "dev/net", "run"):
            info = (root / name).stat()
            assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (UID, 0o700)
        inside = Path(f"/proc/{child.pid}/root")
        assert not (inside / "etc").exists()
        assert not (inside / "old_root").exists()
        copy, source = (root / "firecracker").stat(), (base / "programs" / "firecracker").stat()
        assert (copy.st_uid, copy.st_size) == (UID, source.st_size)
        assert copy.st_ino != source.st_ino
        assert source.st_uid == 0
    os.close(secret)
    assert (root / "firecracker.pid").exists(), "nothing is cleaned"


def test_the_default_socket_is_in_run(base: Path) -> None:
    with jailed(base) as (root, _):
        assert ask(root / "run" / "firecracker.socket", "GET", "/version").status == 200


def test_a_jail_is_for_one_use(base: Path) -> None:
    with jailed(base) as (root, _):
        ask(root / "run" / "firecracker.socket", "GET", "/")
    assert "Failed to create /dev/net/tun via mknod inside the jail: File exists" in refused(base)
    for name in ("net/tun", "kvm", "urandom", "userfaultfd"):
        (root / "dev" / name).unlink(missing_ok=True)
    assert "Failed to open file /firecracker.pid: File exists" in refused(base)


def test_a_link_in_the_place_of_the_copy_is_refused(base: Path) -> None:
    root = base / "firecracker" / "vm-1" / "root"
    root.mkdir(parents=True)
    os.link(base / "programs" / "firecracker", root / "firecracker")
    assert "Detected hard link" in refused(base)
    (root / "firecracker").unlink()
    (root / "firecracker").symlink_to("/etc/passwd")
    assert "Too many levels of symbolic links" in refused(base)


def test_version_and_missing_arguments(base: Path) -> None:
    jailer = str(base / "programs" / "jailer")
    assert run([jailer, "--version"], timeout=20).stdout.startswith(b"Jailer v1.16.1\n")
    found = run([jailer, "--id", "x"], timeout=20, ok=EVERY_CODE)
    assert found.code == 1
    assert b"Argument 'exec-file' required, but not found." in found.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--nonsense",), "Found argument 'nonsense'"),
        (("--id", "again"), "more than once"),
        (("--parent-cgroup", "/absolute"), "Parent cgroup path is invalid"),
        (("--parent-cgroup", "a/../b"), "Parent cgroup path is invalid"),
        (("--cgroup-version", "two"), "invalid cgroup version specifier"),
        (("--cgroup", "nothing"), "Invalid format for cgroups"),
        (("--cgroup", "../a.b=1"), "Cgroup invalid file"),
        (("--resource-limit", "fsize"), "Invalid format for resources limits"),
        (("--resource-limit", "memory=1"), "Invalid resource argument"),
        (("--resource-limit", "fsize=much"), "Invalid limit value"),
        (("--netns", "/no/such/namespace"), "No such file"),
    ],
)
def test_arguments_that_are_refused(base: Path, more: tuple[str, ...], words: str) -> None:
    assert words in refused(base, *more)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--id", "under_score", "Invalid char (_) at position 5"),
        ("--id", "x" * 65, "Invalid len (65)"),
        ("--uid", "root", "Invalid uid: root"),
        ("--gid", "-1", "Invalid gid: -1"),
        ("--exec-file", "/no/such/file", "Failed to canonicalize path"),
        ("--exec-file", "/usr", "is not a file"),
        ("--chroot-base-dir", "/no/such/folder", "Failed to canonicalize path"),
        ("--chroot-base-dir", "/etc/passwd", "is not a directory"),
    ],
)
def test_values_that_are_refused(base: Path, option: str, value: str, words: str) -> None:
    changed = argv(base)
    changed[changed.index(option) + 1] = value
    found = run(changed, timeout=20, ok=EVERY_CODE)
    assert found.code == 1
    assert words in found.stderr.decode()


def test_a_new_pid_namespace(base: Path) -> None:
    with jailed(base, "--new-pid-ns") as (root, child):
        assert child.wait(20) == 0, "the jailer itself ends"
        ask(root / "run" / "firecracker.socket", "GET", "/")
        pid = int((root / "firecracker.pid").read_text())
        assert os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
        assert f"NSpid:\t{pid}\t1\n" in Path(f"/proc/{pid}/status").read_text()
        os.kill(pid, 9)


def test_as_a_daemon(base: Path) -> None:
    with jailed(base, "--daemonize") as (root, child):
        assert child.wait(20) == 0
        ask(root / "run" / "firecracker.socket", "GET", "/")
        pid = int((root / "firecracker.pid").read_text())
        assert os.getsid(pid) not in (pid, os.getsid(0))
        assert os.readlink(f"/proc/{pid}/fd/0").endswith("/dev/null")
        os.kill(pid, 9)


def test_limits(base: Path) -> None:
    with jailed(base, "--resource-limit", "fsize=4096", "--resource-limit", "no-file=512") as (root, child):
        ask(root / "run" / "firecracker.socket", "GET", "/")
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        assert "Max file size             4096                 4096" in limits
        assert "Max open files            512                  512" in limits


def hierarchy(base: Path) -> Path:
    """A directory in the place of cgroup v2, for what the jailer writes where."""
    made = base / "unified"
    (made / "parent").mkdir(parents=True)
    (made / "cgroup.controllers").write_text("cpu memory pids\n")
    (base / "mounts").write_text(f"cgroup2 {made} cgroup2 rw 0 0\n")
    install(base / "programs", proc_mounts=base / "mounts")
    return made


def test_a_parent_cgroup_without_values_is_joined(base: Path) -> None:
    made = hierarchy(base)
    with jailed(base, "--cgroup-version", "2", "--parent-cgroup", "parent") as (root, child):
        ask(root / "run" / "firecracker.socket", "GET", "/")
        assert (made / "parent" / "cgroup.procs").read_text() == str(child.pid)
        assert os.listdir(made / "parent") == ["cgroup.procs"]


def test_a_parent_cgroup_that_is_missing_is_passed_over(base: Path) -> None:
    made = hierarchy(base)
    with jailed(base, "--cgroup-version", "2", "--parent-cgroup", "other") as (root, _):
        ask(root / "run" / "firecracker.socket", "GET", "/")
        assert not (made / "other").exists()


def test_a_cgroup_is_made_where_values_are_given(base: Path) -> None:
    made = hierarchy(base)
    more = ("--cgroup-version", "2", "--parent-cgroup", "parent", "--cgroup", "memory.max=1000000")
    with jailed(base, *more) as (root, child):
        ask(root / "run" / "firecracker.socket", "GET", "/")
        assert (made / "parent" / "vm-1" / "memory.max").read_text() == "1000000\n"
        assert (made / "parent" / "vm-1" / "cgroup.procs").read_text() == f"{child.pid}\n"
        assert (made / "parent" / "cgroup.subtree_control").read_text() == "+memory\n"
    assert "Controller io is unavailable" in refused(base, "--cgroup-version", "2", "--cgroup", "io.max=1")
    assert "Hierarchy not found" in refused(base, "--cgroup", "cpu.shares=1")


def test_faults(base: Path) -> None:
    install(base / "programs", faults=["jailer refuses"])
    assert "told to refuse" in refused(base)
    assert not (base / "firecracker").exists()
    install(base / "programs", faults=["jailer cannot exec"])
    assert "Failed to exec into Firecracker" in refused(base)
    assert (base / "firecracker" / "vm-1" / "root" / "dev" / "kvm").exists()
    install(base / "programs", faults=["jailer hangs"])
    with start(argv(base)) as child:
        assert child.wait(0.3) is None
        child.stop(0)
