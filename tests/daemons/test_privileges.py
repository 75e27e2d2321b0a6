"""The daemon's rights are no more than it needs, and it does not start with others."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.support.hostd_daemon import daemon_world

from mvm.core.errors import MissingPrerequisite, MvmError, Refused
from mvm.hostd import confine
from mvm.linux import capabilities, seccomp

pytestmark = pytest.mark.root


@pytest.mark.req("H3")
@pytest.mark.parametrize("capability", sorted(confine.CAPABILITIES))
def test_none_can_be_spared(capability: str) -> None:
    """Without it, something in an instance's life fails."""
    left = sorted(set(confine.CAPABILITIES) - {capability})
    with daemon_world(capabilities=left) as world:
        world.daemon.start()
        plan = world.plan()
        with pytest.raises(MvmError):
            world.client.create_instance(plan)
            world.client.setup_network(plan)
            world.client.sleep_instance(plan.instance)
            world.client.wake_instance(plan)
            world.client.stop_instance(plan.instance)


def in_child(act: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            act()
            code = 0
        except MvmError as error:
            code = error.exit_code
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.req("H3")
def test_it_does_not_start_without_what_it_needs() -> None:
    def act() -> None:
        capabilities.limit_to({"KILL", "SETPCAP"})
        confine.confine()

    assert in_child(act) == MissingPrerequisite.exit_code


@pytest.mark.req("H3")
def test_it_does_not_start_with_more() -> None:
    """What is read back must be what was asked for, in every set."""

    def more() -> None:
        confine.confine()
        confine.check(sorted(confine.CAPABILITIES)[1:], filtered=True)

    def unfiltered() -> None:
        confine.confine(filter_calls=False)
        confine.check(confine.CAPABILITIES, filtered=True)

    def nothing_done() -> None:
        confine.check(confine.CAPABILITIES, filtered=True)

    for act in (more, unfiltered, nothing_done):
        assert in_child(act) == Refused.exit_code
    assert in_child(confine.confine) == 0


@pytest.mark.req("H3")
def test_calls_that_are_not_on_the_list_fail() -> None:
    import ctypes
    import errno
    import socket

    def act() -> None:
        confine.confine()
        libc = ctypes.CDLL(None, use_errno=True)
        newuser = 0x10000000
        refused: tuple[Callable[[], int], ...] = (
            lambda: libc.ptrace(0, 0, 0, 0),
            lambda: libc.unshare(newuser),
            lambda: libc.syscall(seccomp.allowed()["clone"], newuser, 0, 0, 0, 0),
            lambda: libc.reboot(0),
            lambda: libc.init_module(0, 0, 0),
            lambda: libc.syscall(321, 0, 0, 0),  # bpf
            lambda: libc.syscall(425, 1, 0),  # io_uring_setup
            lambda: libc.swapon(b"/x", 0),
        )
        for call in refused:
            assert call() == -1
            assert ctypes.get_errno() == errno.EPERM
        assert libc.syscall(435, 0, 0) == -1  # clone3
        assert ctypes.get_errno() == errno.ENOSYS
        assert libc.syscall(5000) == -1
        assert ctypes.get_errno() == errno.ENOSYS
        with pytest.raises(OSError, match="family"):
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        # Inherited by every program that is started.
        from mvm.linux.process import run

        status = run(["cat", "/proc/self/status"], timeout=10).stdout.decode()
        assert capabilities.parse_status(status).seccomp == 2

    assert in_child(act) == 0
