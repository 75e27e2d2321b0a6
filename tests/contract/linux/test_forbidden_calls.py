"""What the kernel makes of the filter that a VMM and its keeper are under."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import threading
from collections.abc import Callable

import pytest

from mvm.linux import capabilities, seccomp

pytestmark = [
    pytest.mark.req("H4"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="its numbers are this machine's"),
]


def under_the_filter(act: Callable[[], int]) -> int:
    """What `act` returned in a process under the filter, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            capabilities.no_new_privs()
            seccomp.forbid()
            os._exit(act())
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def call(number: int, *arguments: int) -> int:
    """errno, 0 for success."""
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.syscall(number, *map(ctypes.c_long, arguments)) >= 0 else ctypes.get_errno()


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (56, (0x10000000 | 17, 0, 0, 0, 0), errno.EPERM),  # clone into a user namespace
        (56, (0x00020000 | 17, 0, 0, 0, 0), errno.EPERM),  # or a mount namespace
        (435, (0, 0), errno.ENOSYS),  # clone3
        (430, (0, 0), errno.EPERM),  # fsopen
        (432, (0, 0, 0), errno.EPERM),  # fsmount
        (161, (0,), errno.EPERM),  # chroot
        (467, (0, 0, 0, 0, 0), errno.ENOSYS),  # open_tree_attr
        (0x40000000 | 39, (), -signal.SIGSYS),  # x32
    ],
)
def test_no_way_to_another_view_of_the_host(number: int, arguments: tuple[int, ...], expected: int) -> None:
    assert under_the_filter(lambda: call(number, *arguments)) == expected


def test_threads_and_processes_are_started_as_before() -> None:
    def both() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(1))
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + len(seen)

    assert under_the_filter(both) == 8
