"""The VM that runs: its start, pause and resume, and what can be changed of its devices."""

from __future__ import annotations

import os

from . import versions
from .guest import Guest
from .memory import PAGE, GuestMemory
from .requests import ApiError
from .resources import MIB, POST_BOOT, PRE_BOOT, Resources, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


NO_KVM = (
    "Kvm error: Error creating KVM object: No such file or directory (os error 2) Make sure the user launching the "
    "firecracker process is configured on the /dev/kvm file's ACL."
)


class Machine(Resources):
    # The start.

    def _action(self, value: dict[str, Any]) -> None:
        kind = value["action_type"]
        if kind == "InstanceStart":
            if self.started:
                raise ApiError(POST_BOOT)
            self.start()
            return
        if not self.started:
            raise ApiError(PRE_BOOT)
        if kind == "FlushMetrics":
            self.metrics.flush()
        else:
            assert self._guest is not None
            self._guest.ctrl_alt_del()

    def start(self) -> None:
        """InstanceStart, also that of a configuration file. ApiError; the VM can be configured further then."""
        if self._kernel < 0:
            raise ApiError("Start microvm error: Cannot start microvm without kernel configuration.")
        if "no kvm" in self.faults:
            raise ApiError(f"Start microvm error: {NO_KVM}")
        head = os.pread(self._kernel, 0x206, 0)
        bzimage = head[0x202:0x206] == b"HdrS" and versions.has(self.version, versions.BZIMAGE)
        if not head.startswith(b"\x7fELF") and not bzimage:
            raise ApiError(
                "Start microvm error: System configuration error: Cannot load kernel due to invalid memory "
                "configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: "
                "Invalid Elf magic number"
            )
        self._memory = GuestMemory(
            self._machine["mem_size_mib"] * MIB, track=self._machine["track_dirty_pages"]
        )
        self._memory.write_tables()
        self._run_guest(restored=False)
        self._resume()

    def _run_guest(self, *, restored: bool) -> None:
        assert self._memory is not None
        if self._serial_path is not None:
            try:
                self._serial = os.open(
                    self._serial_path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
                )
            except OSError as error:
                raise ApiError(
                    f"Start microvm error: Error creating legacy device: {text_of(error)}"
                ) from None
        reports = self._balloon is not None and self._balloon["free_page_reporting"]
        self._guest = Guest(
            self._memory,
            restored=restored,
            console=self._console,
            ended=self._exit,
            reported=self._discard if reports else None,
            faults=self.faults,
        )
        vsock = self._vsock
        if vsock is not None:
            vsock.lock.acquire()
            vsock.start(self._guest.connect, filtered=self._filtered, active=restored)
        vcpu_filtered = self._filtered and "vcpu without filter" not in self.faults
        self._guest.start(
            filtered=vcpu_filtered, booted=vsock.activated if vsock is not None else lambda: None
        )
        self.state = "Paused"

    def _console(self, data: bytes) -> None:
        if "console=ttyS0" in (self._boot["boot_args"] or ""):
            try:
                os.write(self._serial if self._serial >= 0 else 1, data)
            except OSError:
                return

    def _discard(self, first: int, count: int) -> None:
        assert self._memory is not None
        self._memory.discard(first * PAGE, count * PAGE)

    # Pause and resume.

    def _patch_vm(self, value: dict[str, Any]) -> None:
        if value["state"] == "Paused":
            self._pause()
            return
        if "resume fails" in self.faults:
            raise ApiError("Internal VMM error: Failed to send event to vCPU.")
        self._resume()

    def _pause(self) -> None:
        if self.state == "Paused":
            return
        assert self._guest is not None
        self._guest.processor.acquire()
        if self._vsock is not None:
            self._vsock.lock.acquire()
        self.state = "Paused"

    def _resume(self) -> None:
        """Also of a VM that runs: its devices are kicked all the same."""
        assert self._guest is not None
        if self.state == "Running":
            self._pause()
        self._inflate()
        if self._vsock is not None:
            self._vsock.kick()
            self._vsock.lock.release()
        self.state = "Running"
        self._guest.processor.release()

    # Devices that run.

    def _patch_drive(self, value: dict[str, Any]) -> None:
        drive = self._drives.get(value["drive_id"])
        if drive is None:
            raise ApiError(
                "Drive config error: Unable to patch the block device: Device manager error: Device not found "
                "Please verify the request arguments."
            )
        if value.get("path_on_host") is None and value.get("rate_limiter") is None:
            raise ApiError(
                "Drive config error: Unable to patch the block device: Running method expected different backend. "
                "Please verify the request arguments."
            )
        drive.update(value)

    def _patch_net(self, value: dict[str, Any]) -> None:
        tap = self._taps.get(value["iface_id"])
        if tap is None:
            raise ApiError("Network config error: Unable to update the net device: Device not found")
        tap.config.update({key: item for key, item in value.items() if item is not None})

    def _patch_pmem(self, value: dict[str, Any]) -> None:
        if value["id"] not in self._pmem:
            raise ApiError("Pmem config error: Unable to patch the pmem device: Device not found")
        self._pmem[value["id"]].update(value)

    def _unplug(self, _: tuple[str, str]) -> None:
        raise ApiError(
            "The requested operation is not supported: the fake has no PCI hotplug"
            if self._pci
            else "PCI is not enabled"
        )

    def _running_balloon(self, kind: str = "Balloon update error:") -> dict[str, Any]:
        if self._balloon is None:
            raise ApiError(f"{kind} Device not found")
        return self._balloon

    def _patch_balloon(self, value: dict[str, Any]) -> None:
        balloon = self._running_balloon()
        if value["amount_mib"] > self._machine["mem_size_mib"]:
            raise ApiError(
                "Balloon update error: Balloon error: Requested memory should be less than "
                f"{self._machine['mem_size_mib']}MiB"
            )
        balloon["amount_mib"] = value["amount_mib"]
        if self.state == "Running":
            assert self._guest is not None
            with self._guest.processor:
                self._inflate()

    def _inflate(self) -> None:
        """What the guest's driver does once it runs: give up unused pages until the target is met, or take all back."""
        if self._balloon is None or self._guest is None or self._memory is None:
            return
        wanted = self._balloon["amount_mib"] * MIB // PAGE
        if wanted < sum(count for _, count in self._inflated):
            self._inflated = []
        taken = {page for first, count in self._inflated for page in range(first, first + count)}
        for first, count in self._guest.unused(wanted):
            if first in taken:
                continue
            self._memory.discard(first * PAGE, count * PAGE)
            self._inflated.append([first, count])

    def _patch_balloon_statistics(self, value: dict[str, Any]) -> None:
        balloon = self._running_balloon()
        if (balloon["stats_polling_interval_s"] == 0) != (value["stats_polling_interval_s"] == 0):
            raise ApiError(
                "Balloon update error: Balloon error: Statistics cannot be enabled/disabled after activation."
            )
        balloon["stats_polling_interval_s"] = value["stats_polling_interval_s"]

    def _get_balloon_statistics(self, _: None) -> dict[str, Any]:
        balloon = self._running_balloon("Internal VMM error:")
        if balloon["stats_polling_interval_s"] == 0:
            raise ApiError("Internal VMM error: Balloon error: Received stats query when stats are disabled.")
        actual = sum(count for _, count in self._inflated)
        return {
            "target_pages": balloon["amount_mib"] * MIB // PAGE,
            "actual_pages": actual,
            "target_mib": balloon["amount_mib"],
            "actual_mib": actual * PAGE // MIB,
        }

    def _hinting(self) -> None:
        if not self._running_balloon()["free_page_hinting"]:
            raise ApiError("Balloon update error: Balloon error: Attempting to use hinting when not enabled")

    def _start_hinting(self, _: dict[str, Any]) -> None:
        self._hinting()

    def _stop_hinting(self, _: None) -> None:
        self._hinting()

    def _get_hinting(self, _: None) -> dict[str, Any]:
        self._hinting()
        return {"host_cmd": 0, "guest_cmd": None}

    def _get_memory_hotplug(self, _: None) -> dict[str, Any]:
        if self._hotplug is None:
            raise ApiError("Internal VMM error: Error finding device: Device not found")
        return {**self._hotplug, "plugged_size_mib": 0, "requested_size_mib": 0}

    def _patch_memory_hotplug(self, _: dict[str, Any]) -> None:
        raise ApiError("Memory hotplug update error: the fake's guest has no driver for it")
