"""The guard that keeps unit tests away from processes and sockets bites, whichever way they are reached."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pty
import socket
import subprocess
import threading
from collections.abc import Callable

import pytest

from isolation import Guard, IsolationViolation

TRUE = "/bin/true"

ATTEMPTS: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run([TRUE], check=False),
    "subprocess-shell": lambda: subprocess.getoutput(TRUE),
    "fork": os.fork,
    "forkpty": os.forkpty,
    "pty-fork": pty.fork,
    "pty-spawn": lambda: pty.spawn([TRUE]),
    "posix-spawn": lambda: os.posix_spawn(TRUE, [TRUE], {}),
    "posix-spawnp": lambda: os.posix_spawnp(TRUE, [TRUE], {}),
    "exec": lambda: os.execv(TRUE, [TRUE]),
    "spawn": lambda: os.spawnv(os.P_WAIT, TRUE, [TRUE]),
    "system": lambda: os.system(TRUE),
    "popen": lambda: os.popen(TRUE),
    "mp-fork": lambda: multiprocessing.get_context("fork").Process(target=int).start(),
    "mp-spawn": lambda: multiprocessing.get_context("spawn").Process(target=int).start(),
    "tcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "resolve": lambda: socket.getaddrinfo("localhost", 80),
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_refuses(name: str, isolation_guard: Guard) -> None:
    with pytest.raises(IsolationViolation):
        ATTEMPTS[name]()
    assert isolation_guard.violations
    isolation_guard.violations.clear()


def test_refuses_in_threads_and_remembers_what_was_swallowed(isolation_guard: Guard) -> None:
    def swallow() -> None:
        try:
            socket.socket()
        except Exception:
            pass

    thread = threading.Thread(target=swallow)
    thread.start()
    thread.join()
    assert len(isolation_guard.violations) == 1
    isolation_guard.violations.clear()


def test_is_off_outside_of_a_block() -> None:
    guard = Guard()
    guard.audit("os.fork", ())
    with guard.enforced():
        with pytest.raises(IsolationViolation):
            guard.audit("os.fork", ())
    guard.audit("os.fork", ())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_refuses_socketpair(isolation_guard: Guard) -> None:
    """Apart, because the C half exists already when the refusal comes, and its collection warns."""
    with pytest.raises(IsolationViolation):
        socket.socketpair()
    isolation_guard.violations.clear()
    gc.collect()
