"""The guarantees mvm makes, which mode each belongs to, and what a set of findings amounts to.

This list is the one place that says what mvm promises: `mvm posture` prints it with what was found on this node,
docs/posture.md is rendered from it, and a test holds every entry against a check that is really executed.

Rules. A guarantee that is not built yet stands in the list with `there=False` and is never reported as held, whatever
its check saw. `NOTHING` (no VM runs, no snapshot is kept) neither breaks a mode nor counts as held. What could not be
looked at is `UNKNOWN`, and an unknown guarantee keeps a mode from being reached. A mode is reached when every guarantee
of it, and of the modes below it, is held or has nothing to be seen on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

import msgspec


class Mode(StrEnum):
    """How far a node can be trusted, in ascending order."""

    DEVELOPMENT = "development"
    BASELINE = "baseline"
    HARDENED = "hardened"


MEANING: Final = {
    Mode.DEVELOPMENT: "One user's own machine. Nothing below is promised; what holds all the same is shown.",
    Mode.BASELINE: "Tenants who do not trust each other, on a node and an operator that are trusted.",
    Mode.HARDENED: "As baseline, and a break-in into one part of mvm, or a stolen disk, stays contained.",
}


class Status(StrEnum):
    HELD = "held"
    NOT_HELD = "not held"
    NOT_THERE = "not held: not there yet"
    NOTHING = "nothing to look at"
    UNKNOWN = "not known"


class Guarantee(msgspec.Struct, frozen=True):
    """`mode`: the lowest that promises it; `check`: what is looked at; `requires`: ids of docs/requirements.md;
    `there`: whether mvm does this at all today; `note`: what there is instead, or what the check does not show."""

    id: str
    area: str
    mode: Mode
    statement: str
    check: str
    requires: tuple[str, ...]
    there: bool = True
    note: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """What a check saw. `held`: None where nothing could be concluded; `count`: things looked at; `seen`: in words."""

    held: bool | None
    count: int
    seen: str


class Finding(msgspec.Struct, frozen=True):
    guarantee: Guarantee
    status: Status
    seen: str


class Posture(msgspec.Struct, frozen=True):
    """`missing`: ids that keep the next mode from being reached; `unseen`: ids of reached modes that had nothing to be
    seen on."""

    mode: Mode
    missing: tuple[str, ...]
    unseen: tuple[str, ...]


def find(guarantee: Guarantee, verdict: Verdict) -> Finding:
    """The verdict under the rules above."""
    if not guarantee.there:
        status = Status.NOT_THERE
    elif verdict.held is None:
        status = Status.UNKNOWN
    elif not verdict.held:
        status = Status.NOT_HELD
    else:
        status = Status.HELD if verdict.count else Status.NOTHING
    return Finding(guarantee, status, verdict.seen)


def assess(findings: Iterable[Finding]) -> Posture:
    """The mode reached."""
    found = list(findings)
    reached = Mode.DEVELOPMENT
    missing: tuple[str, ...] = ()
    for mode in Mode:
        of_mode = [f for f in found if f.guarantee.mode is mode]
        missing = tuple(f.guarantee.id for f in of_mode if f.status not in (Status.HELD, Status.NOTHING))
        if missing:
            break
        reached = mode
    modes = list(Mode)
    below = modes[: modes.index(reached) + 1]
    unseen = tuple(f.guarantee.id for f in found if f.status is Status.NOTHING and f.guarantee.mode in below)
    return Posture(reached, missing, unseen)


_B, _H = Mode.BASELINE, Mode.HARDENED

GUARANTEES: Final = (
    Guarantee(
        "memory-sealed", "memory", _H,
        "The memory of a sleeping guest is on disk encrypted and in no other form.",
        "Every file of every snapshot directory is one of the sealed format, by name and first bytes; nothing else lies"
        " there.",
        ("S1", "S3"),
        note="That the bytes behind the headers are ciphertext is shown by tests, not by this check.",
    ),
    Guarantee(
        "memory-in-ram", "memory", _H,
        "The decrypted memory of a running guest is in RAM only.",
        "No VMM maps a file of a block device for writing, or has one open for writing but its encrypted data disk and"
        " its log; its core files are limited to 0 bytes.",
        ("S3",),
    ),
    Guarantee(
        "no-plain-swap", "memory", _H,
        "Nothing of a guest is swapped to a disk unencrypted.",
        "Every line of /proc/swaps is a dm-crypt device or compressed memory without a disk behind it.",
        ("S3", "O1"),
    ),
    Guarantee(
        "snapshot-bound", "snapshots", _H,
        "A snapshot belongs to one instance and to one sleep of it.",
        "The manifest of each kept snapshot names the instance it lies with, and its id and SHA-256 are those in the"
        " instance's record.",
        ("S4",),
        note="A foreign, old or damaged one is refused at the wake by authentication; tests show that.",
    ),
    Guarantee(
        "snapshot-private", "snapshots", _B,
        "Snapshots are root's alone.",
        "Every snapshot directory is root's with mode 0700, every file in it 0600.",
        ("S4", "L4"),
    ),
    Guarantee(
        "volume-encrypted", "volumes", _B,
        "Data disks are encrypted.",
        "Every data.img begins with a LUKS header, and a wrapped key lies beside it.",
        ("K1",),
        note="LUKS2 (AES-256-XTS), opened by dm-crypt; where the kernel has none, LUKS1, opened by QEMU itself.",
    ),
    Guarantee(
        "volume-locked", "volumes", _B,
        "A data disk is open only in the VMM of its running instance.",
        "No other process has a data.img or the block device it is decrypted to open (but Firecracker's keeper, which"
        " reads nothing), and no such device exists for an instance that does not run.",
        ("K1",),
    ),
    Guarantee(
        "keys-wrapped", "keys", _H,
        "Every key that lies beside data is wrapped by the tenant's key.",
        "Each data.key, snapshot key and secrets file has the form of one that holds a wrapped key.",
        ("K2",),
    ),
    Guarantee(
        "key-provider", "keys", _H,
        "Tenant keys do not lie on the disk they protect.",
        "The key provider in use has no warning to give, and the development provider holds no keys here.",
        ("K2",),
        note="Only the development provider exists so far, so this cannot be held yet.",
    ),
    Guarantee(
        "no-key-in-sight", "keys", _B,
        "No key is in the arguments or the environment of a VMM.",
        "The environment of every VMM is PATH, LANG and HOME; no argument has a part that could be a key.",
        ("K2",),
    ),
    Guarantee(
        "secrets-sealed", "keys", _B,
        "Tenants' secrets are encrypted at rest and reach a guest through memory only.",
        "Every secrets file begins as a sealed one; every VMM's secrets disk is a memory file, or a copy in"
        " the memory of its jail.",
        ("K3",),
    ),
    Guarantee(
        "hardware-virtualisation", "machines", _B,
        "Guests are kept apart by the processor.",
        "Every VMM holds a KVM virtual machine.",
        ("O1", "O3"),
        note="Software emulation is for development: QEMU's authors do not call it a security boundary.",
    ),
    Guarantee(
        "vmm-uid", "machines", _B,
        "Every VMM runs as a user of its own that owns nothing.",
        "All four uids and gids of every thread are the instance's, no two VMMs share one, and the only further group"
        " is that of /dev/kvm.",
        ("H4",),
    ),
    Guarantee(
        "vmm-no-capabilities", "machines", _B,
        "A VMM has no capability.",
        "CapInh, CapPrm, CapEff and CapAmb are 0 on every thread.",
        ("H4",),
    ),
    Guarantee(
        "vmm-no-new-privs", "machines", _B,
        "A VMM cannot gain privileges.",
        "NoNewPrivs is 1 on every thread.",
        ("H4", "H6"),
    ),
    Guarantee(
        "vmm-seccomp", "machines", _H,
        "A VMM's system calls are filtered.",
        "Seccomp is 2 on every thread.",
        ("H6",),
        note="The filter is QEMU's own deny list (-sandbox on, spawning and privilege changes denied), or Firecracker's"
        " own list of what each of its threads may do.",
    ),
    Guarantee(
        "vmm-jail", "machines", _B,
        "A VMM sees no process and no network of the host, and of its files only its own program and what that loads.",
        "Its root directory is not the host's, and its mount, network and PID namespaces are its own.",
        ("H4",),
        note="What is in its root, and that nothing there can be changed, is shown by tests. In development mode a VMM"
        " runs without a jail where the kernel refuses one; runtime/unjailed then says why.",
    ),
    Guarantee(
        "vmm-limits", "machines", _B,
        "A VMM cannot use more memory, CPU or processes than it was given.",
        "Every VMM is in a cgroup v2 of its own with memory.max, pids.max, and cpu.max or cpuset.cpus set.",
        ("H5",),
    ),
    Guarantee(
        "artifacts-unchanged", "machines", _B,
        "What runs is what was built.",
        "Kernel, initrd, root file system and configuration of every revision in use have the SHA-256 of the build.",
        ("B5",),
    ),
    Guarantee(
        "builds-isolated", "machines", _B,
        "A tenant's flake is built in a throw-away microVM.",
        "Not looked at: builds run on the host.",
        ("B4",), there=False,
        note="Builds run under Nix on the host. Build only what you trust.",
    ),
    Guarantee(
        "network-separate", "network", _B,
        "Each tenant has a bridge of its own, and instances on it cannot reach each other.",
        "The tap of every running instance is an isolated port of its tenant's bridge, read back through ip.",
        ("N1", "N2"),
    ),
    Guarantee(
        "ipv6-closed", "network", _B,
        "No IPv6 to, from or between guests.",
        "disable_ipv6 is 1 on every bridge and tap of a running instance, and none has an IPv6 address.",
        ("N2",),
    ),
    Guarantee(
        "firewall", "network", _B,
        "Tenants cannot reach each other or spoof addresses, and go out only as allowed.",
        "The tables named mvm, read back through nft, are exactly what the records of all instances ask for.",
        ("N2", "N3"),
        note="That these rules stop what they should is shown by tests with real packets.",
    ),
    Guarantee(
        "no-network-control", "control", _B,
        "A guest is controlled without the network: there is no SSH, and no VMM has a network socket.",
        "No VMM holds an IPv4, IPv6 or packet socket; its control sockets are Unix sockets in a directory only root can"
        " enter.",
        ("L6",),
    ),
    Guarantee(
        "audit-chain", "control", _B,
        "What was done to a tenant is in a log that shows tampering.",
        "The audit log of every tenant, past ones included, is verified from its first entry to its head.",
        ("O2",),
        note="Who can write both the log and its head can rewrite both; keep heads elsewhere.",
    ),
    Guarantee(
        "state-private", "control", _B,
        "State is root's alone.",
        "The state root is root's with mode 0700, and no directory above it can be changed by others.",
        ("L4",),
    ),
    Guarantee(
        "mutual-tls", "control", _B,
        "The node is reached over the network by mutual TLS only.",
        "Not looked at: there is no agent, and mvm listens on no network address.",
        ("A5", "C2"), there=False,
    ),
    Guarantee(
        "privilege-split", "control", _H,
        "What talks to the network holds no privilege, and what is privileged talks to no network.",
        "Not looked at: there is no agent that would talk to the network.",
        ("H1", "H2"), there=False,
        note="Where mvm-hostd runs, the command needs no root and reaches it over a Unix socket.",
    ),
    Guarantee(
        "bounded-capabilities", "control", _H,
        "The privileged daemon holds the documented capabilities, filtered system calls, and nothing more.",
        "mvm-hostd answers for this state root; on every thread its capability sets are those documented for its"
        " drivers, NoNewPrivs is 1, Seccomp is 2, and it holds no network socket.",
        ("H3",),
        note="Without the daemon the command does the work itself, with all of root's rights.",
    ),
    Guarantee(
        "signed-state", "control", _H,
        "Nothing runs that the coordinator did not sign.",
        "Not looked at: there is no coordinator; the operator of the command line decides.",
        ("A2",), there=False,
    ),
    Guarantee(
        "attested-node", "control", _H,
        "The node can prove which software it booted.",
        "Not looked at: there is no attestation.",
        ("H8",), there=False,
    ),
    Guarantee(
        "host-side-channels", "host", _H,
        "Tenants share no core, no page and no open processor flaw.",
        "The rows smt, ksm and cpu of mvm doctor pass.",
        ("O1",),
    ),
)  # fmt: skip


def in_mode(mode: Mode) -> Sequence[Guarantee]:
    """Those that `mode` adds to the ones below it."""
    return [guarantee for guarantee in GUARANTEES if guarantee.mode is mode]


_INTRO: Final = """\
# What holds, and how it is checked

Generated from the list in `mvm.core.posture` by `python -m mvm.cli.posture > docs/posture.md`; do not edit.

`mvm posture` executes every check below on the node it runs on and prints what it saw. A guarantee is *held*, *not
held*, *not there yet* (mvm does not do this today; never reported as held), *not known* (it could not be looked at,
usually for want of root), or there is *nothing to look at* (no VM runs, no snapshot is kept).

## Modes

A mode is reached when all its guarantees, and those of the modes before it, are held or have nothing to be seen on.
`mvm posture --require MODE` exits with 13 unless it is reached.

| mode | for | guarantees | of these not there yet |
|---|---|---|---|
"""


def render_page() -> str:
    """docs/posture.md."""
    parts = [_INTRO]
    for mode in Mode:
        mine = in_mode(mode)
        absent = sum(not guarantee.there for guarantee in mine)
        parts.append(f"| **{mode}** | {MEANING[mode]} | {len(mine)} | {absent} |\n")
    unmet = [mode for mode in Mode if any(not guarantee.there for guarantee in in_mode(mode))]
    if unmet:
        parts.append(
            f"\n**No node can reach {unmet[0]} mode with this version of mvm**: some of its guarantees are not built"
            " yet.\n"
        )
    for area in dict.fromkeys(guarantee.area for guarantee in GUARANTEES):
        parts.append(f"\n## {area.capitalize()}\n")
        parts += [_entry(guarantee) for guarantee in GUARANTEES if guarantee.area == area]
    return "".join(parts)


def _entry(guarantee: Guarantee) -> str:
    absent = "" if guarantee.there else " **Not there yet.**"
    note = f"\n{guarantee.note}\n" if guarantee.note else ""
    return (
        f"\n### {guarantee.id}\n\n{guarantee.statement}{absent} ({guarantee.mode}; {', '.join(guarantee.requires)})\n"
        f"\nCheck: {guarantee.check}\n{note}"
    )
