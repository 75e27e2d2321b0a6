"""Which rows of `mvm doctor` must pass before the service runs in baseline mode, and what is lost where one does not.

A row counts only when it is `ok`: what could not be seen is not there. Rows that are not named here are shown and
decide nothing; `mvm posture` says what they cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from mvm.hostd.inspect.doctor import Check, Result

BASELINE: Final = "baseline"
DEVELOPMENT: Final = "development"

REQUIRED: Final = {
    "kvm": "guests are emulated in software, which is slow and no security boundary",
    "cgroup": "no limit holds on the memory, processor and processes of an instance",
    "nftables": "the rules that keep tenants apart cannot be loaded, so no instance starts",
    "dm-crypt": "data disks are opened by the VMM, whose process has the key, and not by the kernel",
    "paging": "no sleeping instance can wake",
    "tun": "no instance can have a network, so none starts",
    "program:ip": "links cannot be read back",
    "program:nft": "the rules that keep tenants apart cannot be loaded, so no instance starts",
    "program:cryptsetup": "no data disk can be made",
    "program:mke2fs": "no secrets disk can be made, so no instance starts",
    "program:debugfs": "no secrets disk can be filled, so no instance starts",
}
"""row of the checklist -> what does not hold without it."""
VMMS: Final = ("program:qemu-system-x86_64", "firecracker")
"""One of these is enough."""
_NO_VMM: Final = "there is nothing to run a VM with"
_NO_BOOT: Final = "KVM is there and no guest kernel boots with it: guests are emulated in software"


class Lack(NamedTuple):
    """A row that is not as it must be, and what is lost."""

    check: Check
    lost: str


def lacking(checks: Iterable[Check]) -> list[Lack]:
    """What keeps this host from baseline mode, in the order of the checklist."""
    rows = {check.id: check for check in checks}
    found = []
    for name, check in rows.items():
        if name in REQUIRED and check.result is not Result.OK:
            found.append(Lack(check, REQUIRED[name]))
        elif name == "kvm-boots" and check.result is Result.FAIL:
            found.append(Lack(check, _NO_BOOT))
    found += [Lack(_unseen(name), lost) for name, lost in REQUIRED.items() if name not in rows]
    vmms = [rows[name] for name in VMMS if name in rows]
    if not any(check.result is Result.OK for check in vmms):
        found.append(Lack(vmms[0] if vmms else _unseen(VMMS[0]), _NO_VMM))
    return found


def emulated(checks: Iterable[Check]) -> bool:
    """Whether guests will not run on KVM here, as far as is known."""
    rows = {check.id: check.result for check in checks}
    return rows.get("kvm") is not Result.OK or rows.get("kvm-boots") is Result.FAIL


def _unseen(name: str) -> Check:
    return Check(name, name, Result.FAIL, "it was not looked at", "mvm doctor")
