"""The guest's disks: /dev/vdb is data, /dev/vdc is secrets. Both are optional; a guest without them still
answers.

Rules:
- A data disk is formatted only when it is certainly unused: no signature of any file system, partition table, volume
  manager, swap area or encryption header at any known place. In doubt the disk is left alone and not mounted.
- The secrets disk is replaced by the host while the guest sleeps, so its cached blocks are dropped before each mount.
"""

from __future__ import annotations

import fcntl
import os

from mvm.guest import log, process
from mvm.guest.mounts import mount, mounted, unmount

BLKFLSBUF = 0x1261
_FORMAT_TIMEOUT = 300.0
_KIB = 1024

_EXT4 = (0x438, b"\x53\xef")  # ext2 and ext3 too
# (offset, magic): what blkid and the kernel look for. Offsets count from the start of the disk.
SIGNATURES: tuple[tuple[int, bytes], ...] = (
    (0, b"LUKS\xba\xbe"),
    (0, b"XFSB"),
    (0, b"hsqs"),
    (0, b"\x7fELF"),
    (0, b"BCACHEFS"),
    (3, b"NTFS    "),
    (3, b"EXFAT   "),
    (3, b"-FVE-FS-"),
    (0, b"LABELONE"),
    (512, b"LABELONE"),
    (1024, b"LABELONE"),
    (1536, b"LABELONE"),
    (510, b"\x55\xaa"),  # MBR, FAT
    (512, b"EFI PART"),
    (4096, b"EFI PART"),
    (0x400, b"\x10\x20\xf5\xf2"),  # f2fs
    (0x400, b"\xe2\xe1\xf5\xe0"),  # erofs
    _EXT4,
    (0, b"\xfc\x4e\x2b\xa9"),  # md 1.1
    (4096, b"\xfc\x4e\x2b\xa9"),  # md 1.2
    (4086, b"SWAPSPACE2"),
    (4086, b"SWAP-SPACE"),
    (4086, b"S1SUSPEND"),
    (4086, b"S2SUSPEND"),
    (4096 + 24, b"\xc6\x85\x73\xf6"),  # bcache
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    (0x8000, b"JFS1"),
    (0x8001, b"CD001"),
    (0x8001, b"NSR0"),
    (0x10034, b"ReIsEr"),
    (0x10040, b"_BHRfS_M"),
    (0x20000, b"\x0c\xb1\xba\x00"),  # zfs uberblock, little endian
    (0x20000, b"\x00\x00\x00\x00\x00\xba\xb1\x0c"),
    *(
        (offset, b"SKUL\xba\xbe")
        for offset in (0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000, 0x400000)
    ),
)
# Counted from the end of the disk, which is also rounded down to 64 KiB for md 0.90.
_END_SIGNATURES: tuple[tuple[int, bytes], ...] = (
    (512, b"EFI PART"),
    (4096, b"EFI PART"),
    (8192, b"\xfc\x4e\x2b\xa9"),  # md 1.0
)


def used_by(path: str) -> str | None:
    """What the disk at `path` seems to carry, None when nothing is known of it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        for offset, magic in SIGNATURES:
            if _at(fd, offset, magic):
                return f"signature {magic.hex()} at {offset:#x}"
        for back, magic in _END_SIGNATURES:
            if size >= back and _at(fd, size - back, magic):
                return f"signature {magic.hex()} at {size - back:#x}"
        md = (size & ~(64 * _KIB - 1)) - 64 * _KIB
        if md > 0 and _at(fd, md, b"\xfc\x4e\x2b\xa9"):
            return f"RAID member at {md:#x}"
        return None
    finally:
        os.close(fd)


def _at(fd: int, offset: int, magic: bytes) -> bool:
    return os.pread(fd, len(magic), offset) == magic


def prepare_data(device: str, where: str) -> str:
    """Format `device` if unused, mount it on `where`; one word of what happened. Never raises: nofail."""
    try:
        if not _is_block(device):
            return "absent"
        if mounted(where):
            return "mounted"
        os.makedirs(where, exist_ok=True)
        formatted = False
        if used_by(device) is None:
            options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
            code, output = process.run(
                ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", options, device], _FORMAT_TIMEOUT
            )
            if code:
                log.line(f"{device}: mkfs.ext4 exits {code}: {output.decode(errors='replace')}")
                return "unformatted"
            formatted = True
        problem = mount(device, where, "ext4", "nodev", "nosuid")
        if problem:
            log.line(f"{device}: {problem}")
            return "unmountable"
        return "formatted" if formatted else "mounted"
    except OSError as error:
        log.failure(device, error)
        return "failed"


def mount_secrets(device: str, where: str) -> str:
    """Mount the secrets disk afresh; `mounted`, `absent` or `failed`. Never raises: nofail."""
    try:
        if not _is_block(device):
            return "absent"
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, BLKFLSBUF, 0)
            if not _at(fd, *_EXT4):
                return "absent"  # a blank disk: this tenant has no secrets
        finally:
            os.close(fd)
        os.makedirs(where, exist_ok=True)
        problem = mount(device, where, "ext4", "ro", "noexec", "nodev", "nosuid")
        if problem:
            log.line(f"{device}: {problem}")
            return "failed"
        return "mounted"
    except OSError as error:
        log.failure(device, error)
        return "failed"


def _is_block(path: str) -> bool:
    try:
        return os.stat(path).st_mode & 0o170000 == 0o060000
    except FileNotFoundError:
        return False


def remount_secrets(device: str, where: str) -> str:
    """After a wake: whatever is still mounted goes, the new disk comes. Same results as `mount_secrets`."""
    try:
        if not unmount(where):
            return "failed"
    except OSError as error:
        log.failure(where, error)
        return "failed"
    return mount_secrets(device, where)


def first_secrets(device: str, where: str) -> str:
    """At the agent's start: keep what is mounted (it may be newer than the disk), else mount the disk."""
    try:
        if mounted(where):
            return "kept"
    except OSError as error:
        log.failure(where, error)
    return mount_secrets(device, where)
