"""What a fake can be made to do wrong. A fault is one line of text:

    no socket                       firecracker lives, but never makes its API socket
    slow start SECONDS              it waits before it makes its API socket
    exit at start CODE              it ends before it makes its API socket
    version TEXT                    what --version prints instead of "Firecracker v..." / "Jailer v..."
    hang METHOD PATH [WORD]         such a request is never answered, nor is any other after it
    refuse METHOD PATH [WORD]       400 without having done anything
    late METHOD PATH [WORD]         done, but answered only after a second
    garbage METHOD PATH [WORD]      answered with bytes that are not HTTP, and the connection is closed
    cut METHOD PATH [WORD]          half of the answer, and the connection is closed
    exit CODE METHOD PATH [WORD]    the process ends instead of an answer (148: seccomp's own exit code)
    exit after CODE METHOD PATH [WORD]     it ends just after the answer
    signal N METHOD PATH [WORD]     the process gets that signal instead
    no space                        PUT /snapshot/create answers that the disk is full, with half a state file written
    load fails                      PUT /snapshot/load answers 400 and the process exits 1
    resume fails                    PATCH /vm Resumed answers 400, and the VM stays paused
    no kvm                          InstanceStart and load answer that there is no KVM (a load then exits 1)
    no filter                       no thread has a seccomp filter, as in a build without them
    vcpu without filter             the vCPU threads have none
    no guest                        nothing in the guest listens on any vsock port
    silent guest                    the guest takes connections and answers nothing
    silent after load               the same, but only in a restored guest
    ignore sigterm                  SIGTERM does nothing
    jailer refuses                  the jailer ends with 1 before it has made anything
    jailer cannot exec              the jailer makes the whole jail and ends with 1
    jailer hangs                    the jailer does nothing at all

`METHOD PATH` is a request as it is sent; with WORD only if its body has that text in it.
"""

from __future__ import annotations

_PLAIN = (
    "no socket", "no space", "load fails", "resume fails", "no kvm", "no filter", "vcpu without filter", "no guest",
    "silent guest", "silent after load", "ignore sigterm", "jailer refuses", "jailer cannot exec", "jailer hangs",
)  # fmt: skip
_NUMBER = ("slow start", "exit at start")
_REQUEST = ("hang", "refuse", "late", "garbage", "cut")
_NUMBER_REQUEST = ("exit after", "exit", "signal")
_METHODS = ("GET", "PUT", "PATCH", "DELETE")


class Faults:
    """Parsed; ValueError for a line that is none of the above."""

    def __init__(self, lines: list[str]) -> None:
        self.plain: set[str] = set()
        self.numbers: dict[str, float] = {}
        self.version = ""
        self._requests: list[tuple[str, int, str, str, str]] = []
        for line in lines:
            self._add(line)

    def __contains__(self, name: str) -> bool:
        assert name in _PLAIN, name
        return name in self.plain

    def of_request(self, method: str, path: str, body: bytes) -> tuple[str, int]:
        """(what, number) for a request; ("", 0) if nothing goes wrong with it."""
        for what, number, wanted, where, word in self._requests:
            if (wanted, where) == (method, path) and word.encode() in body:
                return what, number
        return "", 0

    def _add(self, line: str) -> None:
        if line in _PLAIN:
            self.plain.add(line)
            return
        if line.startswith("version "):
            self.version = line.removeprefix("version ")
            return
        for name in _NUMBER:
            if line.startswith(name + " "):
                self.numbers[name] = float(line.removeprefix(name))
                return
        words = line.split()
        for name in (*_NUMBER_REQUEST, *_REQUEST):
            length = len(name.split())
            if " ".join(words[:length]) != name:
                continue
            rest = words[length:]
            number = int(rest.pop(0)) if name in _NUMBER_REQUEST and rest else 0
            if len(rest) not in (2, 3) or rest[0] not in _METHODS or not rest[1].startswith("/"):
                break
            self._requests.append((name, number, rest[0], rest[1], rest[2] if len(rest) == 3 else ""))
            return
        raise ValueError(f"no such fault: {line!r}")
