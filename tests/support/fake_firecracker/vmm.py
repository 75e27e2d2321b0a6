"""The VM and its life: `Vmm.handle` does one action. It runs on the main thread, as in the program.

    not started --InstanceStart--> running <--PATCH /vm--> paused
    not started --PUT /snapshot/load--> paused (or running, with resume_vm)

Before the start only what configures is allowed, after it only what does not; `load` only while nothing was
configured but logger, metrics and serial. (The program also lets CPU template and MMDS contents pass; its contract
does not.) A load that fails is fatal: `fatal` is set, and the process ends with 1 once the answer is out. A load that
is merely not allowed any more is not.
"""

from __future__ import annotations

import json
import os
import socket
import time

from . import snapshot, versions
from .devices import Drive, Tap
from .guest import Guest
from .memory import PAGE, GuestMemory
from .requests import Action, ApiError
from .vsock import Vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .faults import Faults
    from .logs import Log, Metrics
    from .versions import Version

_CMDLINE_MAX = 2048
_MIB = 1 << 20
_PRE_BOOT = "The requested operation is not supported before starting the microVM."
_POST_BOOT = "The requested operation is not supported after starting the microVM."
_NO_KVM = (
    "Kvm error: Error creating KVM object: No such file or directory (os error 2) Make sure the user launching the "
    "firecracker process is configured on the /dev/kvm file's ACL."
)
_ANY_TIME = {"get instance", "get version", "get config", "get machine", "get mmds", "put mmds", "patch mmds",
             "get balloon"}  # fmt: skip
_POST_ONLY = {"patch vm", "create snapshot", "patch drive", "patch net", "patch pmem", "patch balloon",
              "patch balloon statistics", "get balloon statistics", "start hinting", "stop hinting", "get hinting",
              "get memory hotplug", "patch memory hotplug", "unplug"}  # fmt: skip
_NO_BOOT_PATH = {"put logger", "put metrics", "put serial"}


def text_of(error: OSError) -> str:
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"


class Vmm:
    """`submit_exit(code)` may be called from any thread: the process is to end."""

    def __init__(
        self, instance: str, version: Version, log: Log, metrics: Metrics, faults: Faults,
        submit_exit: Callable[[int], None], *, pci: bool = False, filtered: bool = True, mmds_limit: int = 51200,
    ) -> None:  # fmt: skip
        self.instance, self.version, self.log, self.metrics, self.faults = (
            instance, version, log, metrics, faults,
        )  # fmt: skip
        self.state = "Not started"
        self.fatal = False
        self._exit = submit_exit
        self._pci = pci
        self._filtered = filtered
        self._mmds_limit = mmds_limit
        self._configured = False
        self._machine: dict[str, Any] = {
            "vcpu_count": 1, "mem_size_mib": 128, "smt": False, "track_dirty_pages": False, "huge_pages": "None",
        }  # fmt: skip
        self._boot: dict[str, Any] = {"kernel_image_path": "", "initrd_path": None, "boot_args": None}
        self._kernel = -1
        self._drives: dict[str, Drive] = {}
        self._taps: dict[str, Tap] = {}
        self._pmem: dict[str, dict[str, Any]] = {}
        self._vsock: Vsock | None = None
        self._balloon: dict[str, Any] | None = None
        self._inflated: list[list[int]] = []
        self._entropy: dict[str, Any] | None = None
        self._hotplug: dict[str, Any] | None = None
        self._mmds: Any = None
        self._mmds_config: dict[str, Any] | None = None
        self._serial = -1
        self._serial_path: str | None = None
        self._serial_no = os.urandom(8).hex()
        self._guest: Guest | None = None
        self._memory: GuestMemory | None = None

    @property
    def started(self) -> bool:
        return self.state != "Not started"

    def handle(self, action: Action) -> tuple[int, str]:
        """(status, body or fault message)."""
        began = time.monotonic_ns()
        try:
            self._allowed(action.name)
            answer = getattr(self, "_" + action.name.replace(" ", "_"))(action.value)
        except ApiError as error:
            return error.status, str(error)
        self.metrics.counts["latencies_us"][action.name.replace(" ", "_")] = (
            time.monotonic_ns() - began
        ) // 1000
        if answer is None:
            return 204, ""
        return 200, json.dumps(answer, separators=(",", ":"))

    def _allowed(self, name: str) -> None:
        if name in _ANY_TIME or name == "action":
            return
        if name in _POST_ONLY:
            if not self.started:
                raise ApiError(_PRE_BOOT)
            return
        if self.started:
            if name in ("put drive", "put net", "put pmem") and versions.has(self.version, versions.HOTPLUG):
                raise ApiError(
                    "The requested operation is not supported: the fake has no PCI hotplug"
                    if self._pci
                    else "PCI is not enabled"
                )
            raise ApiError(_POST_BOOT)
        if name not in _NO_BOOT_PATH and name != "load snapshot":
            self._configured = True

    # What configures.

    def _put_logger(self, value: dict[str, Any]) -> None:
        try:
            self.log.configure(value, self.version)
        except OSError as error:
            raise ApiError(f"Logger error: Failed to open target file: {text_of(error)}") from None

    def _put_metrics(self, value: dict[str, Any]) -> None:
        kind = "Metrics error: Cannot initialize the metrics system due to bad user input:"
        try:
            self.metrics.open(value["metrics_path"], self.version)
        except OSError as error:
            raise ApiError(f"{kind} {text_of(error)}") from None
        except ValueError as error:
            raise ApiError(f"{kind} {error}") from None

    def _put_serial(self, value: dict[str, Any]) -> None:
        self._serial_path = value.get("serial_out_path")

    def _put_boot_source(self, value: dict[str, Any]) -> None:
        kind = "Boot source error:"
        try:
            kernel = os.open(value["kernel_image_path"], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ApiError(f"{kind} The kernel file cannot be opened: {text_of(error)}") from None
        try:
            if value.get("initrd_path") is not None:
                os.close(os.open(value["initrd_path"], os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            os.close(kernel)
            raise ApiError(
                f"{kind} The initrd file cannot be opened due to invalid path or invalid permissions. {text_of(error)}"
            ) from None
        arguments = value.get("boot_args") or ""
        if len(arguments) >= _CMDLINE_MAX or not arguments.isascii():
            os.close(kernel)
            raise ApiError(f"{kind} The kernel command line is invalid: Invalid cmdline capacity provided.")
        if self._kernel >= 0:
            os.close(self._kernel)
        self._kernel = kernel
        self._boot = {key: value.get(key) for key in self._boot}

    def _put_machine(self, value: dict[str, Any]) -> None:
        new = {**self._machine, **{key: item for key, item in value.items() if item is not None}}
        if new.get("cpu_template") == "None":
            del new["cpu_template"]
        kind = "Machine config error:"
        count = new["vcpu_count"]
        if not 0 < count <= 32 or (new["smt"] and count > 1 and count % 2):
            raise ApiError(
                f"{kind} The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
                "SMT is enabled."
            )
        if new["mem_size_mib"] == 0 or (new["huge_pages"] == "2M" and new["mem_size_mib"] % 2):
            raise ApiError(
                f"{kind} The memory size (MiB) is either 0, or not a multiple of the configured page size."
            )
        if self._balloon is not None and new["mem_size_mib"] < self._balloon["amount_mib"]:
            raise ApiError(
                f"{kind} The memory size (MiB) is smaller than the previously set balloon device target size."
            )
        self._machine = new

    def _put_cpu_config(self, _: dict[str, Any]) -> None:
        return None  # there is no CPU whose features it could change

    def _put_drive(self, value: dict[str, Any]) -> None:
        roots = [drive.id for drive in self._drives.values() if drive.config["is_root_device"]]
        if value["is_root_device"]:
            if any(item.get("root_device") for item in self._pmem.values()):
                raise ApiError(
                    "Drive config error: Attempt to add block as a root device while the root device defined as a "
                    "pmem device"
                )
            if roots and roots != [value["drive_id"]]:
                raise ApiError("Drive config error: A root block device already exists!")
        drive = Drive(value)
        old = self._drives.get(drive.id)
        if old is not None:
            old.close()
        self._drives[drive.id] = drive

    def _put_net(self, value: dict[str, Any]) -> None:
        mac = value.get("guest_mac")
        for other in self._taps.values():
            if mac is not None and other.config.get("guest_mac") == mac and other.id != value["iface_id"]:
                raise ApiError(f"Network config error: The MAC address is already in use: {mac}")
        old = self._taps.pop(value["iface_id"], None)
        if old is not None:
            old.close()
        self._taps[value["iface_id"]] = Tap(
            value, "Network config error: Could not create the network device:"
        )

    def _put_pmem(self, value: dict[str, Any]) -> None:
        if value.get("root_device") and any(d.config["is_root_device"] for d in self._drives.values()):
            raise ApiError("Pmem config error: Attempt to add pmem as a root device while there is another")
        try:
            fd = os.open(value["path_on_host"], os.O_RDONLY if value.get("read_only") else os.O_RDWR)
            size = os.lseek(fd, 0, os.SEEK_END)
            os.close(fd)
        except OSError as error:
            raise ApiError(f"Pmem config error: Error opening backing file: {text_of(error)}") from None
        if size == 0:
            raise ApiError("Pmem config error: Error backing file size is 0")
        self._pmem[value["id"]] = value

    def _put_vsock(self, value: dict[str, Any]) -> None:
        kind = "Vsock config error: Cannot create backend for vsock device:"
        try:
            if self._vsock is not None:
                old, self._vsock = self._vsock, None
                old.close()
            self._vsock = Vsock(value["guest_cid"], value["uds_path"], self.version)
        except OSError as error:
            raise ApiError(f"{kind} Error binding to the host-side Unix socket: {text_of(error)}") from None

    def _put_entropy(self, value: dict[str, Any]) -> None:
        self._entropy = value

    def _put_balloon(self, value: dict[str, Any]) -> None:
        if value["amount_mib"] > self._machine["mem_size_mib"]:
            raise ApiError("Balloon config error: Amount of pages requested is too large.")
        self._balloon = {
            "amount_mib": value["amount_mib"],
            "deflate_on_oom": value["deflate_on_oom"],
            "stats_polling_interval_s": value.get("stats_polling_interval_s", 0),
            "free_page_hinting": value.get("free_page_hinting", False),
            "free_page_reporting": value.get("free_page_reporting", False),
        }

    def _put_mmds_config(self, value: dict[str, Any]) -> None:
        wanted = value["network_interfaces"]
        if not wanted:
            raise ApiError(
                "MMMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty."
            )
        if not set(wanted) <= set(self._taps):
            raise ApiError(
                "MMMDS config error: The list of network interface IDs provided contains at least one ID that does "
                "not correspond to any existing network interface."
            )
        address = value.get("ipv4_address") or "169.254.169.254"
        first, second, third, _ = (int(part) for part in address.split("."))
        if (first, second) != (169, 254) or not 1 <= third <= 254:
            raise ApiError("MMMDS config error: The MMDS IPv4 address is not link local.")
        self._mmds_config = {
            "version": value.get("version", "V1"), "network_interfaces": wanted, "ipv4_address": address,
            "imds_compat": value.get("imds_compat", False),
        }  # fmt: skip

    def _put_memory_hotplug(self, value: dict[str, Any]) -> None:
        new = {"total_size_mib": 0, "block_size_mib": 2, "slot_size_mib": 128, **value}
        block, slot, total = new["block_size_mib"], new["slot_size_mib"], new["total_size_mib"]
        if block < 2 or block & (block - 1) or slot < 128 or slot % block or total < slot or total % slot:
            raise ApiError("Memory hotplug config error: Sizes that do not fit each other.")
        self._hotplug = new

    # What may be asked at any time.

    def _get_instance(self, _: None) -> dict[str, Any]:
        return {
            "id": self.instance,
            "state": self.state,
            "vmm_version": ".".join(map(str, self.version)),
            "app_name": "Firecracker",
        }

    def _get_version(self, _: None) -> dict[str, Any]:
        return {"firecracker_version": ".".join(map(str, self.version))}

    def _get_machine(self, _: None) -> dict[str, Any]:
        return self._machine

    def _get_balloon(self, _: None) -> dict[str, Any]:
        if self._balloon is None:
            raise ApiError("Balloon config error: No balloon device found.")
        return self._balloon

    def _get_config(self, _: None) -> dict[str, Any]:
        return {
            "balloon": self._balloon,
            "drives": [drive.shown() for drive in self._ordered_drives()],
            "boot-source": self._boot,
            "cpu-config": None,
            "logger": None,
            "machine-config": self._machine,
            "metrics": None,
            "mmds-config": self._mmds_config,
            "network-interfaces": [tap.shown() for tap in self._taps.values()],
            "vsock": None
            if self._vsock is None
            else {"guest_cid": self._vsock.cid, "uds_path": self._vsock.path},
            "entropy": self._entropy,
            "pmem": list(self._pmem.values()),
            "memory-hotplug": self._hotplug,
        }

    def _ordered_drives(self) -> list[Drive]:
        return sorted(self._drives.values(), key=lambda drive: not drive.config["is_root_device"])

    def _get_mmds(self, _: None) -> Any:
        if self.started and self._mmds is None:
            raise ApiError("MMDS error: The MMDS data store is not initialized.")
        return self._mmds if self._mmds is not None else {}

    def _put_mmds(self, value: Any) -> None:
        if len(json.dumps(value, separators=(",", ":"))) > self._mmds_limit:
            raise ApiError("MMDS limit exceeded error: The MMDS patch request doesn't fit.", 413)
        self._mmds = value

    def _patch_mmds(self, value: Any) -> None:
        if self._mmds is None and self.started:
            raise ApiError("MMDS error: The MMDS data store is not initialized.")
        self._put_mmds(_merged(self._mmds, value))

    # The start.

    def _action(self, value: dict[str, Any]) -> None:
        kind = value["action_type"]
        if kind == "InstanceStart":
            if self.started:
                raise ApiError(_POST_BOOT)
            self.start()
            return
        if not self.started:
            raise ApiError(_PRE_BOOT)
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
            raise ApiError(f"Start microvm error: {_NO_KVM}")
        head = os.pread(self._kernel, 0x206, 0)
        bzimage = head[0x202:0x206] == b"HdrS" and versions.has(self.version, versions.BZIMAGE)
        if not head.startswith(b"\x7fELF") and not bzimage:
            raise ApiError(
                "Start microvm error: System configuration error: Cannot load kernel due to invalid memory "
                "configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: "
                "Invalid Elf magic number"
            )
        self._memory = GuestMemory(
            self._machine["mem_size_mib"] * _MIB, track=self._machine["track_dirty_pages"]
        )
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
        self._guest = Guest(
            self._memory, restored=restored, console=self._console, ended=self._exit, faults=self.faults
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
        wanted = self._balloon["amount_mib"] * _MIB // PAGE
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
            "target_pages": balloon["amount_mib"] * _MIB // PAGE,
            "actual_pages": actual,
            "target_mib": balloon["amount_mib"],
            "actual_mib": actual * PAGE // _MIB,
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

    # Snapshots.

    def _create_snapshot(self, value: dict[str, Any]) -> None:
        kind = "Create snapshot error:"
        assert self._memory is not None
        if self.state != "Paused":
            # The devices are asked before the vCPUs, so the guest's connections are reset for nothing.
            self._pause()
            if self._vsock is not None:
                self._vsock.prepare_save()
            self._resume()
            raise ApiError(
                f"{kind} Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"
            )
        if self._vsock is not None:
            self._vsock.prepare_save()
        raw = snapshot.encode(self._device_state(), versions.snapshot_format(self.version))
        step = "open"
        try:
            fd = os.open(value["snapshot_path"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                step = "write"
                full = "no space" in self.faults
                _write_all(fd, raw[: len(raw) // 2] if full else raw)
                if full:
                    raise ApiError(
                        f"{kind} Cannot serialize the microVM state: IO Error: No space left on device (os error 28)"
                    )
                step = "sync_all"
                _sync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if step == "write":
                raise ApiError(
                    f"{kind} Cannot serialize the microVM state: IO Error: {text_of(error)}"
                ) from None
            raise ApiError(
                f"{kind} Cannot perform {step} on the snapshot backing file: {text_of(error)}"
            ) from None
        self._write_memory(value["mem_file_path"], value.get("snapshot_type", "Full") == "Diff", kind)

    def _write_memory(self, path: str, diff: bool, kind: str) -> None:
        assert self._memory is not None
        step = "open"
        try:
            existed = os.path.exists(path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                # Not emptied if it has the right size: it may be the very file that this VM was restored from.
                if existed and os.fstat(fd).st_size != self._memory.size:
                    step = "truncate"
                    os.ftruncate(fd, 0)
                step = "set_length"
                os.ftruncate(fd, self._memory.size)
                step = "write"
                if diff:
                    self._memory.dump_dirty(fd)
                else:
                    self._memory.dump(fd)
                step = "sync_all"
                _sync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if step == "write":
                raise ApiError(f"{kind} Cannot write memory file: {text_of(error)}") from None
            raise ApiError(
                f"{kind} Cannot perform {step} on the memory backing file: {text_of(error)}"
            ) from None

    def _device_state(self) -> dict[str, Any]:
        return {
            "vm_info": {**self._machine, "boot_source": self._boot},
            "memory": [[region.guest_address, region.size] for region in (self._memory or _none()).regions],
            "vcpus": [{"registers": self._serial_no} for _ in range(self._machine["vcpu_count"])],
            "drives": [drive.shown() for drive in self._ordered_drives()],
            "nets": [tap.config for tap in self._taps.values()],
            "vsock": None
            if self._vsock is None
            else {"cid": self._vsock.cid, "uds_path": self._vsock.path, "local": self._vsock.local_last},
            "balloon": self._balloon,
            "inflated": self._inflated,
            "entropy": self._entropy,
            "pmem": list(self._pmem.values()),
            "hotplug": self._hotplug,
            "mmds_config": self._mmds_config,
        }

    def _load_snapshot(self, value: dict[str, Any]) -> None:
        kind = "Load snapshot error:"
        if self._configured:
            raise ApiError(
                f"{kind} Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        try:
            self._restore(value)
            if value.get("resume_vm"):
                self._patch_vm({"state": "Resumed"})
        except ApiError as error:
            self.fatal = True
            raise ApiError(f"{kind} {error}") from None

    def _restore(self, value: dict[str, Any]) -> None:
        kind = "Failed to restore from snapshot:"
        if "load fails" in self.faults:
            raise ApiError(f"{kind} The fake was told to fail.")
        state_kind = f"{kind} Failed to get snapshot state from file:"
        try:
            state = snapshot.load(value["snapshot_path"], versions.snapshot_format(self.version))
        except OSError as error:
            raise ApiError(f"{state_kind} Failed to open snapshot file: {text_of(error)}") from None
        except snapshot.BadSnapshot as error:
            raise ApiError(f"{state_kind} Failed to load snapshot state from file: {error}") from None
        for override in value.get("network_overrides", ()):
            found = [net for net in state["nets"] if net["iface_id"] == override["iface_id"]]
            if not found:
                raise ApiError(f"{state_kind} Unknown Network Device.")
            found[0]["host_dev_name"] = override["host_dev_name"]
        if value.get("vsock_override") is not None:
            if state["vsock"] is None:
                raise ApiError(f"{state_kind} Unknown Vsock Device.")
            state["vsock"]["uds_path"] = value["vsock_override"]["uds_path"]
        self._boot = state["vm_info"].pop("boot_source")
        track = value.get("track_dirty_pages", False) or value.get("enable_diff_snapshots", False)
        self._machine = {**state["vm_info"], "track_dirty_pages": track}
        self._map_memory(value["mem_backend"], state, f"{kind} Failed to load guest memory:")
        if "no kvm" in self.faults:
            raise ApiError(f"{kind} Failed to build microVM from snapshot: {_NO_KVM}")
        self._restore_devices(
            state, f"{kind} Failed to build microVM from snapshot: Failed to restore devices:"
        )
        self._run_guest(restored=True)

    def _map_memory(self, backend: dict[str, Any], state: dict[str, Any], kind: str) -> None:
        if backend["backend_type"] == "Uffd":
            # As far as it goes on a host without userfaultfd: whether anybody listens is seen first.
            try:
                with socket.socket(socket.AF_UNIX) as handler:
                    handler.connect(backend["backend_path"])
            except OSError as error:
                raise ApiError(
                    f"{kind} Error creating guest memory from uffd: Failed to connect to UDS Unix stream: "
                    f"{text_of(error)}"
                ) from None
            raise ApiError(
                f"{kind} Error creating guest memory from uffd: Failed to UFFD object: the fake has none"
            )
        kind += " Error creating guest memory from file:"
        if self._machine["huge_pages"] == "2M":
            raise ApiError(
                f"{kind} Cannot restore hugetlbfs backed snapshot by mapping the memory file. Please use uffd."
            )
        size = sum(length for _, length in state["memory"])
        try:
            fd = os.open(backend["backend_path"], os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._memory = GuestMemory(size, track=self._machine["track_dirty_pages"], fd=fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise ApiError(f"{kind} Failed to load guest memory: {text_of(error)}") from None
        except ValueError as error:
            raise ApiError(f"{kind} Failed to restore guest memory: {error}") from None

    def _restore_devices(self, state: dict[str, Any], kind: str) -> None:
        try:
            for drive in state["drives"]:
                self._drives[drive["drive_id"]] = Drive(drive)
            for net in state["nets"]:
                self._taps[net["iface_id"]] = Tap(net, "Net:")
        except ApiError as error:
            raise ApiError(f"{kind} {error}") from None
        vsock = state["vsock"]
        if vsock is not None:
            try:
                self._vsock = Vsock(vsock["cid"], vsock["uds_path"], self.version, vsock["local"])
            except OSError as error:
                raise ApiError(
                    f"{kind} Error resetting VSOCK device: Error binding to the host-side Unix socket: {text_of(error)}"
                ) from None
            self._vsock.prepare_restored()
        self._balloon, self._inflated = state["balloon"], state["inflated"]
        self._entropy, self._hotplug = state["entropy"], state["hotplug"]
        self._mmds_config = state["mmds_config"]
        self._pmem = {item["id"]: item for item in state["pmem"]}
        self._serial_no = state["vcpus"][0]["registers"]


def _none() -> GuestMemory:
    raise AssertionError("a VM without memory was saved")


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    made = dict(old) if isinstance(old, dict) else {}
    for key, item in patch.items():
        if item is None:
            made.pop(key, None)
        else:
            made[key] = _merged(made.get(key), item)
    return made


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync(fd: int) -> None:
    os.fsync(fd)
