"""`firecracker`: the command line, the exit codes, and the two threads that matter.

The main thread is the VMM's: it does one action after the other, and is where a signal ends the process. The API thread
hands it what came over the socket.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import select
import signal
import threading
import time

from . import logs, schema, seccomp, snapshot, versions
from .api_server import ApiServer
from .arguments import Arguments, BadArguments, Option, help_text
from .faults import Faults
from .requests import Action, ApiError
from .vmm import Vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

GENERIC, BAD_CONFIGURATION, BAD_ARGUMENTS, PANIC = 1, 152, 153, 134
# Signals that firecracker catches, and its exit codes. The first two come from the very instruction that failed.
_SYNCHRONOUS = {signal.SIGBUS: 149, signal.SIGSEGV: 150}
_CAUGHT = {
    signal.SIGXFSZ: 151,
    signal.SIGXCPU: 154,
    signal.SIGHUP: 156,
    signal.SIGILL: 157,
    signal.SIGSYS: 148,
}
_METRICS_PERIOD_S = 60.0
_US = "(wall clock, microseconds). This parameter is optional."
OPTIONS = {
    "api-sock": Option("Path to unix domain socket used by the API.", default="/run/firecracker.socket"),
    "id": Option("MicroVM unique identifier.", default="anonymous-instance"),
    "seccomp-filter": Option("Path to a custom seccomp filter. For advanced users.", forbids="no-seccomp"),
    "no-seccomp": Option("No seccomp filtering. Not recommended.", value=False, forbids="seccomp-filter"),
    "start-time-us": Option(f"Process start time {_US}"),
    "start-time-cpu-us": Option(f"Process start CPU time {_US}"),
    "parent-cpu-time-us": Option(f"Parent process CPU time {_US}"),
    "config-file": Option("Path to a file that contains the microVM configuration in JSON format."),
    "metadata": Option("Path to a file that contains metadata in JSON format to add to the mmds."),
    "no-api": Option("No active API socket.", value=False, requires="config-file"),
    "log-path": Option("Path to a fifo or a file used for configuring the logger on startup."),
    "level": Option("Set the logger level."),
    "module": Option("Set the logger module filter."),
    "show-level": Option("Whether or not to output the level in the logs.", value=False),
    "show-log-origin": Option("Whether or not to include the origin in the logs.", value=False),
    "metrics-path": Option("Path to a fifo or a file used for configuring the metrics on startup."),
    "boot-timer": Option("Whether or not to load boot timer device.", value=False),
    "version": Option("Print the binary version number.", value=False),
    "snapshot-version": Option("Print the supported data format version.", value=False),
    "describe-snapshot": Option("Print the data format version of the provided snapshot state file."),
    "http-api-max-payload-size": Option("Http API request payload max size, in bytes.", default="51200"),
    "mmds-size-limit": Option("Mmds data store limit, in bytes."),
    "enable-pci": Option("Enables PCIe support.", value=False),
}


class Stop(Exception):
    """The process ends with `code`; the text is logged."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Panic(Exception):
    """Where the program panics it aborts, which its parent sees as SIGABRT."""


def main(argv: Sequence[str], config: dict[str, Any]) -> None:
    """Never returns."""
    threading.current_thread().name = "main"
    log = logs.Log("anonymous-instance")
    metrics = logs.Metrics()
    try:
        _main(argv, config, log, metrics)
        log.info("Firecracker exiting successfully. exit_code=0")
        code = 0
    except Stop as stop:
        log.error(str(stop))
        os.write(2, f"Error: {stop}\n".encode())
        log.error(f"Firecracker exiting with error. exit_code={stop.code}")
        code = stop.code
    except Panic as panic:
        log.error(f"Firecracker panicked: {panic}")
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGABRT)
        code = PANIC
    os._exit(code)


def _main(argv: Sequence[str], config: dict[str, Any], log: logs.Log, metrics: logs.Metrics) -> None:
    version, faults = versions.parse(config["version"]), Faults(config["faults"])
    try:
        arguments = Arguments(OPTIONS, argv)
    except BadArguments as error:
        raise Stop(
            BAD_ARGUMENTS,
            f"Arguments parsing error: {error} \n\nFor more information try --help. ({error.kind})",
        ) from None
    shown = faults.version or f"Firecracker v{config['version']}"
    if arguments.help:
        print(f"{shown}\n\n{help_text(OPTIONS)}", flush=True)
        return
    if arguments.version:
        print(f"{shown}\n", flush=True)
        return
    if arguments.flag("snapshot-version"):
        print(f"v{versions.snapshot_format(version)}", flush=True)
        return
    described = arguments.one("describe-snapshot")
    if described is not None:
        try:
            print(f"v{snapshot.read_version(snapshot.read(described))}", flush=True)
        except (OSError, snapshot.BadSnapshot) as error:
            raise Stop(GENERIC, f"When printing Snapshot Data format: {error}") from None
        return
    instance = arguments.one("id") or ""
    if not 1 <= len(instance) <= 64 or not all(c == "-" or c.isalnum() for c in instance):
        raise Panic(f"Invalid instance ID: {instance}")
    log.instance = instance
    _configure_log(arguments, log, version)
    log.info(f"Running Firecracker v{config['version']}")
    _run(arguments, version, faults, log, metrics)


def _configure_log(arguments: Arguments, log: logs.Log, version: versions.Version) -> None:
    level = arguments.one("level")
    if level is not None and level.lower() not in schema.LEVELS:
        raise Stop(
            BAD_CONFIGURATION,
            f"Invalid value for logger level: Failed to parse string to level filter: {level}."
            "Possible values: [Error, Warning, Info, Debug]",
        )
    try:
        log.configure(
            {
                "log_path": arguments.one("log-path"),
                "level": level,
                "show_level": arguments.flag("show-level") or None,
            },
            version,
        )
    except OSError as error:
        raise Stop(
            GENERIC, f"Could not initialize logger: Failed to open target file: {error.strerror}"
        ) from None


def _run(
    arguments: Arguments, version: versions.Version, faults: Faults, log: logs.Log, metrics: logs.Metrics
) -> None:
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _catch_signals(wake, metrics, faults)
    path = arguments.one("metrics-path")
    if path is not None:
        try:
            metrics.open(path, version)
        except OSError as error:
            raise Stop(GENERIC, f"Could not initialize metrics: {error.strerror}") from None
    filtered = _filter(arguments, faults)
    vmm_config = _file(arguments.one("config-file"), "Unable to open or read from the configuration file")
    metadata = _file(arguments.one("metadata"), "Unable to open or read from the mmds content file")
    limit = int(arguments.one("http-api-max-payload-size") or 0)
    mmds_limit = int(arguments.one("mmds-size-limit") or limit)
    if "exit at start" in faults.numbers:
        os._exit(int(faults.numbers["exit at start"]))
    if "no socket" in faults:
        threading.Event().wait()
    time.sleep(faults.numbers.get("slow start", 0))

    incoming: queue.SimpleQueue[tuple[Action, queue.SimpleQueue[tuple[int, str]]]] = queue.SimpleQueue()
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def submit(action: Action) -> tuple[int, str]:
        answer: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        incoming.put((action, answer))
        os.write(wake, b"a")
        return answer.get()

    def submit_exit(code: int) -> None:
        ends.put(code)
        os.write(wake, b"e")

    vmm = Vmm(
        instance=log.instance, version=version, log=log, metrics=metrics, faults=faults, submit_exit=submit_exit,
        pci=arguments.flag("enable-pci"), filtered=filtered, mmds_limit=mmds_limit,
    )  # fmt: skip
    server = None
    kind = "RunWithoutApiError"
    if not arguments.flag("no-api"):
        kind = "RunWithApiError"
        server = _listen(arguments.one("api-sock") or "", version, limit, log, faults, submit)
        threading.Thread(target=server.run, kwargs={"filtered": filtered}, name="fc_api", daemon=True).start()
    if metadata is not None:
        try:
            vmm.handle(Action("put mmds", json.loads(metadata)))
        except ValueError:
            raise Panic("MMDS error: metadata provided not valid json") from None
    if vmm_config is not None:
        _boot_from(vmm_config, vmm, f"{kind} error: Failed to build MicroVM from Json:")
    _loop(vmm, server, incoming, ends, woken, metrics, filtered)


def _listen(
    path: str, version: versions.Version, limit: int, log: logs.Log, faults: Faults, submit: Any
) -> ApiServer:
    try:
        server = ApiServer(path, version=version, limit=limit, log=log, faults=faults, submit=submit)
    except OSError as error:
        text = f"Failed to bind and run the HTTP server: IO error: {error.strerror} (os error {error.errno})"
        if error.errno == 98:
            text = f"Failed to open the API socket at: {path}. Check that it is not already used."
        raise Stop(GENERIC, f"RunWithApiError error: {text}") from None
    log.info(f'Listening on API socket ("{path}").')
    return server


def _filter(arguments: Arguments, faults: Faults) -> bool:
    """Whether threads get a filter. A given filter's content is not looked at."""
    path = arguments.one("seccomp-filter")
    if path is not None:
        try:
            raw = snapshot.read(path)
        except OSError as error:
            raise Stop(GENERIC, f"Seccomp error: Filter file open error: {error.strerror}") from None
        if not raw:
            raise Stop(GENERIC, "Seccomp error: Filter deserialization failed: unexpected end of file")
    return not arguments.flag("no-seccomp") and "no filter" not in faults


def _file(path: str | None, problem: str) -> bytes | None:
    if path is None:
        return None
    try:
        return snapshot.read(path)
    except OSError as error:
        raise Panic(f"{problem}: {error.strerror}") from None


def _boot_from(raw: bytes, vmm: Vmm, kind: str) -> None:
    """A configuration file: as if its parts had been put one by one, and started."""
    parse_kind = f"{kind} Configuration for VMM from one single json failed:"
    try:
        config = schema.check_config_file(schema.decode(raw), vmm.version)
    except schema.Malformed as error:
        raise Stop(GENERIC, f"{parse_kind} Invalid JSON: {error}") from None
    actions = [
        (action, config[key])
        for key, action in (
            ("logger", "put logger"), ("metrics", "put metrics"), ("machine-config", "put machine"),
            ("cpu-config", "put cpu config"), ("boot-source", "put boot source"),
        )
        if key in config
    ]  # fmt: skip
    actions += [("put drive", drive) for drive in config["drives"]]
    actions += [("put net", net) for net in config.get("network-interfaces", ())]
    actions += [
        (action, config[key])
        for key, action in (
            ("vsock", "put vsock"), ("balloon", "put balloon"), ("mmds-config", "put mmds config"),
            ("entropy", "put entropy"), ("memory-hotplug", "put memory hotplug"),
        )
        if key in config
    ]  # fmt: skip
    actions += [("put pmem", pmem) for pmem in config.get("pmem", ())]
    for name, value in actions:
        status, text = vmm.handle(Action(name, value))
        if status >= 300:
            raise Stop(GENERIC, f"{parse_kind} {text}")
    try:
        vmm.start()
    except ApiError as error:
        raise Stop(GENERIC, f"{kind} Could not Start MicroVM from one single json: {error}") from None


def _loop(
    vmm: Vmm,
    server: ApiServer | None,
    incoming: Any,
    ends: Any,
    woken: int,
    metrics: logs.Metrics,
    filtered: bool,
) -> None:
    waiting = select.poll()
    waiting.register(woken, select.POLLIN)
    was_started = False
    written = time.monotonic()
    while True:
        if vmm.started and not was_started:
            was_started = True
            if filtered:
                seccomp.apply()
            metrics.flush()
        waiting.poll(1000)
        try:
            os.read(woken, 4096)
        except BlockingIOError:
            pass
        while not incoming.empty():
            action, answer = incoming.get()
            status, text = vmm.handle(action)
            if vmm.fatal and server is not None:
                server.stopping.set()
            answer.put((status, text))
            if vmm.fatal:
                if server is not None:
                    server.stopped.wait(5)
                raise Stop(
                    GENERIC, "RunWithApiError error: Failed to build MicroVM: Loading snapshot failed.."
                )
        # Like all that the VMM's thread does for itself, these wait while the VM is paused.
        if vmm.state == "Paused":
            continue
        if not ends.empty():
            metrics.flush()
            code = ends.get()
            if code == 0:
                return
            raise Stop(code, f"RunWithApiError error: MicroVM stopped with an error: {code}")
        if time.monotonic() - written > _METRICS_PERIOD_S:
            written = time.monotonic()
            metrics.flush()


def _catch_signals(wake: int, metrics: logs.Metrics, faults: Faults) -> None:
    if "ignore sigterm" in faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def caught(number: int, _: Any) -> None:
        metrics.flush()
        os._exit(_CAUGHT[signal.Signals(number)])

    for number in _CAUGHT:
        signal.signal(number, caught)
    # A signal that another thread caused or got is handled on this one, which has to be woken for it.
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    # A handler of Python's would return to the instruction that faults, for ever.
    def faulted(number: int) -> None:
        os._exit(_SYNCHRONOUS[signal.Signals(number)])

    global _kept
    _kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(faulted)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    for number in _SYNCHRONOUS:
        libc.signal(number, ctypes.cast(_kept, ctypes.c_void_p))


_kept: Any = None
