"""The only door to other programs.

Rules. A program is an argument list, never a shell string. It starts with a clean environment (`PATH`,
`LANG`, `HOME` and what the caller names), `/dev/null` or given bytes as stdin, no descriptor beyond those
passed (and locks, see `run`), in a session of its own (so that a time-out can end the whole group, and Ctrl-C
reaches only mvm, which then ends the group itself). Nothing secret belongs in `argv` or `env`: both are
world-readable in /proc. Every exit status is checked against `ok`.

`run` waits for the program and returns its output, bounded by `MAX_OUTPUT`. `start` hands back a process
that outlives the call, held by a pidfd, so that no signal can reach a stranger who got the same number.

Both are safe in a forked child as long as it has one thread: no lock, thread or handler is kept between
calls.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import CommandFailed, MissingPrerequisite
from mvm.linux.files import held

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path
    from typing import Any, Self

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_OUTPUT = 64 << 20
"""Bytes of stdout and of stderr that `run` keeps; a program that writes more is ended."""
MAX_LINE = 64 << 10
"""Bytes after which `on_line` gets a line although no newline came."""
_TAIL_LINES = 30
_TAIL_BYTES = 6000
_DRAIN_S = 0.5
_TERM_S = 2.0

_PACKAGES = {
    "bridge": "iproute2", "cpio": "cpio", "cryptsetup": "cryptsetup-bin", "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg", "e2fsck": "e2fsprogs", "fusermount3": "fuse3", "git": "git", "ip": "iproute2",
    "mke2fs": "e2fsprogs", "mmdebstrap": "mmdebstrap", "mount": "mount", "nft": "nftables", "nix": "nix-bin",
    "nix-store": "nix-bin", "ping": "iputils-ping", "qemu-img": "qemu-utils", "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils", "qemu-system-x86_64": "qemu-system-x86", "resize2fs": "e2fsprogs", "tar": "tar",
    "umount": "mount", "unshare": "util-linux", "xz": "xz-utils", "zstd": "zstd",
}  # fmt: skip


class Completed(NamedTuple):
    """A program that has ended. `code` is the exit status, or minus the signal's number."""

    argv: tuple[str, ...]
    code: int
    stdout: bytes
    stderr: bytes


class Child:
    """A running child of this process: `pid`, and `pidfd`, an owned descriptor that is readable once it has
    ended.

    `close` (or leaving the context) gives up the descriptor and leaves the process running.
    """

    __slots__ = ("argv", "code", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int, argv: tuple[str, ...]) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.argv = argv
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status (minus the signal's number if killed), reaping the process; None after `timeout`
        seconds."""
        if self.code is None and wait_readable(self.pidfd, timeout):
            try:
                result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            except ChildProcessError:
                # Somebody else reaped it (SIGCHLD ignored, or a fork of ours asks): ended, with a status
                # nobody kept.
                self.code = 0x100
            else:
                assert result is not None
                self.code = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        return self.code

    def send_signal(self, signum: int) -> None:
        """Signal it; nothing happens if it has ended."""
        if self.code is None:
            try:
                signal.pidfd_send_signal(self.pidfd, signum)
            except ProcessLookupError:
                pass

    def stop(self, grace: float = _TERM_S) -> int:
        """SIGTERM, then SIGKILL after `grace` seconds; returns the exit status."""
        self.send_signal(signal.SIGTERM)
        if self.wait(grace) is None:
            self.send_signal(signal.SIGKILL)
        code = self.wait()
        assert code is not None
        return code

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def wait_readable(fd: int, timeout: float | None) -> bool:
    """Whether `fd` (a pidfd, a socket) became readable within `timeout` seconds; None waits for ever."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0, int(timeout * 1000))))


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every program gets: nothing of ours but what is written here."""
    return {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/", **(extra or {})}


def command_line(argv: Sequence[str], cwd: Path | None = None) -> str:
    """The command as an operator would paste it."""
    import shlex

    line = shlex.join(argv)
    return f"cd {shlex.quote(str(cwd))} && {line}" if cwd is not None else line


def find_program(name: str) -> str | None:
    """Absolute path of `name` on the clean PATH, or None."""
    for folder in PATH.split(":"):
        candidate = f"{folder}/{name}"
        if os.access(candidate, os.X_OK):
            return candidate
    return None


def start(
    argv: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    groups: Sequence[int] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    new_session: bool = True,
    umask: int = 0o077,
) -> Child:
    """Start a long-lived program. `stdin`, `stdout`, `stderr` are descriptors (None: /dev/null), borrowed.

    With `uid` or `gid` the supplementary groups become exactly `groups`. `pass_fds` keep their numbers.
    """
    import subprocess

    drop = uid is not None or gid is not None
    popen = _popen(
        argv, cwd,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=subprocess.DEVNULL if stderr is None else stderr,
        pass_fds=tuple(pass_fds), env=clean_environment(env), start_new_session=new_session, umask=umask,
        user=uid, group=gid, extra_groups=list(groups) if drop else None,
    )  # fmt: skip
    try:
        # An unreaped child keeps its number, so this cannot open a stranger.
        pidfd = os.pidfd_open(popen.pid)
    except OSError:
        # Out of descriptors: without a handle nobody would ever end it.
        popen.kill()
        popen.wait()
        raise
    # From here the Child reaps. A Popen collected while "running" would enter subprocess's list of orphans
    # and be waited for behind our back by the next Popen.
    popen.returncode = 0
    return Child(popen.pid, pidfd, tuple(argv))


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    pass_fds: Sequence[int] = (),
    timeout: float,
    ok: Collection[int] = (0,),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Run a program to its end, `timeout` seconds at most.

    With `on_line`, stdout and stderr are one stream: each line goes to `on_line` as it comes (without its
    newline, undecodable bytes replaced) and all of it to `Completed.stdout`. A daemon that the program
    leaves behind holding the pipes does not hold up the return. The locks that this process holds are the
    program's too: if we are killed, nobody gets them before it has ended. Raises CommandFailed (status not in
    `ok`, time-out, too much output) and MissingPrerequisite (no such program).
    """
    import subprocess

    popen = _popen(
        argv, cwd,
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if on_line else subprocess.PIPE,
        pass_fds=(*pass_fds, *held()), env=clean_environment(env), start_new_session=True, bufsize=0,
    )  # fmt: skip
    try:
        with popen:
            try:
                out, err, problem = _converse(popen, stdin, time.monotonic() + timeout, on_line)
                if problem:
                    _end_group(popen)
            except BaseException:
                _end_group(popen)
                raise
    finally:
        assert popen.returncode is not None
    if problem == "timeout":
        raise _failure(argv, cwd, f"{argv[0]} did not finish within {timeout:g} s", err or out)
    if problem:
        raise _failure(argv, cwd, f"{argv[0]} wrote more than {MAX_OUTPUT} bytes", b"")
    if popen.returncode not in ok:
        how = (
            f"was killed by signal {-popen.returncode}"
            if popen.returncode < 0
            else f"exited with {popen.returncode}"
        )
        raise _failure(argv, cwd, f"{argv[0]} {how}", err if err.strip() else out)
    return Completed(tuple(argv), popen.returncode, out, err)


def _popen(argv: Sequence[str], cwd: Path | None, **options: Any) -> subprocess.Popen[bytes]:
    import subprocess

    try:
        popen: subprocess.Popen[bytes] = subprocess.Popen(list(argv), cwd=cwd, close_fds=True, **options)
        return popen
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        if cwd is not None and not os.path.isdir(cwd):
            raise _failure(argv, cwd, f"{argv[0]} has no directory to run in", str(error).encode()) from error
        program = os.path.basename(argv[0])
        package = _PACKAGES.get(program)
        raise MissingPrerequisite(
            f"the program {argv[0]} cannot be started",
            details=f"{command_line(argv, cwd)}\n{error}",
            resolution=f"install it: apt-get install {package}" if package else f"install {program}",
        ) from error


def _converse(
    popen: subprocess.Popen[bytes], stdin: bytes, deadline: float, on_line: Callable[[str], None] | None
) -> tuple[bytes, bytes, str]:
    """Feed and read the program until it has ended and its pipes are dry: (stdout, stderr, what went wrong
    or '')."""
    import select

    chunks: dict[int, bytearray] = {}
    poll = select.poll()
    for pipe in (popen.stdout, popen.stderr):
        if pipe is not None:
            chunks[pipe.fileno()] = bytearray()
            os.set_blocking(pipe.fileno(), False)
            poll.register(pipe.fileno(), select.POLLIN)
    out = chunks[popen.stdout.fileno()] if popen.stdout else bytearray()
    err = chunks[popen.stderr.fileno()] if popen.stderr else bytearray()
    todo = memoryview(stdin)
    stdin_fd = -1
    if popen.stdin is not None:
        stdin_fd = popen.stdin.fileno()
        os.set_blocking(stdin_fd, False)
        poll.register(stdin_fd, select.POLLOUT)
    lines = _Lines(on_line) if on_line else None
    open_pipes = len(chunks)
    pidfd = os.pidfd_open(popen.pid)
    poll.register(pidfd, select.POLLIN)
    ended = False
    try:
        while open_pipes or not ended:
            left = deadline - time.monotonic()
            if left <= 0:
                # After its end only descendants hold the pipes; the drain time being over is no failure.
                return bytes(out), bytes(err), "" if ended else "timeout"
            for fd, _ in poll.poll(min(left, 3600.0) * 1000):
                if fd == pidfd:
                    ended = True
                    poll.unregister(pidfd)
                    deadline = min(deadline, time.monotonic() + _DRAIN_S)
                elif fd == stdin_fd:
                    try:
                        todo = todo[os.write(stdin_fd, todo[: 1 << 16]) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        todo = todo[:0]
                    if not todo:
                        poll.unregister(stdin_fd)
                        assert popen.stdin is not None
                        popen.stdin.close()
                        stdin_fd = -1
                else:
                    try:
                        data = os.read(fd, 1 << 16)
                    except BlockingIOError:
                        continue
                    if not data:
                        poll.unregister(fd)
                        open_pipes -= 1
                        continue
                    chunks[fd] += data
                    if lines:
                        lines.feed(data)
                    if len(chunks[fd]) > MAX_OUTPUT:
                        return b"", b"", "output"
    finally:
        os.close(pidfd)
        if lines:
            lines.end()
    return bytes(out), bytes(err), ""


class _Lines:
    """Cuts a byte stream into lines of at most MAX_LINE bytes."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._sink(line.decode("utf-8", "replace").rstrip("\r"))
        if len(self._rest) > MAX_LINE:
            self.end()

    def end(self) -> None:
        if self._rest:
            self._sink(self._rest.decode("utf-8", "replace"))
            self._rest = b""


def _end_group(popen: subprocess.Popen[bytes]) -> None:
    """End the program and all that stayed in its session. It is unreaped, so its number is still its own."""
    import subprocess

    for pipe in (popen.stdin, popen.stdout, popen.stderr):
        if pipe is not None:
            pipe.close()
    if popen.returncode is None:
        _killpg(popen.pid, signal.SIGTERM)
        try:
            popen.wait(_TERM_S)
        except subprocess.TimeoutExpired:
            pass
    # Also when the leader is gone: a group lives while any member does, and its number is not given out
    # again.
    _killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def _killpg(pgid: int, signum: int) -> None:
    try:
        os.killpg(pgid, signum)
    except ProcessLookupError:
        pass


def _failure(argv: Sequence[str], cwd: Path | None, brief: str, output: bytes) -> CommandFailed:
    tail = output[-_TAIL_BYTES:].decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
    return CommandFailed(
        brief,
        details="\n".join([command_line(argv, cwd), *tail]),
        resolution="run the command by hand to see more",
    )
