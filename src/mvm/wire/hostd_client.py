"""`HostdClient`: an `Executor` that asks mvm-hostd, over whatever transport it is given.

This zone opens no descriptor, so `dial` makes the connection (`mvm.linux.sockets.dial`). One connection per request: an
operation is tied to nobody else's. A client that goes away does not end an operation: the daemon finishes it.
Errors are rebuilt as the types that were raised on the other side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from mvm.core.errors import Busy, GuestError, MissingPrerequisite, MvmError
from mvm.core.ids import InstanceId, TenantId
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord
from mvm.wire.executor import Progress, no_progress
from mvm.wire.hostd_api import (
    MAX_ANSWER,
    VERBS,
    ChannelAnswer,
    ChannelRequest,
    CloseRequest,
    ConsoleAnswer,
    ConsolePlace,
    ConsoleRequest,
    DestroyRequest,
    InstanceLine,
    InstanceRequest,
    ListAnswer,
    ListRequest,
    NetworkAnswer,
    NodeAnswer,
    Nothing,
    PlanRequest,
    Purpose,
    TenantAnswer,
    TenantLine,
    TenantRequest,
    TenantsAnswer,
    TenantsRequest,
    Verb,
)
from mvm.wire.hostd_frames import FrameReader, decode_answer, decode_message, encode_request, rebuilt

PATIENCE_S = 30.0
"""Beyond a verb's own time: for the daemon to end and undo an operation that took too long, and to say so."""
_RECEIVE = 65536


class Transport(Protocol):
    """A connected stream. Methods raise OSError."""

    def send(self, data: bytes) -> None:
        """All of it."""
        ...

    def receive(self, size: int, timeout: float) -> tuple[bytes, list[int]]:
        """Bytes and owned descriptors; b"" at the end. TimeoutError after `timeout` seconds."""
        ...

    def close(self) -> None: ...


class OpenChannel:
    """One session with a guest: `fd` is owned by whoever takes it; the port is theirs until `release`.

    Has the shape of hostd's own port lease, so that a guest channel needs not know where its port came from.
    """

    def __init__(self, transport: Transport, fd: int, answer: ChannelAnswer) -> None:
        self.fd = fd
        self.port = answer.port
        self.was_clean = answer.was_clean
        self.vsock = answer.vsock
        self._transport: Transport | None = transport

    def release(self, *, clean: bool) -> None:
        """Give the port back. A connection that just ends says the same as `clean=False`."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        try:
            # The answer says that the port is free again, for a caller that opens the next at once.
            _converse(transport, VERBS["close_channel"], CloseRequest(clean), no_progress)
        except (OSError, MvmError):
            pass  # the daemon is gone, and its lock on the port with it
        finally:
            transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(clean=False)


class Console:
    """Reads one instance's console log, over one connection for as long as the daemon keeps it.

    The daemon remembers nothing of a reader, so that after its restart reading goes on at the same place.
    """

    def __init__(self, connect: Callable[[], Transport], instance: InstanceId) -> None:
        self._connect = connect
        self._instance = instance
        self._transport: Transport | None = None

    def read(self, lines: int | None, place: ConsolePlace | None) -> ConsoleAnswer:
        """Begin `lines` lines before the end (None: with all that is kept), or go on at `place`."""
        request = ConsoleRequest(self._instance, lines, place)
        kept = self._transport is not None
        try:
            return self._ask(request)
        except OSError as error:
            if not kept:
                raise _lost(error) from error
        try:
            return self._ask(request)
        except OSError as error:
            raise _lost(error) from error

    def _ask(self, request: ConsoleRequest) -> ConsoleAnswer:
        if self._transport is None:
            self._transport = self._connect()
        try:
            answer: ConsoleAnswer = _converse(self._transport, VERBS["read_console"], request, no_progress)
            return answer
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostdClient:
    """Implements `mvm.wire.executor.Executor`, and the daemon's inspection."""

    def __init__(self, dial: Callable[[], Transport]) -> None:
        self._dial = dial

    def create_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        return self._record("create_instance", PlanRequest(plan), progress)

    def sleep_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        return self._record("sleep_instance", InstanceRequest(instance), progress)

    def wake_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        return self._record("wake_instance", PlanRequest(plan), progress)

    def stop_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        return self._record("stop_instance", InstanceRequest(instance), progress)

    def attach_drives(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        return self._record("attach_drives", PlanRequest(plan), progress)

    def setup_network(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        return self._record("setup_network", PlanRequest(plan), progress)

    def destroy_instance(
        self, instance: InstanceId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> None:
        self._call("destroy_instance", DestroyRequest(instance, wipe_volumes), progress)

    def inspect_instance(self, instance: InstanceId) -> InstanceRecord:
        return self._record("inspect_instance", InstanceRequest(instance), no_progress)

    def inspect_tenant(self, tenant: TenantId) -> TenantAnswer:
        answer: TenantAnswer = self._call("inspect_tenant", TenantRequest(tenant), no_progress)
        return answer

    def list_instances(self, tenant: TenantId | None = None) -> list[InstanceLine]:
        rows: list[InstanceLine] = []
        while True:
            after = rows[-1].instance if rows else None
            answer: ListAnswer = self._call("list_instances", ListRequest(tenant, after), no_progress)
            rows += answer.rows
            if not answer.more or not answer.rows:
                return rows

    def list_tenants(self) -> list[TenantLine]:
        rows: list[TenantLine] = []
        while True:
            after = rows[-1].tenant if rows else None
            answer: TenantsAnswer = self._call("list_tenants", TenantsRequest(after), no_progress)
            rows += answer.rows
            if not answer.more or not answer.rows:
                return rows

    def console(self, instance: InstanceId) -> Console:
        return Console(self._connect, instance)

    def verify_network(self, progress: Progress = no_progress) -> NetworkAnswer:
        answer: NetworkAnswer = self._call("verify_network", Nothing(), progress)
        return answer

    def ping(self) -> NodeAnswer:
        answer: NodeAnswer = self._call("ping", Nothing(), no_progress)
        return answer

    def open_channel(self, instance: InstanceId, purpose: Purpose, program: str = "") -> OpenChannel:
        """A session port of a running guest. Conflict if it does not run, Busy if all ports are taken."""
        transport = self._connect()
        fds: list[int] = []
        try:
            request = ChannelRequest(instance, purpose, program[:1024])
            answer: ChannelAnswer = _converse(transport, VERBS["open_channel"], request, no_progress, fds)
            if len(fds) != 1:
                raise GuestError(
                    "mvm-hostd passed no connection to the guest", details=f"{len(fds)} descriptors"
                )
            return OpenChannel(transport, fds.pop(), answer)
        except BaseException as error:
            transport.close()
            if isinstance(error, OSError):
                raise _lost(error) from error
            raise
        finally:
            _close_all(fds)

    def _record(self, verb: str, request: Any, progress: Progress) -> InstanceRecord:
        record: InstanceRecord = self._call(verb, request, progress).record
        return record

    def _call(self, verb: str, request: Any, progress: Progress) -> Any:
        transport = self._connect()
        try:
            return _converse(transport, VERBS[verb], request, progress)
        except OSError as error:
            raise _lost(error) from error
        finally:
            transport.close()

    def _connect(self) -> Transport:
        try:
            return self._dial()
        except PermissionError as error:
            raise MissingPrerequisite(
                "mvm-hostd does not talk to this user",
                details=str(error),
                resolution="Use sudo, or have yourself added to the group (adduser USER mvm) and log in again.",
            ) from error
        except OSError as error:
            raise MissingPrerequisite(
                "mvm-hostd cannot be reached",
                details=str(error),
                resolution="Start it: systemctl start mvm-hostd",
            ) from error


def _converse(
    transport: Transport, verb: Verb, request: Any, progress: Progress, fds: list[int] | None = None
) -> Any:
    """Send one request; the decoded answer. `fds` takes the descriptors that come with it; without, none may come."""
    deadline = time.monotonic() + verb.timeout_s + PATIENCE_S
    reader = FrameReader(MAX_ANSWER)
    try:
        transport.send(encode_request(verb, request))
    except (BrokenPipeError, ConnectionResetError):
        pass  # a daemon that refuses says why and closes, maybe before we have asked
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer to {verb.name} in {verb.timeout_s + PATIENCE_S:g} s")
        data, received = transport.receive(_RECEIVE, left)
        if fds is not None:
            fds += received
        else:
            _close_all(received)
        if not data:
            raise ConnectionResetError(f"the connection ended during {verb.name}")
        for body in reader.feed(data):
            message = decode_message(body)
            if message.progress is not None:
                progress(message.progress)
            elif message.error is not None:
                raise rebuilt(message.error)
            else:
                return decode_answer(message, verb)


def _lost(error: OSError) -> Busy:
    return Busy(
        "mvm-hostd went away before it answered",
        details=f"{error}. What was asked for may have been done or undone.",
        resolution="Try again: every verb is safe to repeat. See also: journalctl -u mvm-hostd",
    )


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
