"""The verbs of the guest protocol as typed values: request bodies out, replies in.

Every decoder takes untrusted bytes and returns a frozen value or raises GuestError. Text from the guest is
shortened and stripped of control characters here, once, so that it can be shown on a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import NoReturn

import msgspec

from mvm.core.errors import GuestError, InvalidInput
from mvm.wire import framing

STDIN = 0
STDOUT = 1
STDERR = 2

EXEC_TTY = 1
EXEC_DETACH = 2
EXEC_STDIN = 4
SLEEP_DROP_CACHES = 1
SLEEP_UNMOUNT_SECRETS = 2
WAKE_REMOUNT_SECRETS = 1
SHUTDOWN_POWEROFF = 0
SHUTDOWN_REBOOT = 1

E_MALFORMED = 1
E_UNSUPPORTED = 2
E_NOT_FOUND = 3
E_DENIED = 4
E_FAILED = 5
E_TOO_LARGE = 6
E_CANCELLED = 7
E_BUSY = 8

TREE_FILE = 1
TREE_DIR = 2
TREE_LINK = 3
TREE_UP = 4
TREE_SKIPPED = 5
TREE_FAILED = 0xFFFFFFFF
MAX_NAME = 255
MAX_TARGET = 4095
MAX_DEPTH = 64

ENTROPY_SIZE = 64
MAX_MESSAGE = 512

STATUS_BODY = Struct(">IIIHIQIII")
EXEC_HEAD = Struct(">BHHI")
STARTED_BODY = Struct(">I")
CREDIT_BODY = Struct(">BI")
EXIT_BODY = Struct(">BB")
RESIZE_BODY = Struct(">HH")
AFTER_WAKE_BODY = Struct(">BQ64s")
AFTER_WAKE_DONE = Struct(">BIII")
PREPARE_DONE = Struct(">BIIII")
COPY_DONE = Struct(">IQI")
SHUTDOWN_BODY = Struct(">BH")
TREE_HEAD = Struct(">BHH")
U16 = Struct(">H")
U32 = Struct(">I")

_SECRETS = ("none", "mounted", "failed")
_NET_AS_CONFIGURED = 0x10


class GuestStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the guest says of itself.

    `load`: averages over 1, 5, 15 minutes. `idle_s`: since a session last moved a byte. `busy_ms`: CPU time since
    boot over all CPUs, modulo 2^32. Memory in KiB.
    """

    load: tuple[float, float, float]
    sessions: int
    idle_s: int
    uptime_ms: int
    memory_total_kib: int
    memory_available_kib: int
    busy_ms: int


class ExitStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a program ended: `code` when it exited, `signal` (non-zero) when it was killed."""

    code: int
    signal: int = 0

    @property
    def shell_code(self) -> int:
        """What a shell reports: the code, or 128 + signal."""
        return 128 + self.signal if self.signal else self.code


class SleepReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What quiescing did. `secrets`: "none" once nothing is mounted there, else "failed". Microseconds and KiB."""

    secrets: str
    sync_us: int
    trim_us: int
    memory_used_kib: int
    memory_free_kib: int


class WakeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a woken guest did, by its own clock in microseconds. `secrets`: "none", "mounted" or "failed"."""

    secrets: str
    network_ok: bool
    clock_entropy_us: int
    secrets_us: int
    network_us: int


class CopyReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`entries` files, directories and links holding `size` bytes were copied; `skipped` were not."""

    entries: int
    size: int
    skipped: int


class GuestRefusal(GuestError):
    """The guest understood the request and answered that it cannot do it; the connection goes on."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(
            f"the guest refused: {message}", details=f"guest error {code}", resolution=_advice(code)
        )
        self.code = code


def exec_body(
    argv: Sequence[str | bytes],
    *,
    env: Mapping[str, str],
    cwd: str,
    user: str,
    tty: tuple[int, int] | None,
    detach: bool,
    stdin: bool,
    window: int,
) -> bytes:
    """The body of EXEC. `tty` is (rows, columns). InvalidInput if it is empty, has a NUL or exceeds a frame."""
    if not argv:
        raise InvalidInput("no command given", resolution="name the program to run in the guest")
    rows, columns = tty or (0, 0)
    flags = EXEC_TTY * (tty is not None) | EXEC_DETACH * detach | EXEC_STDIN * stdin
    for key in env:
        if not key or "=" in key:
            raise InvalidInput(f"{key!r} is not a name of an environment variable")
    body = (
        EXEC_HEAD.pack(flags, _clip(rows), _clip(columns), window)
        + _texts([_raw(a) for a in argv])
        + _texts([_raw(f"{key}={value}") for key, value in env.items()])
        + text(_raw(cwd))
        + text(_raw(user))
    )
    if len(body) > framing.MAX_FRAME:
        raise InvalidInput(
            "command line and environment are too long",
            details=f"{len(body)} bytes, {framing.MAX_FRAME} fit",
            resolution="pass long input through a file (mvm tenant cp) or standard input",
        )
    return body


def resize_body(rows: int, columns: int) -> bytes:
    return RESIZE_BODY.pack(_clip(rows), _clip(columns))


def copy_in_body(remote: str, name: bytes) -> bytes:
    return text(_raw(_absolute(remote))) + text(name)


def copy_out_body(remote: str, window: int) -> bytes:
    return U32.pack(window) + text(_raw(_absolute(remote)))


def after_wake_body(realtime_ns: int, entropy: bytes, *, remount_secrets: bool) -> bytes:
    """`realtime_ns`: nanoseconds since the epoch. `entropy`: ENTROPY_SIZE bytes no guest has seen before."""
    if len(entropy) != ENTROPY_SIZE or not 0 <= realtime_ns < 1 << 63:
        raise ValueError("after_wake takes 64 bytes and a time")
    return AFTER_WAKE_BODY.pack(WAKE_REMOUNT_SECRETS * remount_secrets, realtime_ns, entropy)


def decode_status(untrusted: bytes) -> GuestStatus:
    one, five, fifteen, sessions, idle, uptime, total, available, busy = _unpack(STATUS_BODY, untrusted)
    return GuestStatus((one / 100, five / 100, fifteen / 100), sessions, idle, uptime, total, available, busy)


def decode_exit(untrusted: bytes) -> ExitStatus:
    code, signal = _unpack(EXIT_BODY, untrusted)
    if signal > 64 or (signal and code):
        _malformed("exit status")
    return ExitStatus(code, signal)


def decode_started(untrusted: bytes) -> int:
    """The process id in the guest."""
    pid: int = _unpack(STARTED_BODY, untrusted)[0]
    return pid


def decode_credit(untrusted: bytes) -> tuple[int, int]:
    """(stream, bytes)."""
    stream, amount = _unpack(CREDIT_BODY, untrusted)
    return stream, amount


def decode_prepare_sleep(untrusted: bytes) -> SleepReport:
    result, sync_us, trim_us, used, free = _unpack(PREPARE_DONE, untrusted)
    return SleepReport(_secrets(result), sync_us, trim_us, used, free)


def decode_after_wake(untrusted: bytes) -> WakeReport:
    result, seeded, secrets, network = _unpack(AFTER_WAKE_DONE, untrusted)
    network_ok = bool(result & _NET_AS_CONFIGURED)
    return WakeReport(_secrets(result & ~_NET_AS_CONFIGURED), network_ok, seeded, secrets, network)


def decode_copy(untrusted: bytes) -> CopyReport:
    entries, size, skipped = _unpack(COPY_DONE, untrusted)
    return CopyReport(entries, size, skipped)


def decode_nothing(untrusted: bytes) -> None:
    if untrusted:
        _malformed("answer")


def decode_error(untrusted: bytes) -> GuestRefusal:
    if len(untrusted) < U16.size:
        _malformed("error")
    return GuestRefusal(U16.unpack_from(untrusted)[0], printable(untrusted[U16.size :]))


def printable(untrusted: bytes) -> str:
    """Text from the guest that is safe to show: bounded, no control characters, no line breaks."""
    shown = untrusted[:MAX_MESSAGE].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def text(raw: bytes) -> bytes:
    """A field: u16 length and bytes."""
    if len(raw) > 0xFFFF:
        raise InvalidInput("argument too long for the guest", details=f"{len(raw)} bytes, 65535 fit")
    return U16.pack(len(raw)) + raw


def _texts(raws: Sequence[bytes]) -> bytes:
    if len(raws) > 0xFFFF:
        raise InvalidInput("too many arguments for the guest")
    return U16.pack(len(raws)) + b"".join(map(text, raws))


def _raw(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise InvalidInput("an argument contains a NUL byte")
    return raw


def _absolute(remote: str) -> str:
    if not remote.startswith("/"):
        raise InvalidInput(f"{remote!r} is not an absolute path", resolution="write the guest's path from /")
    return remote


def _clip(value: int) -> int:
    return max(0, min(value, 0xFFFF))


def _secrets(result: int) -> str:
    if result >= len(_SECRETS):
        _malformed("result")
    return _SECRETS[result]


def _unpack(form: Struct, untrusted: bytes) -> tuple[int, ...]:
    if len(untrusted) != form.size:
        _malformed("answer")
    values: tuple[int, ...] = form.unpack(untrusted)
    return values


def _malformed(what: str) -> NoReturn:
    raise GuestError(
        f"the guest sent a malformed {what}",
        resolution="stop the instance and start it again; its agent is broken or hostile",
    )


def _advice(code: int) -> str:
    return {
        E_NOT_FOUND: "check the name; paths are the guest's own",
        E_BUSY: "try again when the other request has ended",
        E_UNSUPPORTED: "rebuild the guest: its agent is older or runs without this",
    }.get(code, "see the guest's console log (mvm tenant logs)")
