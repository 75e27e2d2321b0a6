"""Parsers of what the kernel and programs print. Pure, total: any text gives a value or InvalidInput."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from mvm.core.errors import InvalidInput
from mvm.linux import capabilities

_VERSION: Final = re.compile(r"(?<![\w.])v?(\d{1,6}(?:\.\d{1,6}){1,3})")
_KEY_HEX: Final = re.compile(r"[0-9a-fA-F]{32,}")
_KEY_WORD: Final = re.compile(r"[A-Za-z0-9+_]{20,}")
_DIGITS: Final = re.compile(r"[0-9]{1,10}")


class ThreadStatus(msgspec.Struct, frozen=True):
    """What /proc/PID/task/TID/status says of privileges. `uids`, `gids`: real, effective, saved, file system.
    `capabilities`: the bits in any of its inheritable, permitted, effective and ambient sets."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    no_new_privs: bool
    seccomp: int
    capabilities: int


def parse_status(text: str) -> ThreadStatus:
    """Raises InvalidInput if a field is missing or is not of its form."""
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name, value.strip())
    try:
        seen = capabilities.parse_status(text)
        held = seen.inheritable | seen.permitted | seen.effective | seen.ambient
        uids, gids = _numbers(fields["Uid"]), _numbers(fields["Gid"])
        if len(uids) != 4 or len(gids) != 4:
            raise ValueError("Uid or Gid")
        return ThreadStatus(
            uids,
            gids,
            _numbers(fields["Groups"]),
            seen.no_new_privs,
            seen.seccomp,
            capabilities.mask_of(held),
        )
    except (KeyError, ValueError) as error:
        raise InvalidInput("a process's status cannot be read", details=f"field {error}") from error


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split()
    if not all(_DIGITS.fullmatch(word) for word in words):
        raise ValueError(text[:40])
    return tuple(int(word) for word in words)


class Swap(msgspec.Struct, frozen=True):
    """`kind`: `partition` or `file`."""

    path: str
    kind: str


def parse_swaps(text: str) -> tuple[Swap, ...]:
    """/proc/swaps."""
    rows = [line.split() for line in text.split("\n")[1:]]
    return tuple(Swap(row[0].replace("\\040", " "), row[1]) for row in rows if len(row) >= 5)


def parse_parent(status: str) -> int:
    """The parent's pid from /proc/PID/status; 0 if it has none that we can see."""
    for line in status.splitlines():
        if line.startswith("PPid:"):
            return int(line.split()[1])
    return 0


def parse_unified_cgroup(text: str) -> str:
    """The path in the unified hierarchy from /proc/PID/cgroup; "" if it is in none."""
    for line in text.split("\n"):
        if line.startswith("0::/"):
            return line[3:]
    return ""


def parse_core_limit(limits: str) -> str:
    """The soft and hard core file size of /proc/PID/limits, as `0 0`; "" if it is not there."""
    for line in limits.split("\n"):
        if line.startswith("Max core file size"):
            words = line[len("Max core file size") :].split()
            return " ".join(words[:2])
    return ""


def parse_fd_flags(fdinfo: str) -> int:
    """The open flags in /proc/PID/fdinfo/N. Raises InvalidInput."""
    for line in fdinfo.split("\n"):
        name, _, value = line.partition(":")
        if name == "flags" and re.fullmatch(r"[0-7]{1,12}", value.strip()):
            return int(value.strip(), 8)
    raise InvalidInput("a descriptor's flags cannot be read", details=fdinfo[:80])


def parse_socket_table(text: str) -> frozenset[int]:
    """Inode numbers of the sockets in /proc/PID/net/{tcp,udp,raw,packet} and the like."""
    lines = text.split("\n")
    header = lines[0].replace("tx_queue rx_queue", "queues").replace("tr tm->when", "timer").split()
    try:
        # In `tcp` two pairs of columns are joined by a colon, which the two replacements above account for.
        at = [word.lower() for word in header].index("inode")
    except ValueError:
        return frozenset()
    found = set()
    for line in lines[1:]:
        words = line.split()
        if len(words) > at and _DIGITS.fullmatch(words[at]):
            found.add(int(words[at]))
    return frozenset(found)


def parse_os_release(text: str) -> str:
    """PRETTY_NAME of os-release; "" without one."""
    for line in text.split("\n"):
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip().strip("\"'")[:120]
    return ""


def parse_version(text: str) -> str:
    """The first thing in the first lines of a program's output that looks like a version; "" if nothing does."""
    found = _VERSION.search("\n".join(text.split("\n")[:5]))
    return found[1] if found else ""


def key_like(words: Iterable[str]) -> list[str]:
    """The places (`argument 3`) of words with a part that could be a key: 32 hex digits, or 20 mixed characters.

    The words themselves are not returned: what could be a key is not to be printed.
    """
    return [f"argument {n}" for n, word in enumerate(words) if _has_key(word)]


def _has_key(word: str) -> bool:
    if _KEY_HEX.search(word):
        return True
    return any(
        any(c.isdigit() for c in part) and any(c.islower() for c in part) and any(c.isupper() for c in part)
        for part in _KEY_WORD.findall(word)
    )


class Mapping(msgspec.Struct, frozen=True):
    """A writable mapping of a file. `device`: `major:minor`, decimal; `size` in bytes."""

    path: str
    device: str
    inode: int
    size: int
    shared: bool


_MAP: Final = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) [r-]w[x-]([ps]) [0-9a-f]+ ([0-9a-f]{1,8}):([0-9a-f]{1,8}) (\d{1,20})\s+(/.*)"
)


def parse_writable_maps(maps: str) -> tuple[Mapping, ...]:
    """The writable mappings with a file behind them in /proc/PID/maps."""
    found = []
    for line in maps.split("\n"):
        match = _MAP.fullmatch(line)
        if match is not None:
            start, end, kind, major, minor, inode, path = match.groups()
            device = f"{int(major, 16)}:{int(minor, 16)}"
            found.append(Mapping(path, device, int(inode), int(end, 16) - int(start, 16), kind == "s"))
    return tuple(found)


class Mount(msgspec.Struct, frozen=True):
    point: str
    device: str
    kind: str


def parse_mounts(mountinfo: str) -> tuple[Mount, ...]:
    """/proc/PID/mountinfo, in mount order."""
    found = []
    for line in mountinfo.split("\n"):
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(" "), right.partition(" ")[0]
        if separator and len(fields) >= 6 and kind:
            point = fields[4].replace("\\040", " ").replace("\\134", "\\")
            found.append(Mount(point, fields[2], kind))
    return tuple(found)
