"""A QMP client: one request at a time, every wait bounded.

QMP is JSON objects, one a line: a greeting, then for every request one `return` or `error`, with events in between
(docs/interop/qmp-spec in QEMU). QEMU serves one client at a time and queues the next.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvm.core.errors import VmmError
from mvm.linux.sockets import connect_unix

_LINE_MAX = 1 << 20


class Qmp:
    """A connection to the monitor at `path`. Raises VmmError for everything that goes wrong, time-outs included.

    `broken`: out of step or lost; nothing but `close` makes sense any more.
    """

    def __init__(self, path: Path, *, timeout: float) -> None:
        self._buffer = b""
        self.broken = False
        try:
            self._socket = connect_unix(path, timeout=timeout)
        except OSError as error:
            raise VmmError("QEMU's monitor cannot be reached", details=f"{path}: {error}") from error
        try:
            deadline = time.monotonic() + timeout
            if "QMP" not in self._line(deadline):
                raise VmmError("QEMU's monitor did not greet", details=str(path))
            self.call("qmp_capabilities", timeout=timeout)
        except BaseException:
            self.close()
            raise

    def call(self, command: str, *, fds: Sequence[int] = (), timeout: float, **arguments: object) -> Any:
        """Run `command`; `fds` travel with it (for `add-fd`, `getfd`). Underscores in argument names become hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = json.dumps({"execute": command, "arguments": named}).encode() + b"\n"
        deadline = time.monotonic() + timeout
        try:
            self._socket.settimeout(timeout)
            if fds:
                socket.send_fds(self._socket, [request], list(fds))
            else:
                self._socket.sendall(request)
        except OSError as error:
            self.broken = True
            raise VmmError("QEMU is gone", details=f"{command}: {error}") from error
        while True:
            answer = self._line(deadline)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                problem = answer["error"]
                text = problem.get("desc", "") if isinstance(problem, dict) else str(problem)
                raise VmmError(f"QEMU refused {command}", details=text)

    def _line(self, deadline: float) -> dict[str, Any]:
        try:
            return self._read_line(deadline)
        except VmmError:
            # The answer may still come, and would be taken for that to the next request.
            self.broken = True
            raise

    def _read_line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._buffer) > _LINE_MAX:
                raise VmmError("QEMU's monitor does not answer")
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                raise VmmError("QEMU is gone", details=str(error)) from error
            if not data:
                raise VmmError("QEMU is gone", details="It closed its monitor.")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise VmmError("QEMU's monitor sent something that is not JSON") from error
        if not isinstance(answer, dict):
            raise VmmError("QEMU's monitor sent something that is not an object")
        return answer

    def close(self) -> None:
        self._socket.close()
