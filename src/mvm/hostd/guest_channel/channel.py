"""A connection to one port of one guest: the verbs as methods, every wait bounded.

Lifetimes: the channel owns its socket and its port lease until `close` (it is a context manager). Closing marks the
port clean only if the guest read everything and nothing is open; else the next client resynchronises.

Threads: none. One thread uses a channel; requests run concurrently through `start_*` and `wait`, which drives all open
requests of the channel. Two threads take two ports.

Nothing is sent before the first request: HELLO leaves with it in one write, so the first answer after a wake costs one
round trip.

Failures: GuestRefusal is an answer, the channel goes on. Any other GuestError (time, protocol, lost connection)
ends the channel; later calls raise at once.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mvm.core.errors import GuestError
from mvm.hostd import jailed_run
from mvm.hostd.guest_channel.exec_operation import ExecOperation, Sink, Source
from mvm.hostd.guest_channel.extract import CopyLimits, Extractor, ReceiveOperation, destination
from mvm.hostd.guest_channel.operation import Operation
from mvm.hostd.guest_channel.ports import PortLease, take_port
from mvm.hostd.guest_channel.send import SendOperation, TreeSource
from mvm.hostd.guest_channel.vsock import await_vsock, connect_vsock
from mvm.linux.files import temporary_beside
from mvm.linux.sockets import connect_unix
from mvm.wire import framing, guest_api, guest_session
from mvm.wire.guest_api import CopyReport, ExitStatus, GuestStatus, SleepReport, WakeReport
from mvm.wire.guest_session import ClientSession, Verb

ANSWER_TIMEOUT = 30.0  # seconds for a verb that needs no program or disk
SLEEP_TIMEOUT = 120.0  # prepare_sleep writes all dirty pages first
STALL_TIMEOUT = 120.0  # a copy during which nothing moves for so long has failed
KEEPALIVE = 20.0  # silence after which a sign of life is asked for, and again until the guest counts as dead
CLOSE_TIMEOUT = 2.0
_CANCEL_TIMEOUT = 10.0
_RECEIVE = 131072
_O = TypeVar("_O", bound=Operation)


def connect(
    socket_path: Path, *, lock_path: Path | None = None, lease: PortLease | None = None, deadline: float
) -> GuestChannel:
    """Connect to the port whose socket is `socket_path`, or to the guest by its VMM's vsock where it has that; under
    `lock_path` (taken here) or a `lease` taken before.

    `deadline`: time.monotonic() until which to connect. Busy: another client has the port. GuestError: nobody listens.
    """
    if lease is None and lock_path is not None:
        lease = take_port(lock_path)
    try:
        vsock = jailed_run.find(socket_path.parent)
        try:
            if vsock is not None:
                sock = connect_vsock(vsock, framing.VSOCK_PORT, deadline)
            else:
                sock = connect_unix(socket_path, max(0.01, deadline - time.monotonic()))
        except OSError as error:
            raise _unreachable(socket_path.name, error) from None
        return GuestChannel(sock, lease, boundaries=vsock is not None)
    except BaseException:
        if lease is not None:
            # Not a byte was sent: the port is as it was.
            lease.release(clean=lease.was_clean)
        raise


def take_over(sock: socket.socket, lease: PortLease, *, vsock: bool, deadline: float) -> GuestChannel:
    """A channel on a socket that the daemon has connected, `vsock`: by vsock, whose answer is still to come.

    GuestError if the guest does not take it by `deadline` (time.monotonic()); socket and lease are given back then.
    """
    try:
        if vsock:
            await_vsock(sock, deadline)
    except BaseException as error:
        sock.close()
        lease.release(clean=lease.was_clean)
        if isinstance(error, OSError):
            raise _unreachable("vsock", error) from None
        raise
    return GuestChannel(sock, lease, boundaries=vsock)


def _unreachable(name: str, error: OSError) -> GuestError:
    return GuestError(
        "the guest's control channel cannot be reached",
        details=f"{name}: {error}",
        resolution="see whether the instance runs (mvm instance list)",
    )


class GuestChannel:
    """`sock`: connected stream socket, owned from here on. `boundaries`: nothing of an earlier client can be on it
    (vsock); so it is without a lease."""

    def __init__(
        self, sock: socket.socket, lease: PortLease | None = None, *, boundaries: bool = False
    ) -> None:
        self._sock = sock
        self._lease = lease
        resync = lease is not None and not lease.was_clean and not boundaries
        self._session = ClientSession(os.urandom(framing.NONCE_SIZE), resync=resync)
        self._operations: dict[int, Operation] = {}
        self._broken: GuestError | None = None
        self._closed = False
        self._heard = time.monotonic()
        self._touched: dict[int, float] = {}
        sock.setblocking(False)

    def __enter__(self) -> GuestChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def buffered(self) -> int:
        """Bytes this channel holds in either direction, outside of local descriptors."""
        held = sum(op.pending for op in self._operations.values() if isinstance(op, ExecOperation))
        return self._session.buffered + len(self._session.output) + held

    def close(self) -> None:
        """Leave the port in order if the guest plays along within CLOSE_TIMEOUT, else marked for resync."""
        if self._closed:
            return
        try:
            self._settle()
        finally:
            self._closed = True
            clean = self._broken is None and self._session.settled
            for operation in self._operations.values():
                operation.close()
            self._operations.clear()
            self._sock.close()
            if self._lease is not None:
                self._lease.release(clean=clean)

    # verbs with one answer

    def hello(self, *, timeout: float = ANSWER_TIMEOUT) -> None:
        """Return once the guest's agent answers; GuestError after `timeout` seconds."""
        self._usable()
        until = time.monotonic() + timeout
        self._session.ping()
        while self._session.ping_pending:
            self._turn(until, "greeting")

    def status(self, *, timeout: float = ANSWER_TIMEOUT) -> GuestStatus:
        value: GuestStatus = self._ask(guest_session.STATUS, b"", "status", timeout)
        return value

    def prepare_sleep(
        self, *, drop_caches: bool = False, unmount_secrets: bool = True, timeout: float = SLEEP_TIMEOUT
    ) -> SleepReport:
        """Quiesce: sync, unmount secrets (the next wake brings new ones), optionally drop clean caches."""
        flags = guest_api.SLEEP_DROP_CACHES * drop_caches | guest_api.SLEEP_UNMOUNT_SECRETS * unmount_secrets
        value: SleepReport = self._ask(guest_session.PREPARE_SLEEP, bytes([flags]), "prepare_sleep", timeout)
        return value

    def after_wake(
        self,
        realtime_ns: int | None = None,
        entropy: bytes | None = None,
        *,
        remount_secrets: bool = True,
        timeout: float = ANSWER_TIMEOUT,
    ) -> WakeReport:
        """Set the clock (default: now), reseed the random pool (default: fresh bytes), mount the new secrets."""
        seed = os.urandom(guest_api.ENTROPY_SIZE) if entropy is None else entropy
        now = time.time_ns() if realtime_ns is None else realtime_ns
        body = guest_api.after_wake_body(now, seed, remount_secrets=remount_secrets)
        value: WakeReport = self._ask(guest_session.AFTER_WAKE, body, "after_wake", timeout)
        return value

    def shutdown(self, *, reboot: bool = False, grace: float = 5.0, timeout: float = ANSWER_TIMEOUT) -> None:
        """Ask the guest to go down; returns when it agreed. Programs get `grace` seconds after SIGTERM.

        `reboot` is the one that ends a VMM whose guest was booted with reboot=k and cannot power off.
        """
        mode = guest_api.SHUTDOWN_REBOOT if reboot else guest_api.SHUTDOWN_POWEROFF
        body = guest_api.SHUTDOWN_BODY.pack(mode, min(int(grace * 1000), 0xFFFF))
        self._ask(guest_session.SHUTDOWN, body, "shutdown", timeout)

    # programs

    def start_exec(
        self,
        argv: Sequence[str | bytes],
        *,
        stdin: Source = None,
        stdout: Sink = None,
        stderr: Sink = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        tty: tuple[int, int] | None = None,
        detach: bool = False,
    ) -> ExecOperation:
        """Start a program; `wait` on what is returned. `tty`: (rows, columns), then standard error is on stdout."""
        self._usable()
        session = self._session
        body = guest_api.exec_body(
            argv,
            env=env or {},
            cwd=cwd,
            user=user,
            tty=tty,
            detach=detach,
            stdin=stdin is not None,
            window=session.window,
        )
        number = session.open(guest_session.EXEC, body)
        return self._track(ExecOperation(session, number, "exec", stdin, stdout, stderr))

    def exec(
        self,
        argv: Sequence[str | bytes],
        *,
        stdin: Source = None,
        stdout: Sink = None,
        stderr: Sink = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        tty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> ExitStatus:
        """Run a program to its end. `stdin`: bytes, a descriptor or None; sinks: a callback, a descriptor or None.

        The guest must have started it within ANSWER_TIMEOUT. `timeout` bounds its run in seconds (it is killed and
        GuestError raised); without one it may run for as long as the guest shows signs of life.
        """
        operation = self.start_exec(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, user=user, tty=tty
        )
        status: ExitStatus = self.wait(operation, timeout=timeout)
        return status

    def spawn(
        self,
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> int:
        """Start a program that stays when this channel is gone, its output on the guest's console; its process id."""
        operation = self.start_exec(argv, env=env, cwd=cwd, user=user, detach=True)
        self.wait(operation, timeout=ANSWER_TIMEOUT)
        return operation.pid

    # copies

    def copy_in(
        self, local: Path, remote: str, on_progress: Callable[[int], object] | None = None
    ) -> CopyReport:
        """Copy a file or directory into the guest. `on_progress(bytes so far)`. NotFound, InvalidInput, GuestRefusal.

        A `remote` that ends in "/" or is a directory receives it under its own name.
        """
        source = TreeSource(on_progress)
        body = guest_api.copy_in_body(remote, os.fsencode(local.name or local.resolve().name))
        return self._send(guest_session.COPY_IN, body, "copy_in", source, source.local(local))

    def copy_out(
        self,
        remote: str,
        local: Path,
        on_progress: Callable[[int], object] | None = None,
        *,
        limits: CopyLimits | None = None,
    ) -> CopyReport:
        """Copy a file or directory out of the guest; nothing outside `local` is touched whatever the guest sends.

        Into `local` under its own name if that is a directory. Files replace files; Conflict if a directory exists.
        Links and special files are not made on the host; the report counts them as skipped.
        """
        self._usable()
        body = guest_api.copy_out_body(remote, self._session.window)
        target = destination(remote, local)
        extractor = Extractor(target, temporary_beside(target), limits or CopyLimits(), on_progress)
        number = self._session.open(guest_session.COPY_OUT, body)
        operation = ReceiveOperation(self._session, number, "copy_out", extractor)
        try:
            report: CopyReport = self.wait(self._track(operation), stall=STALL_TIMEOUT)
        finally:
            operation.close()
        return report

    def refresh_secrets(
        self, files: Mapping[str, bytes | bytearray | memoryview], *, mode: int = 0o400
    ) -> CopyReport:
        """Replace the running guest's secrets by `files` (name to content), each with permission bits `mode`."""
        source = TreeSource()
        pieces = source.memory(files, mode)
        return self._send(guest_session.REFRESH_SECRETS, b"", "refresh_secrets", source, pieces)

    # the engine

    def wait(self, operation: Operation, *, timeout: float | None = None, stall: float | None = None) -> Any:
        """Drive the channel until `operation` is done; its result, or raises what it failed with.

        `timeout`: seconds until it is cancelled and GuestError raised. `stall`: the same, counted from its last event.
        """
        self._usable()
        start = time.monotonic()
        until = None if timeout is None else start + timeout
        while not operation.done:
            limits = [until] if until is not None else []
            if not operation.answered:
                limits.append(start + ANSWER_TIMEOUT)
            if stall is not None:
                limits.append(self._touched.get(operation.number, start) + stall)
            if operation.abandoned_at is not None:
                limits = [operation.abandoned_at + _CANCEL_TIMEOUT]
                if limits[0] <= time.monotonic():
                    self._broken = GuestError(f"the guest did not stop {operation.name} when asked to")
                    operation.give_reason()
            limit = min(limits, default=None)
            if limit is not None and limit <= time.monotonic():
                self._give_up(operation, limit - start)
            self._turn(limit, None)
        self._operations.pop(operation.number, None)
        self._touched.pop(operation.number, None)
        return operation.result()

    def _give_up(self, operation: Operation, after: float) -> None:
        """Time is over: cancel, and see whether the guest is at least able to do that."""
        error = GuestError(
            f"the guest did not finish {operation.name} in time",
            details=f"waited {after:.0f} s",
            resolution="look at the guest's load and console log; stop the instance if it hangs",
        )
        operation.abandon(error)
        until = time.monotonic() + _CANCEL_TIMEOUT
        while self._session.is_open(operation.number):
            self._turn(until, operation.name)
        self._operations.pop(operation.number, None)
        operation.close()
        raise error

    def _ask(self, verb: Verb, body: bytes, name: str, timeout: float) -> Any:
        self._usable()
        operation = self._track(Operation(self._session, self._session.open(verb, body), name))
        until = time.monotonic() + timeout
        while not operation.done:
            self._turn(until, name)
        self._operations.pop(operation.number, None)
        self._touched.pop(operation.number, None)
        return operation.result()

    def _send(self, verb: Verb, body: bytes, name: str, source: TreeSource, pieces: Any) -> CopyReport:
        self._usable()
        operation = SendOperation(self._session, self._session.open(verb, body), name, source, pieces)
        try:
            report: CopyReport = self.wait(self._track(operation), timeout=None, stall=STALL_TIMEOUT)
        finally:
            operation.close()
        return report

    def _track(self, operation: _O) -> _O:
        self._operations[operation.number] = operation
        return operation

    def _usable(self) -> None:
        if self._closed:
            raise ValueError("the channel is closed")
        if self._broken is not None:
            raise self._broken

    def _turn(self, until: float | None, expected: str | None) -> None:
        """Send what can be sent, then wait once for anything to happen, until `until` at most.

        With `expected`, time running out is a dead guest: GuestError.
        """
        try:
            now = time.monotonic()
            if expected is not None and until is not None and now >= until:
                raise GuestError(
                    f"the guest did not answer ({expected})",
                    resolution="look at the guest's console log; stop the instance if it hangs",
                )
            for operation in list(self._operations.values()):
                operation.produce()
            self._flush()
            self._watch(until, now)
        except GuestError as error:
            self._broken = error
            raise

    def _watch(self, until: float | None, now: float) -> None:
        poller = select.poll()
        masks: dict[int, int] = {}
        owners: dict[int, list[Operation]] = {}
        for operation in self._operations.values():
            for fd, events in operation.polls():
                masks[fd] = masks.get(fd, 0) | events
                # Once per descriptor: a terminal is polled both ways, and a second read of it would block.
                watchers = owners.setdefault(fd, [])
                if operation not in watchers:
                    watchers.append(operation)
        sock = self._sock.fileno()
        masks[sock] = select.POLLIN | (select.POLLOUT if self._session.output else 0)
        for fd, events in masks.items():
            poller.register(fd, events)
        alive_until = self._heard + KEEPALIVE * (2 if self._session.ping_pending else 1)
        limit = alive_until if until is None else min(until, alive_until)
        for fd, events in poller.poll(max(0, int((limit - now) * 1000) + 1)):
            if fd == sock:
                if events & ~select.POLLOUT:
                    self._receive()
                continue
            for operation in owners[fd]:
                operation.ready(fd, events)
        if time.monotonic() - self._heard > KEEPALIVE:
            self._silence()

    def _silence(self) -> None:
        if not self._session.ping_pending:
            self._session.ping()
        elif time.monotonic() - self._heard > 2 * KEEPALIVE:
            raise GuestError(
                "the guest shows no sign of life",
                details=f"silent for {2 * KEEPALIVE:.0f} s",
                resolution="look at the guest's console log; stop the instance if it hangs",
            )

    def _flush(self) -> None:
        output = self._session.output
        try:
            while output:
                sent = self._sock.send(output)
                del output[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost(error) from None

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost(error) from None
        if not data:
            raise self._lost(None)
        events = self._session.feed(data)
        now = time.monotonic()
        if self._session.greeted:
            self._heard = now
        for event in events:
            operation = self._operations.get(event.number)
            if operation is not None:
                self._touched[event.number] = now
                operation.event(event)

    def _lost(self, error: OSError | None) -> GuestError:
        return GuestError(
            "the connection to the guest was lost",
            details=str(error) if error else "the other end closed it",
            resolution="see whether the instance still runs (mvm instance list)",
        )

    def _settle(self) -> None:
        """Have the guest acknowledge what it has not yet: after that, the port may be left as it is."""
        session = self._session
        if self._broken is not None or session.settled or not session.greeted or self._operations:
            return
        until = time.monotonic() + CLOSE_TIMEOUT
        try:
            while not session.settled:
                session.ping()
                self._turn(until, "closing")
        except GuestError:
            return  # the port stays marked, which is what the mark is for
