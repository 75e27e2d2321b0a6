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
from .machine import NO_KVM, Machine
from .memory import GuestMemory
from .requests import Action, ApiError
from .resources import POST_BOOT, PRE_BOOT, text_of
from .vsock import Vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_ANY_TIME = {"get instance", "get version", "get config", "get machine", "get mmds", "put mmds", "patch mmds",
             "get balloon"}  # fmt: skip
_POST_ONLY = {"patch vm", "create snapshot", "patch drive", "patch net", "patch pmem", "patch balloon",
              "patch balloon statistics", "get balloon statistics", "start hinting", "stop hinting", "get hinting",
              "get memory hotplug", "patch memory hotplug", "unplug"}  # fmt: skip
_NO_BOOT_PATH = {"put logger", "put metrics", "put serial"}


class Vmm(Machine):
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
                raise ApiError(PRE_BOOT)
            return
        if self.started:
            if name in ("put drive", "put net", "put pmem") and versions.has(self.version, versions.HOTPLUG):
                raise ApiError(
                    "The requested operation is not supported: the fake has no PCI hotplug"
                    if self._pci
                    else "PCI is not enabled"
                )
            raise ApiError(POST_BOOT)
        if name not in _NO_BOOT_PATH and name != "load snapshot":
            self._configured = True

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
            raise ApiError(f"{kind} Failed to build microVM from snapshot: {NO_KVM}")
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


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync(fd: int) -> None:
    os.fsync(fd)
