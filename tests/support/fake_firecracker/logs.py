"""The logger and the metrics, each of which writes to a file or nowhere else (the log: to stdout until then)."""

from __future__ import annotations

import json
import os
import threading
import time

from . import versions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .versions import Version

_RANK = {"off": 0, "error": 1, "warn": 2, "warning": 2, "info": 3, "debug": 4, "trace": 5}


def open_target(path: str, version: Version) -> int:
    """A log or metrics file, which may be a FIFO; before 1.14 it had to be there. OSError."""
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
    if versions.has(version, versions.CREATES_LOG_FILES):
        flags |= os.O_CREAT
    return os.open(path, flags, 0o666)


class Log:
    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.missed = 0
        self._fd = 1
        self._rank = _RANK["info"]
        self._show_level = False

    def configure(self, config: dict[str, Any], version: Version) -> None:
        """OSError if the file cannot be opened."""
        if config.get("log_path") is not None:
            fd = open_target(config["log_path"], version)
            # As the program does it: no O_APPEND, so an earlier file is written over from its start.
            if self._fd != 1:
                os.close(self._fd)
            self._fd = fd
        self._rank = _RANK[(config.get("level") or "info").lower()]
        if config.get("show_level") is not None:
            self._show_level = config["show_level"]

    def info(self, text: str) -> None:
        self._write(text, "INFO")

    def warn(self, text: str) -> None:
        self._write(text, "WARN")

    def error(self, text: str) -> None:
        self._write(text, "ERROR")

    def _write(self, text: str, level: str) -> None:
        if _RANK[level.lower()] > self._rank:
            return
        seconds, nanos = divmod(time.time_ns(), 10**9)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))
        shown = f":{level}" if self._show_level else ""
        thread = threading.current_thread().name
        line = f"{stamp}.{nanos:09} [{self.instance}:{thread}{shown}] {text}\n"
        try:
            os.write(self._fd, line.encode("utf-8", "replace"))
        except OSError:
            self.missed += 1


class Metrics:
    """One JSON object a line. `counts` is what the fake counts; the program has hundreds."""

    def __init__(self) -> None:
        self._fd = -1
        self.counts: dict[str, dict[str, int]] = {
            "api_server": {"process_startup_time_us": 0},
            "get_api_requests": {},
            "put_api_requests": {},
            "patch_api_requests": {},
            "logger": {"missed_metrics_count": 0},
            "seccomp": {"num_faults": 0},
            "vmm": {"panic_count": 0},
            "vsock": {"conns_added": 0, "conns_removed": 0},
            "latencies_us": {},
        }

    def open(self, path: str, version: Version) -> None:
        """OSError; ValueError if they go somewhere already."""
        fd = open_target(path, version)
        if self._fd >= 0:
            os.close(fd)
            raise ValueError("Reinitialization of metrics not allowed.")
        self._fd = fd

    def count(self, group: str, name: str, add: int = 1) -> None:
        self.counts[group][name] = self.counts[group].get(name, 0) + add

    def flush(self) -> None:
        if self._fd < 0:
            return
        line = json.dumps({"utc_timestamp_ms": time.time_ns() // 10**6, **self.counts}) + "\n"
        os.write(self._fd, line.encode())
