"""The verbs of the guest's life: status, prepare_sleep, after_wake, shutdown.

after_wake is the hot path: its descriptors are open and its modules loaded before the guest ever sleeps. Its
answer means: the clock is the host's, the kernel's random pool was reseeded with bytes no other copy of this
memory has seen, and the new secrets disk is mounted (or there is none).
"""

from __future__ import annotations

import _socket
import fcntl
import gc
import os
import time
from struct import Struct
from time import CLOCK_BOOTTIME, CLOCK_REALTIME, clock_gettime, clock_settime_ns, monotonic, monotonic_ns

from mvm.guest import disks, log, mounts, process, proto
from mvm.guest.conn import Connection, Refusal
from mvm.guest.proto import Malformed, frame
from mvm.guest.session import Activity

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
SIOCGIFADDR = 0x8915
_POOL_INFO = Struct("ii")  # struct rand_pool_info: entropy in bits, size in bytes

# after_wake and prepare_sleep results, one byte
SECRETS_NONE = 0
SECRETS_MOUNTED = 1
SECRETS_FAILED = 2
NET_AS_CONFIGURED = 0x10
_SECRETS_RESULT = {"absent": SECRETS_NONE, "mounted": SECRETS_MOUNTED, "failed": SECRETS_FAILED}


class Settings:
    """Where things are in this guest. `simulate` replaces effects on the machine (clock, power) by nothing."""

    def __init__(self) -> None:
        self.data_device = "/dev/vdb"
        self.data_dir = "/data"
        self.secrets_device = "/dev/vdc"
        self.secrets_dir = "/run/secrets"
        self.interface = "eth0"
        self.address = boot_argument("mvm.ip").partition("/")[0]
        self.disks = True
        self.simulate = False


def boot_argument(name: str) -> str:
    """The value of `name=value` on the kernel's command line, or ""."""
    try:
        with open("/proc/cmdline") as file:
            words = file.read().split()
    except OSError:
        return ""
    for word in words:
        key, _, value = word.partition("=")
        if key == name:
            return value
    return ""


class Lifecycle:
    def __init__(self, settings: Settings, activity: Activity) -> None:
        self._settings = settings
        self._activity = activity
        self._random = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
        self._socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        self._ifreq = settings.interface.encode().ljust(40, b"\0")
        self._expected = _socket.inet_aton(settings.address) if settings.address else b""

    def status(self, conn: Connection, number: int, body: bytes) -> None:
        if body:
            raise Malformed
        one, five, fifteen = os.getloadavg()
        total, available = _memory()
        conn.send(
            frame(
                proto.STATUS_REPLY,
                number,
                proto.STATUS_BODY.pack(
                    int(one * 100),
                    int(five * 100),
                    int(fifteen * 100),
                    self._activity.sessions,
                    min(int(monotonic() - self._activity.last), 0xFFFFFFFF),
                    int(clock_gettime(CLOCK_BOOTTIME) * 1000),
                    total,
                    available,
                    _busy_ms(),
                ),
            )
        )

    def prepare_sleep(self, conn: Connection, number: int, body: bytes) -> None:
        if len(body) != 1:
            raise Malformed
        flags = body[0]
        began = monotonic_ns()
        result = SECRETS_NONE
        if flags & proto.SLEEP_UNMOUNT_SECRETS and self._settings.disks:
            result = SECRETS_NONE if mounts.unmount(self._settings.secrets_dir) else SECRETS_FAILED
        os.sync()
        synced = monotonic_ns()
        gc.collect()
        if flags & proto.SLEEP_DROP_CACHES:
            _write("/proc/sys/vm/drop_caches", b"1")
        total, available = _memory()
        done = monotonic_ns()
        conn.send(
            frame(
                proto.DONE,
                number,
                proto.PREPARE_DONE.pack(
                    result,
                    (synced - began) // 1000,
                    (done - synced) // 1000,
                    total - available,
                    _memory_free(),
                ),
            )
        )

    def after_wake(self, conn: Connection, number: int, body: bytes) -> None:
        if len(body) != 73:
            raise Malformed
        began = monotonic_ns()
        flags, realtime, entropy = proto.AFTER_WAKE_BODY.unpack(body)
        if not self._settings.simulate:
            clock_settime_ns(CLOCK_REALTIME, realtime)
            fcntl.ioctl(self._random, RNDADDENTROPY, _POOL_INFO.pack(512, 64) + entropy)
            fcntl.ioctl(self._random, RNDRESEEDCRNG)
        seeded = monotonic_ns()
        result = 0
        if flags & proto.WAKE_REMOUNT_SECRETS and self._settings.disks:
            settings = self._settings
            result = _SECRETS_RESULT[disks.remount_secrets(settings.secrets_device, settings.secrets_dir)]
        mounted = monotonic_ns()
        if self._address_holds():
            result |= NET_AS_CONFIGURED
        done = monotonic_ns()
        conn.send(
            frame(
                proto.DONE,
                number,
                proto.AFTER_WAKE_DONE.pack(
                    result, (seeded - began) // 1000, (mounted - seeded) // 1000, (done - mounted) // 1000
                ),
            )
        )

    def shutdown(self, conn: Connection, number: int, body: bytes) -> None:
        if len(body) != 3:
            raise Malformed
        mode, grace_ms = proto.SHUTDOWN_BODY.unpack(body)
        if mode not in (proto.SHUTDOWN_POWEROFF, proto.SHUTDOWN_REBOOT):
            raise Refusal(proto.E_UNSUPPORTED, f"shutdown mode {mode}")
        conn.send(frame(proto.DONE, number))
        # Answer first: once programs are being killed there may be nobody left to answer.
        conn.loop.after(0.05, lambda: self._go_down(conn, mode, grace_ms / 1000))

    def _go_down(self, conn: Connection, mode: int, grace: float) -> None:
        if self._settings.simulate:
            conn.loop.stopping = True
            return
        command = "reboot" if mode == proto.SHUTDOWN_REBOOT else "poweroff"
        if os.path.isdir("/run/systemd/system"):
            process.run(["systemctl", "--no-block", command], 10)
            return
        # Without systemd this process orders the shutdown itself, so that every step is bounded.
        for number, seconds in ((process.SIGTERM, grace), (process.SIGKILL, 1.0)):
            try:
                os.kill(-1, number)  # everyone but init and this process
            except OSError:
                break
            until = monotonic() + seconds
            while monotonic() < until and _others():
                time.sleep(0.02)
        os.sync()
        for where in (self._settings.secrets_dir, self._settings.data_dir):
            try:
                mounts.unmount(where)
            except OSError as error:
                log.failure(f"unmount {where}", error)
        os.sync()
        process.run([command, "-f"], 10)

    def _address_holds(self) -> bool:
        """Whether the interface still has the address the host gave at boot; True when it gave none."""
        if not self._expected:
            return True
        try:
            return fcntl.ioctl(self._socket.fileno(), SIOCGIFADDR, self._ifreq)[20:24] == self._expected
        except OSError:
            return False


def _memory() -> tuple[int, int]:
    """MemTotal and MemAvailable in KiB."""
    fields = _meminfo()
    return fields.get(b"MemTotal", 0), fields.get(b"MemAvailable", 0)


def _memory_free() -> int:
    return _meminfo().get(b"MemFree", 0)


def _meminfo() -> dict[bytes, int]:
    fd = os.open("/proc/meminfo", os.O_RDONLY)
    try:
        lines = os.read(fd, 256).split(b"\n")[:3]
    finally:
        os.close(fd)
    fields = {}
    for line in lines:
        key, _, rest = line.partition(b":")
        words = rest.split()
        if words:
            fields[key] = int(words[0])
    return fields


def _busy_ms() -> int:
    """CPU time spent in anything but idling since boot, all CPUs, in ms modulo 2^32."""
    try:
        fd = os.open("/proc/stat", os.O_RDONLY)
    except OSError:
        return 0
    try:
        words = os.read(fd, 256).split(b"\n", 1)[0].split()
    finally:
        os.close(fd)
    user, nice, system, _idle, _iowait, irq, softirq = (int(word) for word in words[1:8])
    return (user + nice + system + irq + softirq) * 10 & 0xFFFFFFFF


def _others() -> bool:
    """Whether any user process besides init and this one is alive; kernel threads have no command line."""
    me = os.getpid()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (1, me):
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if file.read(1):
                        return True
            except OSError:
                continue
    return False


def _write(path: str, data: bytes) -> None:
    try:
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        log.failure(path, error)
