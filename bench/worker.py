"""The worker that runs in the measured guests, and the host's end of it.

It keeps STATE_MIB of state in memory only, a quarter of each page noise and the rest source text, and answers requests
on TCP: `touch` reads every page of the state; `dirty N` overwrites N MiB of another buffer with noise, which no
compressor makes smaller; each answer carries the checksum of the state and how many requests this very process has
answered, so a wake that lost anything is noticed. The request after a wake is what a client of a
sleeping service sends.
"""

from __future__ import annotations

import json
import socket
import time

STATE_MIB = 20
DIRTY_MAX_MIB = 64
PORT = 7000
_TIMEOUT_S = 60.0

SOURCE = r"""
import json, mmap, os, socket, sys, zlib
PAGE, state_mib, dirty_max, port = 4096, int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
text = open(json.decoder.__file__, "rb").read()
text = (text * 4)[: 3 * PAGE // 4 * 8]
state = bytearray()
for n in range(state_mib * 256):
    at = n % 8 * (3 * PAGE // 4)
    state += os.urandom(PAGE // 4) + text[at : at + 3 * PAGE // 4]
spare = mmap.mmap(-1, dirty_max << 20)
answered = 0
server = socket.create_server(("", port), backlog=4)
print("worker ready", flush=True)
while True:
    client, _ = server.accept()
    with client:
        words = client.makefile().readline().split()
        if words[0] == "dirty":
            for n in range(int(words[1])):
                spare[n << 20 : (n + 1) << 20] = os.urandom(1 << 20)
        answered += 1
        # One byte of every page: what is measured is getting at the memory, not the guest's arithmetic.
        answer = {"answered": answered, "pid": os.getpid(), "sum": zlib.crc32(state[::PAGE])}
        client.sendall(json.dumps(answer).encode() + b"\n")
"""


class StateLost(Exception):
    """The worker that answered is not the one that fell asleep, or its memory is not what it was."""


class Worker:
    """The host's end: one worker at `ip`, and what is known of it. Make a new one after a cold boot."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._known: dict[str, int] | None = None

    @staticmethod
    def argv() -> list[str]:
        return ["python3", "-c", SOURCE, str(STATE_MIB), str(DIRTY_MAX_MIB), str(PORT)]

    def wait(self) -> None:
        """Until it answers for the first time. TimeoutError."""
        until = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                return self.ask("touch")
            except (ConnectionError, TimeoutError, OSError):
                if time.monotonic() > until:
                    raise TimeoutError(f"the worker at {self._ip} does not answer") from None
                time.sleep(0.05)

    def ask(self, request: str, *, restored: bool = False) -> None:
        """Send one request and check the answer. `restored`: this life will be forgotten, so remember nothing."""
        with socket.create_connection((self._ip, PORT), timeout=_TIMEOUT_S) as sock:
            sock.sendall(request.encode() + b"\n")
            with sock.makefile("rb") as file:
                answer: dict[str, int] = json.loads(file.readline(4096))
        known = self._known
        if known is not None and {**known, "answered": known["answered"] + 1} != answer:
            raise StateLost(f"before: {known}; now: {answer}")
        if not restored:
            self._known = answer
