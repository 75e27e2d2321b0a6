"""A client of Firecracker's API: one request at a time, every wait bounded.

The API has a single thread, so a request that follows a slow one waits for it; and it serves ten connections, an
eleventh gets 503. A client therefore keeps one connection while it is used and none otherwise.

Failures are three: `Refused` (the VMM answered that it will not), `Gone` (it closed the connection: after a load that
failed it exits), and VmmError for everything else, time running out included.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import msgspec

from mvm.core.errors import VmmError
from mvm.hostd.jailed_run import Place
from mvm.hostd.vmm.firecracker.http import Reader, Response, render
from mvm.hostd.vmm.firecracker.requests import GET_INSTANCE, Call

_RECEIVE = 1 << 16


class Refused(VmmError):
    """The VMM answered a request with a failure; `status` is HTTP's, `said` its message."""

    def __init__(self, call: Call, response: Response) -> None:
        self.status = response.status
        self.said = response.message()
        brief = f"Firecracker refused {call}"
        if response.status == 503:
            brief = f"Firecracker has too many connections to take {call}"
        super().__init__(brief, details=self.said)


class Gone(VmmError):
    """The VMM closed the connection or cannot be reached: it has ended, or is about to."""


class Api:
    """The API at the socket `name` of a VMM. Connects at the first call."""

    def __init__(self, vmm: Place, name: str) -> None:
        self._vmm = vmm
        self._name = name
        self._socket: socket.socket | None = None
        self._reader = Reader()

    def call(self, call: Call, *, timeout: float) -> bytes:
        """The body of a successful answer. `timeout`: seconds for all of it."""
        response = self.ask(call, timeout=timeout)
        if not response.ok:
            raise Refused(call, response)
        return response.body

    def get(self, call: Call, *, timeout: float) -> dict[str, Any]:
        """The answer to a GET. VmmError if it is not a JSON object."""
        try:
            found = msgspec.json.decode(self.call(call, timeout=timeout))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise VmmError(f"Firecracker's answer to {call} is not JSON", details=str(error)) from error
        if not isinstance(found, dict):
            raise VmmError(f"Firecracker's answer to {call} is not an object", details=repr(found)[:200])
        return found

    def state(self, *, timeout: float) -> str:
        """`Not started`, `Running` or `Paused`."""
        return str(self.get(GET_INSTANCE, timeout=timeout).get("state", ""))

    def ask(self, call: Call, *, timeout: float) -> Response:
        """The answer, whatever its status."""
        deadline = time.monotonic() + timeout
        try:
            sock = self._connected(deadline)
            _limit(sock, call, deadline)
            sock.sendall(render(call))
            while True:
                _limit(sock, call, deadline)
                data = sock.recv(_RECEIVE)
                if not data:
                    raise Gone(f"Firecracker ended during {call}", details="It closed its API socket.")
                response = self._reader.feed(data)
                if response is not None:
                    if response.status == 503:
                        self.close()
                    return response
        except TimeoutError as error:
            self.close()
            raise _late(call, timeout) from error
        except OSError as error:
            self.close()
            raise Gone(f"Firecracker is gone: {call}", details=f"{self._name}: {error}") from error
        except VmmError:
            # An answer may still come, and would be taken for that to the next request.
            self.close()
            raise

    def _connected(self, deadline: float) -> socket.socket:
        if self._socket is None:
            self._reader = Reader()
            self._socket = self._vmm.connect(self._name, max(0.001, deadline - time.monotonic()))
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _limit(sock: socket.socket, call: Call, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _late(call: Call, timeout: float) -> VmmError:
    return VmmError(f"Firecracker did not answer {call} in time", details=f"Waited {timeout:g} s.")
