"""The keeper: one small process per awake VM, parent of its VMM.

It exists so that a VM depends on no command and no daemon of ours, and leaves nothing behind:

- it starts the VMM in a jail and a control group, as the instance's uid, without privileges to gain, and hands it
  descriptors under fixed numbers;
- it drains the guest's console and the VMM's own words into logs of bounded size (a guest can make both go on for ever;
  the disk is not its to fill);
- once the VMM runs it has no capability and can gain none, before that none in the threads that serve pages (where
  there are no PID namespaces it keeps CAP_KILL, by which its death reaches the VMM);
- it serves the pages of a woken VM (`serve`), so the key of one snapshot is in one process and dies with it;
- when the VMM ends it writes `vmm.exit` (the wait status in decimal) into the runtime directory, and ends itself;
- both hold a lock on `runtime/alive` from before the fork, so the kernel can say whether anything of a VM is left
  (`anything_left`), whatever became of the command that started it; each by an open file of its own, because a VMM that
  was taken over can let go of what it has;
- when the keeper dies, the VMM gets SIGKILL, and a page it waits for fails instead of hanging: the keeper is the first
  process of a PID namespace that the VMM's is in, and where there is none, PR_SET_PDEATHSIG says so.

It is forked, not executed: at a wake, starting another interpreter would take longer than reading the guest's memory.
So the caller must have a single thread at that moment. The child closes every descriptor but those it is given.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from mvm.core.errors import Busy, Conflict, VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd import jail as jails
from mvm.hostd.bounded_log import BoundedLog, drain, tail
from mvm.linux import capabilities, hugepages, namespaces, seccomp
from mvm.linux.files import write_atomic
from mvm.linux.pidfd import identify
from mvm.linux.process import clean_environment, wait_readable

EXIT_FILE = "vmm.exit"
ALIVE_FILE = "alive"
PID_FILE = "keeper.pid"
UNJAILED_FILE = "unjailed"
"""Says why the VMM that runs has no jail. It is there only then."""
ALIVE_FD = 7
"""The lock's descriptor in the VMM, which holds it without knowing."""
_LOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid. Of an open file (F_OFD_SETLK), not of a process: fcntl(2)."""
_TAKING, _HELD = 0, 1
"""Bytes of `alive`: locked by whoever is about to start a VM; locked, shared, by each process of a VM."""
_START_TIMEOUT_S = 20.0
_NAME = b"mvm-keeper"
_SETTLED, _UNJAILED, _FAILED = b"s", b"u", b"f"
"""What the child may say before it executes the program, each with a line of text."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 4, 15, 38

# A terminal's signals are meant for the command that started the VM, not for the VM.
_NOT_FOR_US = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGPIPE)

_libc = ctypes.CDLL(None, use_errno=True)


Serve = Callable[[threading.Event], None]
"""Answers for a file, in a thread of its own without capabilities: given an event that is set once the kernel knows the
file's size. Before that nothing may be stored in the file: FUSE_NOTIFY_STORE extends a file it takes for empty, and the
answer that would correct it is then dropped as older."""


class Program(msgspec.Struct, frozen=True):
    """The VMM to start. `fds`: descriptor numbers in the VMM -> our descriptors.

    `argv[0]`: a path in the jail, if there is one that is pivoted into. `served`: the number under which it gets the
    file that `serve` answers for, if there is one. `jail`: descriptors in its binds are ours, not the VMM's. `cgroup`:
    the directory of a control group (v2), which the VMM joins before anything else.

    A program that changes its uid by itself is `owner`'s (uid, gid) in the end, and starts as `uid`. By that it loses
    the death signal that ties it to its keeper, so it has to be `tied` whether it has a jail or not: both in a PID
    namespace of which the keeper is the first process, and with which all in it end. `lock_fd`: where the VMM holds the
    lock; 0 for a program that closes everything from 3 on. `file_max`: how large it can make a file, in bytes.
    """

    argv: Sequence[str]
    fds: Mapping[int, int]
    uid: int
    gid: int
    groups: Sequence[int]
    served: int | None = None
    jail: jails.Jail | None = None
    cgroup: Path | None = None
    owner: tuple[int, int] | None = None
    tied: bool = False
    lock_fd: int = ALIVE_FD
    file_max: int | None = None


def launch(
    program: Program,
    *,
    runtime: Path,
    console: socket.socket,
    errors: Path,
    serve: Serve | None = None,
    keep: Sequence[int] = (),
    logs: Mapping[int, Path] | None = None,
) -> tuple[ProcessIdentity, ProcessIdentity]:
    """Fork a keeper, which starts `program`. Returns (VMM, keeper).

    `console`: our end of the guest's console. `errors`: file that gets the VMM's own stderr. `keep`: descriptors that
    `serve` needs. `logs`: descriptors that the VMM writes to the other ends of -> files of bounded size for
    what comes out of them. Returns once the program is executed; VmmError if it could not be, or its jail not be built.
    A program that has ended since is for the caller to find out, as one that ends a moment later.
    """
    alive = _take_alive(runtime)  # the keeper's, the VMM's
    ready, tell = os.pipe2(os.O_CLOEXEC)
    first = os.fork()
    if first == 0:
        # Twice forked: the keeper's parent is init, which reaps it; the caller has no child to look after.
        try:
            os.close(ready)
            os.setsid()
            tied = _tie(program)
            if os.fork() == 0:
                _keeper(
                    program,
                    tied,
                    runtime,
                    {console.fileno(): None, **(logs or {})},
                    errors,
                    serve,
                    keep,
                    tell,
                    alive,
                )
        except OSError as error:
            os.write(tell, f"failed {error}".encode())
        finally:
            os._exit(0)
    os.close(tell)
    for fd in alive:
        os.close(fd)
    os.waitpid(first, 0)
    try:
        if not wait_readable(ready, _START_TIMEOUT_S):
            raise VmmError("the VM's keeper did not start", details=f"Waited {_START_TIMEOUT_S:g} s.")
        told = os.read(ready, 4096).decode("utf-8", "replace")
    finally:
        os.close(ready)
    kind, _, rest = told.partition(" ")
    if kind != "ok":
        raise VmmError(
            "the VMM could not be started",
            details=rest or "its keeper died",
            resolution=f"See {errors}.",
        )
    return msgspec.json.decode(rest, type=tuple[ProcessIdentity, ProcessIdentity])


def _take_alive(runtime: Path) -> tuple[int, int]:
    """Two open files, each with a lock of its own: the keeper's, the VMM's."""
    path = runtime / ALIVE_FILE
    taking = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    taken: list[int] = []
    try:
        fcntl.fcntl(taking, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, _TAKING))
        if _is_held(taking):
            raise BlockingIOError
        for stale in (PID_FILE, UNJAILED_FILE):
            (runtime / stale).unlink(missing_ok=True)
        for _ in range(2):
            # Read-only, because one is the VMM's, and what root reads must not be the VMM's to write.
            taken.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
            fcntl.fcntl(taken[-1], fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, _HELD))
    except BaseException as error:
        for fd in taken:
            os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise
        raise Conflict(
            "a VM of this instance is there already",
            details=f"{path} is locked.",
            resolution="Any command on the instance recovers it; run the command again.",
        ) from None
    finally:
        os.close(taking)
    return taken[0], taken[1]


def _lock(kind: int, byte: int) -> bytes:
    return _LOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _is_held(fd: int) -> bool:
    # Asked without taking it: two who ask at once must not see each other.
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, _HELD))
    return int(_LOCK.unpack(found)[0]) != fcntl.F_UNLCK


def anything_left(runtime: Path) -> int | None:
    """Whether a keeper or a VMM of this runtime directory exists: the keeper's pid (0: not told yet), or None."""
    try:
        fd = os.open(runtime / ALIVE_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not _is_held(fd):
            return None
        try:
            return int((runtime / PID_FILE).read_bytes()[:16] or b"0")
        except FileNotFoundError:
            return 0
    finally:
        os.close(fd)


def last_words(runtime: Path, errors: Path) -> str:
    """What the VMM that has just ended said, once its keeper has written it down."""
    await_end(runtime, wait_s=2.0)
    return tail(errors)


def await_end(runtime: Path, *, wait_s: float = 5.0) -> bool:
    """Wait for a keeper whose VMM has ended to write down how, which it does before it lets go of its lock."""
    deadline = time.monotonic() + wait_s
    while anything_left(runtime) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def end_leftovers(runtime: Path, *, grace_s: float = 0.0, wait_s: float = 10.0) -> bool:
    """SIGKILL whatever `anything_left` finds, and wait until it is gone; False if there was nothing.

    `grace_s`: how long a keeper whose VMM has just been ended may take to reap it and end by itself.

    The pid cannot have been reused: while the lock is held by that keeper it is alive, and when it is not, the VMM
    that still holds the lock has its death signal already. A VMM that let go of its lock has that signal as well.
    """
    found = anything_left(runtime)
    if found is None:
        return False
    began = time.monotonic()
    deadline = began + wait_s
    while (found := anything_left(runtime)) is not None:
        if found > 0 and time.monotonic() - began >= grace_s and _is_keeper(found):
            try:
                os.kill(found, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise Busy(
                "a VM of this instance does not end",
                details=f"{runtime / ALIVE_FILE} is still locked after {wait_s:g} s.",
                resolution=f"Look at who holds it: fuser -v {runtime / ALIVE_FILE}",
            )
        time.sleep(0.002)
    return True


def _is_keeper(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().strip() == _NAME
    except OSError:
        return False


def _tie(program: Program) -> bool:
    """Have the next child be the first process of a PID namespace: the kernel ends all of it with the first."""
    if not program.tied and (program.jail is None or "pid" not in program.jail.namespaces):
        return False
    try:
        namespaces.unshare(("pid",))
    except OSError:
        if program.tied or program.jail is None or program.jail.required:
            raise
        return False  # the jail will come to the same answer, and say so
    return True


def _keeper(
    program: Program,
    tied: bool,
    runtime: Path,
    sources: Mapping[int, Path | None],
    errors: Path,
    serve: Serve | None,
    keep: Sequence[int],
    tell: int,
    alive: tuple[int, int],
) -> None:
    """The keeper's whole life. Never returns to the caller's code. `sources`: None for the guest's console."""
    try:
        for ignored in _NOT_FOR_US:
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        me = os.pidfd_open(os.getpid())
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        _libc.prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        (runtime / PID_FILE).write_bytes(str(_outside(me)).encode())
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open("/dev/null", os.O_RDWR)
        words, stderr = os.pipe2(os.O_CLOEXEC)
        logs = {
            fd: BoundedLog(path or runtime / "logs" / "console.log", fresh=path is not None)
            for fd, path in {**sources, words: errors}.items()
        }
        os.chdir("/")  # neither of us may pin the directory that the command was started in
        hears, says = os.pipe2(os.O_CLOEXEC)
        pid = _fork(program, runtime)
        if pid == 0:
            _become(program, null, stderr, alive[1], me, says)
        pidfd = os.pidfd_open(pid)
        # Here, because a pid is sure to be theirs as long as its process was not reaped.
        identities = msgspec.json.encode([identify(_outside(pidfd)), identify(_outside(me))])
        for number in (0, 1, 2):
            os.dup2(null, number)
        kept = {0, 1, 2, tell, alive[0], pidfd, hears, *logs, *(log.fileno() for log in logs.values())}
        _close_all_but({*kept, *keep})
        known = threading.Event()
        # A death signal is sent with the rights of the one that dies; a PID namespace needs none.
        rights = () if tied else ("KILL",)
        if serve is not None:
            for _ in range(2):  # one thread may wait for a chunk while the other answers
                threading.Thread(target=_serve_or_die, args=(serve, known, rights), daemon=True).start()
        problem = _hear(hears, runtime, known)
        _give_up(rights)
        os.write(tell, problem or b"ok " + identities)
        os.close(tell)
        drain(logs, pidfd)
        _, status = os.waitpid(pid, 0)
        # A VMM that is killed says nothing of it.
        logs[words].write(describe_end(status).encode())
        write_atomic(runtime / EXIT_FILE, str(status).encode())
    except BaseException as error:
        try:
            os.write(tell, f"failed {error}".encode()[:4000])
        except OSError:  # it was told before; the VMM ends with us, and somebody will want to know why
            _note(errors, f"its keeper failed: {error!r}\n")
    finally:
        os._exit(0)


def describe_end(status: int) -> str:
    """A line on a wait status that is not an orderly exit, "" for one that is."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"the VMM was ended by signal {-code} ({signal.strsignal(-code) or 'unknown'})\n"
    return f"the VMM ended with exit code {code}\n" if code else ""


def _note(log: Path, text: str) -> None:
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        pass  # a full disk, most likely


def _outside(pidfd: int) -> int:
    """The number of the process of `pidfd` for everybody else: that in the PID namespace of the host's /proc."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _fork(program: Program, runtime: Path) -> int:
    try:
        return jails.fork(program.jail)
    except OSError as error:
        if program.jail is None or program.jail.required:
            raise
        _note_unjailed(runtime, f"{error}")
        return os.fork()


def _hear(hears: int, runtime: Path, known: threading.Event) -> bytes:
    """What the child says, to its end, which is the program's beginning: b"", or why there is no program."""
    problem, rest = b"", b""
    while data := os.read(hears, 4096):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            kind, text = line[:1], line[1:]
            if kind == _SETTLED:
                known.set()
            elif kind == _UNJAILED:
                _note_unjailed(runtime, text.decode("utf-8", "replace"))
            else:
                problem = b"failed " + text
    os.close(hears)
    return problem


def _note_unjailed(runtime: Path, why: str) -> None:
    with (runtime / UNJAILED_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{why}\n")


def unjailed(runtime: Path) -> str:
    """Why the VMM that runs has no jail, in one line; "" if it has one or was to have none."""
    try:
        text = (runtime / UNJAILED_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "; ".join(filter(None, text.split("\n")))


def _give_up(rights: Sequence[str]) -> None:
    capabilities.give_up(rights)
    seccomp.forbid()


def _serve_or_die(serve: Serve, known: threading.Event, rights: Sequence[str]) -> None:
    """A keeper that cannot serve any more ends, and its VMM with it: a guest must not wait for pages for ever."""
    try:
        _give_up(rights)
        serve(known)
    except BaseException:
        os._exit(1)


def _become(program: Program, null: int, stderr: int, alive: int, keeper: int, says: int) -> None:
    """In the child: go into the jail, take the descriptors' places, give up everything, execute."""
    try:
        _die_with(keeper)
        if program.cgroup is not None:
            _join(program.cgroup)
        if program.jail is not None:
            _enter(program.jail, says)
        # Above every wanted number first, so that no move overwrites a source.
        high = {number: _dup_above(fd, 200) for number, fd in {**program.fds, program.lock_fd: alive}.items()}
        says, keeper = _dup_above(says, 200), _dup_above(keeper, 200)
        os.dup2(null, 0)
        os.dup2(null, 1)
        stderr = os.dup2(stderr, 2)
        for number, fd in high.items():
            os.dup2(fd, number, inheritable=True)
        _close_all_but({0, 1, 2, says, keeper, *high})
        os.setgroups(list(program.groups))
        os.setresgid(program.gid, program.gid, program.gid)
        os.setresuid(program.uid, program.uid, program.uid)
        _die_with(keeper)  # the change of uid has cleared it
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if program.served is not None:
            _ask_size(program.served, program.owner)
            os.write(says, _SETTLED + b"\n")
            if program.owner is None:
                hugepages.refuse_advice()
        if program.jail is None or program.jail.pivot:
            seccomp.forbid()  # unless it is a program that pivots by itself
        if program.file_max is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (program.file_max, program.file_max))
        os.umask(0o077)
        for ignored in _NOT_FOR_US:
            signal.signal(ignored, signal.SIG_DFL)
        os.execve(program.argv[0], list(program.argv), clean_environment())
    except BaseException as error:
        words = f"{program.argv[0]}: {error}".replace("\n", " ")
        os.write(says, _FAILED + words.encode()[:4000] + b"\n")
        os.write(stderr, f"{words}\n".encode())
    finally:
        os._exit(127)


def _ask_size(served: int, owner: tuple[int, int] | None) -> None:
    """As the one uid that may: the kernel asks the keeper, and keeps the answer."""
    if owner is None:
        os.fstat(served)
        return
    uid, gid = owner
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.fstat(served)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError(13, "the guest's memory cannot be opened by its uid")


def _die_with(keeper: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the kernel was told. Its pid would not say: in a PID namespace, a parent has none.
    poll = select.poll()
    poll.register(keeper, select.POLLIN)
    if poll.poll(0):
        os._exit(127)


def _join(cgroup: Path) -> None:
    fd = os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def _enter(jail: jails.Jail, says: int) -> None:
    try:
        jails.enter(jail)
    except OSError as error:
        if jail.required:
            raise OSError(error.errno, f"no jail: {error.strerror}", error.filename) from error
        os.chdir("/")
        os.write(says, _UNJAILED + f"{error}".replace("\n", " ").encode()[:1000] + b"\n")


def _dup_above(fd: int, lowest: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)


def _close_all_but(wanted: set[int]) -> None:
    lowest = 0
    for fd in sorted(wanted):
        if lowest < fd:  # an empty range would mean "all" to close_range(2)
            os.closerange(lowest, fd)
        lowest = fd + 1
    os.closerange(lowest, 1 << 16)
