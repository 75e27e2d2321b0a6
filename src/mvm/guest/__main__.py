"""Start the agent: `python3 -I -S /usr/lib/mvm/mvm/guest/__main__.py`, as root, from the guest's init.

Run as a file rather than with -m: in isolated mode nothing else puts the package's directory on the path, and
runpy would load a dozen modules first.

Options (for tests on a machine that is no guest): --listen-unix PATH, --port-fd N (an inherited descriptor
treated like a virtio-serial port), --no-devices (neither ports nor vsock), --no-disks (neither mounts nor
formats), --simulate (the clock, the random pool and the power stay as they are).
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    _root = __file__.rsplit("/", 3)[0]
    if _root not in sys.path:
        sys.path.insert(0, _root)

import gc
import os

from mvm.guest import disks, log, process, proto, transfer, transports
from mvm.guest.conn import Connection
from mvm.guest.lifecycle import Lifecycle, Settings
from mvm.guest.loop import Loop
from mvm.guest.secrets import RefreshVerb
from mvm.guest.session import Activity, ExecVerb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mvm.guest.conn import Handler


def main(arguments: list[str]) -> int:
    settings = Settings()
    unix: list[str] = []
    port_fds: list[int] = []
    devices = True
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if option == "--listen-unix" and rest:
            unix.append(rest.pop(0))
        elif option == "--port-fd" and rest:
            port_fds.append(int(rest.pop(0)))
        elif option == "--no-devices":
            devices = False
        elif option == "--no-disks":
            settings.disks = False
        elif option == "--simulate":
            settings.simulate = True
        elif option in _PATHS and rest:
            setattr(settings, _PATHS[option], rest.pop(0))
        else:
            log.line(f"unknown option {option}")
            return 2
    os.umask(0o022)
    os.chdir("/")
    if not settings.simulate:
        process.protect(-1000)
    if settings.disks:
        log.line(
            f"data disk {disks.prepare_data(settings.data_device, settings.data_dir)}, "
            f"secrets disk {disks.first_secrets(settings.secrets_device, settings.secrets_dir)}"
        )
    loop = Loop()
    activity = Activity()
    life = Lifecycle(settings, activity)
    verbs: dict[int, Handler] = {
        proto.STATUS: life.status,
        proto.EXEC: ExecVerb(activity),
        proto.COPY_IN: transfer.copy_in,
        proto.COPY_OUT: transfer.copy_out,
        proto.PREPARE_SLEEP: life.prepare_sleep,
        proto.AFTER_WAKE: life.after_wake,
        proto.REFRESH_SECRETS: RefreshVerb(settings),
        proto.SHUTDOWN: life.shutdown,
    }
    served = 0
    if devices:
        served = transports.open_ports(loop, verbs) + transports.listen_vsock(loop, verbs)
    for path in unix:
        transports.listen_unix(loop, verbs, path)
    for fd in port_fds:
        os.set_inheritable(fd, False)
        Connection(loop, fd, verbs, port=True, name=f"fd {fd}")
    served += len(unix) + len(port_fds)
    if not served:
        log.line("no control channel: neither virtio-serial ports named mvm.0 to mvm.7 nor AF_VSOCK")
        return 1
    log.line(f"serving {served} channels")
    # Nothing here makes cycles worth a collection, and a collection would write to pages all over the heap
    # after a wake, each one a fault; prepare_sleep collects instead.
    gc.collect()
    gc.freeze()
    gc.disable()
    loop.run()
    return 0


_PATHS = {
    "--data-device": "data_device",
    "--data-dir": "data_dir",
    "--secrets-device": "secrets_device",
    "--secrets-dir": "secrets_dir",
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
