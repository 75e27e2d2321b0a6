from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import pytest

from mvm.core.errors import MissingPrerequisite
from mvm.hostd.vmm.driver import Drive, Machine, Nic
from mvm.hostd.vmm.firecracker.exits import describe
from mvm.hostd.vmm.firecracker.guard import unfiltered
from mvm.hostd.vmm.firecracker.jail import Programs, command, instance_name, jail

PROGRAMS = Programs(Path("/opt/fc/firecracker"), Path("/opt/fc/jailer"))
MACHINE = Machine(
    name="acme--default-0", vcpus=1, mem_mib=256, kernel=Path("/r/vmlinux"), initrd=Path("/r/initrd"), boot_args="",
    drives=(
        Drive("rootfs", "/r/rootfs.ext4", read_only=True),
        Drive("data", "/proc/self/fd/9", read_only=False, device=True),
        Drive("secrets", "/proc/self/fd/8", read_only=True),
    ),
    nic=Nic("0a:00:00:00:00:01", None, "mvm-t1s0"), uid=1900000256, gid=1900000257, runtime=Path("/i/runtime"),
)  # fmt: skip


def test_the_jailers_arguments() -> None:
    assert command(PROGRAMS, MACHINE, Path("/i/jail")) == [
        "/opt/fc/jailer", "--id", "acme--default-0", "--exec-file", "/opt/fc/firecracker",
        "--uid", "1900000256", "--gid", "1900000257", "--chroot-base-dir", "/i/jail", "--cgroup-version", "2",
        "--", "--api-sock", "/run/api.sock", "--log-path", "/run/log",
    ]  # fmt: skip
    leaf = Path("/sys/fs/cgroup/mvm.slice/mvm-instances/acme--default-0")
    argv = command(PROGRAMS, msgspec.structs.replace(MACHINE, cgroup=leaf), Path("/i/jail"))
    assert argv[argv.index("--parent-cgroup") + 1] == "mvm.slice/mvm-instances/acme--default-0"
    assert "--cgroup" not in argv, "with one, the jailer would make a group of its own"


def test_names_are_what_the_jailer_takes() -> None:
    odd = msgspec.structs.replace(MACHINE, name="a_b.c" + "d" * 100)
    assert len(instance_name(odd)) == 64
    assert all(c == "-" or c.isalnum() for c in instance_name(odd))


@pytest.mark.req("H4", "K2")
def test_what_is_in_the_jail() -> None:
    made = jail(PROGRAMS, MACHINE, Path("/i/jail"), None)
    top = "/firecracker/acme--default-0/root"
    assert {(bind.target.removeprefix(top), bind.read_only) for bind in made.binds} == {
        ("/run/log", False), ("/run/metrics", False), ("/vmlinux", True), ("/initrd", True), ("/rootfs", True),
    }  # fmt: skip
    assert {(copy.target.removeprefix(top), copy.mode, copy.uid) for copy in made.copies} == {
        ("/data", 0o600, MACHINE.uid), ("/secrets", 0o400, MACHINE.uid),
    }  # fmt: skip
    assert not made.pivot
    assert made.room.size <= 64 << 20, "it is the host's memory"
    assert made.required


@pytest.mark.req("H4", "N1")
@pytest.mark.parametrize(
    ("nic", "network"),
    [(None, None), (Nic("0a:00:00:00:00:01", None, "mvm-t1s0", 7), 7)],
)
def test_its_network_is_its_taps_or_has_nothing(nic: Nic | None, network: int | None) -> None:
    made = jail(PROGRAMS, msgspec.structs.replace(MACHINE, nic=nic), Path("/i/jail"), None)
    assert made.namespaces == {"mount", "net", "ipc"}
    assert made.network == network


def test_a_woken_guest_gets_its_memory_and_no_kernel() -> None:
    targets = {Path(bind.target).name for bind in jail(PROGRAMS, MACHINE, Path("/i/jail"), 5).binds}
    assert targets == {"log", "metrics", "memory", "rootfs"}


def test_an_encrypted_disk_without_dm_crypt_is_refused_with_the_way_on() -> None:
    drives = (MACHINE.drives[0], Drive("data", "/i/data.img", read_only=False, key_fd=7), MACHINE.drives[2])
    with pytest.raises(MissingPrerequisite) as refused:
        jail(PROGRAMS, msgspec.structs.replace(MACHINE, drives=drives), Path("/i/jail"), None)
    assert "dm-crypt" in refused.value.details


def test_ends_are_told_in_words() -> None:
    assert "seccomp" in describe(148 << 8)
    assert "SIGBUS" in describe(149 << 8)
    assert "SIGXFSZ" in describe(151 << 8)
    assert "Exit code 77" in describe(77 << 8)
    assert "SIGKILL" in describe(signal.SIGKILL)
    assert "SIGSEGV" in describe(signal.SIGSEGV)


SETS = "".join(f"Cap{kind}:\t0000000000000000\n" for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"))


@pytest.mark.req("H6")
def test_every_thread_has_to_have_a_filter() -> None:
    good = f"Name:\tfc_vcpu 0\n{SETS}NoNewPrivs:\t1\nSeccomp:\t2\n"
    assert unfiltered({1: good, 2: good}) == []
    for bad in (good.replace("2\n", "0\n"), good.replace("1\n", "0\n"), "Name:\tfc_api\n"):
        assert len(unfiltered({1: good, 2: bad})) == 1
    forged = good.replace("fc_vcpu 0", "\x1cSeccomp:\t2").replace("\nSeccomp:\t2", "\nSeccomp:\t0")
    assert len(unfiltered({1: forged + "Name:\t\x1cSeccomp:\t2\n"})) == 1, "a name is no field"


@pytest.mark.req("H6")
def test_a_filter_that_the_daemon_gave_it_is_not_its_own() -> None:
    inherited = f"Name:\tfc_api\n{SETS}NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"
    own = inherited.replace("filters:\t1", "filters:\t2")
    assert unfiltered({1: own, 2: own}, inherited=1) == []
    assert len(unfiltered({1: own, 2: inherited}, inherited=1)) == 1
    assert unfiltered({1: inherited}, inherited=0) == []
