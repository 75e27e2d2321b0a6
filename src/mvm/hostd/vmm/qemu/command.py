"""QEMU's command line for a machine: pure.

QEMU opens nothing of ours by name. All of it reaches it as a descriptor under one of the numbers below, opened or
bound by us, so it needs no right to any file and may run as a uid that owns none:

    3          QMP, a listening socket            6       the tap
    4          the guest's console, connected     10+n    control channel n, listening sockets
    5          memory of a restored guest         20+n    drive n;  40+n  its LUKS passphrase
    8, 9       kernel and initrd, cold only

The machine is `microvm` with the legacy timers and ACPI on: without `pit` and `pic` a stock kernel hangs calibrating
the TSC under software emulation, and ACPI is how it finds virtio-mmio devices (it knows no command-line devices).

Migration settings that sleeping depends on: `send-configuration=off` and `suppress-vmdesc=on` make the device stream
that `xen-save-devices-state` writes (devices only, no RAM) loadable by `migrate-incoming`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mvm.hostd.vmm.driver import CHANNELS, Drive, Machine

QMP_FD, CONSOLE_FD, MEMORY_FD, TAP_FD, KERNEL_FD, INITRD_FD = 3, 4, 5, 6, 8, 9  # 7 is the keeper's
CHANNEL_FD, DRIVE_FD, KEY_FD = 10, 20, 40

_MACHINE = "microvm,pit=on,pic=on,rtc=on,acpi=on,x-option-roms=off,memory-backend=mem,suppress-vmdesc=on"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# QEMU keeps translated code in a buffer this large, in MiB; by default it takes a share of the host's memory.
_TRANSLATION_MIB = 64


def accel_args(accel: str, vcpus: int = 1) -> list[str]:
    """`tcg` or `kvm`.

    Several emulated CPUs share a thread: with one each, a CPU may go on executing what was translated of an instruction
    that another CPU's kernel was just patching (seen with 7.2.22, in the development node: `mvm.dev.node.steady`).
    """
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    threads = ",thread=single" if vcpus > 1 else ""
    return ["-accel", f"tcg,tb-size={_TRANSLATION_MIB}{threads}", "-cpu", "max"]


def kernel_args(accel: str, tsc_khz: int) -> str:
    """What the guest kernel is told beside its configuration, because it runs on this machine type.

    `tsc_early_khz`: under emulation the kernel measures the TSC against a PIT that lags on a busy host, finds nothing
    usable and hangs; QEMU shows it the host's TSC, so it is told the host's rate (guest time follows it).
    `reboot=t`: there is no keyboard controller whose reset line `reboot=k` could pull; a triple fault works.
    """
    return f"reboot=t tsc_early_khz={tsc_khz}" if accel == "tcg" else "reboot=t"


def command(qemu: str, machine: Machine, accel: str, *, extra: str = "", restored: bool) -> list[str]:
    """The argument list. `restored`: memory comes from descriptor MEMORY_FD and QEMU waits for device state.

    `extra`: appended to the boot arguments of a cold start.
    """
    argv = [
        qemu, "-name", machine.name, "-M", _MACHINE, *accel_args(accel, machine.vcpus),
        "-m", str(machine.mem_mib), "-smp", str(machine.vcpus),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
        "-sandbox", SANDBOX, "-global", "migration.send-configuration=off",
        "-chardev", f"socket,id=qmp,fd={QMP_FD},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=console,fd={CONSOLE_FD}", "-serial", "chardev:console",
        "-object", _memory(machine, restored), *(_INCOMING if restored else _boot(machine, extra)),
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng",
        "-device", "virtio-serial-device,max_ports=16",
    ]  # fmt: skip
    for n in range(CHANNELS):
        argv += ["-chardev", f"socket,id=ch{n},fd={CHANNEL_FD + n},server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=ch{n},name=mvm.{n},nr={n + 1}"]
    for n, drive in enumerate(machine.drives):
        argv += _drive(n, drive)
    if machine.nic is not None:
        argv += ["-netdev", f"tap,id=net0,fd={TAP_FD}"]
        argv += ["-device", f"virtio-net-device,netdev=net0,mac={machine.nic.mac}"]
    return argv


# A restored guest has its kernel in memory; reading the file again would take longer than the rest of QEMU's start.
_INCOMING = ("-incoming", "defer")


def _boot(machine: Machine, extra: str) -> Sequence[str]:
    files = ("-kernel", f"/proc/self/fd/{KERNEL_FD}", "-initrd", f"/proc/self/fd/{INITRD_FD}")
    return (*files, "-append", f"{machine.boot_args} {extra}".rstrip())


def _memory(machine: Machine, restored: bool) -> str:
    # Private memory either way: what the guest wrote is then what /proc/<pid>/pagemap calls anonymous.
    common = f"id=mem,size={machine.mem_mib}M,share=off,dump=off,merge=off"
    if restored:
        return f"memory-backend-file,{common},mem-path=/proc/self/fd/{MEMORY_FD}"
    return f"memory-backend-ram,{common}"


def _drive(n: int, drive: Drive) -> Sequence[str]:
    name, access = drive.id, "on" if drive.read_only else "off"
    argv = ["-add-fd", f"fd={DRIVE_FD + n},set={n + 1}"]
    # Each protocol driver refuses the other's kind of file. No locks: all instances of a revision have its root file
    # system open, and one whose QEMU was taken over could hold a lock on it that no other gets past. Who may have a
    # data disk open is decided before, under the instance's lock.
    kind = "host_device" if drive.device else "file"
    file = f"file.driver={kind},file.filename=/dev/fdset/{n + 1},file.locking=off"
    if drive.key_fd is not None:
        # The object file is read at start-up through its descriptor; the passphrase is in no argument.
        argv += ["-object", f"secret,id=key{n},file=/proc/self/fd/{KEY_FD + n}"]
        argv += ["-blockdev", f"driver=luks,node-name={name},read-only={access},key-secret=key{n},{file}"]
    else:
        argv += ["-blockdev", f"driver=raw,node-name={name},read-only={access},{file}"]
    return [*argv, "-device", f"virtio-blk-device,drive={name},id=disk-{name}"]
