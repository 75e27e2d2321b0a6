"""Starting programs in the guest: the agent's only door to fork and exec.

fork + exec in Python rather than posix_spawn: a session needs a new session id, a controlling terminal, a
directory and a user, which posix_spawn cannot give. Every descriptor of the agent is close-on-exec.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # built in; `signal` would load enum
import errno
import fcntl
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIGHUP = 1
SIGKILL = 9
SIGTERM = 15
SIGCONT = 18
SIGSTOP = 19
TIOCSCTTY = 0x540E
TIOCSWINSZ = 0x5414
PATH = "/run/current-system/sw/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class User:
    """Who a program runs as. `groups_of` is the name for the group database, None for root as it stands."""

    def __init__(self, name: str, uid: int, gid: int, home: str, shell: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.home = home
        self.shell = shell


def find_user(name: str) -> User | None:
    """Look `name` up in the password file; "" is root, which needs no file."""
    import pwd  # only for the rare request that names a user

    if not name:
        name = "root"
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return User("root", 0, 0, "/root", "/bin/sh") if name == "root" else None
    return User(name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell or "/bin/sh")


def base_env(user: User) -> dict[bytes, bytes]:
    return {
        b"PATH": PATH.encode(),
        b"HOME": os.fsencode(user.home),
        b"USER": os.fsencode(user.name),
        b"LOGNAME": os.fsencode(user.name),
        b"SHELL": os.fsencode(user.shell),
        b"LANG": b"C.UTF-8",
    }


def spawn(
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
    fds: tuple[int, int, int],
    *,
    cwd: bytes = b"/",
    user: User | None = None,
    tty: bool = False,
    detach: bool = False,
) -> int:
    """Start `argv` as leader of a new session and return its process id.

    Returns after the exec succeeded; raises the child's OSError if any step before it failed. With `tty`,
    fds[0] becomes the controlling terminal. With `detach` the process is a child of init and outlives the
    agent.
    """
    status_r, status_w = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(status_r)
        os.close(status_w)
        raise
    if pid == 0:
        _child(argv, env, fds, cwd, user, tty, detach, status_w)
    os.close(status_w)
    report = b""
    try:
        while chunk := os.read(status_r, 64):
            report += chunk
    finally:
        os.close(status_r)
    if detach:
        # The middle process has ended; its report begins with the process id of the one that stays.
        os.waitpid(pid, 0)
        first, _, report = report.partition(b"\n")
        pid = int(first)
    if report:
        if not detach:
            os.waitpid(pid, 0)
        code = int(report)
        raise OSError(code, os.strerror(code), os.fsdecode(argv[0]))
    return pid


def _child(
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
    fds: tuple[int, int, int],
    cwd: bytes,
    user: User | None,
    tty: bool,
    detach: bool,
    status_w: int,
) -> None:
    """The forked child up to exec; never returns. Reports an errno through `status_w`."""
    try:
        os.setsid()
        if detach:
            if os.fork():
                os._exit(0)
            # No session leader, so opening a terminal can never make it the controlling one.
            os.write(status_w, b"%d\n" % os.getpid())
        if tty:
            fcntl.ioctl(fds[0], TIOCSCTTY, 0)
        # Lift them above 2 first, so that no dup2 overwrites a source still needed.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]
        for target, fd in enumerate(high):
            os.dup2(fd, target)

        # An ignored signal stays ignored across exec: Python ignores SIGPIPE, and whoever started the agent may have
        # ignored more (a shell does so with SIGINT for its background jobs).
        for number in range(1, 32):
            if number not in (SIGKILL, SIGSTOP):
                _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.umask(0o022)
        protect(0)
        if user is not None and (user.uid or user.gid or user.name != "root"):
            os.initgroups(user.name, user.gid)
            os.setgid(user.gid)
            os.setuid(user.uid)
        os.chdir(cwd)
        _exec(list(argv), env)
    except OSError as error:
        os.write(status_w, b"%d" % (error.errno or errno.EIO))
    except BaseException:
        os.write(status_w, b"%d" % errno.EINVAL)
    os._exit(127)


def _exec(argv: list[bytes], env: Mapping[bytes, bytes]) -> None:
    """Replace this process; raises OSError. (os.execvpe imports modules, which costs more than the search.)"""
    name = argv[0]
    if b"/" in name:
        os.execve(name, argv, env)
    failure = errno.ENOENT
    for directory in env.get(b"PATH", b"/bin").split(b":"):
        try:
            os.execve((directory or b".") + b"/" + name, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            failure = error.errno or errno.EIO
    raise OSError(failure, "")


def protect(score: int) -> None:
    """Set this process's out-of-memory score; -1000 exempts it. Best effort: it needs root."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        try:
            os.write(fd, b"%d" % score)
        finally:
            os.close(fd)
    except OSError:
        pass


def run(argv: Sequence[str], timeout: float) -> tuple[int, bytes]:
    """Run a system program to its end; (exit code or 128 + signal, last 4 KiB of its output).

    Blocks the agent, so it is for mounting and formatting only. A program that outlives `timeout` seconds is
    killed.
    """
    out_r, out_w = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    try:
        pid = spawn([os.fsencode(a) for a in argv], base_env(_ROOT), (null, out_w, out_w))
    except OSError as error:
        os.close(out_r)
        return 127, str(error).encode()
    finally:
        os.close(null)
        os.close(out_w)
    return wait(pid, out_r, timeout)


def wait(pid: int, out_r: int, timeout: float) -> tuple[int, bytes]:
    """Collect a child started with its output on `out_r`, which is closed."""
    import select

    poller = select.poll()
    poller.register(out_r, select.POLLIN)
    until = time.monotonic() + timeout
    tail = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or not poller.poll(int(left * 1000) + 1):
            os.kill(pid, SIGKILL)
            break
        chunk = os.read(out_r, 4096)
        if not chunk:
            break
        tail = (tail + chunk)[-4096:]
    os.close(out_r)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), tail.strip()


_ROOT = User("root", 0, 0, "/", "/bin/sh")
