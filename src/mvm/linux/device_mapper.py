"""Device mapper by ioctl(2) on /dev/mapper/control, and what /sys/block says of it: no program, no library, no udev.

    devices()          every mapped device: name, uuid, number, what it lies on
    has_target(kind)   whether the kernel can make mappings of that kind; loads its module
    crypt_table(name)  a dm-crypt mapping as the kernel applies it, its key left out
    remove(name)       takes a mapping away, and with it the kernel's copy of its key; now or with its last user

All but `devices` need CAP_SYS_ADMIN. Errors are OSError; an absent mapping is False or None, never an error. Names and
uuids are the kernel's: 127 and 128 bytes at most.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import Final, NamedTuple

CONTROL: Final = "/dev/mapper/control"
NAME_MAX: Final = 127
_SYS_BLOCK: Final = "/sys/block"

# struct dm_ioctl of <linux/dm-ioctl.h>, interface 4: version[3], data_size, data_start, target_count, open_count,
# flags, event_nr, padding, dev, name[128], uuid[129], 7 bytes that make it whole words.
_HEADER: Final = struct.Struct("=3IIIIiIIIQ128s129s7x")
# struct dm_target_spec: sector_start, length, status, next, target_type[16]; its parameters follow.
_TARGET: Final = struct.Struct("=QQiI16s")
_REMOVE, _TABLE_STATUS, _TARGET_VERSION = 4, 12, 17
_STATUS_TABLE, _SECURE_DATA, _DEFERRED = 1 << 4, 1 << 15, 1 << 17
_ROOM: Final = 16 << 10
_VERSION: Final = (4, 0, 0)
"""The oldest interface that has what is asked for here but `_TARGET_VERSION`, which older kernels answer by ENOTTY."""


class Device(NamedTuple):
    """`path`: the node that the kernel itself makes. `below`: the files or devices it lies on; of a loop device the
    file behind it, as the kernel names it now."""

    name: str
    uuid: str
    path: str
    below: tuple[str, ...]


class CryptTable(NamedTuple):
    """`offset` in sectors of 512 bytes, of the device below; `options` without the count."""

    cipher: str
    offset: int
    options: tuple[str, ...]


def devices(sys_block: str = _SYS_BLOCK) -> list[Device]:
    """All of them. One that goes away meanwhile is left out."""
    found = []
    try:
        entries = os.listdir(sys_block)
    except FileNotFoundError:
        return []
    for entry in sorted(entries):
        if not entry.startswith("dm-"):
            continue
        base = f"{sys_block}/{entry}"
        try:
            name, uuid = _word(f"{base}/dm/name"), _word(f"{base}/dm/uuid")
            below = tuple(_below(f"{base}/slaves", slave) for slave in sorted(os.listdir(f"{base}/slaves")))
        except OSError:
            continue
        if name:
            found.append(Device(name, uuid, f"/dev/{entry}", below))
    return found


def _below(folder: str, slave: str) -> str:
    try:
        return _word(f"{folder}/{slave}/loop/backing_file")
    except OSError:
        return f"/dev/{slave}"


def _word(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read(8192).rstrip(b"\n"))


def has_target(kind: str) -> bool:
    """Whether mappings of this kind (`crypt`) can be made. Raises OSError where the kernel cannot be asked."""
    try:
        _call(_TARGET_VERSION, kind)
        return True
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return os.path.isdir(f"/sys/module/dm_{kind}")
        if error.errno in (errno.EINVAL, errno.ENXIO):
            return False
        raise


def crypt_table(name: str) -> CryptTable | None:
    """What the kernel does with the mapping's sectors. None if there is no such mapping, or it is of another kind."""
    try:
        answer = _call(_TABLE_STATUS, name, _STATUS_TABLE | _SECURE_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    try:
        return parse_crypt_table(answer)
    finally:
        answer[:] = bytes(len(answer))


def parse_crypt_table(answer: bytearray) -> CryptTable | None:
    """The only target of a TABLE_STATUS answer. Its key, the second word, is overwritten in `answer`, copied nowhere.

    None if it is of another kind. ValueError for more targets than one, and for what is no table.
    """
    start, count = struct.unpack_from("=II", answer, 16)
    if count == 0:
        return None
    if count != 1 or not _HEADER.size <= start <= len(answer) - _TARGET.size:
        raise ValueError(f"{count} targets at {start}")
    kind = _TARGET.unpack_from(answer, start)[4].rstrip(b"\0")
    if kind != b"crypt":
        return None
    at = start + _TARGET.size
    end = answer.find(b"\0", at)
    first = answer.find(b" ", at, end)
    second = answer.find(b" ", first + 1, end)
    if min(first, second) < 0:
        raise ValueError("the table of a crypt target has at least five words")
    answer[first + 1 : second] = b"-" * (second - first - 1)
    words = answer[at:end].decode("ascii", "replace").split(" ")
    if len(words) < 5 or not words[4].isdecimal():
        raise ValueError(f"not the table of a crypt target: {' '.join(words)[:200]}")
    return CryptTable(words[0], int(words[4]), tuple(words[6:]))


def remove(name: str, *, deferred: bool = False) -> bool:
    """Remove a mapping. False if there is none.

    OSError(EBUSY) while somebody has it open; `deferred` lets the kernel remove it when the last of them closes it.
    """
    try:
        _call(_REMOVE, name, _DEFERRED if deferred else 0)
        return True
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


def holders(path: str) -> list[tuple[int, str]]:
    """(pid, command name) of every process that has the block device at `path` open, as far as they can be seen."""
    try:
        wanted = os.stat(path).st_rdev
    except OSError:
        return []
    found = []
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
            held = any(_device_of(f"/proc/{pid}/fd/{number}") == wanted for number in numbers)
            if held:
                found.append((pid, _word(f"/proc/{pid}/comm")))
        except OSError:
            continue
    return found


def _device_of(link: str) -> int:
    # Not by its name: in a jail the node has another one. What has no path (sockets, pipes) needs no second look.
    try:
        if not os.readlink(link).startswith("/"):
            return -1
        seen = os.stat(link)
        return seen.st_rdev if stat.S_ISBLK(seen.st_mode) else -1
    except OSError:
        return -1


def render(name: str, flags: int = 0) -> bytearray:
    """What an ioctl is asked with: a header and room for the answer."""
    encoded = os.fsencode(name)
    if not encoded or len(encoded) > NAME_MAX or b"\0" in encoded:
        raise ValueError(f"not a name of a mapping: {name[:200]!r}")
    buffer = bytearray(_ROOM)
    _HEADER.pack_into(buffer, 0, *_VERSION, _ROOM, _HEADER.size, 0, 0, flags, 0, 0, 0, encoded, b"")
    return buffer


def _call(number: int, name: str, flags: int = 0) -> bytearray:
    buffer = render(name, flags)
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        # _IOWR(0xfd, number, struct dm_ioctl); the kernel takes the size of the buffer from the header.
        fcntl.ioctl(fd, 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | number, buffer)
    finally:
        os.close(fd)
    return buffer
