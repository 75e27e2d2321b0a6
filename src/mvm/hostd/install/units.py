"""The service's files as they are shipped, and their places on a host. Nothing here writes."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from mvm.core.errors import NotFound

MARK: Final = "# Installed by `mvm bootstrap`, which replaces it."
HOSTD: Final = Path("/usr/bin/mvm-hostd")
"""What the unit executes."""
SERVICE: Final = "mvm-hostd.service"
SOCKET: Final = "mvm-hostd.socket"
SYSUSERS: Final = Path("/etc/sysusers.d/mvm.conf")
TMPFILES: Final = Path("/etc/tmpfiles.d/mvm.conf")
_UNITS: Final = Path("/etc/systemd/system")
EMULATION: Final = _UNITS / f"{SERVICE}.d" / "10-emulation.conf"
FIRECRACKER: Final = _UNITS / f"{SERVICE}.d" / "10-firecracker.conf"
CONDITIONAL: Final = frozenset({EMULATION, FIRECRACKER})
"""Installed where guests are emulated in software, and where Firecracker's programs are; removed elsewhere."""
_ADVICE: Final = "What is to be different here goes into a drop-in: systemctl edit"


class Shipped(NamedTuple):
    """`source`: its name in `shipped_dir`."""

    source: str
    target: Path


FILES: Final = (
    Shipped("mvm.sysusers", SYSUSERS),
    Shipped("mvm.tmpfiles", TMPFILES),
    Shipped("09-mvm.rules", Path("/etc/udev/rules.d/09-mvm.rules")),
    Shipped("mvm.slice", _UNITS / "mvm.slice"),
    Shipped(SOCKET, _UNITS / SOCKET),
    Shipped(SERVICE, _UNITS / SERVICE),
    Shipped("10-emulation.conf", EMULATION),
    Shipped("10-firecracker.conf", FIRECRACKER),
)


def shipped_dir() -> Path:
    """Package data in an installed wheel, `systemd` in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for candidate in (package / "_data/systemd", package.parents[1] / "systemd"):
        if (candidate / SERVICE).is_file():
            return candidate
    raise NotFound(
        "the service's units are not part of this installation",
        details=f"looked below {package}",
        resolution="install mvm from its wheel or run it from a checkout",
    )


def rendered(source: str, text: str) -> bytes:
    """A shipped file as it is installed: under the mark, by which it is known again."""
    advice = f" {_ADVICE} {source}" if source.endswith((".service", ".socket", ".slice")) else ""
    return f"{MARK}{advice}\n{text}".encode()


def load() -> dict[Path, bytes]:
    """target -> content, of every file, those of CONDITIONAL included."""
    folder = shipped_dir()
    return {f.target: rendered(f.source, (folder / f.source).read_text(encoding="utf-8")) for f in FILES}
