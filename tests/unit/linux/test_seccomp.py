"""The filter's answers, by an interpreter of the same instructions the kernel runs."""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from mvm.linux import seccomp

pytestmark = [
    pytest.mark.req("H3"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the table is that of x86-64"),
]

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
X86_64, I386 = 0xC000003E, 0x40000003


def answer(number: int, *arguments: int, arch: int = X86_64) -> int:
    six = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    return seccomp.evaluate(seccomp.program(), struct.pack("=iIQ6Q", number, arch, 0, *six))


def test_exactly_the_list_is_allowed() -> None:
    table = seccomp.allowed()
    special = {"socket", "setns"}
    for number in range(467):
        names = [name for name, known in table.items() if known == number]
        expected = ERRNO | (errno.ENOSYS if number == 435 else errno.EPERM)
        if names and names[0] not in special:
            expected = ALLOW
        if not set(names) & special:
            assert answer(number) == expected, (number, names)
    assert len(set(table.values())) == len(table)


def test_other_architectures_die() -> None:
    assert answer(1, arch=I386) == KILL
    assert answer(0x40000000 | 1) == KILL


@pytest.mark.parametrize("number", [467, 500, 0x3FFFFFFF])
def test_the_future_does_not_exist(number: int) -> None:
    assert answer(number) == ERRNO | errno.ENOSYS


def test_arguments() -> None:
    table = seccomp.allowed()
    assert answer(table["clone"], 0x01200011) == ALLOW
    assert answer(table["clone"], 0x10000000) == ERRNO | errno.EPERM
    assert answer(table["unshare"], 0x4C020000) == ALLOW
    assert answer(table["unshare"], 0x5C020000) == ERRNO | errno.EPERM
    for kind in (0x20000000, 0x40000000):
        assert answer(table["setns"], 3, kind) == ALLOW
    for kind in (0, 0x00020000, 0x10000000, 0x30000000, 0x60000000):
        assert answer(table["setns"], 3, kind) == ERRNO | errno.EPERM
    assert answer(table["ioctl"], 3, 0x5413) == ALLOW
    assert answer(table["ioctl"], 3, 0x5412) == ERRNO | errno.EPERM
    for family in range(64):
        known = family in seccomp.FAMILIES.values()
        assert answer(table["socket"], family) == (ALLOW if known else ERRNO | errno.EAFNOSUPPORT)


DANGEROUS = [
    "ptrace", "bpf", "kexec_load", "init_module", "io_uring_setup", "userfaultfd",
    "perf_event_open", "chroot", "reboot", "swapon", "pidfd_getfd", "keyctl",
]  # fmt: skip


@pytest.mark.parametrize("name", DANGEROUS)
def test_what_no_part_of_us_needs(name: str) -> None:
    assert name not in seccomp.allowed()


def test_a_vmm_in_its_jail_can_build_no_other() -> None:
    table = seccomp.allowed()
    refused = {
        "mount",
        "umount2",
        "pivot_root",
        "unshare",
        "setns",
        "open_tree",
        "move_mount",
        "mount_setattr",
    }
    refused |= {"semget", "semop", "semctl", "semtimedop"}
    for name, number in table.items():
        data = struct.pack("=iIQ6Q", number, X86_64, 0, *[0] * 6)
        expected = ERRNO | errno.EPERM if name in refused else ALLOW
        assert seccomp.evaluate(seccomp.forbidding(), data) == expected, name
    for number in (29, 68, 240):  # shmget, msgget, mq_open
        data = struct.pack("=iIQ6Q", number, X86_64, 0, *[0] * 6)
        assert seccomp.evaluate(seccomp.forbidding(), data) == ERRNO | errno.EPERM
    assert seccomp.evaluate(seccomp.forbidding(), struct.pack("=iIQ6Q", 1, I386, 0, *[0] * 6)) == KILL


@pytest.mark.req("H4")
def test_a_vmm_in_its_jail_has_no_other_way_to_a_view_of_its_own() -> None:
    def found(number: int, *arguments: int) -> int:
        data = struct.pack("=iIQ6Q", number, X86_64, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
        return seccomp.evaluate(seccomp.forbidding(), data)

    thread = 0x003D0F00  # what a C library asks for
    clone = seccomp.allowed()["clone"]
    assert found(clone, thread) == found(clone, 17) == ALLOW
    for namespace in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert found(clone, namespace | 17) == ERRNO | errno.EPERM, hex(namespace)
    assert found(435) == ERRNO | errno.ENOSYS, "clone3's flags are in memory"
    for number in (428, 429, 430, 431, 432, 433, 442, 161):
        assert found(number) == ERRNO | errno.EPERM, number
    for number in (467, 500, 0x3FFFFFFF):
        assert found(number) == ERRNO | errno.ENOSYS
    for number in (1, 165, 272, 520):
        assert found(0x40000000 | number) == KILL, "x32: the same calls by other numbers"


def test_the_kernels_limit() -> None:
    with pytest.raises(ValueError, match="longer"):
        seccomp.assemble([seccomp.program()[0]] * 4097)
