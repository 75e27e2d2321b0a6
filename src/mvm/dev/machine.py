"""QEMU's command line for a node: pure. Numbers of descriptors are those of `mvm.hostd.vmm.qemu.command`.

The machine is `microvm`, as for guests: on the standard kernel it reaches a login prompt in 16 s of emulation. The CPU
is a plain AMD one with SVM and nested paging, because that is the virtualization extension that QEMU emulates; kvm_amd
in the node then gives it a working /dev/kvm.
"""

from __future__ import annotations

from typing import Final

from mvm.hostd.vmm.driver import CHANNELS
from mvm.hostd.vmm.qemu import command as guest

ROOT, STATE, SEED = 0, 1, 2
DISKS: Final = ("root", "state", "seed")
_MACHINE: Final = "microvm,pit=on,pic=on,rtc=on,acpi=on,x-option-roms=off"
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# A node runs a whole distribution, and a guest's code beside it: with a small buffer QEMU translates all over again.
_TRANSLATION_MIB: Final = 512


def accel_args(accel: str) -> list[str]:
    """`tcg` or `kvm`."""
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,thread=multi,tb-size={_TRANSLATION_MIB}", "-cpu", "EPYC,+svm,+npt"]


def boot_args(accel: str, tsc_khz: int, machine_id: str) -> str:
    """`machine_id`: 32 hex digits, so that the node is the same one after its root disk was replaced."""
    machine = guest.kernel_args(accel, tsc_khz)
    return f"root=LABEL=mvm-root ro console=ttyS0 panic=-1 systemd.machine_id={machine_id} {machine}"


def command(qemu: str, *, vcpus: int, mem_mib: int, accel: str, boot_args: str) -> list[str]:
    argv = [
        qemu, "-name", "mvm-node", "-M", _MACHINE, *accel_args(accel), "-m", str(mem_mib), "-smp", str(vcpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox", _SANDBOX,
        "-chardev", f"socket,id=qmp,fd={guest.QMP_FD},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=console,fd={guest.CONSOLE_FD}", "-serial", "chardev:console",
        "-kernel", f"/proc/self/fd/{guest.KERNEL_FD}", "-initrd", f"/proc/self/fd/{guest.INITRD_FD}",
        "-append", boot_args,
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng",
        "-device", "virtio-serial-device,max_ports=16",
    ]  # fmt: skip
    for n in range(CHANNELS):
        argv += ["-chardev", f"socket,id=ch{n},fd={guest.CHANNEL_FD + n},server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=ch{n},name=mvm.{n},nr={n + 1}"]
    for n, name in enumerate(DISKS):
        access = "on" if n == SEED else "off"
        argv += ["-add-fd", f"fd={guest.DRIVE_FD + n},set={n + 1}", "-blockdev"]
        argv += [
            f"driver=raw,node-name={name},read-only={access},file.driver=file,file.filename=/dev/fdset/{n + 1}"
        ]
        argv += ["-device", f"virtio-blk-device,drive={name},id=disk-{name},serial={name}"]
    return argv
