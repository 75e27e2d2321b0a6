"""One Firecracker process.

Sleeping takes two steps, in this order: `save_state`, which has Firecracker write the devices' state into the memory of
its jail, and then reading guest memory from outside. The order matters: saving tells the guest's vsock driver, in guest
memory, that its connections are gone. Firecracker's own copy of guest memory is asked for at a place where no file can
be (`jail.NO_FILE`): it writes the device state first, cannot open the other, and says so; not a byte of guest memory
leaves the process, and saving takes a millisecond whatever the guest's size.

`resume` after a `pause` without a save in between would leave a guest that can never be reached again
(`version.Features.deaf_resume`), so it saves first.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mvm.core.errors import VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd import keeper as keepers
from mvm.hostd.bounded_log import tail
from mvm.hostd.jailed_run import Place
from mvm.hostd.vmm.firecracker import jail, memory
from mvm.hostd.vmm.firecracker import requests as rq
from mvm.hostd.vmm.firecracker.api import Api, Refused
from mvm.hostd.vmm.firecracker.exits import describe
from mvm.hostd.vmm.firecracker.guard import filters, thread_statuses, unfiltered
from mvm.hostd.vmm.firecracker.version import Features
from mvm.linux.pidfd import is_alive, terminate
from mvm.linux.procmem import Span, SpannedMemory

READY_S: Final = 30.0
CALL_S: Final = 30.0
"""Firecracker itself gives its vCPUs that long to pause."""
LOAD_S: Final = 60.0
FILTERS_S: Final = 2.0
"""How long a VMM's threads may take to put on their filters, which they do as they start."""
STATE_MAX: Final = 10_000_000
"""Bytes of device state; Firecracker loads no more."""
LOG_FILE: Final = "firecracker.log"
UNFILTERED_FILE: Final = "unfiltered"
"""In the runtime directory, of a VMM that runs without seccomp filters: why. It is there only then."""
SAVED_FILE: Final = "saved"
_NOT_SAVED = "memory backing file"


class FirecrackerVm:
    """`size`: guest memory in bytes. `strict`: it is an error if a thread has no seccomp filter. `nodes`: names of
    device nodes in its jail's root."""

    def __init__(
        self,
        vmm: ProcessIdentity,
        keeper: ProcessIdentity | None,
        size: int,
        runtime: Path,
        uid: int,
        known: Features,
        *,
        strict: bool = False,
        nodes: Sequence[str] = (),
    ) -> None:
        self._vmm = vmm
        self._keeper = keeper
        self._size = size
        self._runtime = runtime
        self._known = known
        self._strict = strict
        self._nodes = nodes
        self._api = Api(Place(vmm, uid), jail.API)

    @property
    def _saved(self) -> Path:
        """There while a save or load has come since the last pause. A file: another process may be next to resume."""
        return self._runtime / SAVED_FILE

    @property
    def identity(self) -> ProcessIdentity:
        return self._vmm

    def is_alive(self) -> bool:
        return is_alive(self._vmm)

    def await_api(self) -> None:
        """Return when the API answers. VmmError if the process ends first, or after READY_S."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self._api.state(timeout=max(0.1, deadline - time.monotonic()))
                return
            except VmmError as error:
                # There is no socket yet, or it does not listen yet.
                if not self.is_alive():
                    raise self._ended(VmmError("Firecracker did not start")) from error
                if time.monotonic() > deadline:
                    raise VmmError(
                        "Firecracker's API does not answer",
                        details="\n".join(
                            filter(None, [f"Waited {READY_S:g} s.", error.details, self._words()])
                        ),
                        resolution=f"See {self._runtime / 'logs'}.",
                    ) from error
                time.sleep(0.001)

    def ask(self, call: rq.Call, *, timeout: float = CALL_S) -> None:
        """Have it do something. VmmError with what it said, or how it ended."""
        try:
            self._api.call(call, timeout=timeout)
        except VmmError as error:
            raise self._explained(error) from error

    def _state(self) -> str:
        try:
            return self._api.state(timeout=CALL_S)
        except VmmError as error:
            raise self._explained(error) from error

    def pause(self) -> None:
        if self._state() != "Paused":
            self._saved.unlink(missing_ok=True)
            self.ask(rq.SetState("Paused").call())

    def resume(self) -> None:
        if self._state() == "Running":
            return
        if self._known.deaf_resume and not self._saved.exists():
            self.save_state()
        self._saved.unlink(missing_ok=True)
        self.ask(rq.SetState("Resumed").call())

    def save_state(self) -> bytearray:
        with self._root() as root:
            _remove(root, jail.STATE_OUT)
            try:
                self._api.call(
                    rq.CreateSnapshot(f"/{jail.STATE_OUT}", jail.NO_FILE, "Full").call(), timeout=CALL_S
                )
            except Refused as error:
                if _NOT_SAVED not in error.said:
                    raise self._explained(error) from error
            except VmmError as error:
                raise self._explained(error) from error
            try:
                state = _read(root, jail.STATE_OUT)
            finally:
                _remove(root, jail.STATE_OUT)
        self._saved.touch(0o600)
        return state

    def load_state(self, state: bytes) -> None:
        """Give a process that was started for it the snapshot; it is paused then. A refusal ends the process."""
        if not 0 < len(state) <= STATE_MAX:
            raise VmmError(
                "the snapshot's device state is not of a plausible size", details=f"{len(state)} bytes."
            )
        # Not `clock_realtime`: where the host's KVM has no master clock (its clock source is not the TSC), the load
        # fails for it and the process ends. The guest's agent sets the clock after every wake.
        load = rq.LoadSnapshot(
            f"/{jail.STATE_IN}", rq.MemoryBackend("File", jail.MEMORY), resume_vm=False
        ).call()
        with self._root() as root:
            _write(root, jail.STATE_IN, state)
            try:
                self._api.call(load, timeout=LOAD_S)
            except VmmError as error:
                raise VmmError(
                    "Firecracker did not take the snapshot's device state",
                    details="\n".join(filter(None, [error.details, self._how_it_ended()])),
                    resolution="The snapshot fits another Firecracker or host; start the instance cold.",
                ) from error
            finally:
                _remove(root, jail.STATE_IN)
        self.take_nodes()
        self._saved.touch(0o600)
        self.check_filters()

    def take_nodes(self) -> None:
        """Take its device nodes out of its jail, once it has them open, before its guest runs. VmmError if one stays.

        A node is a number. Were it still there when the device is gone, it could be opened as whatever has that number
        then: the disk of another tenant.
        """
        with self._root() as root:
            for name in self._nodes:
                try:
                    os.unlink(name, dir_fd=root)
                except FileNotFoundError:
                    continue

    def check_filters(self) -> None:
        """After a start or load, when all threads are there. VmmError if one lacks its filter and must have it."""
        # As many as this process has, the VMM inherited.
        inherited = filters(Path("/proc/thread-self/status").read_text(encoding="utf-8", errors="replace"))
        deadline = time.monotonic() + FILTERS_S
        while True:
            statuses = thread_statuses(self._vmm.pid)
            missing = unfiltered(statuses, inherited)
            if not missing:
                return
            # Each thread puts its own on: a vCPU's may come after the answer. None at all is a build without filters.
            if len(missing) == len(statuses) or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        if self._strict:
            raise VmmError(
                "Firecracker runs without its seccomp filters",
                details="\n".join(missing),
                resolution="Use the release's own static binary; one built against glibc has no filters.",
            )
        (self._runtime / UNFILTERED_FILE).write_text(
            "".join(f"{line}\n" for line in missing), encoding="utf-8"
        )

    @contextmanager
    def memory(self) -> Iterator[SpannedMemory]:
        try:
            found = SpannedMemory(self._vmm.pid, self._spans())
        except OSError as error:
            raise VmmError("Firecracker's memory cannot be read", details=str(error)) from error
        with found:
            # Opened by number: if that changed hands before, what is open now is a stranger's memory.
            if not self.is_alive():
                raise self._ended(VmmError("Firecracker's memory cannot be read"))
            try:
                yield found
            except OSError as error:
                if self.is_alive():
                    raise
                raise VmmError("Firecracker ended while its memory was read", details=str(error)) from error

    def _spans(self) -> list[Span]:
        with open(f"/proc/{self._vmm.pid}/maps", encoding="utf-8", errors="replace") as file:
            maps = file.read()
        fd = os.open(f"/proc/{self._vmm.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return memory.find(maps, self._size, lambda at, size: _peek(fd, at, size))
        finally:
            os.close(fd)

    def stop(self, grace_s: float) -> None:
        self.close()
        terminate(self._vmm, grace_s)
        if self._keeper is not None and not keepers.await_end(self._runtime, wait_s=2.0):
            terminate(self._keeper, 0)

    def close(self) -> None:
        self._api.close()

    @contextmanager
    def _root(self) -> Iterator[int]:
        """The root of the jail, as a directory. Names in it are the VMM's to make, so no link is followed."""
        try:
            root = os.open(f"/proc/{self._vmm.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._explained(VmmError("Firecracker's jail is gone", details=str(error))) from error
        try:
            # The pid may have become another's; what was opened is checked, not the number.
            if not self.is_alive():
                raise self._ended(VmmError("Firecracker is gone"))
            yield root
        except OSError as error:
            raise self._explained(
                VmmError("Firecracker's device state cannot be handed over", details=str(error))
            ) from error
        finally:
            os.close(root)

    def _explained(self, error: VmmError) -> VmmError:
        return error if self.is_alive() else self._ended(error)

    def _ended(self, error: VmmError) -> VmmError:
        return VmmError(
            "Firecracker ended unexpectedly",
            details="\n".join(filter(None, [error.brief, error.details, self._how_it_ended()])),
            resolution=f"See {self._runtime / 'logs'}.",
        )

    def _how_it_ended(self) -> str:
        """How, if it has or is about to, and what it said last."""
        deadline = time.monotonic() + 2.0
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        status = ""
        if not self.is_alive():
            keepers.await_end(self._runtime, wait_s=2.0)
            try:
                status = describe(int((self._runtime / keepers.EXIT_FILE).read_bytes()[:16]))
            except (OSError, ValueError):
                status = "How it ended is not known: its keeper ended as well."
        return "\n".join(filter(None, [status, self._words()]))

    def _words(self) -> str:
        logs = self._runtime / "logs"
        return "\n".join(filter(None, [tail(logs / LOG_FILE, 1000), tail(logs / "vmm.log", 1000)]))


def _peek(fd: int, at: int, size: int) -> bytes:
    try:
        return os.pread(fd, size, at)
    except OSError:
        return b""


def _remove(root: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=root)
    except FileNotFoundError:
        pass
    except OSError:
        return  # its jail went with it, or it is a directory: then opening it says so


def _write(root: int, name: str, data: bytes) -> None:
    _remove(root, name)
    fd = os.open(
        name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444, dir_fd=root
    )
    try:
        os.fchmod(fd, 0o444)  # whatever the umask; its directory is the VMM's alone
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _read(root: int, name: str) -> bytearray:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=root)
    except OSError as error:
        raise VmmError("Firecracker saved no device state", details=str(error)) from error
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode) or not 0 < seen.st_size <= STATE_MAX:
            raise VmmError(
                "Firecracker's device state is not of a plausible size", details=f"{seen.st_size} bytes."
            )
        data = bytearray(seen.st_size)
        view, at = memoryview(data), 0
        while at < len(data):
            count = os.preadv(fd, [view[at:]], at)
            if count == 0:
                raise VmmError("Firecracker's device state ended early")
            at += count
        return data
    finally:
        os.close(fd)
