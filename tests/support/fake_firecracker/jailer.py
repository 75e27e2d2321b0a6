"""`jailer`: makes a jail, goes into it, becomes the uid, executes: the order of the real one, with real system calls.

    <chroot-base-dir>/<name of the executable>/<id>/root/      the jail
        <name of the executable>                               a copy, owned by the uid
        <name of the executable>.pid                           made new: a jail that was used is refused
        dev/net/tun, dev/kvm, dev/urandom, dev/userfaultfd     made new, owned by the uid
        run/                                                   owned by the uid

Every descriptor but the first three is closed and the environment is empty before anything else. Nothing is undone
when something fails, and nothing when the VM ends.

One thing is not as in the real one: what is executed is a Python program, so the interpreter's directories (/usr, where
/lib and its like lead, and the interpreter's own if it is elsewhere) are bound into the jail, read-only, in the mount
namespace that the jailer makes and nobody else sees. Of that, empty directories and links stay behind in the jail.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import sys
import threading
import time

from .arguments import Arguments, BadArguments, Option, help_text
from .cgroups import Cgroups
from .faults import Faults

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_CLONE_NEWNS, _CLONE_NEWNET, _CLONE_NEWPID = 0x00020000, 0x40000000, 0x20000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE, _MNT_DETACH = 1, 32, 4096, 16384, 1 << 19, 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_NO_FILE = 2048
_LINKED = ("lib", "lib64", "lib32", "bin")
OPTIONS = {
    "id": Option("Jail ID.", required=True),
    "exec-file": Option("File path to exec into.", required=True),
    "uid": Option("The user identifier the jailer switches to after exec.", required=True),
    "gid": Option("The group identifier the jailer switches to after exec.", required=True),
    "chroot-base-dir": Option("The base folder where chroot jails are located.", default="/srv/jailer"),
    "netns": Option("Path to the network namespace this microVM should join."),
    "daemonize": Option("Daemonize the jailer before exec.", value=False),
    "new-pid-ns": Option("Exec into a new PID namespace.", value=False),
    "cgroup": Option("Cgroup and value to be set by the jailer: <cgroup_file>=<value>.", multiple=True),
    "resource-limit": Option("Resource limit values: fsize=<bytes>, no-file=<number>.", multiple=True),
    "cgroup-version": Option("Select the cgroup version used by the jailer.", default="1"),
    "parent-cgroup": Option("Parent cgroup in which the cgroup of this microvm will be placed."),
    "version": Option("Print the binary version number.", value=False),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (*(ctypes.c_char_p,) * 3, ctypes.c_ulong, ctypes.c_char_p)


class Refusal(Exception):
    """What the jailer says before it exits with 1."""


def main(argv: Sequence[str], config: dict[str, Any]) -> None:
    """Never returns."""
    os.closerange(3, 1 << 20)
    os.environ.clear()
    faults = Faults(config["faults"])
    if "jailer hangs" in faults:
        threading.Event().wait()
    try:
        _main(argv, config, faults)
    except (Refusal, BadArguments) as error:
        text = f"Failed to parse arguments: {error}" if isinstance(error, BadArguments) else str(error)
        os.write(2, f"{text}\nError: {type(error).__name__}\n".encode())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _main(argv: Sequence[str], config: dict[str, Any], faults: Faults) -> None:
    began = time.monotonic_ns()
    arguments = Arguments(OPTIONS, argv)
    shown = faults.version or f"Jailer v{config['version']}"
    if arguments.help:
        print(f"{shown}\n\n{help_text(OPTIONS)}\n\nAny arguments after the -- separator will be supplied to the "
              "jailed binary.\n")  # fmt: skip
        return
    if arguments.version:
        print(f"{shown}\n")
        return
    if "jailer refuses" in faults:
        raise Refusal("The fake was told to refuse.")
    jail = _Jail(arguments, config)
    jail.prepare()
    jail.enter()
    if "jailer cannot exec" in faults:
        raise Refusal("Failed to exec into Firecracker: Permission denied (os error 13)")
    jail.execute(began // 1000)


class _Jail:
    """Checked arguments. Raises Refusal."""

    def __init__(self, arguments: Arguments, config: dict[str, Any]) -> None:
        self._arguments = arguments
        self._prefixes: list[str] = config["prefixes"]
        self.id = arguments.one("id") or ""
        _check_id(self.id)
        self._source = _resolved(arguments.one("exec-file") or "")
        if not os.path.isfile(self._source):
            raise Refusal(f"{self._source} is not a file")
        self._name = os.path.basename(self._source)
        base = _resolved(arguments.one("chroot-base-dir") or "")
        if not os.path.isdir(base):
            raise Refusal(f"{base} is not a directory")
        self.root = os.path.join(base, self._name, self.id, "root")
        self._uid = _number(arguments.one("uid") or "", "Invalid uid: ")
        self._gid = _number(arguments.one("gid") or "", "Invalid gid: ")
        self._cgroups = Cgroups(
            arguments.one("cgroup-version") or "",
            arguments.one("parent-cgroup") or self._name,
            self.id,
            arguments.many("cgroup"),
            config["proc_mounts"],
            Refusal,
        )
        self._null = -1
        self._uffd_minor = _uffd_minor()
        self._limits = {resource.RLIMIT_NOFILE: _NO_FILE}
        names = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}
        for given in arguments.many("resource-limit"):
            name, mark, value = given.partition("=")
            if not mark:
                raise Refusal(f"Invalid format for resources limits: {given}")
            if not value.isdigit():
                raise Refusal(f"Invalid limit value for resource: {value}: invalid digit found in string")
            if name not in names:
                raise Refusal(f"Invalid resource argument: {name}")
            self._limits[names[name]] = int(value)

    def prepare(self) -> None:
        """All that is done from outside."""
        with _refusing("Failed to create directory"):
            os.makedirs(self.root, exist_ok=True)
        self._copy()
        netns = self._arguments.one("netns")
        if netns is not None:
            with _refusing(f"Failed to open file {netns}"):
                fd = os.open(netns, os.O_RDONLY)
            if _libc.setns(fd, _CLONE_NEWNET) != 0:
                raise Refusal(f"Failed to join network namespace: netns: {_last_error()}")
            os.close(fd)
        for which, value in self._limits.items():
            with _refusing("Failed to set limit for resource"):
                try:
                    resource.setrlimit(which, (value, value))
                except ValueError as error:
                    raise Refusal(f"Failed to set limit for resource: {error}") from None
        self._cgroups.setup()
        if self._arguments.flag("daemonize"):
            with _refusing("Failed to open /dev/null"):
                self._null = os.open("/dev/null", os.O_RDWR)  # the jail has none

    def _copy(self) -> None:
        target = os.path.join(self.root, self._name)
        with _refusing(f"Failed to open {self._source}"):
            source = os.open(self._source, os.O_RDONLY)
        mode = stat.S_IMODE(os.fstat(source).st_mode)
        with _refusing(f"Failed to open {target}"):
            made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, mode)
        if os.fstat(made).st_nlink > 1:
            raise Refusal(f"Detected hard link at: {target}")
        with _refusing(f"Failed to change owner for {target}"):
            os.fchown(made, self._uid, self._gid)
        with _refusing(f"Failed to copy {self._source} to {target}"):
            while data := os.read(source, 1 << 20):
                os.write(made, data)
        os.close(source)
        os.close(made)

    def enter(self) -> None:
        """Into the jail, in a mount namespace of its own; then what has to be there is made."""
        if _libc.unshare(_CLONE_NEWNS) != 0:
            raise Refusal(f"Failed to unshare into new mount namespace: {_last_error()}")
        _mount(None, "/", _MS_SLAVE | _MS_REC, "Failed to change the propagation type to slave")
        _mount(self.root, self.root, _MS_BIND | _MS_REC, "Failed to bind mount the jail root directory")
        _bind_interpreter(self.root, self._prefixes)
        os.chdir(self.root)
        with _refusing("Failed to create the jail root directory before pivoting root"):
            os.mkdir("old_root", 0o600)
        if _libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"old_root") != 0:
            raise Refusal(f"Failed to pivot root: {_last_error()}")
        os.chdir("/")
        if _libc.umount2(b"old_root", _MNT_DETACH) != 0:
            raise Refusal(f"Failed to unmount the old jail root: {_last_error()}")
        os.rmdir("old_root")
        for folder in ("/", "/dev", "/dev/net", "/run"):
            with _refusing(f"Failed to create directory {folder}"):
                os.makedirs(folder, exist_ok=True)
                os.chmod(folder, 0o700)
                os.chown(folder, self._uid, self._gid)
        self._device("/dev/net/tun", 10, 200)
        self._device("/dev/kvm", 10, 232)
        try:
            self._device("/dev/urandom", 1, 9)
        except Refusal as error:
            print(f"Warning! Could not create /dev/urandom device inside jailer: {error}.")
        if self._uffd_minor is not None:
            self._device("/dev/userfaultfd", 10, self._uffd_minor)

    def _device(self, path: str, major: int, minor: int) -> None:
        with _refusing(f"Failed to create {path} via mknod inside the jail"):
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        with _refusing(f"Failed to change owner for {path}"):
            os.chown(path, self._uid, self._gid)

    def execute(self, began_us: int) -> None:
        if self._arguments.flag("daemonize"):
            _daemonize(self._null)
        path = "/" + self._name
        if self._arguments.flag("new-pid-ns"):
            leader = os.getsid(0) == os.getpid()
            if _libc.unshare(_CLONE_NEWPID) != 0:
                raise Refusal(f"Failed cloning into a new child process: {_last_error()}")
            pid = os.fork()
            if pid:
                self._save_pid(path, pid)
                os._exit(0)
            if leader:
                os.setsid()
        else:
            self._save_pid(path, os.getpid())
        spent = time.process_time_ns() // 1000
        argv = [path, "--id", self.id, "--start-time-us", str(began_us), "--start-time-cpu-us", str(spent),
                "--parent-cpu-time-us", str(spent), *self._arguments.extra]  # fmt: skip
        with _refusing("Failed to exec into Firecracker"):
            os.setgroups([])
            os.setresgid(self._gid, self._gid, self._gid)
            os.setresuid(self._uid, self._uid, self._uid)
            os.execve(path, argv, {})

    @staticmethod
    def _save_pid(path: str, pid: int) -> None:
        with _refusing(f"Failed to open file {path}.pid"):
            fd = os.open(f"{path}.pid", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(fd, str(pid).encode())
        os.close(fd)


class _refusing:
    """OSError as a refusal."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            number = error.errno or 0
            raise Refusal(f"{self._what}: {os.strerror(number)} (os error {number})") from None


def _last_error() -> str:
    number = ctypes.get_errno()
    return f"{os.strerror(number)} (os error {number})"


def _mount(source: str | None, target: str, flags: int, what: str) -> None:
    if _libc.mount(source.encode() if source else None, target.encode(), None, flags, None) != 0:
        raise Refusal(f"{what}: {_last_error()}")


def _bind_interpreter(root: str, prefixes: list[str]) -> None:
    for path in ("/usr", *prefixes):
        target = root + path
        os.makedirs(target, exist_ok=True)
        _bind(path, target)
    for name in _LINKED:
        path, target = f"/{name}", f"{root}/{name}"
        if os.path.lexists(target):
            continue
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.mkdir(target)
            _bind(path, target)


def _bind(path: str, target: str) -> None:
    _mount(path, target, _MS_BIND, "Failed to bind the interpreter")
    _mount(None, target, _MS_BIND | _MS_REMOUNT | _MS_RDONLY, "Failed to bind the interpreter read-only")


def _daemonize(null: int) -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (0, 1, 2):
        os.dup2(null, number)


def _uffd_minor() -> int | None:
    try:
        with open("/proc/misc") as file:
            numbers = {words[1]: int(words[0]) for words in map(str.split, file) if len(words) == 2}
    except OSError:
        return None
    return numbers.get("userfaultfd")


def _resolved(path: str) -> str:
    with _refusing(f"Failed to canonicalize path {path}"):
        return os.path.realpath(path, strict=True)


def _number(text: str, what: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 32:
        raise Refusal(what + text)
    return int(text)


def _check_id(name: str) -> None:
    if not 1 <= len(name) <= 64:
        raise Refusal(f"Invalid instance ID: Invalid len ({len(name)});  the length must be between 1 and 64")
    for position, c in enumerate(name):
        if c != "-" and not c.isalnum():
            raise Refusal(f"Invalid instance ID: Invalid char ({c}) at position {position}")
