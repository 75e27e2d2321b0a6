"""QEMU's command line as a value: what is on it, and what must never be."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import VmmError
from mvm.hostd.vmm.driver import CHANNELS, Drive, Machine, Nic
from mvm.hostd.vmm.qemu import command as layout
from mvm.hostd.vmm.qemu.driver import parse_version

QEMU = "/usr/bin/qemu-system-x86_64"
STATE = "/var/lib/mvm"


def machine(vcpus: int = 1, mem_mib: int = 256, nic: bool = True) -> Machine:
    folder = Path(STATE) / "revisions" / "ab"
    return Machine(
        name="acme-default-0",
        vcpus=vcpus,
        mem_mib=mem_mib,
        kernel=folder / "vmlinux",
        initrd=folder / "initrd",
        boot_args="console=ttyS0 mvm.host=acme-default-0",
        drives=(
            Drive("rootfs", f"{folder}/rootfs.ext4", read_only=True),
            Drive("data", f"{STATE}/tenants/acme/data.img", read_only=False, key_fd=33),
            Drive("secrets", "/proc/self/fd/34", read_only=True),
        ),
        nic=Nic("02:00:00:00:00:01", 35) if nic else None,
        uid=100_000,
        gid=100_000,
        runtime=Path(STATE) / "tenants/acme/runtime",
    )


def options(argv: list[str], name: str) -> list[str]:
    return [argv[at + 1] for at, word in enumerate(argv) if word == name]


def numbers(argv: list[str]) -> set[int]:
    """Every descriptor the arguments mention."""
    text = " ".join(argv)
    found = re.findall(r"fd=(\d+)", text) + re.findall(r"/proc/self/fd/(\d+)", text)
    return {int(number) for number in found}


@pytest.mark.req("H4", "K2")
@given(
    vcpus=st.integers(1, 32),
    mem_mib=st.integers(64, 4096),
    accel=st.sampled_from(["tcg", "kvm"]),
    restored=st.booleans(),
    nic=st.booleans(),
)
def test_no_path_of_ours_and_only_known_descriptors(
    vcpus: int, mem_mib: int, accel: str, restored: bool, nic: bool
) -> None:
    argv = layout.command(QEMU, machine(vcpus, mem_mib, nic), accel, restored=restored)
    assert argv[0] == QEMU
    paths = set(re.findall(r"(?<![\w.])/[\w/.-]+", " ".join(argv[1:])))
    assert all(p.startswith(("/proc/self/fd/", "/dev/fdset/")) or p == "/dev/urandom" for p in paths), paths
    wanted = {layout.QMP_FD, layout.CONSOLE_FD, layout.KEY_FD + 1}
    wanted |= {layout.CHANNEL_FD + n for n in range(CHANNELS)} | {layout.DRIVE_FD + n for n in range(3)}
    wanted |= {layout.TAP_FD} if nic else set()
    wanted |= {layout.MEMORY_FD} if restored else {layout.KERNEL_FD, layout.INITRD_FD}
    assert numbers(argv) == wanted
    assert 7 not in wanted, "the keeper's lock"
    assert options(argv, "-smp") == [str(vcpus)]
    assert options(argv, "-m") == [str(mem_mib)]


def test_descriptor_numbers_never_meet() -> None:
    ranges = [
        {layout.QMP_FD}, {layout.CONSOLE_FD}, {layout.MEMORY_FD}, {layout.TAP_FD}, {7}, {layout.KERNEL_FD},
        {layout.INITRD_FD}, set(range(layout.CHANNEL_FD, layout.CHANNEL_FD + CHANNELS)),
        set(range(layout.DRIVE_FD, layout.KEY_FD)), set(range(layout.KEY_FD, layout.KEY_FD + 20)),
    ]  # fmt: skip
    assert sum(len(each) for each in ranges) == len(set().union(*ranges))


@pytest.mark.req("K1")
def test_a_disk_that_the_kernel_opened_is_a_device_and_needs_no_passphrase() -> None:
    whole = machine()
    data = Drive("data", "/proc/self/fd/33", read_only=False, device=True)
    argv = layout.command(
        QEMU, msgspec.structs.replace(whole, drives=(whole.drives[0], data)), "tcg", restored=False
    )
    [of_data] = [o for o in options(argv, "-blockdev") if "node-name=data," in o]
    assert "driver=raw," in of_data
    assert "file.driver=host_device," in of_data
    assert "secret" not in " ".join(argv)


@pytest.mark.req("S1", "S2")
def test_a_restored_machine_is_the_one_that_was_started() -> None:
    cold = layout.command(QEMU, machine(), "tcg", restored=False)
    warm = layout.command(QEMU, machine(), "tcg", restored=True)
    differ = {"-kernel", "-initrd", "-append", "-incoming"}

    def devices(argv: list[str]) -> list[str]:
        kept, at = [], 1
        while at < len(argv):
            two = argv[at : at + 2]
            step = 1 if two[0] in ("-nodefaults", "-no-user-config", "-no-reboot", "-S") else 2
            if two[0] not in differ and not two[-1].startswith("memory-backend-"):
                kept += two[:step]
            at += step
        return kept

    assert devices(cold) == devices(warm)
    [memory] = [o for o in options(warm, "-object") if o.startswith("memory-backend-")]
    assert memory.startswith("memory-backend-file,")
    assert "share=off" in memory
    assert "size=256M" in memory
    assert options(warm, "-incoming") == ["defer"]
    assert options(cold, "-incoming") == []
    assert options(cold, "-append") == [machine().boot_args]
    assert "-S" in cold
    assert "-S" in warm


@pytest.mark.req("H6")
def test_the_sandbox_denies_what_it_can() -> None:
    [sandbox] = options(layout.command(QEMU, machine(), "kvm", restored=False), "-sandbox")
    assert set(sandbox.split(",")) == {
        "on", "obsolete=deny", "elevateprivileges=deny", "spawn=deny", "resourcecontrol=deny",
    }  # fmt: skip


@pytest.mark.req("L1")
@pytest.mark.parametrize(
    ("vcpus", "accel", "single"), [(1, "tcg", False), (2, "tcg", True), (2, "kvm", False)]
)
def test_emulated_processors_share_a_thread(vcpus: int, accel: str, single: bool) -> None:
    argv = layout.command(QEMU, machine(vcpus), accel, restored=False)
    assert any("thread=single" in word for word in options(argv, "-accel")) == single


@pytest.mark.req("K1")
def test_the_data_disk_is_unlocked_by_a_descriptor() -> None:
    argv = layout.command(QEMU, machine(), "tcg", restored=False)
    assert f"secret,id=key1,file=/proc/self/fd/{layout.KEY_FD + 1}" in options(argv, "-object")
    [data] = [o for o in options(argv, "-blockdev") if "node-name=data" in o]
    assert data.startswith("driver=luks,")
    assert "key-secret=key1" in data
    assert "read-only=off" in data
    for name in ("rootfs", "secrets"):
        [other] = [o for o in options(argv, "-blockdev") if f"node-name={name}" in o]
        assert "driver=raw" in other
        assert "read-only=on" in other


@pytest.mark.req("H4")
def test_no_lock_of_one_vmm_is_in_the_way_of_another() -> None:
    for device in (False, True):
        drives = tuple(msgspec.structs.replace(drive, device=device) for drive in machine().drives)
        argv = layout.command(QEMU, msgspec.structs.replace(machine(), drives=drives), "tcg", restored=False)
        files = options(argv, "-blockdev")
        assert len(files) == 3
        assert all("file.locking=off" in file.split(",") for file in files)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright", "7.2.22 (Debian 1:7.2+dfsg-7)"),
        ("QEMU emulator version 8.0.0", "8.0.0"),
        ("QEMU emulator version 9.1.2 (v9.1.2)\n", "9.1.2 (v9.1.2)"),
    ],
)  # fmt: skip
def test_versions(text: str, version: str) -> None:
    assert parse_version(text) == version


@given(st.text())
def test_a_version_is_read_or_refused(text: str) -> None:
    try:
        assert parse_version(text)
    except VmmError:
        pass
