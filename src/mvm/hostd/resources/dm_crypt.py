"""Data disks opened by dm-crypt: an image becomes a block device, `mvm-<vm name>.<mark>`, that the kernel decrypts.

    open_mapping    cryptsetup opens it; read back; given to its holder; an owned descriptor of the device
    close           the mapping is gone, and with it the kernel's copy of the volume key; verified
    opened          every mapping of this kind on the host, whoever made it

**A mapping lives as long as somebody has it open.** As soon as we hold its descriptor the kernel is told to remove it
with its last user. So a disk is locked the moment its VMM ends, by whatever hand, also when no mvm runs any more; and a
command killed between opening the disk and starting the VM leaves nothing, but for the moment between cryptsetup's last
call and ours, after which `close` finds it. The loop device below is cryptsetup's and goes with the mapping by itself.

udev is kept out of it (`udev`), and not waited for (`DM_DISABLE_UDEV`). The node is the kernel's own, /dev/dm-N; where
cryptsetup makes a second one, /dev/mapper/mvm-..., it is removed at once, so that it cannot outlive the mapping and
lead to another.

Names are the host's, so each ends with a mark of the directory that its image is in, by which it is known again:
another state root's is never touched. The kernel's own word on the image would not do: it names the file as it was in
the mount namespace of the daemon that opened it, and once that is gone nothing is left of that name but its end.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from mvm.core.errors import Busy, IntegrityError, VmmError
from mvm.hostd.resources import udev
from mvm.linux import device_mapper, process

if TYPE_CHECKING:
    from pathlib import Path

    from mvm.linux.secret import SecretBytes

PREFIX: Final = "mvm-"
CIPHER: Final = "aes-xts-plain64"
WITHOUT_UDEV: Final = {"DM_DISABLE_UDEV": "1"}
_OPEN_S: Final = 30.0
CLOSE_S: Final = 5.0
_RETRY_S: Final = 0.002
# cryptsetup's uuid of a mapping ends with its name; a volume group `mvm` of somebody's LVM has names like ours.
_UUID: Final = re.compile(r"CRYPT-LUKS[12]-[0-9a-f]{32}-(.+)", re.DOTALL)
_FORMAT_1_SECTOR, _SECTOR = 512, 4096


class Mapping(NamedTuple):
    """An open disk. `path`: its block device; `image`: the file below it, as the kernel names it now, or ""."""

    name: str
    vm_name: str
    mark: str
    path: str
    image: str


def mark(image: Path) -> str:
    """Of the directory that an image is in, whichever image: one that is being made or replaced has the same."""
    return hashlib.sha256(os.fsencode(os.path.realpath(image.parent))).hexdigest()[:12]


def render_name(image: Path, vm_name: str) -> str:
    """The mapping of an instance's disk, `mvm-acme--default-0.0123456789ab`. ValueError over 127 bytes."""
    name = f"{PREFIX}{vm_name}.{mark(image)}"
    if len(name) > device_mapper.NAME_MAX:
        raise ValueError(f"too long for the name of a mapping: {name}")
    return name


def parse_name(name: str) -> tuple[str, str] | None:
    """(vm name, mark) of a mapping, None for what `render_name` does not make."""
    found = re.fullmatch(r"mvm-([a-z][a-z0-9-]*)\.([0-9a-f]{12})", name)
    return None if found is None else (found[1], found[2])


def unavailable() -> str:
    """Why images cannot be opened by the kernel here; "" if they can. Loads the kernel's module if need be."""
    if not os.path.exists("/dev/loop-control"):
        return "there is no /dev/loop-control"
    try:
        return "" if device_mapper.has_target("crypt") else "the kernel has no dm-crypt"
    except OSError as error:
        return f"{device_mapper.CONTROL}: {error.strerror}"


def render_open(image: Path, name: str) -> list[str]:
    """The command that makes the mapping; the passphrase is its standard input.

    No locks of cryptsetup's, because the instance's lock is held. No kernel keyring: the volume key is in the mapping
    alone, and goes with it. No discards: no VMM passes on a guest's, and they would show what is in use.
    """
    return [
        "cryptsetup", "open", "--type", "luks", "--key-file", "-", "--disable-locks", "--disable-keyring", str(image),
        name,
    ]  # fmt: skip


def open_mapping(image: Path, vm_name: str, phrase: SecretBytes, *, offset: int, luks: int) -> int:
    """Open `image` (`luks`: 1 or 2) and return an owned descriptor of its block device; the mapping lives as long.

    A mapping that an interrupted command left is closed first. IntegrityError if the kernel was not told to do what a
    header of ours says.
    """
    name = render_name(image, vm_name)
    close(image, vm_name)
    udev.keep_out()
    process.run(render_open(image, name), stdin=bytes(phrase.view()), timeout=_OPEN_S, env=WITHOUT_UDEV)
    fd = -1
    try:
        mapping = _find(name)
        if mapping is None or mapping.image != os.path.realpath(image):
            raise VmmError(f"cryptsetup did not open {name} over {image}", details=str(mapping))
        fd = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
        device_mapper.remove(name, deferred=True)
        try:
            os.unlink(f"/dev/mapper/{name}")
        except FileNotFoundError:
            pass  # cryptsetup may make no nodes where it has no CAP_MKNOD
        _check_table(name, offset, luks)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        close(image, vm_name)
        raise
    return fd


def _check_table(name: str, offset: int, luks: int) -> None:
    """That the kernel encrypts as it should. A LUKS header is not authenticated: whoever could write to the disk while
    it was elsewhere could have named a weaker cipher for what the guest writes from now on."""
    found = device_mapper.crypt_table(name)
    wanted = table(offset, luks)
    if found != wanted:
        raise IntegrityError(
            "the data disk's header is not one that mvm wrote",
            details=f"It makes the kernel use {found}, expected {wanted}.",
            resolution="restore it from a backup",
        )


def table(offset: int, luks: int) -> device_mapper.CryptTable:
    """What the kernel does with a disk of ours; `offset` in bytes."""
    options = (f"sector_size:{_SECTOR}",) if luks == 2 else ()
    return device_mapper.CryptTable(CIPHER, offset // _FORMAT_1_SECTOR, options)


def opened() -> list[Mapping]:
    """Every mapping on this host that mvm, of any state root, has open. Starts no program."""
    return [mapping for device in device_mapper.devices() if (mapping := parse(device)) is not None]


def parse(device: device_mapper.Device) -> Mapping | None:
    """A mapped device as one of ours, None if its name or uuid is not what cryptsetup gives ours."""
    words, uuid = parse_name(device.name), _UUID.fullmatch(device.uuid)
    if words is None or uuid is None or uuid[1] != device.name:
        return None
    return Mapping(device.name, *words, device.path, device.below[0] if len(device.below) == 1 else "")


def is_of(mapping: Mapping, image: Path) -> bool:
    """Whether the mapping is of a disk in the directory of `image`: the image itself, or one being made or replaced."""
    return mapping.mark == mark(image)


def close(image: Path, vm_name: str, *, wait_s: float = CLOSE_S) -> bool:
    """Lock the disk: return when no mapping over `image` exists. False if there was none.

    Whoever still has it open is given `wait_s` seconds (its VMM has been ended; udev may look at it). After that Busy
    names them, and the kernel removes the mapping when the last of them lets go.
    """
    mapping = _find(render_name(image, vm_name))
    if mapping is None:
        return False
    deadline = time.monotonic() + wait_s
    problem = ""
    while True:
        try:
            device_mapper.remove(mapping.name)
        except OSError as error:
            problem = str(error)
        # Looked at, not concluded: the kernel may still be about it.
        left = _find(mapping.name)
        if left is None or left.path != mapping.path:
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(_RETRY_S)
    try:
        device_mapper.remove(mapping.name, deferred=True)
    except OSError as error:
        problem = str(error)
    names = ", ".join(f"{comm} (pid {pid})" for pid, comm in device_mapper.holders(mapping.path))
    raise Busy(
        f"the data disk of {vm_name} cannot be locked: it is in use",
        details=f"{mapping.path} ({mapping.name}) is open in {names or 'no process that can be seen'}; {problem}",
        resolution="End what has it open; the kernel locks the disk then. Run the command again after that.",
    )


def _find(name: str) -> Mapping | None:
    return next((mapping for mapping in opened() if mapping.name == name), None)
