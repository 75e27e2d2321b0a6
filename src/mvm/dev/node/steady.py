"""Keeps an emulated node's kernel from rewriting its busiest code.

Linux turns rare features on and off by patching instructions while other processors run them, by way of a breakpoint
instruction. A QEMU that emulates processors in threads (seen: 7.2.22) can keep what it translated in between, and that
processor then traps at a breakpoint which is not there any more, for ever: the node shows no sign of life, all of its
processors busy. Seen at `finish_task_switch`, which is patched whenever KVM's first VM comes or its last one goes; a
busier computer makes it likelier.

So there is always one VM, with one processor that never runs: KVM's switches (preempt_notifier_key, apic_sw_disabled)
stay as they are. The unit's CPUQuota= does the same for one of the scheduler's (cfs_bandwidth_used), which would be
patched with the first and last instance that has a limit. Runs in the node, with the standard library alone.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time

KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU = 0xAE01, 0xAE60, 0xAE41
APPEARS_S = 30.0
"""How long udev may take to load KVM's module."""


def hold(device: str) -> list[int]:
    """Descriptors of a VM and its processor, which are there as long as these are open. OSError."""
    deadline = time.monotonic() + APPEARS_S
    while not os.path.exists(device) and time.monotonic() < deadline:
        time.sleep(0.1)
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    # Then a processor gets its interrupt controller, which begins switched off.
    fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
    return [kvm, vm, fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)]


def tell_ready() -> None:
    """sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


if __name__ == "__main__":
    held = hold("/dev/kvm")
    tell_ready()
    signal.pause()
