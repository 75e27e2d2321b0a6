"""Which VMM runs an instance.

    a sleeping or running instance     the one it has, whatever is asked for now: no other can read its snapshot
    a start, driver = "auto"           Firecracker if its programs are there, are of a version that is mended, and a
                                       guest of this kernel was seen to boot with it on this host; else QEMU
    a start, any other                 that one, and an error where it does not work

The reason goes to `mvm node info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from mvm.core.errors import MissingPrerequisite, MvmError
from mvm.core.snapshot import Sha256

if TYPE_CHECKING:
    from mvm.core.record import InstanceRecord
    from mvm.hostd.vmm.driver import Driver
    from mvm.hostd.vmm.firecracker.driver import FirecrackerDriver

PROGRAMS: Final = "/usr/lib/mvm/firecracker/current"


class StrictFilter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled seccomp filter for tenants with `seccomp = "strict"`, for one version of Firecracker (`1.16.1`)."""

    version: Annotated[str, Meta(pattern=r"^\d{1,4}\.\d{1,4}\.\d{1,4}\Z")]
    path: Annotated[str, Meta(min_length=1, max_length=4095, pattern=r"^/")]
    sha256: Sha256


class VmmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`directory`: of the programs firecracker and jailer. `sha256`: program -> what it has to be, if it is given."""

    driver: Literal["auto", "firecracker", "qemu"] = "auto"
    directory: Annotated[str, Meta(min_length=1, max_length=4095, pattern=r"^/")] = PROGRAMS
    sha256: dict[Literal["firecracker", "jailer"], Sha256] = {}
    strict_filters: Annotated[tuple[StrictFilter, ...], Meta(max_length=16)] = ()


class Choice:
    """The drivers of a host. Without `firecracker` there is only QEMU."""

    def __init__(
        self, asked: str, qemu: Driver, firecracker: FirecrackerDriver | None, absent: str = ""
    ) -> None:
        self.asked = asked
        self._qemu = qemu
        self._firecracker = firecracker
        self._absent = absent

    def without_firecracker(self, why: str) -> Choice:
        """The same, on a host that turns out not to be able to."""
        return Choice(self.asked, self._qemu, None, why)

    @property
    def names(self) -> tuple[str, ...]:
        """Of every driver that may be used."""
        return (*((self._firecracker.name,) if self._firecracker else ()), self._qemu.name)

    @property
    def name(self) -> str:
        return "+".join(self.names)

    def for_start(self, kernel: Path, initrd: Path) -> tuple[Driver, str]:
        """(driver, why that one) for a guest of this kernel. Boots it once, for seconds, if that is not known yet."""
        if self.asked == "qemu":
            return self._qemu, "the settings say so"
        if self._firecracker is None:
            if self.asked == "firecracker":
                raise MissingPrerequisite(
                    "Firecracker cannot be used",
                    details=self._absent,
                    resolution="Install it, or ask for QEMU.",
                )
            return self._qemu, self._absent
        if self.asked == "firecracker":
            self._firecracker.version()
            return self._firecracker, "the settings say so"
        try:
            found = self._firecracker.acceleration(kernel, initrd)
        except MvmError as error:
            return self._qemu, error.brief
        if found.accel != "kvm":
            return self._qemu, found.reason
        return self._firecracker, found.reason

    def known(self, kernel: Path | None) -> tuple[Driver, str] | None:
        """What `for_start` would say of a kernel, without starting anything; None if it would have to boot it first."""
        if self.asked == "auto" and self._firecracker is not None:
            try:
                found = None if kernel is None else self._firecracker.known(kernel)
            except (MvmError, OSError) as error:
                return self._qemu, getattr(error, "brief", "") or str(error)
            if found is None:
                return None
            return (self._firecracker if found.accel == "kvm" else self._qemu), found.reason
        try:
            return self.for_start(Path(), Path())
        except MvmError as error:
            return self._firecracker or self._qemu, error.brief

    def of(self, record: InstanceRecord) -> Driver | None:
        """The driver of the VMM that the instance has, or sleeps under; None if it has neither."""
        if record.vmm is None or (record.process is None and record.snapshot is None):
            return None
        return self.named(record.vmm.driver)

    def named(self, name: str) -> Driver:
        """MissingPrerequisite if this host has none of that name any more."""
        for driver in (self._firecracker, self._qemu):
            if driver is not None and driver.name == name:
                return driver
        raise MissingPrerequisite(
            f"the instance needs the VMM {name}, which this host has not",
            details=self._absent,
            resolution="Install it again, or give up the instance's memory: mvm instance stop",
        )

    @property
    def usual(self) -> Driver:
        """For what needs no VMM at all."""
        return self._firecracker or self._qemu


def choose(settings: VmmSettings, cache: Path, *, confined: bool = False) -> Choice:
    """The drivers that this host can have. Looks for the programs, starts none."""
    from mvm.hostd.vmm.qemu.driver import QemuDriver

    qemu = QemuDriver(cache, confined=confined)
    if settings.driver == "qemu":
        return Choice("qemu", qemu, None, "the settings say that QEMU is to be used")
    from mvm.hostd.vmm.firecracker import programs
    from mvm.hostd.vmm.firecracker.driver import Filter, FirecrackerDriver

    folder = Path(settings.directory)
    try:
        programs.require_there(folder)
    except MissingPrerequisite as error:
        return Choice(settings.driver, qemu, None, f"{error.brief}: {error.details}")
    pins: Mapping[str, str] = {str(name): value for name, value in settings.sha256.items()}
    filters = tuple(Filter(one.version, Path(one.path), one.sha256) for one in settings.strict_filters)
    driver = FirecrackerDriver(cache, folder, pins=pins, confined=confined, strict_filters=filters)
    return Choice(settings.driver, qemu, driver)


def driver_of(source: Driver | Choice, record: InstanceRecord) -> Driver:
    """For an operation on an instance as it is recorded; a start may choose anew (`driver_for`)."""
    if isinstance(source, Choice):
        return source.of(record) or source.usual
    return source


def driver_for(source: Driver | Choice, kernel: Path, initrd: Path) -> Driver:
    """For a start."""
    return source.for_start(kernel, initrd)[0] if isinstance(source, Choice) else source
