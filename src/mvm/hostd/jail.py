"""What a VMM sees of the host: a root of its own that holds what it was given, and nothing else.

The jail is built by the child that will execute the VMM, after the fork and before it gives up its rights:

    enter(jail)   prepare, then pivot_root into the root and let the host's tree go
    prepare(jail) new namespaces; nothing is propagated; a tmpfs over `root`, which stays empty on the host; what
                  `binds` and `devices` name, attached in it

Everything mounted is in the child's own mount namespace: the host's table of mounts never has a line of it, the kernel
removes it with the last process inside, and a crash between any two steps leaves nothing. What is to be bound is opened
in the host's namespace first, and its attributes are set before it is attached, so that no path is looked up twice and
nothing read-only was ever writable.

`namespaces` always has `mount`. `pid` takes effect at the fork (`mvm.linux.namespaces`); with it and `proc` the jail
has a /proc in which the VMM is the only process, and which has nothing but processes. Without a pivot the child sees
the host as well, for a program that pivots by itself.

A descriptor that the VMM holds names its file still; what it names as a path, it can only open if it was bound.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.linux import mount, mount_tree, namespaces

_DESCRIPTOR: Final = "/proc/self/fd/"
_MS_PRIVATE, _MS_REC = 1 << 18, 1 << 14
_EINVAL: Final = 22

JailPath = Annotated[
    str, Meta(pattern=r"^/(?!\.\.?(/|\Z))([^/\0]+(/(?!\.\.?(/|\Z))[^/\0]+)*)\Z", max_length=1024)
]
"""Absolute below the jail's root, without empty, `.` and `..` parts."""


class Bind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file or directory in the jail. `source`: a path of the host, or /proc/self/fd/N, which binds exactly what N
    is open on: a file, a directory, or a mount that is attached nowhere (fsmount(2)), which then moves into the jail.

    Mounts below a source do not come along. No bind honours set-user-id bits, or device files but
    one that is bound itself.
    """

    source: str
    target: JailPath
    read_only: bool = True


class Copy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the jail's own memory: what `source` holds, for what cannot be bound (a memfd is on no mount).

    Of a block device it is a node of the same device, so that `uid` may open it and the host's own node stays as it is.
    `source`: a path of the host, or /proc/self/fd/N. The file is `uid`'s and `gid`'s, with permissions `mode`.
    """

    source: str
    target: JailPath
    uid: int
    gid: int
    mode: int = 0o400


class Room(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much a jail's own memory holds: bytes of files, and names (directories and mount points count)."""

    size: int = 16 << 20
    names: int = 1024


class Jail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`devices`: paths below /dev, bound writable at the same path. `root`: an empty directory of root's.
    `network`: a descriptor of the network namespace to go into, in the place of a new one; `net` is then named too.
    `required`: where the kernel refuses, whether that is an error; else the program runs without, and says so.
    """

    root: Path
    binds: tuple[Bind, ...] = ()
    copies: tuple[Copy, ...] = ()
    devices: tuple[JailPath, ...] = ()
    namespaces: frozenset[str] = frozenset({"mount", "net", "ipc", "uts", "pid"})
    network: int | None = None
    proc: bool = False
    pivot: bool = True
    room: Room = Room()
    required: bool = True

    def __post_init__(self) -> None:
        unknown = self.namespaces - namespaces.FLAGS.keys()
        if unknown or "mount" not in self.namespaces:
            raise ValueError(f"a jail has a mount namespace and others of {sorted(namespaces.FLAGS)}")
        if self.proc and "pid" not in self.namespaces:
            raise ValueError("a /proc in the jail would show the host's processes")
        if self.network is not None and "net" not in self.namespaces:
            raise ValueError("a jail that has a network of its own is not in the host's")


def unavailable(kinds: Collection[str] = ("mount", "net", "pid")) -> str:
    """Why the kernel does not give this process such namespaces; "" if it does. Found out by a child of a moment."""
    hears, says = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            namespaces.unshare(kinds)
            mount.mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
        except OSError as error:
            os.write(says, str(error).encode()[:1000])
        finally:
            os._exit(0)
    os.close(says)
    try:
        said = os.read(hears, 1000)
    finally:
        os.close(hears)
        os.waitpid(pid, 0)
    return said.decode("utf-8", "replace")


def fork(jail: Jail | None) -> int:
    """As os.fork(), the child in the jail's PID namespace if it has one. Raises OSError."""
    if jail is not None and "pid" in jail.namespaces:
        return namespaces.fork_into_pid_namespace()
    return os.fork()


def enter(jail: Jail) -> None:
    """Build the jail, and go in if it is one to pivot into. OSError names the step; the process is then fit only for
    `required=False`: it may have new namespaces, and still has the host's root."""
    prepare(jail)
    if not jail.pivot:
        return
    os.chdir(jail.root)
    # Both the same: the old root ends on top of the new one, from where it is taken away, and needs no directory.
    mount_tree.pivot_root(".", ".")
    mount.detach(".")
    os.chdir("/")


def prepare(jail: Jail) -> None:
    """Build the jail at `root`, in a mount namespace of its own. The descriptors that binds name stay open."""
    # The daemon's would close every directory to the VMM, which is not root in here.
    umask = os.umask(0o022)
    trees: list[tuple[Bind, int, int]] = []
    sources: list[tuple[Copy, int]] = []
    try:
        for bind in _all(jail):
            trees.append((bind, *_open(bind)))
        for copy in jail.copies:
            sources.append((copy, os.open(copy.source, os.O_RDONLY | os.O_CLOEXEC)))
        namespaces.unshare(jail.namespaces - ({"pid"} if jail.network is None else {"pid", "net"}))
        if jail.network is not None:
            namespaces.enter(jail.network, "net")
        mount.mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
        # A program that pivots by itself makes its device files and puts its code there.
        flags = mount.MS_NOSUID | (mount.MS_NODEV | mount.MS_NOEXEC if jail.pivot else 0)
        room = f"size={jail.room.size},nr_inodes={jail.room.names}"
        mount.mount("mvm-jail", jail.root, "tmpfs", flags, f"mode=0755,{room}")
        for bind, tree, attributes in trees:
            target = f"{jail.root}{bind.target}"
            _make_place(target, folder=stat.S_ISDIR(_kind(tree)))
            mount_tree.set_attributes(tree, attributes, bind.target)
            mount_tree.attach(tree, target)
        for copy, source in sources:
            _copy(copy, source, f"{jail.root}{copy.target}")
    finally:
        os.umask(umask)
        for _, source in sources:
            os.close(source)
        for _, tree, _ in trees:
            os.close(tree)
    if jail.proc:
        _make_place(f"{jail.root}/proc", folder=True)
        options = "hidepid=invisible,subset=pid"
        mount.mount(
            "proc", f"{jail.root}/proc", "proc", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC, options
        )
    if jail.pivot:
        finished = os.open(jail.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount_tree.set_attributes(finished, mount_tree.RDONLY, str(jail.root))
        finally:
            os.close(finished)


def _all(jail: Jail) -> list[Bind]:
    return [*jail.binds, *(Bind(device, device, read_only=False) for device in jail.devices)]


def _open(bind: Bind) -> tuple[int, int]:
    """(a tree that belongs to us, its attributes)."""
    attributes = mount_tree.NOSUID | (mount_tree.RDONLY if bind.read_only else 0)
    if bind.source.startswith(_DESCRIPTOR):
        number = int(bind.source.removeprefix(_DESCRIPTOR))
        try:
            tree = mount_tree.open_tree("", number)
        except OSError as error:
            if error.errno != _EINVAL:
                raise
            # No mount of this namespace: one that is attached nowhere is moved itself.
            tree = os.dup(number)
    else:
        tree = mount_tree.open_tree(bind.source)
    kind = _kind(tree)
    if not stat.S_ISCHR(kind) and not stat.S_ISBLK(kind):
        attributes |= mount_tree.NODEV
    return tree, attributes


def _kind(tree: int) -> int:
    """The mode of what a descriptor is open on."""
    try:
        return os.fstat(tree).st_mode
    except PermissionError:
        return stat.S_IFREG  # the pager's: a file, whose attributes the kernel tells nobody but the VMM's uid


def _make_place(target: str, *, folder: bool) -> None:
    """Something of the same kind to mount on."""
    if folder:
        os.makedirs(target, 0o755, exist_ok=True)
        return
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))


def _copy(copy: Copy, source: int, target: str) -> None:
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    seen = os.fstat(source)
    if stat.S_ISBLK(seen.st_mode):
        os.mknod(target, stat.S_IFBLK | copy.mode, seen.st_rdev)
        os.chown(target, copy.uid, copy.gid, follow_symlinks=False)
        return
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, copy.mode)
    try:
        at = 0
        while count := os.sendfile(fd, source, at, 1 << 20):
            at += count
        os.fchmod(fd, copy.mode)
        os.fchown(fd, copy.uid, copy.gid)  # last: the mode is the owner's to change
    finally:
        os.close(fd)
