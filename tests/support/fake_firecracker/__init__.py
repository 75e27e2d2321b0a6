"""A strict fake of Firecracker and its jailer: two real programs, for the very code that runs the real ones.

    programs = install(folder, version="1.16.1", faults=["hang PUT /snapshot/create"])
    run([programs / "firecracker", "--api-sock", ...])
    run([programs / "jailer", "--id", ..., "--exec-file", programs / "firecracker", ...])

Each is one executable file, a zip archive for the interpreter in its first line, without anything beside it: the jailer
copies it into a jail as it would copy the real one. Version and faults (`faults.py` lists them) are inside; `install`
into the same directory again to change them, which touches no process that runs.

What is real: process, uid, jail, socket, HTTP, threads, seccomp mode, files that are opened, taps, guest memory (a
private mapping of the machine's size, or of the memory file), signals, exit codes; the guest's agent.
What is not: processor, kernel, disks, traffic. See `guest.py` for what lives in the guest, `vmm.py`, `vsock.py` and
`jailer.py` for the rules that are enforced. Formats of state files and of compiled seccomp filters are the fake's own.

For tests: `elf_kernel()` is a kernel image it boots. Through its vsock socket the guest's agent is at AGENT_PORT, and
at PROBE_PORT what a test does inside the guest (`guest.Guest.do_*`; `Probe` is a client). The count of the guest's
worker, which goes on over a wake, is at guest offset COUNTER.
"""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import struct
import sys
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.fake_driver import interpreter

import mvm
from mvm.guest import proto
from mvm.linux.sockets import connect_unix

from . import versions
from .faults import Faults

AGENT_PORT = proto.VSOCK_PORT
PROBE_PORT = 5253
COUNTER = 16 * 4096
"""Where in guest memory the worker counts: 8 bytes, little endian (`guest.COUNTER`)."""
PROGRAMS = ("firecracker", "jailer")
_START = """import json, sys, zipfile
from fake_firecracker.{name} import main
with zipfile.ZipFile(sys.argv[0]) as archive:
    config = json.loads(archive.read("config.json"))
main(sys.argv[1:], config)
"""


def install(
    folder: Path, *, version: str = "1.16.1", faults: Iterable[str] = (), proc_mounts: Path | None = None
) -> Path:
    """Write both programs into `folder` (made if it is not there); any uid may run them. Returns `folder`.

    `version`: three numbers. `proc_mounts`: what the jailer reads in the place of /proc/mounts, to find control groups
    that are plain directories of a test. Raises ValueError for a version or fault that is none.
    """
    versions.parse(version)
    lines = list(faults)
    Faults(lines)
    config = {
        "version": version,
        "faults": lines,
        "proc_mounts": str(proc_mounts or "/proc/mounts"),
        "prefixes": _prefixes(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        made = io.BytesIO()
        made.write(f"#!{interpreter()} -ISB\n".encode())
        with zipfile.ZipFile(made, "a") as archive:
            for path, content in _members():
                archive.writestr(path, content)
            archive.writestr("__main__.py", _START.format(name=name))
            archive.writestr("config.json", json.dumps(config))
        temporary = folder / f".{name}.new"
        temporary.write_bytes(made.getvalue())
        temporary.chmod(0o755)
        temporary.rename(folder / name)
    return folder


@cache
def _members() -> list[tuple[str, bytes]]:
    """The fake's modules and the guest agent's, compiled as well: each start would compile them again."""
    members: list[tuple[str, bytes]] = [("fake_firecracker/__init__.py", b""), ("mvm/__init__.py", b"")]
    for package, folder in (
        ("fake_firecracker", Path(__file__).parent),
        ("mvm/guest", Path(mvm.__file__).parent / "guest"),
    ):
        for path in sorted(folder.glob("*.py")):
            if package == "fake_firecracker" and path.name in ("__init__.py", "client.py"):
                continue
            source = path.read_bytes()
            code = compile(source, f"{package}/{path.name}", "exec", dont_inherit=True)
            members.append((f"{package}/{path.name}", source))
            members.append((f"{package}/{path.stem}.pyc", _pyc(code)))
    return members


def _pyc(code: Any) -> bytes:
    import marshal

    # Flag 1: named by hash, unchecked, so that no time of a file matters.
    return importlib.util.MAGIC_NUMBER + struct.pack("<I", 1) + bytes(8) + marshal.dumps(code)


def _prefixes() -> list[str]:
    """Directories that the interpreter needs and that are not below /usr."""
    found = {str(Path(interpreter()).resolve().parents[1]), sys.base_prefix}
    return sorted(path for path in found if path != "/usr" and not path.startswith("/usr/"))


def elf_kernel() -> bytes:
    """An uncompressed x86-64 kernel image, as far as anybody looks: the header of an ELF file."""
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHI", 2, 62, 1) + bytes(40)


class Probe:
    """A client of the guest's probe port. `ask` is one request; OSError when the guest does not answer in time."""

    def __init__(self, uds: Path, timeout: float = 10.0) -> None:
        self._sock = vsock_connect(uds, PROBE_PORT, timeout)

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        self._sock.sendall(json.dumps({"do": command, **arguments}).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            data = self._sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the guest's probe port is gone")
            line += data
        answer: dict[str, Any] = json.loads(line)
        return answer

    def count(self) -> int:
        return int(self.ask("status")["count"])

    def close(self) -> None:
        self._sock.close()


def vsock_connect(uds: Path, port: int, timeout: float = 10.0) -> socket.socket:
    """Connected to `port` of the guest. ConnectionError if nobody listens there, TimeoutError."""
    sock = connect_unix(uds, timeout)
    try:
        sock.settimeout(timeout)
        sock.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte:
                raise ConnectionRefusedError(f"port {port} of the guest")
            line += byte
        if not line.startswith(b"OK "):
            raise ConnectionError(f"the answer to CONNECT is {line!r}")
    except BaseException:
        sock.close()
        raise
    return sock


__all__ = ["AGENT_PORT", "COUNTER", "PROBE_PORT", "Probe", "elf_kernel", "install", "vsock_connect"]
