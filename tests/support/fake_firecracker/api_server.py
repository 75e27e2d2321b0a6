"""The HTTP end: one thread for everybody, ten connections, a request line and headers of at most 1024 bytes each.

Requests are answered one after the other, whoever they come from: while one takes long, nobody else is heard.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time

from . import seccomp
from .requests import ApiError, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .faults import Faults
    from .logs import Log
    from .requests import Action
    from .versions import Version

    Submit = Callable[[Action], tuple[int, str]]

MAX_CONNECTIONS = 10
_LINE = 1024
_FULL_BODY = b'{ "error": "Too many open connections" }'
_FULL = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n" + _FULL_BODY
)
_METHODS = (b"GET", b"PUT", b"PATCH", b"DELETE")


class NotHttp(Exception):
    """What was received cannot be parsed."""


class Request:
    def __init__(self, method: str, path: str, body: bytes | None) -> None:
        self.method, self.path, self.body = method, path, body


class Parser:
    """Bytes of one connection in, requests out. `wants_continue` once a client waits for leave to send its body."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = b""
        self._head: list[bytes] = []
        self._length = -1
        self.wants_continue = False

    def feed(self, data: bytes) -> list[Request]:
        """Raises NotHttp, after which what was received is forgotten."""
        self._buffer += data
        try:
            found = []
            while (request := self._next()) is not None:
                found.append(request)
            return found
        except NotHttp:
            self.__init__(self._limit)  # type: ignore[misc]
            raise

    def _next(self) -> Request | None:
        while self._length < 0:
            line, mark, rest = self._buffer.partition(b"\r\n")
            if not mark:
                if len(self._buffer) >= _LINE:
                    raise NotHttp("Invalid request.")
                return None
            if len(line) >= _LINE:
                raise NotHttp("Invalid request.")
            self._buffer = rest
            if self._head or line:
                if not self._head:
                    _request_line(line)
                if line:
                    self._head.append(line)
                    continue
            self._end_of_head()
        if len(self._buffer) < self._length:
            return None
        method, path = _request_line(self._head[0])
        body = self._buffer[: self._length] if self._length else None
        self._buffer = self._buffer[self._length :]
        self._head, self._length = [], -1
        return Request(method, path, body)

    def _end_of_head(self) -> None:
        if not self._head:
            raise NotHttp("Invalid request.")
        length, wants_continue = 0, False
        for line in self._head[1:]:
            name, mark, value = line.partition(b":")
            if not mark:
                raise NotHttp(f"Invalid header. Reason: Header is incorrectly formatted. Key: {_text(name)}")
            if name.lower() == b"content-length":
                digits = value.strip()
                if not digits.isdigit() or int(digits) >= 1 << 32:
                    raise NotHttp(
                        f"Invalid header. Reason: Invalid value. Key:{_text(name)}; Value:{_text(value)}"
                    )
                length = int(digits)
            elif name.lower() == b"expect" and value.strip() == b"100-continue":
                wants_continue = True
        if length > self._limit:
            raise NotHttp(
                f"Request payload with size {length} is larger than the limit of {self._limit} allowed by server."
            )
        self.wants_continue = wants_continue and length > 0
        self._length = length


def _request_line(line: bytes) -> tuple[str, str]:
    words = line.split(b" ")
    if len(words) != 3:
        raise NotHttp("Invalid request.")
    method, uri, version = words
    if method not in _METHODS:
        raise NotHttp("Invalid HTTP Method: Unsupported HTTP method.")
    if not uri:
        raise NotHttp("Invalid URI: Empty URI not allowed.")
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise NotHttp("Invalid HTTP Version: Unsupported HTTP version.")
    path = _text(uri)
    if path.startswith("http://"):
        _, slash, rest = path.removeprefix("http://").partition("/")
        path = slash + rest
    return method.decode(), path if path.startswith("/") else ""


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def response(status: int, body: str, *, deprecated: bool = False) -> bytes:
    head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    if deprecated:
        head += "Deprecation: true\r\n"
    raw = body.encode()
    if status not in (100, 204):
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    return head.encode() + b"\r\n" + raw


class ApiServer:
    """Listens from the start; `run` is the body of its thread. `submit` has the VMM's thread do an action."""

    def __init__(
        self, path: str, *, version: Version, limit: int, log: Log, faults: Faults, submit: Submit
    ) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(128)
        self._version, self._limit, self._log, self._faults = version, limit, log, faults
        self._submit = submit
        self._clients: dict[int, tuple[socket.socket, Parser]] = {}
        self._poll = select.epoll()
        self.stopping = threading.Event()
        """Set by the VMM's thread while the API thread waits for it: answer that one, then end."""
        self.stopped = threading.Event()

    def run(self, *, filtered: bool) -> None:
        seccomp.name_thread("fc_api")
        if filtered:
            seccomp.apply()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._log.info("API server started.")
        try:
            while not self.stopping.is_set():
                for fd, events in self._poll.poll():
                    if fd == self._listener.fileno():
                        self._accept()
                    elif fd in self._clients:
                        self._serve(fd, events)
                    if self.stopping.is_set():
                        break
        finally:
            self.stopped.set()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if len(self._clients) >= MAX_CONNECTIONS:
            with client:
                client.send(_FULL)
            return
        self._clients[client.fileno()] = (client, Parser(self._limit))
        self._poll.register(client.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def _drop(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._clients.pop(fd)[0].close()

    def _serve(self, fd: int, events: int) -> None:
        client, parser = self._clients[fd]
        if events & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP):
            self._drop(fd)  # without looking at what it may have sent before it left
            return
        try:
            try:
                data = client.recv(65536)
                requests = parser.feed(data)
            except NotHttp as error:
                # Not JSON: the line break is in the middle of a string.
                text = f'{{ "error": "{error}\nAll previous unanswered requests will be dropped." }}'
                client.sendall(response(400, text))
                return
            if parser.wants_continue:
                parser.wants_continue = False
                client.sendall(b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")
            for request in requests:
                if not self._answer(client, request):
                    self._drop(fd)
                    return
        except OSError as error:
            self._log.error(f"API Server encountered an error on response: {error}")
            self._drop(fd)

    def _answer(self, client: socket.socket, request: Request) -> bool:
        """False if the connection is to be closed."""
        body = request.body or b""
        wrong, number = self._faults.of_request(request.method, request.path, body)
        if wrong == "hang":
            threading.Event().wait()
        if wrong == "exit":
            os._exit(number)
        if wrong == "signal":
            os.kill(os.getpid(), number)
            threading.Event().wait()
        answer = self._do(request) if wrong != "refuse" else _fault("The fake was told to refuse this.")
        if wrong == "late":
            time.sleep(1)
        if wrong == "garbage":
            client.sendall(b"\x00\xffthis is not HTTP at all\n" * 20)
            return False
        if wrong == "cut":
            client.sendall(answer[: len(answer) // 2])
            return False
        client.sendall(answer)
        if wrong == "exit after":
            os._exit(number)
        return True

    def _do(self, request: Request) -> bytes:
        method, path, body = request.method, request.path, request.body
        text = f'{method.title()} request on "{path}"'
        if body is not None and path not in ("/mmds", "/cpu-config"):
            text += f" with body {_text(body)!r}"
        self._log.info(f"The API server received a {text}.")
        try:
            action = parse(method, path, body, self._version)
        except ApiError as error:
            self._log.error(str(error))
            return _fault(str(error), error.status)
        status, answer = self._submit(action)
        if status < 300:
            self._log.info(f"The request was executed successfully. Status code: {status}.")
        else:
            self._log.error(f"Received Error. Status code: {status}. Message: {answer}")
            return _fault(answer, status, deprecated=action.deprecated)
        return response(status, answer, deprecated=action.deprecated)


def _fault(message: str, status: int = 400, *, deprecated: bool = False) -> bytes:
    import json

    return response(
        status, json.dumps({"fault_message": message}, separators=(",", ":")), deprecated=deprecated
    )
