"""The jail with ordinary programs in the VMM's place: what they see in it, and what is left of it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mvm.core.errors import VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd import keeper
from mvm.hostd.jail import Bind, Jail
from mvm.hostd.recovery import read_exit
from mvm.linux import namespaces
from mvm.linux.pidfd import is_alive, terminate

pytestmark = [pytest.mark.root, pytest.mark.req("H4")]
UID = 1_900_123_457
_SYSTEM = tuple(Bind(path, path) for path in ("/usr/bin", "/usr/lib", "/lib", "/lib64", "/bin"))

Run = Callable[..., tuple[ProcessIdentity, ProcessIdentity]]


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runtime"
    (folder / "logs").mkdir(parents=True)
    (tmp_path / "jail").mkdir()
    yield folder
    keeper.end_leftovers(folder)


@pytest.fixture
def jail(tmp_path: Path) -> Jail:
    binds = tuple(bind for bind in _SYSTEM if os.path.exists(bind.source))
    return Jail(root=tmp_path / "jail", binds=binds, devices=("/dev/null",), proc=True)


@pytest.fixture
def start(runtime: Path) -> Run:
    def run(jail: Jail, script: str, uid: int = UID) -> tuple[ProcessIdentity, ProcessIdentity]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            program = keeper.Program(["/bin/sh", "-c", script], {4: theirs.fileno()}, uid, uid, (), jail=jail)
            return keeper.launch(program, runtime=runtime, console=ours, errors=runtime / "logs" / "vmm.log")

    return run


def said(runtime: Path) -> list[str]:
    assert keeper.await_end(runtime)
    return (runtime / "logs" / "console.log").read_text().splitlines()


def with_binds(jail: Jail, *binds: Bind, **other: object) -> Jail:
    return msgspec.structs.replace(jail, binds=(*jail.binds, *binds), **other)


def test_a_program_sees_what_was_bound_and_nothing_else(runtime: Path, start: Run, jail: Jail) -> None:
    start(
        jail,
        "exec >&4; echo /* /dev/* /proc/[0-9]*; ls -A /usr; ls -A /etc /home /root 2>&1 | wc -l; pwd; sleep 0.2",
    )
    top, *rest = said(runtime)
    places = {f"/{bind.target.split('/')[1]}" for bind in jail.binds}
    # The shell is the first process, and expands its own pattern: nobody else is there.
    assert set(top.split()) == {*places, "/dev", "/proc", "/dev/null", "/proc/1"}
    assert set(rest[:-2]) <= {"bin", "lib"}
    assert rest[-2:] == ["3", "/"], "three times that there is no such directory"


def test_nothing_can_be_written_and_no_privilege_is_in_reach(runtime: Path, start: Run, jail: Jail) -> None:
    """As root too: a file system is read-only for everybody."""
    script = (
        "exec >&4 2>&1; for d in / /usr/bin /usr/lib /dev; do touch $d/x && echo wrote $d; done;"
        "while read -r source place type options rest; do echo $place $type $options; done < /proc/self/mounts;"
        "sleep 0.2"
    )
    start(jail, script, uid=0)
    lines = said(runtime)
    assert not [line for line in lines if line.startswith("wrote")]
    mounted = {line.split()[0]: set(line.split()[2].split(",")) for line in lines if line.startswith("/")}
    assert set(mounted) == {"/", "/proc", "/dev/null", *(bind.target for bind in jail.binds)}
    assert all("nosuid" in options for options in mounted.values())
    for place, options in mounted.items():
        assert place == "/proc" or (place == "/dev/null") != ("ro" in options), place
        assert ("nodev" in options) == (place != "/dev/null"), place
    assert "noexec" in mounted["/"]


@pytest.mark.req("L3")
def test_the_host_has_no_mount_of_it_and_nothing_is_left(runtime: Path, start: Run, jail: Jail) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    vmm, _ = start(jail, "exec sleep 100")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.listdir(jail.root) == []
    assert os.readlink(f"/proc/{vmm.pid}/root") == "/"  # of its own namespace, so:
    assert os.stat(f"/proc/{vmm.pid}/root/").st_dev != os.stat("/").st_dev
    for kind in ("mnt", "net", "ipc", "uts", "pid"):
        assert os.readlink(f"/proc/{vmm.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    assert not (runtime / keeper.UNJAILED_FILE).exists()
    assert terminate(vmm, 0) == "killed"
    assert keeper.await_end(runtime)
    assert read_exit(runtime) == signal.SIGKILL
    assert Path("/proc/self/mountinfo").read_text() == before
    jail.root.rmdir()


@pytest.mark.req("L3")
def test_it_dies_with_its_keeper(runtime: Path, start: Run, jail: Jail) -> None:
    """The first process of a PID namespace is immune to most signals, its parent's death signal excepted."""
    vmm, parent = start(jail, "trap '' TERM; sleep 100")
    os.kill(parent.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while is_alive(vmm):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert keeper.anything_left(runtime) is None


def test_its_network_has_nothing(runtime: Path, start: Run, jail: Jail) -> None:
    vmm, _ = start(jail, "exec sleep 100")
    links = Path(f"/proc/{vmm.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in links] == ["lo"]
    assert len(Path(f"/proc/{vmm.pid}/net/unix").read_text().splitlines()) == 1, "the heading alone"


def test_a_descriptor_binds_what_it_is_open_on(runtime: Path, start: Run, jail: Jail, tmp_path: Path) -> None:
    """Not what its path names by now."""
    file, folder = tmp_path / "kernel", tmp_path / "folder"
    file.write_text("right\n")
    file.chmod(0o644)
    folder.mkdir(mode=0o755)
    (folder / "inside").touch()
    fd, directory = os.open(file, os.O_RDONLY), os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        file.rename(tmp_path / "elsewhere")
        file.write_text("wrong\n")
        binds = [Bind(f"/proc/self/fd/{fd}", "/a/kernel"), Bind(f"/proc/self/fd/{directory}", "/b")]
        start(with_binds(jail, *binds), "cat /a/kernel >&4; ls /b >&4; sleep 0.2")
    finally:
        os.close(fd)
        os.close(directory)
    assert said(runtime) == ["right", "inside"]


def test_a_writable_bind_can_be_written(runtime: Path, start: Run, jail: Jail, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    start(
        with_binds(jail, Bind(str(tmp_path / "out"), "/out", read_only=False)), "echo x > /out/x; sleep 0.2"
    )
    assert keeper.await_end(runtime)
    assert (tmp_path / "out" / "x").read_text() == "x\n"


def test_without_a_pivot_the_jail_is_ready_at_its_root(runtime: Path, start: Run, jail: Jail) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    script = f"exec >&4; ls {jail.root}; touch {jail.root}/x && echo writable; test -d /proc/1 && echo host; sleep 0.2"
    vmm, _ = start(with_binds(jail, pivot=False), script, uid=0)
    lines = said(runtime)
    assert {"dev", "proc", "usr", "writable", "host"} <= set(lines)
    assert os.listdir(jail.root) == []
    assert Path("/proc/self/mountinfo").read_text() == before
    assert not is_alive(vmm)


def test_what_cannot_be_bound_is_an_error_and_nothing_runs(runtime: Path, start: Run, jail: Jail) -> None:
    memory = os.memfd_create("secrets")
    try:
        for source in ("/no/such/file", f"/proc/self/fd/{memory}"):
            with pytest.raises(VmmError, match="could not be started") as caught:
                start(with_binds(jail, Bind(source, "/x")), "echo ran >&4; sleep 100")
            assert "no jail: " in caught.value.details
            assert said(runtime) == []
    finally:
        os.close(memory)


@pytest.mark.parametrize("step", ["fork", "enter"])
def test_where_the_kernel_refuses_only_a_jail_that_is_not_required_is_done_without(
    runtime: Path, start: Run, jail: Jail, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = namespaces.unshare

    def refuse(names: object) -> None:
        if (names == ("pid",)) == (step == "fork"):
            raise PermissionError(1, "Operation not permitted", "unshare")
        real(names)  # type: ignore[arg-type]

    monkeypatch.setattr(namespaces, "unshare", refuse)
    with pytest.raises(VmmError) as caught:
        start(jail, "exec sleep 100")
    assert "not permitted" in caught.value.details
    keeper.end_leftovers(runtime)
    vmm, _ = start(
        with_binds(jail, required=False, proc=False, namespaces=frozenset({"mount", "pid"})), "exec sleep 100"
    )
    assert "not permitted" in (runtime / keeper.UNJAILED_FILE).read_text()
    assert "not permitted" in keeper.unjailed(runtime)
    assert "\n" not in keeper.unjailed(runtime)
    assert is_alive(vmm)


@pytest.mark.parametrize("target", ["usr", "/", "/a//b", "/a/../b", "/..", "/a/.", "/a/"])
def test_a_target_is_a_plain_absolute_path(target: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"source": "/usr", "target": target}, Bind)


def test_a_jail_in_the_hosts_network_is_given_no_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="network"):
        Jail(root=tmp_path, namespaces=frozenset({"mount"}), network=3)


def test_a_jail_without_its_own_processes_has_no_proc(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host's processes"):
        Jail(root=tmp_path, namespaces=frozenset({"mount"}), proc=True)
    with pytest.raises(ValueError, match="mount namespace"):
        Jail(root=tmp_path, namespaces=frozenset({"net"}))
