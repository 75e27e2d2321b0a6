"""What a VM is configured with before it starts, and what can be asked about it at any time."""

from __future__ import annotations

import json
import os

from .devices import Drive, Tap
from .guest import Guest
from .memory import GuestMemory
from .requests import ApiError
from .vsock import Vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .faults import Faults
    from .logs import Log, Metrics
    from .versions import Version

MIB = 1 << 20
PRE_BOOT = "The requested operation is not supported before starting the microVM."
POST_BOOT = "The requested operation is not supported after starting the microVM."
_CMDLINE_MAX = 2048


def text_of(error: OSError) -> str:
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"


class Resources:
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
