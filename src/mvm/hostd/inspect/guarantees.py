"""One judge for each guarantee of `mvm.core.posture`: pure, over a scene that was read before.

A judge says what it saw as a count and, where something is wrong, names it. It never concludes from silence: what it
could not look at makes `held` None.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Final

from mvm.core.posture import GUARANTEES, Finding, Verdict, find
from mvm.hostd.confine import wanted_by
from mvm.hostd.inspect import text
from mvm.hostd.inspect.doctor import Check, Result, open_to_others
from mvm.hostd.inspect.host import HostFacts
from mvm.hostd.inspect.process import OpenFile
from mvm.hostd.inspect.scene import CAPABILITY_SETS, Scene, SnapshotFile, VmmFacts
from mvm.linux.process import clean_environment

_SHOWN: Final = 5
_SIDE_CHANNELS: Final = ("smt", "ksm", "cpu")
# File name in a snapshot -> its first bytes (docs/formats/sealed-memory.md).
MAGIC: Final = {
    "manifest": b"MVMSEALM", "key": b"MVMSEALK", "state": b"MVMSEALD", "working-set": b"MVMSEALW",
}  # fmt: skip
SEGMENT: Final = re.compile(r"segment-[0-9a-f]{32}")
SEGMENT_MAGIC: Final = b"MVMSEALS"
_UNDER_WAY: Final = re.compile(r"\.(new|old)-[0-9a-f]{32}")
# What a VMM may have open for writing on a disk, below its instance's directory.
WRITABLE: Final = frozenset({"volumes/data.img", "runtime/logs/vmm.log", "runtime/alive"})
LARGE_MAP: Final = 16 << 20
"""A private writable mapping of a disk's file above this could be guest memory; below, it is a library's data."""


def examine(root: str, host: HostFacts, checks: Iterable[Check], scene: Scene | None) -> list[Finding]:
    """A finding for every guarantee, in order. `scene`: None if it could not be read (no root); `checks`: doctor's."""
    results = {check.id: check for check in checks}
    findings = []
    for guarantee in GUARANTEES:
        if guarantee.id in SCENE_JUDGES:
            verdict = _UNSEEN if scene is None else SCENE_JUDGES[guarantee.id](scene)
        elif guarantee.id in HOST_JUDGES:
            verdict = HOST_JUDGES[guarantee.id](root, host, results)
        else:
            verdict = Verdict(None, 0, guarantee.note)
        findings.append(find(guarantee, verdict))
    return findings


_UNSEEN: Final = Verdict(None, 0, "only root can see this: sudo mvm posture")


def _verdict(count: int, what: str, problems: list[str]) -> Verdict:
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        return Verdict(False, count, "; ".join(problems[:_SHOWN]) + more)
    return Verdict(True, count, f"{what}: {count}")


def _of_vmms(scene: Scene, judge: Callable[[VmmFacts], Iterable[str]], what: str = "running VMMs") -> Verdict:
    """`judge` names what is wrong with one VMM. An instance whose record cannot be read may have one."""
    if scene.unreadable:
        return Verdict(None, 0, "; ".join(scene.unreadable[:_SHOWN]))
    problems = [f"{vmm.instance} (pid {vmm.process.pid}): {p}" for vmm in scene.vmms for p in judge(vmm)]
    return _verdict(len(scene.vmms), what, problems)


# Memory and snapshots.


def _memory_sealed(scene: Scene) -> Verdict:
    problems, count = [], 0
    for snapshot in scene.snapshots:
        where = f"{snapshot.instance} {snapshot.name}"
        if snapshot.name != "latest" and not (snapshot.pending and _UNDER_WAY.fullmatch(snapshot.name)):
            problems.append(f"{where} is not a snapshot in use")
        if snapshot.folder.kind != "directory":
            problems.append(f"{where} is a {snapshot.folder.kind}")
        for file in snapshot.files:
            count += 1
            if not _is_sealed(file):
                problems.append(f"{where}/{file.name} is not of the sealed format")
    return _verdict(count, "files of snapshots", problems)


def _is_sealed(file: SnapshotFile) -> bool:
    magic = SEGMENT_MAGIC if SEGMENT.fullmatch(file.name) else MAGIC.get(file.name)
    return file.facts.kind == "file" and magic is not None and file.head == magic


def _memory_in_ram(scene: Scene) -> Verdict:
    def judge(vmm: VmmFacts) -> Iterable[str]:
        for file in vmm.process.files:
            own = os.path.relpath(file.target, vmm.base) in WRITABLE
            if file.block:
                own = file.block == vmm.data_device
            if file.writable and file.persistent and not own:
                yield f"has {file.target} open for writing"
        for mapping in vmm.process.plain_maps:
            # QEMU maps the guest's kernel privately while it loads it; that is no guest's memory.
            if mapping.shared or (mapping.size > LARGE_MAP and mapping.path not in vmm.artifacts):
                yield f"maps {mapping.path}"
        if vmm.process.core_limit != "0 0":
            yield f"may write core files ({vmm.process.core_limit or 'limit not read'})"

    return _of_vmms(scene, judge)


def _snapshot_bound(scene: Scene) -> Verdict:
    problems, kept = [], [s for s in scene.snapshots if s.name == "latest"]
    for snapshot in kept:
        if snapshot.claims is None:
            problems.append(f"{snapshot.instance}: {snapshot.problem or 'it does not say whose it is'}")
        elif snapshot.recorded is None:
            problems.append(f"{snapshot.instance}: it has a snapshot that its record does not know")
        elif snapshot.claims != (snapshot.instance, *snapshot.recorded) and not snapshot.pending:
            problems.append(f"{snapshot.instance}: its snapshot is another than its record says")
    return _verdict(len(kept), "snapshots", problems)


def _snapshot_private(scene: Scene) -> Verdict:
    problems = []
    folders = [*scene.snapshot_parents, *(s.folder for s in scene.snapshots)]
    for folder in folders:
        if folder.kind != "directory" or folder.uid != 0 or folder.mode != 0o700:
            problems.append(f"{folder.path} is a {folder.kind} of uid {folder.uid}, mode {folder.mode:04o}")
    for snapshot in scene.snapshots:
        for file in snapshot.files:
            if file.facts.uid != 0 or file.facts.mode & 0o077:
                problems.append(f"{file.facts.path} is of uid {file.facts.uid}, mode {file.facts.mode:04o}")
    return _verdict(len(scene.snapshots), "snapshots", problems)


# Volumes and keys.


def _volume_encrypted(scene: Scene) -> Verdict:
    problems = [f"{v.path} does not begin as LUKS" for v in scene.volumes if not v.luks]
    return _verdict(len(scene.volumes), "data disks", problems)


def _volume_locked(scene: Scene) -> Verdict:
    if scene.unreadable:
        return Verdict(None, 0, "; ".join(scene.unreadable[:_SHOWN]))
    allowed = {(vmm.data_disk, vmm.process.pid) for vmm in scene.vmms}
    problems = [
        f"{v.path} is open in process {pid}"
        for v in scene.volumes
        for pid in v.holders
        if (os.path.realpath(v.path), pid) not in allowed
    ]
    for v in scene.volumes:
        own = {pid for path, pid in allowed if path == os.path.realpath(v.path)}
        # Firecracker's keeper holds the device, so that its number stays taken.
        own |= {vmm.keeper for vmm in scene.vmms if vmm.driver == "firecracker" and vmm.process.pid in own}
        if v.device and not own:
            problems.append(f"{v.path} is open as {v.device}, and its instance does not run")
        strangers = sorted(set(v.device_holders) - own)
        problems += [f"{v.path} is open as {v.device} in process {stranger}" for stranger in strangers]
    if scene.hidden_processes and not problems:
        pids = ", ".join(map(str, scene.hidden_processes[:_SHOWN]))
        return Verdict(None, 0, f"{len(scene.hidden_processes)} processes cannot be looked into: {pids}")
    return _verdict(len(scene.volumes), "data disks", problems)


def _keys_wrapped(scene: Scene) -> Verdict:
    problems = [f"{v.path} has no wrapped key beside it" for v in scene.volumes if not v.key]
    count = len(scene.volumes) + len(scene.secrets)
    for snapshot in scene.snapshots:
        key = next((file for file in snapshot.files if file.name == "key"), None)
        count += 1
        if not snapshot.pending and (key is None or not _is_sealed(key)):
            problems.append(f"{snapshot.instance} {snapshot.name} has no wrapped key")
    problems += [f"{s.path} is not sealed" for s in scene.secrets if not s.sealed]
    return _verdict(count, "files with keys", problems)


def _key_provider(scene: Scene) -> Verdict:
    problems = [scene.provider_warning] if scene.provider_warning else []
    if scene.development_keys:
        problems.append(f"{scene.development_keys} tenant keys lie on this disk")
    return _verdict(1, f"providers without a warning ({scene.provider})", problems)


def _no_key_in_sight(scene: Scene) -> Verdict:
    clean = {f"{name}={value}" for name, value in clean_environment().items()}

    def judge(vmm: VmmFacts) -> Iterable[str]:
        # Names only: what is there instead of a key's absence is not to be printed.
        extra = sorted(word.partition("=")[0] for word in vmm.process.environ if word not in clean)
        if extra:
            yield f"has {', '.join(extra)} in its environment"
        if not vmm.process.argv:
            yield "shows no arguments"
        for place in text.key_like(vmm.process.argv):
            yield f"has what could be a key in {place}"

    return _of_vmms(scene, judge)


def _secrets_sealed(scene: Scene) -> Verdict:
    problems = [f"{s.path} is not sealed" for s in scene.secrets if not s.sealed]
    for vmm in scene.vmms:
        if not any(_is_secrets_disk(file, vmm.driver) for file in vmm.process.files):
            problems.append(f"{vmm.instance}: its secrets disk is not a memory file")
    return _verdict(len(scene.secrets) + len(scene.vmms), "stores and disks of secrets", problems)


def _is_secrets_disk(file: OpenFile, driver: str) -> bool:
    if driver == "firecracker":  # a copy in the memory of its jail, under the name it has there
        return file.target == "/secrets" and file.regular and not file.persistent and not file.writable
    return file.target.startswith("/memfd:mvm-secrets")


# Machines.


def _hardware(scene: Scene) -> Verdict:
    def judge(vmm: VmmFacts) -> Iterable[str]:
        if not any(file.target == "anon_inode:kvm-vm" for file in vmm.process.files):
            yield "emulated in software"

    return _of_vmms(scene, judge)


def _vmm_uid(scene: Scene) -> Verdict:
    uids = [vmm.uid for vmm in scene.vmms]

    def judge(vmm: VmmFacts) -> Iterable[str]:
        expected = (vmm.uid,) * 4
        for thread in vmm.process.threads:
            if thread.uids != expected or thread.gids != expected or 0 in expected:
                yield f"runs as uid {thread.uids[1]}, gid {thread.gids[1]}, not {vmm.uid}"
                break
            if not set(thread.groups) <= {vmm.uid, *([scene.kvm_gid] if scene.kvm_gid else [])}:
                yield f"is in the groups {', '.join(map(str, thread.groups))}"
                break
        if uids.count(vmm.uid) > 1:
            yield f"shares uid {vmm.uid}"

    return _of_vmms(scene, judge)


def _threads(scene: Scene, problem: Callable[[text.ThreadStatus], str]) -> Verdict:
    def judge(vmm: VmmFacts) -> Iterable[str]:
        if not vmm.process.threads:
            yield "shows no thread"
        for thread in vmm.process.threads:
            if wrong := problem(thread):
                yield wrong
                return

    count = sum(len(vmm.process.threads) for vmm in scene.vmms)
    return _of_vmms(scene, judge, f"threads: {count}, of running VMMs")


def _no_capabilities(scene: Scene) -> Verdict:
    return _threads(scene, lambda t: f"has capabilities {t.capabilities:#x}" if t.capabilities else "")


def _no_new_privs(scene: Scene) -> Verdict:
    return _threads(scene, lambda t: "" if t.no_new_privs else "NoNewPrivs is 0")


def _seccomp(scene: Scene) -> Verdict:
    return _threads(scene, lambda t: "" if t.seccomp == 2 else f"Seccomp is {t.seccomp}")


def _jail(scene: Scene) -> Verdict:
    def judge(vmm: VmmFacts) -> Iterable[str]:
        shared = [kind for kind in ("mnt", "net", "pid") if kind not in vmm.process.own_namespaces]
        if vmm.process.root == "/":
            yield "its root directory is the host's"
        if shared:
            yield f"shares the host's namespaces: {', '.join(shared)}"

    return _of_vmms(scene, judge)


def _limits(scene: Scene) -> Verdict:
    groups = [vmm.process.cgroup for vmm in scene.vmms]

    def judge(vmm: VmmFacts) -> Iterable[str]:
        limits = vmm.process.limits
        missing = [name for name in ("memory.max", "pids.max") if limits.get(name, "max") == "max"]
        if limits.get("cpu.max", "max").startswith("max") and not limits.get("cpuset.cpus"):
            missing.append("cpu.max or cpuset.cpus")
        if missing:
            yield f"without {', '.join(missing)}"
        if vmm.process.cgroup in ("", "/") or groups.count(vmm.process.cgroup) > 1:
            yield "in no cgroup of its own"

    return _of_vmms(scene, judge)


def _artifacts(scene: Scene) -> Verdict:
    problems = [f"revision {r.name}: {r.problem}" for r in scene.revisions if r.problem]
    return _verdict(len(scene.revisions), "revisions in use", problems)


# Network and control.


def _network_separate(scene: Scene) -> Verdict:
    if any(vmm.process.apart for vmm in scene.vmms):
        return Verdict(None, 0, "VMMs were started in another network namespace than this command's")
    owners: dict[str, set[str]] = {}
    for vmm in scene.vmms:
        owners.setdefault(vmm.bridge, set()).add(vmm.instance.partition("/")[0])

    def judge(vmm: VmmFacts) -> Iterable[str]:
        tap = scene.links.get(vmm.tap)
        if tap is None:
            yield f"there is no {vmm.tap}"
        elif tap.master != vmm.bridge or not tap.isolated:
            yield f"{vmm.tap} is {'an' if tap.isolated else 'no'} isolated port, of {tap.master or 'no bridge'}"
        if len(owners[vmm.bridge]) > 1:
            yield f"{vmm.bridge} is shared by {', '.join(sorted(owners[vmm.bridge]))}"

    return _of_vmms(scene, judge)


def _ipv6(scene: Scene) -> Verdict:
    if any(vmm.process.apart for vmm in scene.vmms):
        return Verdict(None, 0, "VMMs were started in another network namespace than this command's")

    def judge(vmm: VmmFacts) -> Iterable[str]:
        for name in (vmm.bridge, vmm.tap):
            link = scene.links.get(name)
            if scene.ipv6 and not scene.ipv6_off.get(name):
                yield f"IPv6 is on on {name}"
            if link is None or any(":" in address for address in link.addresses):
                yield f"{name} has an IPv6 address" if link else f"there is no {name}"

    return _of_vmms(scene, judge)


def _no_network_control(scene: Scene) -> Verdict:
    def judge(vmm: VmmFacts) -> Iterable[str]:
        if vmm.process.network_sockets:
            yield f"holds {vmm.process.network_sockets} network sockets"
        folder = vmm.runtime
        if folder is None or folder.kind != "directory" or folder.uid != 0 or folder.mode & 0o077:
            yield "others can enter the directory of its sockets"

    return _of_vmms(scene, judge)


def _firewall(scene: Scene) -> Verdict:
    if any(vmm.process.apart for vmm in scene.vmms):
        return Verdict(None, 0, "VMMs were started in another network namespace than this command's")
    if scene.firewall.problem:
        return Verdict(None, 0, scene.firewall.problem)
    problems = [f"not as it should be: {place}" for place in scene.firewall.differences]
    return _verdict(len(scene.vmms), "running VMMs behind the rules", problems)


def _bounded_capabilities(scene: Scene) -> Verdict:
    problems = (
        []
        if scene.daemons
        else ["no daemon answers for this state root: the command works with all of root's rights"]
    )
    for daemon in scene.daemons:
        who, expected = f"process {daemon.pid}", tuple(sorted(wanted_by(daemon.drivers)))
        for name in CAPABILITY_SETS:
            wanted = expected if name in ("permitted", "effective", "bounding") else ()
            has = daemon.capabilities.get(name, ("?",))
            if has != wanted:
                problems.append(f"{who}: {name} capabilities are {', '.join(has) or 'none'}")
        if not daemon.no_new_privs:
            problems.append(f"{who}: NoNewPrivs is 0")
        if not daemon.seccomp:
            problems.append(f"{who}: no seccomp filter")
        if daemon.network_sockets:
            problems.append(f"{who}: holds {daemon.network_sockets} network sockets")
    return _verdict(len(scene.daemons), "daemons", problems)


def _audit(scene: Scene) -> Verdict:
    problems = [f"{log.name}: {log.problem}" for log in scene.audits if log.problem]
    return _verdict(len(scene.audits), "audit logs", problems)


def _state_private(root: str, host: HostFacts, results: dict[str, Check]) -> Verdict:
    if not any(path.path == root for path in host.state):
        # Somebody without root cannot tell a root that is hidden from one that is not there.
        return Verdict(True if host.root else None, 0, f"{root} is not there")
    return _verdict(len(host.state), "directories", [p for _, p, _ in open_to_others(host.state, root)])


def _swap(root: str, host: HostFacts, results: dict[str, Check]) -> Verdict:
    check = results["swap"]
    held = {Result.OK: True, Result.FAIL: False}.get(check.result)
    return Verdict(held, 1, check.seen)


def _side_channels(root: str, host: HostFacts, results: dict[str, Check]) -> Verdict:
    rows = [results[name] for name in _SIDE_CHANNELS]
    bad = [f"{row.id}: {row.seen}" for row in rows if row.result is Result.FAIL]
    unseen = [f"{row.id}: {row.seen}" for row in rows if row.result is Result.WARNING]
    if bad or not unseen:
        return _verdict(len(rows), "rows of mvm doctor pass", bad)
    return Verdict(None, 0, "; ".join(unseen))


SCENE_JUDGES: Final[dict[str, Callable[[Scene], Verdict]]] = {
    "memory-sealed": _memory_sealed,
    "memory-in-ram": _memory_in_ram,
    "snapshot-bound": _snapshot_bound,
    "snapshot-private": _snapshot_private,
    "volume-encrypted": _volume_encrypted,
    "volume-locked": _volume_locked,
    "keys-wrapped": _keys_wrapped,
    "key-provider": _key_provider,
    "no-key-in-sight": _no_key_in_sight,
    "secrets-sealed": _secrets_sealed,
    "hardware-virtualisation": _hardware,
    "vmm-uid": _vmm_uid,
    "vmm-no-capabilities": _no_capabilities,
    "vmm-no-new-privs": _no_new_privs,
    "vmm-seccomp": _seccomp,
    "vmm-jail": _jail,
    "vmm-limits": _limits,
    "artifacts-unchanged": _artifacts,
    "network-separate": _network_separate,
    "ipv6-closed": _ipv6,
    "firewall": _firewall,
    "no-network-control": _no_network_control,
    "bounded-capabilities": _bounded_capabilities,
    "audit-chain": _audit,
}
HOST_JUDGES: Final[dict[str, Callable[[str, HostFacts, dict[str, Check]], Verdict]]] = {
    "state-private": _state_private,
    "no-plain-swap": _swap,
    "host-side-channels": _side_channels,
}
