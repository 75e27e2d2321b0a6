"""Exec: one program of the host's choosing, its streams and its end.

Output is read from the program only while the host granted credit for it and the connection is not congested,
so a reader that stops reading stops the program, not this process. EXIT is sent when the program itself has
ended and what it wrote until then was sent: a background child that keeps the pipe open does not keep the
session open.
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import Struct
from time import monotonic

from mvm.guest import process, proto
from mvm.guest.conn import HIGH_WATER, Connection, Refusal, Request
from mvm.guest.loop import IN, OUT
from mvm.guest.proto import Malformed, Reader

KILL_AFTER = 2.0  # seconds between SIGHUP and SIGKILL for the programs of a client that died
_VEOF = b"\x04"
_WINSIZE = Struct("HHHH")


class Activity:
    """When a session last moved a byte, began or ended; and how many there are."""

    def __init__(self) -> None:
        self.last = monotonic()
        self.sessions = 0


class _Output:
    """A pipe or terminal the program writes to."""

    def __init__(self, fd: int, stream: int, window: int) -> None:
        self.fd = fd
        self.stream = stream
        self.credit = window
        self.watched = False


class Session(Request):
    def __init__(self, conn: Connection, number: int, activity: Activity, *, tty: bool) -> None:
        super().__init__(conn, number)
        self._activity = activity
        self._tty = tty
        self._pid = 0
        self._status: int | None = None
        self._outputs: list[_Output] = []
        self._stdin = -1
        self._stdin_buf = bytearray()
        self._stdin_credit = proto.STREAM_WINDOW
        self._stdin_taken = 0
        self._stdin_eof = False
        self._stdin_watched = False
        self._over = False
        activity.sessions += 1
        activity.last = monotonic()

    def start(
        self,
        argv: list[bytes],
        env: dict[bytes, bytes],
        cwd: bytes,
        user: process.User,
        window: int,
        size: tuple[int, int],
        want_stdin: bool,
    ) -> None:
        """Start the program and report STARTED; OSError leaves nothing behind."""
        theirs: list[int] = []
        try:
            if self._tty:
                master, slave = os.openpty()
                theirs.append(slave)
                self._outputs.append(_Output(master, proto.STDOUT, window))
                self._stdin = master
                fcntl.ioctl(master, process.TIOCSWINSZ, _winsize(*size))
                fds = (slave, slave, slave)
            else:
                if want_stdin:
                    in_r, self._stdin = os.pipe()
                else:
                    in_r = os.open("/dev/null", os.O_RDONLY)
                theirs.append(in_r)
                for stream in (proto.STDOUT, proto.STDERR):
                    out_r, out_w = os.pipe()
                    theirs.append(out_w)
                    self._outputs.append(_Output(out_r, stream, window))
                fds = (in_r, theirs[1], theirs[2])
            self._pid = process.spawn(argv, env, fds, cwd=cwd, user=user, tty=self._tty)
        except OSError:
            self._release()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        for output in self._outputs:
            os.set_blocking(output.fd, False)
        if self._stdin >= 0:
            os.set_blocking(self._stdin, False)
        self.conn.loop.child(self._pid, self._ended)
        self.send(proto.STARTED, proto.STARTED_BODY.pack(self._pid))
        self.pump()

    # what the host sends

    def data(self, stream: int, payload: bytes) -> None:
        if stream != proto.STDIN or self._stdin_eof or len(payload) > self._stdin_credit:
            raise Malformed
        self._stdin_credit -= len(payload)
        self._activity.last = monotonic()
        if self._stdin >= 0:
            self._stdin_buf += payload
            self._feed()
        else:
            self._consumed(len(payload))  # the program closed its end; the host need not notice

    def eof(self, stream: int) -> None:
        if stream != proto.STDIN:
            raise Malformed
        if not self._stdin_eof:
            self._stdin_eof = True
            if self._tty:
                self._stdin_buf += _VEOF
            self._feed()

    def credit(self, stream: int, amount: int) -> None:
        for output in self._outputs:
            if output.stream == stream:
                output.credit += amount
        self.pump()

    def signal(self, number: int) -> None:
        if not 0 < number < 65:
            raise Malformed
        self._kill(number)

    def resize(self, rows: int, columns: int) -> None:
        if self._tty and self._outputs:
            fcntl.ioctl(self._outputs[0].fd, process.TIOCSWINSZ, _winsize(rows, columns))

    def cancel(self) -> None:
        self._kill(process.SIGKILL)  # its end answers with EXIT

    def abort(self) -> None:
        if self._over:
            return
        if self._status is None and self._pid:
            self._kill(process.SIGHUP)
            self._kill(process.SIGCONT)
            self.conn.loop.after(KILL_AFTER, self._kill_left_over)
        self._release()

    # towards the host

    def pump(self) -> None:
        if self._over:
            return
        congested = self.conn.pending_out >= HIGH_WATER
        for output in list(self._outputs):
            wanted = output.credit > 0 and not congested
            if wanted and not output.watched:
                output.watched = True
                self.conn.loop.watch(
                    output.fd, IN | (OUT if self._tty and self._stdin_watched else 0), self._any
                )
            elif not wanted and output.watched:
                output.watched = False
                self._rewatch(output)
        if self._status is not None:
            self._drain()

    def _rewatch(self, output: _Output) -> None:
        if self._tty and self._stdin_watched:
            self.conn.loop.watch(output.fd, OUT, self._any)
        else:
            self.conn.loop.forget(output.fd)

    def _any(self, _events: int) -> None:
        self._activity.last = monotonic()
        if self._stdin_watched:
            self._feed()
        for output in list(self._outputs):
            if output.watched:
                self._read(output)
        self.pump()

    def _read(self, output: _Output) -> bool:
        """Move one chunk; False when there is nothing now."""
        try:
            chunk = os.read(output.fd, min(proto.CHUNK, output.credit))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the last holder closed the terminal
                raise
            chunk = b""
        if chunk:
            output.credit -= len(chunk)
            self.send(proto.OUT_DATA, b"%c" % output.stream + chunk)
            return True
        self._close_output(output)
        return False

    def _close_output(self, output: _Output) -> None:
        self._outputs.remove(output)
        self.conn.loop.forget(output.fd)
        if output.fd == self._stdin:
            self._stdin = -1
            self._stdin_watched = False
        os.close(output.fd)
        self.send(proto.OUT_EOF, b"%c" % output.stream)

    def _ended(self, status: int) -> None:
        self._status = status
        if not self._over:
            self._drain()

    def _drain(self) -> None:
        """After the program's end: send what is left as credit allows, then EXIT."""
        for output in list(self._outputs):
            while True:
                if output.credit <= 0 or self.conn.pending_out >= HIGH_WATER:
                    return  # pump comes back here
                if not self._read(output):
                    break
        assert self._status is not None
        code = os.waitstatus_to_exitcode(self._status)
        body = proto.EXIT_BODY.pack(code, 0) if code >= 0 else proto.EXIT_BODY.pack(0, -code)
        self._release()
        self.finish(proto.EXIT, body)

    # towards the program

    def _feed(self) -> None:
        buf = self._stdin_buf
        if self._stdin < 0:
            self._consumed(len(buf))
            buf.clear()
            return
        try:
            while buf:
                sent = os.write(self._stdin, buf[: proto.CHUNK])
                del buf[:sent]
                self._consumed(sent)
        except BlockingIOError:
            pass
        except OSError:  # EPIPE, EIO: the program reads no more
            self._consumed(len(buf))
            buf.clear()
            if not self._tty:
                self._stdin_close()
            return
        if self._tty:
            self._watch_tty_input(bool(buf))
        elif buf:
            if not self._stdin_watched:
                self._stdin_watched = True
                self.conn.loop.watch(self._stdin, OUT, self._stdin_ready)
        else:
            if self._stdin_watched:
                self._stdin_watched = False
                self.conn.loop.forget(self._stdin)
            if self._stdin_eof:
                self._stdin_close()

    def _watch_tty_input(self, wanted: bool) -> None:
        if wanted == self._stdin_watched:
            return
        self._stdin_watched = wanted
        watched = self._outputs[0].watched
        if wanted or watched:
            self.conn.loop.watch(self._stdin, (IN if watched else 0) | (OUT if wanted else 0), self._any)
        else:
            self.conn.loop.forget(self._stdin)

    def _stdin_ready(self, _events: int) -> None:
        self._activity.last = monotonic()
        self._feed()

    def _stdin_close(self) -> None:
        if self._stdin >= 0:
            self.conn.loop.forget(self._stdin)
            os.close(self._stdin)
            self._stdin = -1
            self._stdin_watched = False

    def _consumed(self, count: int) -> None:
        self._stdin_taken += count
        if self._stdin_taken >= proto.STREAM_WINDOW // 2 and not self._stdin_eof:
            self._stdin_credit += self._stdin_taken
            self.send(proto.OUT_CREDIT, proto.CREDIT_BODY.pack(proto.STDIN, self._stdin_taken))
            self._stdin_taken = 0

    # its life

    def _kill(self, number: int) -> None:
        if self._status is None and self._pid:
            try:
                os.killpg(self._pid, number)
            except OSError:
                pass

    def _kill_left_over(self) -> None:
        self._kill(process.SIGKILL)

    def _release(self) -> None:
        if self._over:
            return
        self._over = True
        self._activity.sessions -= 1
        self._activity.last = monotonic()
        if not self._tty:
            self._stdin_close()
        for output in self._outputs:
            self.conn.loop.forget(output.fd)
            os.close(output.fd)
        self._outputs.clear()
        self._stdin = -1
        self._stdin_buf.clear()


def _winsize(rows: int, columns: int) -> bytes:
    return _WINSIZE.pack(rows or 24, columns or 80, 0, 0)


class ExecVerb:
    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __call__(self, conn: Connection, number: int, body: bytes) -> None:
        if len(body) < proto.EXEC_HEAD.size:
            raise Malformed
        flags, rows, columns, window = proto.EXEC_HEAD.unpack_from(body)
        reader = Reader(body, proto.EXEC_HEAD.size)
        argv = reader.texts()
        overlay = reader.texts()
        cwd = reader.text()
        user_name = reader.text()
        reader.end()
        if not argv or b"\0" in b"".join(argv + overlay + [cwd, user_name]):
            raise Malformed
        try:
            user = process.find_user(user_name.decode())
        except UnicodeDecodeError:
            user = None
        if user is None:
            raise Refusal(proto.E_NOT_FOUND, "no such user in the guest")
        env = process.base_env(user)
        for entry in overlay:
            key, found, value = entry.partition(b"=")
            if not key or not found:
                raise Malformed
            env[key] = value
        tty = bool(flags & proto.EXEC_TTY)
        if tty:
            env.setdefault(b"TERM", b"linux")
        where = cwd or (os.fsencode(user.home) if os.path.isdir(user.home) else b"/")
        if flags & proto.EXEC_DETACH:
            pid = _detach(argv, env, where, user)
            self._activity.last = monotonic()
            conn.send(proto.frame(proto.STARTED, number, proto.STARTED_BODY.pack(pid)))
            conn.send(proto.frame(proto.EXIT, number, proto.EXIT_BODY.pack(0, 0)))
            return
        session = Session(conn, number, self._activity, tty=tty)
        conn.requests[number] = session
        session.start(argv, env, where, user, window, (rows, columns), bool(flags & proto.EXEC_STDIN))


def _detach(argv: list[bytes], env: dict[bytes, bytes], cwd: bytes, user: process.User) -> int:
    null = os.open("/dev/null", os.O_RDWR)
    try:
        console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        console = os.dup(null)
    try:
        return process.spawn(argv, env, (null, console, console), cwd=cwd, user=user, detach=True)
    finally:
        os.close(null)
        os.close(console)
