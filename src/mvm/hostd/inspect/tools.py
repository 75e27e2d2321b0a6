"""The programs mvm uses, their versions, and whether nftables takes a ruleset (a dry run: nothing is changed)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import MvmError
from mvm.hostd.inspect import text
from mvm.hostd.inspect.host import path_facts
from mvm.linux.process import find_program, run

_TIMEOUT_S: Final = 10.0

# program -> (how it is asked for its version, Debian package, what for)
PROGRAMS: Final = {
    "qemu-system-x86_64": (("--version",), "qemu-system-x86", "runs the VMs"),
    "qemu-io": (("--version",), "qemu-utils", "blanks new data disks"),
    "cryptsetup": (("--version",), "cryptsetup-bin", "formats data disks"),
    "mke2fs": (("-V",), "e2fsprogs", "makes the secrets disk"),
    "debugfs": (("-V",), "e2fsprogs", "fills the secrets disk"),
    "ip": (("-V",), "iproute2", "reads links back"),
    "nft": (("--version",), "nftables", "loads the firewall"),
    "nix": (("--version",), "nix-bin", "builds guests"),
}
OPTIONAL: Final = ("firecracker", "jailer")
"""Of the settings' `vmm.directory`, which is where mvm-hostd takes them from, and not of the PATH."""

# Everything the fleet's rules will need of the kernel: a bridge table, a set, a verdict map, connection tracking, NAT.
DRY_RUN: Final = b"""\
table inet mvm-doctor {
  set guests { type ipv4_addr; flags interval; elements = { 10.240.0.0/12 } }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ip saddr @guests ip daddr @guests drop
  }
  chain post { type nat hook postrouting priority srcnat; ip saddr @guests masquerade; }
}
table bridge mvm-doctor {
  chain ports { type filter hook prerouting priority filter; ether saddr != 02:00:00:00:00:01 drop; }
}
"""


class Tool(msgspec.Struct, frozen=True):
    """`path`: "" if it is not installed; `version`: "" if it does not say, or, for `problem`, was not asked."""

    name: str
    path: str
    version: str
    problem: str = ""


class NftFacts(msgspec.Struct, frozen=True):
    """`works`: None where it was not tried; `problem`: what nft said."""

    works: bool | None
    problem: str = ""


def read_tools(firecracker: Path | None = None) -> dict[str, Tool]:
    """Every program of PROGRAMS and OPTIONAL. Starts each that is there once.

    `firecracker`: the directory of the OPTIONAL ones, if not the settings'.
    """
    found = {name: _tool(name, find_program(name), argv) for name, (argv, _, _) in PROGRAMS.items()}
    folder = firecracker or _vmm_directory()
    return found | {name: _optional(name, folder / name) for name in OPTIONAL}


def _tool(name: str, path: str | None, argv: tuple[str, ...]) -> Tool:
    if path is None:
        return Tool(name, "", "")
    try:
        done = run([path, *argv], timeout=_TIMEOUT_S, ok=range(256))
    except MvmError:
        return Tool(name, path, "")
    return Tool(
        name, path, text.parse_version((done.stdout + b"\n" + done.stderr).decode("utf-8", "replace"))
    )


def _optional(name: str, path: Path) -> Tool:
    if not os.access(path, os.X_OK):
        return Tool(name, "", "")
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        facts = path_facts(place)
        ours = facts is not None and facts.uid in (0, os.geteuid())
        if facts is None or not ours or (facts.mode & 0o022 and not facts.mode & 0o1000):
            # Perhaps root asks: not somebody else's program.
            return Tool(name, str(path), "", f"others can change {place}")
    return _tool(name, str(path), ("--version",))


def _vmm_directory() -> Path:
    from mvm.hostd import settings
    from mvm.hostd.vmm.choice import PROGRAMS as DEFAULT

    try:
        return Path(settings.load(settings.FILE).vmm.directory)
    except (MvmError, OSError):
        return Path(DEFAULT)  # that they are not valid the daemon says


def read_nft() -> NftFacts:
    """Whether nft and the kernel accept DRY_RUN, which is checked and not loaded. Needs root."""
    if os.geteuid() != 0:
        return NftFacts(None, "only root can try it")
    try:
        run(["nft", "--check", "--file", "-"], stdin=DRY_RUN, timeout=_TIMEOUT_S)
    except MvmError as error:
        return NftFacts(False, error.details.partition("\n")[2].strip() or error.brief)
    return NftFacts(True)
