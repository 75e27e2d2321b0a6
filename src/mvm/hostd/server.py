"""mvm-hostd's loop: one thread, one poll, and a process for every operation.

    accept -> who is it (SO_PEERCRED) -> one request -> admit -> answer here, or fork a `Job` and pass on what it says

Rules:
- Nothing in the loop waits for a client, a guest, an instance or a program. It does wait for its own disk: documents
  are read there, and sessions of others than root are audited there.
- A request is answered exactly once. Its verb comes from the table or it is refused.
- A client that goes away does not end its operation. Two operations on one instance are serialised by its lock.
- A client gets its next answer when it has taken the one before, so that no more than one waits in memory for each.
- No user but root can take all connections, all operations, or fill a log that others need (`mvm.hostd.fairness`).
- Refusals are logged with the peer's ids. Nothing of a payload is logged but ids that were parsed.
- At the start every instance is recovered, as jobs like any other; READY is told to systemd when all have been.
- SIGTERM: no new connections, no new operations; those in progress get DRAIN_S, then SIGTERM, then SIGKILL. VMs stay.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mvm.core.errors import Busy, Conflict, InvalidInput, MvmError, ResourceExhausted
from mvm.core.ids import InstanceId
from mvm.hostd.admission import all_instances, check_peer
from mvm.hostd.connection import Connection, Gone
from mvm.hostd.errand import errand, internal
from mvm.hostd.fairness import Allowance
from mvm.hostd.job import Job
from mvm.hostd.log import Log
from mvm.hostd.service import Service
from mvm.linux.sd_notify import Notifier
from mvm.linux.sockets import PeerCredentials, peer
from mvm.linux.stream import peer_groups
from mvm.wire.hostd_api import (
    VERBS,
    ChannelAnswer,
    ChannelRequest,
    CloseRequest,
    ConsoleRequest,
    InstanceRequest,
    ListRequest,
    Nothing,
    PlanRequest,
    TenantRequest,
    TenantsRequest,
    Verb,
    Where,
)
from mvm.wire.hostd_frames import decode_request, encode_answer, encode_error

DRAIN_S = 60.0
CONNECTIONS = 512
"""Of which the last RESERVED are for root: a group cannot lock the operator out."""
RESERVED = 32
CONNECTIONS_PER_USER = 240
"""Of anybody but root: one member cannot lock the others out."""
OPERATIONS_RESERVED = 1
"""Of the operations at once, where there are more than that: root's. Recovery has its own."""
WAITING_PER_INSTANCE = 4
AUDITED_AT_ONCE, AUDITED_PER_S = 200, 20.0
"""Requests of one user that are written into an audit log, which nobody cuts."""
LINES_AT_ONCE, LINES_PER_S = 50, 5.0
"""Lines about one user's requests that were refused."""
DESCRIPTORS = 4096
"""A connection may hold two, its socket and a port's lock; a shell's usual limit is 1024."""
_NOBODY = -1
_ROOT = PeerCredentials(0, 0, 0)
_RECOVER = VERBS["inspect_instance"]


class Server:
    """`listener`: a listening stream socket, owned. `gid`: of the group that may connect, or None for root alone."""

    def __init__(
        self,
        listener: socket.socket,
        service: Service,
        *,
        gid: int | None,
        operations: int,
        log: Log,
        notifier: Notifier,
    ) -> None:
        self._listener: socket.socket | None = listener
        self._service = service
        self._gid = gid
        self._operations = operations
        self._log = log
        self._notifier = notifier
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._connections: dict[int, Connection] = {}
        self._jobs: dict[int, Job] = {}
        self._to_recover: deque[InstanceId] = deque()
        self._ready = False
        self._stopping = False
        self._woken, self._waker = socket.socketpair()
        self._drain_until = 0.0
        self._audited = Allowance(AUDITED_AT_ONCE, AUDITED_PER_S)
        self._lines = Allowance(LINES_AT_ONCE, LINES_PER_S)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        assert self._listener is not None
        self._listener.setblocking(False)
        _allow_descriptors()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._watch(self._listener.fileno(), select.POLLIN, lambda _: self._accept())
        self._watch(self._woken.fileno(), select.POLLIN, lambda _: self._drain_wakeups())
        self._to_recover.extend(all_instances(self._service.store))
        self._log.info("started", pid=os.getpid(), node=self._service.node, instances=len(self._to_recover))
        # What is there now is shared with every child; without this the first collection in one would copy it all.
        gc.collect()
        gc.freeze()
        while not (self._stopping and not self._jobs):
            self._recover_next()
            for fd, events in self._poll.poll(self._patience()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(events)
            self._expire()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._log.info("stopped")

    # Signals.

    def _on_signal(self, signum: int, frame: object) -> None:
        self._stopping = True

    def _drain_wakeups(self) -> None:
        try:
            while self._woken.recv(64):
                pass
        except BlockingIOError:
            pass
        if self._stopping and self._listener is not None:
            self._log.info("stopping", operations=len(self._jobs))
            self._notifier.tell("STOPPING=1", f"STATUS=waiting for {len(self._jobs)} operations")
            self._unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self._to_recover.clear()
            self._drain_until = time.monotonic() + DRAIN_S
            for connection in list(self._connections.values()):
                if connection.job is None:
                    self._drop(connection)

    # Descriptors.

    def _watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._poll.register(fd, events)
        self._handlers[fd] = handler

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # Time.

    def _patience(self) -> int | None:
        """Milliseconds until the next thing that is due by the clock."""
        due = [c.deadline for c in self._connections.values() if c.deadline is not None]
        due += [job.deadline for job in self._jobs.values()]
        if self._drain_until:
            due.append(self._drain_until)
        return None if not due else max(0, int((min(due) - time.monotonic()) * 1000) + 1)

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if connection.deadline is not None and connection.deadline <= now:
                self._complain("client too slow", connection.peer)
                self._drop(connection)
        for job in list(self._jobs.values()):
            if job.deadline <= now:
                self._log.warning("operation too slow", verb=job.verb, instance=job.instance, child=job.pid)
                job.kill() if job.terminated else job.end()
        if self._drain_until and self._drain_until <= now:
            self._drain_until = 0.0
            for job in self._jobs.values():
                if not job.terminated:
                    job.end()

    # Clients.

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # gone again, or no descriptors left
            if not isinstance(error, BlockingIOError):
                if self._lines.take(_NOBODY):
                    self._log.error("accept failed", error=str(error))
                time.sleep(0.01)  # it stays readable: without this the loop would spin
            return
        who = peer(sock)
        connection = Connection(sock, who)
        try:
            check_peer(who, peer_groups(sock), self._gid)
            if not self._has_room(who):
                raise ResourceExhausted(
                    "mvm-hostd has too many connections",
                    details=f"{len(self._connections)} are open.",
                    resolution="Wait until other commands have ended, then try again.",
                )
        except MvmError as error:
            self._complain("refused", who, gid=who.gid, error=error.brief)
            try:
                connection.queue(encode_error(error))
            except Gone:
                pass
            connection.close()
            return
        self._connections[sock.fileno()] = connection
        self._watch(sock.fileno(), select.POLLIN, lambda events: self._serve(connection, events))

    def _has_room(self, who: PeerCredentials) -> bool:
        if who.uid == 0:
            return len(self._connections) < CONNECTIONS
        theirs = sum(1 for other in self._connections.values() if other.peer.uid == who.uid)
        return len(self._connections) < CONNECTIONS - RESERVED and theirs < CONNECTIONS_PER_USER

    def _complain(self, event: str, who: PeerCredentials, **fields: object) -> None:
        """A line about what a client did wrong, if there have not been too many of its user's."""
        if self._lines.take(who.uid):
            kept_back = self._lines.kept_back(who.uid) or None
            self._log.warning(event, uid=who.uid, pid=who.pid, **fields, lines_kept_back=kept_back)

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            if events & select.POLLOUT:
                connection.send()
            if events & ~select.POLLOUT:
                for body in connection.receive():
                    self._request(connection, body)
        except Gone:
            self._drop(connection)
            return
        except InvalidInput as error:
            self._refuse(connection, error)
        self._settle(connection)

    def _settle(self, connection: Connection) -> None:
        """Have poll wait for what this connection is to do next."""
        fd = connection.fileno()
        if fd not in self._handlers:
            return
        if connection.closing and not connection.wants_write:
            self._drop(connection)
            return
        # With an operation under way only the end of the connection matters, which poll tells unasked.
        events = select.POLLIN if connection.wants_read and connection.job is None else 0
        self._poll.modify(fd, events | (select.POLLOUT if connection.wants_write else 0))

    def _drop(self, connection: Connection) -> None:
        fd = connection.fileno()
        if self._connections.pop(fd, None) is None:
            return
        self._unwatch(fd)
        if connection.job is not None:
            connection.job.connection = None
        connection.close()

    def _refuse(self, connection: Connection, error: MvmError) -> None:
        """For bytes that are no request: say so and hang up, for what follows cannot be trusted to begin anywhere."""
        who = connection.peer
        self._complain("malformed", who, error=error.brief, details=error.details)
        connection.closing = True
        self._reply(connection, encode_error(error))

    def _reply(self, connection: Connection, body: bytes, *, droppable: bool = False) -> None:
        try:
            connection.queue(body, droppable=droppable)
        except Gone:
            self._drop(connection)

    # Requests.

    def _request(self, connection: Connection, untrusted_body: bytes) -> None:
        if connection.closing:
            return
        if connection.job is not None or connection.wants_write:
            # Answers are larger than requests: who sends many and takes none would fill our memory with them.
            raise InvalidInput(
                "a request came before the answer to the one before",
                resolution="Send one at a time on a connection.",
            )
        verb, request = decode_request(untrusted_body)
        del untrusted_body
        who = connection.peer
        try:
            self._service.admit(request)
            if self._service.is_audited(verb):
                self._spend(who)
            if verb.where is Where.CHILD:
                self._operate(connection, verb, request)
                return
            answer = self._answer(connection, verb, request)
        except MvmError as error:
            self._complain(
                "refused",
                who,
                verb=verb.name,
                instance=_instance(request),
                kind=error.kind,
                error=error.brief,
            )
            self._reply(connection, encode_error(error))
            return
        except OSError as error:
            self._complain("failed", who, verb=verb.name, error=str(error))
            self._reply(connection, encode_error(internal(error)))
            return
        if answer is not None:
            self._reply(connection, encode_answer(answer))

    def _spend(self, who: PeerCredentials) -> None:
        if not self._audited.take(who.uid):
            raise Busy(
                "you are asking for too much at once",
                details=f"More than {AUDITED_PER_S:g} requests a second that go into an audit log.",
                resolution="Wait a few seconds, then try again.",
            )

    def _answer(self, connection: Connection, verb: Verb, request: Any) -> Any:
        """What the loop answers itself; None if it has been sent already."""
        service = self._service
        if connection.lease is not None and not isinstance(request, CloseRequest):
            raise Conflict(
                "this connection holds a guest's channel", resolution="Ask for anything else on another one."
            )
        if isinstance(request, ChannelRequest):
            return self._open_channel(connection, request)
        if isinstance(request, CloseRequest):
            if connection.lease is None:
                raise Conflict("this connection holds no channel", resolution="Open one first.")
            connection.give_back(clean=request.clean)
            return Nothing()
        if isinstance(request, ListRequest):
            return service.list_instances(request)
        if isinstance(request, TenantRequest):
            return service.inspect_tenant(request)
        if isinstance(request, TenantsRequest):
            return service.list_tenants(request)
        if isinstance(request, ConsoleRequest):
            return self._read_console(connection, request)
        if verb.name == "ping":
            return service.describe(
                operations=len(self._asked()),
                channels=sum(1 for c in self._connections.values() if c.lease is not None),
                recovering=len(self._to_recover) + sum(1 for j in self._jobs.values() if j.verb == "recover"),
            )
        raise AssertionError(f"{verb.name} has no answer")

    def _read_console(self, connection: Connection, request: ConsoleRequest) -> Any:
        answer = self._service.read_console(request)
        if connection.console != request.instance:
            # Once for a reader, who keeps its connection while it follows; before anything of it is told.
            self._spend(connection.peer)
            self._service.note_console(request, connection.peer)
            connection.console = request.instance
        return answer

    def _open_channel(self, connection: Connection, request: ChannelRequest) -> None:
        who = connection.peer
        try:
            lease, sock, by_vsock = self._service.host.lease_channel(request.instance)
        except MvmError as error:
            self._service.note_channel(request, who, error)
            raise
        with sock:
            connection.lease = lease
            try:
                # Before the guest can be reached through it.
                self._service.note_channel(request, who, None)
            except BaseException:
                connection.give_back(clean=lease.was_clean)  # not a byte was sent
                raise
            answer = ChannelAnswer(lease.port or 0, lease.was_clean, by_vsock)
            self._log.info(
                "channel", instance=request.instance, purpose=request.purpose.value, uid=who.uid, pid=who.pid
            )
            connection.queue_with_fd(encode_answer(answer), sock.fileno())

    # Operations.

    def _operate(self, connection: Connection, verb: Verb, request: Any) -> None:
        if connection.lease is not None:
            raise Conflict(
                "this connection holds a guest's channel", resolution="Ask for anything else on another one."
            )
        instance = _instance(request)
        if self._stopping:
            raise Busy("mvm-hostd is stopping", resolution="Try again when it runs.")
        asked = self._asked()
        room = self._operations
        if connection.peer.uid != 0 and room > OPERATIONS_RESERVED:
            room -= OPERATIONS_RESERVED
        if len(asked) >= room:
            raise Busy(
                "mvm-hostd is busy with other operations",
                details=f"{len(asked)} are in progress, which is its limit.",
                resolution="Try again in a moment.",
            )
        if instance is None and any(job.instance is None for job in asked):
            raise Busy(
                "the network is being verified already",
                details="One verification at a time looks at the whole node.",
                resolution="Try again in a moment.",
            )
        if (
            instance is not None
            and sum(1 for job in asked if job.instance == instance) >= WAITING_PER_INSTANCE
        ):
            raise Busy(
                f"too many operations wait for {instance}",
                details=f"{WAITING_PER_INSTANCE} are in progress or waiting.",
                resolution="Wait for them to end, then try again.",
            )
        plan = request.plan if isinstance(request, PlanRequest) else None
        job = Job(
            verb=verb.name, instance=instance, plan=plan, peer=connection.peer, connection=connection,
            timeout_s=verb.timeout_s,
        )  # fmt: skip
        self._start(job, verb, request)
        connection.job = job

    def _asked(self) -> list[Job]:
        """What clients wait for, or would if they had stayed."""
        return [job for job in self._jobs.values() if job.verb != "recover" and not job.answered]

    def _recover_next(self) -> None:
        """Start what the start-up still has to recover; when all is done, say that we are ready."""
        running = sum(1 for job in self._jobs.values() if job.verb == "recover")
        while self._to_recover and running < self._operations:
            instance = self._to_recover.popleft()
            try:
                self._recover(instance)
            except MvmError as error:  # any command on the instance recovers it as well
                self._log.error("not recovered", instance=instance, error=error.brief)
                continue
            running += 1
        if not self._ready and not running and not self._to_recover and not self._stopping:
            self._ready = True
            self._notifier.tell("READY=1", "STATUS=serving")
            self._log.info("ready")

    def _recover(self, instance: InstanceId) -> None:
        job = Job(
            verb="recover",
            instance=instance,
            plan=None,
            peer=_ROOT,
            connection=None,
            timeout_s=_RECOVER.timeout_s,
        )
        self._start(job, _RECOVER, InstanceRequest(instance))

    def _start(self, job: Job, verb: Verb, request: Any) -> None:
        starting = ("create_instance", "wake_instance")
        admitted = [other.plan for other in self._jobs.values() if other.plan and other.verb in starting]
        try:
            job.start(
                lambda tell: errand(self._service, self._log, job, verb, request, admitted, tell),
                self._leave_loop,
            )
        except OSError as error:
            raise ResourceExhausted("no process could be started", details=str(error)) from error
        assert job.sock is not None
        self._jobs[job.pid] = job
        self._watch(job.sock.fileno(), select.POLLIN, lambda _: self._relay(job))
        self._watch(job.pidfd, select.POLLIN, lambda _: self._ended(job))
        if job.verb != "recover":
            self._log.info(
                "operation",
                verb=verb.name,
                instance=job.instance,
                uid=job.peer.uid,
                pid=job.peer.pid,
                child=job.pid,
            )

    def _relay(self, job: Job) -> None:
        before = job.sock.fileno() if job.sock is not None else -1
        for body in job.messages():
            final = not body.startswith(b'{"progress"')
            job.answered = job.answered or final
            if job.connection is not None:
                if final:
                    job.connection.job = None
                self._reply(job.connection, body, droppable=not final)
                if job.connection is not None:
                    self._settle(job.connection)
                if final:
                    job.connection = None
        if job.sock is None and before >= 0:
            self._unwatch(before)

    def _ended(self, job: Job) -> None:
        self._relay(job)
        if job.sock is not None:
            self._unwatch(job.sock.fileno())
        self._unwatch(job.pidfd)
        status = job.reap()
        took = round((time.monotonic() - job.began) * 1000)
        job.close()
        del self._jobs[job.pid]
        if job.answered:
            return
        # Killed, or it died of a defect. What it was at is recovered before anybody asks.
        how = (
            f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        )
        self._log.error("operation died", verb=job.verb, instance=job.instance, how=how, ms=took)
        if job.connection is not None:
            connection, job.connection = job.connection, None
            connection.job = None
            error = Busy(
                f"{job.what} was ended before it was done",
                details=how,
                resolution="It is being recovered. Look at the instance, then try again."
                if job.instance
                else "Try again.",
            )
            self._reply(connection, encode_error(error))
            self._settle(connection)
        if job.instance is not None and job.verb != "recover" and not self._stopping:
            self._to_recover.append(job.instance)

    def _leave_loop(self) -> None:
        """Forget all that is the loop's, so that nothing here closes a descriptor that has another meaning by then.

        The descriptors themselves are closed by the job. Locks stay the parent's: it still has its own.
        """
        for connection in self._connections.values():
            connection.sock.detach()
        for job in self._jobs.values():
            if job.sock is not None:
                job.sock.detach()
        for sock in (self._listener, self._woken, self._waker):
            if sock is not None:
                sock.detach()
        self._notifier.forget()


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return  # connections beyond the limit wait in the backlog


def _instance(request: Any) -> InstanceId | None:
    if isinstance(request, PlanRequest):
        return request.plan.instance
    found = getattr(request, "instance", None)
    return found if isinstance(found, InstanceId) else None
