"""A seccomp filter: an allow-list of system calls as classic BPF, installed with prctl(2).

What the filter does, in order:

    another architecture's calls (x32 included)        the process is killed: numbers would mean something else
    a number above all that this table's kernels know  ENOSYS, so that C libraries fall back to what they used before
    clone3                                             ENOSYS: its flags are in memory, where no filter can look
    clone, unshare with CLONE_NEWUSER                  EPERM: a new user namespace is a new set of capabilities
    setns into anything but a PID or network namespace EPERM: the one only undoes an unshare (mvm.linux.namespaces), the
                                                       other is made for a VMM before there is a child to be it
    socket of an address family not in FAMILIES        EAFNOSUPPORT
    ioctl TIOCSTI                                      EPERM: typing into somebody's terminal
    a call on the list                                 allowed
    any other                                          EPERM

Filters are inherited and never lifted, so the list is what this process *and every program it starts* need, the child
that builds a VMM's jail included. `forbid` takes that group away again from the VMM itself; a VMM's own filter comes on
top. Nothing is passed to the kernel by us but numbers, so there is no dependency.
The numbers are the x86-64 ABI's; on other machines `program` raises MissingPrerequisite, and the service manager's
filter is the only one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final, NamedTuple

from mvm.core.errors import MissingPrerequisite

FAMILIES: Final = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_VSOCK": 40}
_AUDIT_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_CLONE_NEW: Final = 0x7E020000  # any namespace: mount, cgroup, uts, ipc, user, pid, net
_TIOCSTI: Final = 0x5412
_CLONE3: Final = 435
_NEWEST: Final = 466  # of the newest kernel this table was checked against
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_MAX_INSTRUCTIONS: Final = 4096

# struct sock_filter { u16 code; u8 jt, jf; u32 k } and struct seccomp_data { int nr; u32 arch; u64 ip; u64 args[6] }
_FILTER: Final = struct.Struct("HBBI")
_NR, _ARCH = 0, 4
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

_X86_64: Final[dict[str, dict[str, int]]] = {
    "files and directories": {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8,
        "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "dup": 32,
        "dup2": 33, "sendfile": 40, "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "truncate":
        76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82,
        "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90,
        "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "umask": 95, "statfs": 137, "fstatfs":
        138, "sync": 162, "readahead": 187, "mknod": 133, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
        "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194, "llistxattr": 195,
        "flistxattr": 196, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "getdents64":
        217, "fadvise64": 221, "utimes": 235, "inotify_add_watch": 254, "inotify_rm_watch": 255,
        "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "newfstatat": 262, "unlinkat": 263, "renameat":
        264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269,
        "sync_file_range": 277, "utimensat": 280, "fallocate": 285, "dup3": 292, "inotify_init1": 294,
        "preadv": 295, "pwritev": 296, "syncfs": 306, "renameat2": 316, "copy_file_range": 326,
        "preadv2": 327, "pwritev2": 328, "statx": 332, "close_range": 436, "openat2": 437, "faccessat2":
        439, "fchmodat2": 452,
    },
    "memory": {
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27,
        "madvise": 28, "mlock": 149, "munlock": 150, "mlockall": 151, "munlockall": 152, "mbind": 237,
        "set_mempolicy": 238, "get_mempolicy": 239, "memfd_create": 319, "mlock2": 325,
    },
    "processes and their ids": {
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "getpid": 39,
        "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "kill": 62,
        "uname": 63, "getrlimit": 97, "getrusage": 98, "times": 100, "getuid": 102, "getgid": 104,
        "setuid": 105, "setgid": 106, "geteuid": 107, "getegid": 108, "setpgid": 109, "getppid": 110,
        "getpgrp": 111, "setsid": 112, "setreuid": 113, "setregid": 114, "getgroups": 115, "setgroups":
        116, "setresuid": 117, "getresuid": 118, "setresgid": 119, "getresgid": 120, "getpgid": 121,
        "setfsuid": 122, "getsid": 124, "capget": 125, "capset": 126, "rt_sigpending": 127, "rt_sigtimedwait": 128,
        "rt_sigsuspend": 130, "sigaltstack": 131, "getpriority": 140, "setpriority": 141,
        "sched_setparam": 142, "sched_getparam": 143, "sched_setscheduler": 144, "sched_getscheduler":
        145, "sched_get_priority_max": 146, "sched_get_priority_min": 147, "prctl": 157, "arch_prctl":
        158, "setrlimit": 160, "gettid": 186, "tkill": 200, "sched_setaffinity": 203,
        "sched_getaffinity": 204, "set_tid_address": 218, "exit_group": 231, "tgkill": 234, "waitid":
        247, "ioprio_set": 251, "ioprio_get": 252, "set_robust_list": 273, "get_robust_list": 274,
        "prlimit64": 302, "getcpu": 309, "sched_setattr": 314, "sched_getattr": 315, "seccomp": 317,
        "rseq": 334, "pidfd_send_signal": 424, "pidfd_open": 434,
    },
    "waiting and time": {
        "poll": 7, "select": 23, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37,
        "setitimer": 38, "gettimeofday": 96, "sysinfo": 99, "time": 201, "futex": 202, "epoll_create":
        213, "restart_syscall": 219, "timer_create": 222, "timer_settime": 223, "timer_gettime": 224,
        "timer_getoverrun": 225, "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "epoll_wait": 232, "epoll_ctl": 233, "pselect6": 270, "ppoll": 271,
        "epoll_pwait": 281, "timerfd_create": 283, "eventfd": 284, "timerfd_settime": 286,
        "timerfd_gettime": 287, "signalfd4": 289, "eventfd2": 290, "epoll_create1": 291, "getrandom":
        318, "membarrier": 324, "epoll_pwait2": 441, "futex_waitv": 449,
    },
    "sockets and pipes": {
        "pipe": 22, "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg":
        46, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51, "getpeername":
        52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "accept4": 288, "pipe2": 293,
        "recvmmsg": 299, "sendmmsg": 307,
    },
    "semaphores of libdevmapper": {
        "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220,
    },
    "mounts": {
        "mount": 165, "umount2": 166,
    },
    "the jail of a VMM": {
        "pivot_root": 155, "unshare": 272, "setns": 308, "open_tree": 428, "move_mount": 429,
        "mount_setattr": 442,
    },
}  # fmt: skip


_OTHER_MOUNTS: Final = {"chroot": 161, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433}
_SHARED_OBJECTS: Final = {
    "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "shmdt": 67, "msgget": 68,
    "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "semtimedop": 220, "mq_open": 240, "mq_unlink": 241,
    "mq_timedsend": 242, "mq_timedreceive": 243, "mq_notify": 244, "mq_getsetattr": 245,
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


class Instruction(NamedTuple):
    """`yes`, `no`: how many instructions to skip."""

    code: int
    yes: int
    no: int
    k: int


def allowed() -> dict[str, int]:
    """Name -> number of every call on the list."""
    return {name: number for group in _X86_64.values() for name, number in group.items()}


def program() -> list[Instruction]:
    """The filter for this machine. MissingPrerequisite where the table does not know its numbers."""
    if platform.machine() != "x86_64":
        raise MissingPrerequisite(f"there is no table of system calls for {platform.machine()}")
    table = allowed()
    refuse = _ERRNO | errno.EPERM
    made = [
        Instruction(_LOAD, 0, 0, _ARCH),
        Instruction(_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        Instruction(_RETURN, 0, 0, _KILL),
        Instruction(_LOAD, 0, 0, _NR),
        Instruction(_JGE, 0, 1, _X32_BIT),
        Instruction(_RETURN, 0, 0, _KILL),
        Instruction(_JEQ, 1, 0, _CLONE3),
        Instruction(_JGE, 0, 1, _NEWEST + 1),
        Instruction(_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    made += _if_call(
        table["clone"], [_argument(0), Instruction(_JSET, 0, 1, _CLONE_NEWUSER), _return(refuse)]
    )
    made += _if_call(
        table["unshare"], [_argument(0), Instruction(_JSET, 0, 1, _CLONE_NEWUSER), _return(refuse)]
    )
    kinds = [Instruction(_JEQ, 2, 0, _CLONE_NEWPID), Instruction(_JEQ, 1, 0, _CLONE_NEWNET)]
    made += _if_call(table["setns"], [_argument(1), *kinds, _return(refuse)])
    made += _if_call(table["ioctl"], [_argument(1), Instruction(_JEQ, 0, 1, _TIOCSTI), _return(refuse)])
    families = [Instruction(_JEQ, len(FAMILIES) - at, 0, value) for at, value in enumerate(FAMILIES.values())]
    made += _if_call(table["socket"], [_argument(0), *families, _return(_ERRNO | errno.EAFNOSUPPORT)])
    for first, last in _ranges(sorted(table.values())):
        made += [
            Instruction(_JGE, 0, 2, first),
            Instruction(_JGE, 1, 0, last + 1),
            _return(_ALLOW),
        ]
    return [*made, _return(refuse)]


def assemble(instructions: list[Instruction]) -> bytes:
    if len(instructions) > _MAX_INSTRUCTIONS:
        raise ValueError("the filter is longer than the kernel takes")
    return b"".join(_FILTER.pack(*instruction) for instruction in instructions)


def forbidding() -> list[Instruction]:
    """A filter that takes away what changes a process's view of the host, and System V's and POSIX's objects, which
    everybody in an IPC namespace can name; everything else that this table's kernels know it leaves as it is.

    No namespace comes of a clone either, so clone3 is not there (C libraries use clone instead). A newer call could be
    another way to mount, so those do not exist.
    """
    refused = sorted(
        {
            **_X86_64["mounts"],
            **_X86_64["the jail of a VMM"],
            **_OTHER_MOUNTS,
            **_SHARED_OBJECTS,
        }.values()
    )
    clone = [_argument(0), Instruction(_JSET, 0, 1, _CLONE_NEW), _return(_ERRNO | errno.EPERM)]
    return [
        Instruction(_LOAD, 0, 0, _ARCH),
        Instruction(_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        _return(_KILL),
        Instruction(_LOAD, 0, 0, _NR),
        Instruction(_JGE, 0, 1, _X32_BIT),
        _return(_KILL),
        Instruction(_JEQ, 1, 0, _CLONE3),
        Instruction(_JGE, 0, 1, _NEWEST + 1),
        _return(_ERRNO | errno.ENOSYS),
        *_if_call(allowed()["clone"], clone),
        *(Instruction(_JEQ, len(refused) - at, 0, number) for at, number in enumerate(refused)),
        _return(_ALLOW),
        _return(_ERRNO | errno.EPERM),
    ]


def forbid() -> None:
    """Put `forbidding` on this thread and all it starts. Does nothing where `program` knows no numbers. OSError."""
    if platform.machine() == "x86_64":
        _install(forbidding())


def install() -> None:
    """Put the filter on this thread and all it starts, for good. Set no_new_privs before. Raises OSError."""
    _install(program())


def _install(instructions: list[Instruction]) -> None:
    code = assemble(instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // _FILTER.size, ctypes.addressof(buffer))
    if _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), header, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_SECCOMP): {os.strerror(number)}")


def evaluate(instructions: list[Instruction], data: bytes) -> int:
    """What the kernel would answer to `data`, a struct seccomp_data: for tests, and for explaining a refusal."""
    at = accumulator = 0
    while True:
        code, yes, no, k = instructions[at]
        at += 1
        if code == _RETURN:
            return k
        if code == _LOAD:
            accumulator = struct.unpack_from("=I", data, k)[0]
            continue
        taken = {_JEQ: accumulator == k, _JGE: accumulator >= k, _JSET: bool(accumulator & k)}[code]
        at += yes if taken else no


def _argument(number: int) -> Instruction:
    """The low 32 bits: all flags and families that matter are there, and the kernel ignores the rest of an int."""
    return Instruction(_LOAD, 0, 0, 16 + 8 * number)


def _return(value: int) -> Instruction:
    return Instruction(_RETURN, 0, 0, value)


def _if_call(number: int, body: list[Instruction]) -> list[Instruction]:
    """`body` for that call only. It returns to refuse; past its end the call is allowed."""
    inside = [*body, _return(_ALLOW)]
    return [Instruction(_JEQ, 0, len(inside), number), *inside]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Neighbouring numbers together: fewer comparisons per call."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
