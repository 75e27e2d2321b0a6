"""Everything `mvm posture` looks at below one state root, read once, as root.

No lock is taken, but a shared one on an audit log while it is verified. So what is read while a command is at work may
be of two moments; a finding that surprises is worth a second look.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mvm.core.addressing import instance_uid
from mvm.core.errors import IntegrityError, InvalidInput, MvmError, NotFound
from mvm.core.ids import TenantId
from mvm.core.revision import DOCUMENT, FILES, REVISION_BYTES, decode_revision
from mvm.hostd import keeper, net_policy, sealing
from mvm.hostd.assembly import verify_artifacts
from mvm.hostd.inspect import text
from mvm.hostd.inspect.host import PathFacts, path_facts
from mvm.hostd.inspect.process import ProcessFacts, holders, read_process
from mvm.hostd.keys import parse_header
from mvm.hostd.resources import audit, dm_crypt, forwarding, network, nftables, secrets_store, volume
from mvm.linux import capabilities, machine, pidfd
from mvm.linux.files import read_bounded

if TYPE_CHECKING:
    from mvm.core.ids import RevisionId
    from mvm.core.record import InstanceRecord
    from mvm.hostd.keys import KeyProvider
    from mvm.hostd.resources.network import ObservedLink
    from mvm.hostd.resources.nftables import Ruleset
    from mvm.hostd.store import Store

_HEAD = 8
CAPABILITY_SETS = ("permitted", "effective", "bounding", "inheritable", "ambient")


class VmmFacts(msgspec.Struct, frozen=True):
    """A VMM of this root that runs. `uid`: the one its instance has; `artifacts`: files of its revision, as they are
    named in the end; `runtime`: of its directory; `data_device`: `major:minor` of its data disk, where the kernel has
    it open; `driver`: as its record says; `keeper`: pid of its keeper, 0 if there is none."""

    instance: str
    uid: int
    base: str
    data_disk: str
    artifacts: tuple[str, ...]
    bridge: str
    tap: str
    runtime: PathFacts | None
    process: ProcessFacts
    data_device: str = ""
    driver: str = "qemu"
    keeper: int = 0


class VolumeFacts(msgspec.Struct, frozen=True):
    """`luks`: begins as a LUKS volume; `key`: a wrapped key lies beside it; `holders`: pids that have it open;
    `device`: the block device that the kernel decrypts it to, "" if it is locked; `device_holders`: as `holders`."""

    instance: str
    path: str
    luks: bool
    key: bool
    holders: tuple[int, ...]
    device: str = ""
    device_holders: tuple[int, ...] = ()


class SnapshotFile(msgspec.Struct, frozen=True):
    name: str
    facts: PathFacts
    head: bytes


class SnapshotFacts(msgspec.Struct, frozen=True):
    """One entry of a `snapshots` directory. `claims`: (instance, snapshot id, SHA-256 of the manifest) as it says,
    `recorded`: (snapshot id, SHA-256) as the record says; `problem`: why it does not say."""

    instance: str
    name: str
    folder: PathFacts
    files: tuple[SnapshotFile, ...]
    claims: tuple[str, str, str] | None
    recorded: tuple[str, str] | None
    pending: bool
    problem: str = ""


class SecretsFacts(msgspec.Struct, frozen=True):
    path: str
    sealed: bool


class Checked(msgspec.Struct, frozen=True):
    """Something that was verified as a whole. `problem`: "" if it is sound."""

    name: str
    problem: str


class DaemonFacts(msgspec.Struct, frozen=True):
    """The process that answers at the daemon's socket. `capabilities`: by set, of all threads together; `drivers`: that
    it says it uses."""

    pid: int
    capabilities: dict[str, tuple[str, ...]]
    no_new_privs: bool
    seccomp: bool
    network_sockets: int
    drivers: tuple[str, ...] = ("qemu",)


class FirewallFacts(msgspec.Struct, frozen=True):
    """`differences`: what is live and what should be; `problem`: why that is not known."""

    differences: tuple[str, ...]
    problem: str = ""


class Scene(msgspec.Struct, frozen=True):
    vmms: tuple[VmmFacts, ...]
    volumes: tuple[VolumeFacts, ...]
    hidden_processes: tuple[int, ...]
    snapshots: tuple[SnapshotFacts, ...]
    snapshot_parents: tuple[PathFacts, ...]
    secrets: tuple[SecretsFacts, ...]
    provider: str
    provider_warning: str
    development_keys: int
    links: dict[str, ObservedLink]
    ipv6_off: dict[str, bool]
    ipv6: bool
    audits: tuple[Checked, ...]
    revisions: tuple[Checked, ...]
    kvm_gid: int | None
    firewall: FirewallFacts
    daemons: tuple[DaemonFacts, ...]
    unreadable: tuple[str, ...]


def read_scene(store: Store, keys: KeyProvider, daemon: Path | None = None) -> Scene:
    """Needs root. Reads every artifact in use and every audit log in full. `daemon`: the socket of the one that serves
    this state root, if there is one."""
    unreadable: list[str] = []
    records: list[InstanceRecord] = []
    instances = [i for tenant in _tenants(store) for i in store.instances(tenant)]
    for instance in instances:
        try:
            records.append(store.load_record(instance))
        except NotFound:
            continue  # destroyed just now
        except MvmError as error:
            unreadable.append(f"{instance}: {error.brief}")
    running = [record for record in records if record.process and pidfd.is_alive(record.process)]
    vmms = tuple(facts for facts in map(_VmmReader(store), running) if facts is not None)
    links = network.inspect() if vmms else {}
    volumes, hidden = _volumes(store)
    return Scene(
        vmms=vmms,
        volumes=volumes,
        hidden_processes=hidden,
        snapshots=tuple(facts for record in records for facts in _snapshots(store, record)),
        snapshot_parents=tuple(
            facts for record in records if (facts := path_facts(store.instance_paths(record.id).snapshots))
        ),
        secrets=_secrets(store),
        provider=keys.name,
        provider_warning=keys.warning,
        development_keys=_development_keys(store),
        links=links,
        ipv6_off={name: _ipv6_off(name) for vmm in vmms for name in (vmm.tap, vmm.bridge)},
        ipv6=os.path.isdir("/proc/sys/net/ipv6/conf/all"),
        audits=_audits(store),
        revisions=_revisions(store, {record.revision for record in records if record.revision}),
        kvm_gid=os.stat("/dev/kvm").st_gid if os.path.exists("/dev/kvm") else None,
        firewall=_firewall(store) if vmms else FirewallFacts(()),
        daemons=_daemons(daemon),
        unreadable=tuple(unreadable),
    )


def _tenants(store: Store) -> list[TenantId]:
    """All with a directory: a destroyed tenant's kept volumes and log are looked at too."""
    found = []
    try:
        names = sorted(os.listdir(store.tenants_dir))
    except FileNotFoundError:
        return []
    for name in names:
        try:
            found.append(TenantId.parse(name))
        except InvalidInput:
            continue
    return found


class _VmmReader:
    """Reads a record's VMM; what all of them need is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            self._mounts = text.parse_mounts(file.read())
        self._unified = machine.cgroup_version()[1]

    def __call__(self, record: InstanceRecord) -> VmmFacts | None:
        identity, net = record.process, record.network
        assert identity is not None
        process = read_process(identity.pid, self._mounts, self._unified)
        # Looked at again: the number may have changed hands while its files were read.
        if process is None or not pidfd.is_alive(identity):
            return None
        paths = self._store.instance_paths(record.id)
        return VmmFacts(
            instance=str(record.id),
            uid=instance_uid(net.index, net.slot),
            base=os.path.realpath(paths.base),
            data_disk=os.path.realpath(paths.data_disk),
            artifacts=_artifacts(self._store, record),
            bridge=net.bridge,
            tap=net.tap,
            runtime=path_facts(paths.runtime),
            process=process,
            data_device=_device_number(_device(paths.data_disk, dm_crypt.opened())),
            driver=record.vmm.driver if record.vmm is not None else "",
            keeper=keeper.anything_left(paths.runtime) or 0,
        )


def _artifacts(store: Store, record: InstanceRecord) -> tuple[str, ...]:
    if record.revision is None:
        return ()
    folder = store.revisions_dir / record.revision
    return tuple(os.path.realpath(folder / name) for name in FILES.values())


def _volumes(store: Store) -> tuple[tuple[VolumeFacts, ...], tuple[int, ...]]:
    """Every data.img there is, those that a destroy kept included; and the pids that could not be looked into."""
    images = sorted(store.tenants_dir.glob(f"*/instances/*/volumes/{volume.IMAGE_NAME}"))
    held: dict[str, list[int]] = {}
    mappings = dm_crypt.opened()
    devices = {image: _device(image, mappings) for image in images}
    # Not asked where there is no disk: it means looking into every process.
    wanted = [os.path.realpath(image) for image in images] + [path for path in devices.values() if path]
    found, unseen = holders(wanted) if images else ([], [])
    for path, pid in found:
        held.setdefault(path, []).append(pid)
    volumes = tuple(
        VolumeFacts(
            instance=f"{image.parts[-5]}/{image.parts[-3]}",
            path=str(image),
            luks=_head(image, len(volume.MAGIC)) == volume.MAGIC,
            key=_is_wrapped(volume.key_path(image)),
            holders=tuple(held.get(os.path.realpath(image), ())),
            device=devices[image],
            device_holders=tuple(held.get(devices[image], ())),
        )
        for image in images
    )
    return volumes, tuple(unseen)


def _device(image: Path, mappings: list[dm_crypt.Mapping]) -> str:
    """The block device over an image, "" if the kernel has it not open."""
    return next((mapping.path for mapping in mappings if dm_crypt.is_of(mapping, image)), "")


def _device_number(path: str) -> str:
    try:
        number = os.stat(path).st_rdev if path else 0
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}" if number else ""


def _is_wrapped(path: Path) -> bool:
    try:
        parse_header(read_bounded(path, 4096))
    except (OSError, MvmError):
        return False
    return True


def _snapshots(store: Store, record: InstanceRecord) -> list[SnapshotFacts]:
    parent = store.instance_paths(record.id).snapshots
    try:
        names = sorted(os.listdir(parent))
    except FileNotFoundError:
        return []
    return [facts for name in names if (facts := _snapshot(record, parent / name)) is not None]


def _snapshot(record: InstanceRecord, folder: Path) -> SnapshotFacts | None:
    facts = path_facts(folder)
    if facts is None:
        return None
    found: list[SnapshotFile] = []
    claims, problem = None, ""
    if facts.kind == "directory":
        for name in sorted(os.listdir(folder)):
            seen = path_facts(folder / name)
            if seen is not None:
                found.append(SnapshotFile(name, seen, _head(folder / name, _HEAD)))
        try:
            identity, digest = sealing.peek(folder)
            claims = (str(identity.instance), str(identity.snapshot), digest)
        except (MvmError, OSError) as error:
            problem = error.brief if isinstance(error, MvmError) else str(error)
    ref = record.snapshot
    return SnapshotFacts(
        instance=str(record.id),
        name=folder.name,
        folder=facts,
        files=tuple(found),
        claims=claims,
        recorded=None if ref is None else (str(ref.id), str(ref.manifest_sha256)),
        pending=record.pending is not None,
        problem=problem,
    )


def _head(path: Path, size: int) -> bytes:
    """The first bytes of a file; b"" for what is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, size)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _secrets(store: Store) -> tuple[SecretsFacts, ...]:
    found = []
    for path in sorted(store.tenants_dir.glob(f"*/{secrets_store.STORE_NAME}")):
        try:
            sealed = secrets_store.version(path) > 0
        except (MvmError, OSError):
            sealed = False
        found.append(SecretsFacts(str(path), sealed))
    return tuple(found)


def _development_keys(store: Store) -> int:
    return sum(1 for _ in (store.keys_dir / "development").glob("*/*.key"))


def _ipv6_off(link: str) -> bool:
    try:
        with open(f"/proc/sys/net/ipv6/conf/{network.check_link_name(link)}/disable_ipv6", "rb") as file:
            return file.read().strip() == b"1"
    except OSError:
        return False


def _firewall(store: Store) -> FirewallFacts:
    try:
        wanted = nftables.ruleset(net_policy.wanted(store, forwarding.host_network()))
        return FirewallFacts(tuple(differences(wanted, nftables.read())))
    except (MvmError, OSError) as error:
        return FirewallFacts((), error.brief if isinstance(error, MvmError) else str(error))


def differences(wanted: Ruleset, live: Ruleset) -> list[str]:
    """Each table, chain and set that is not as it should be, by name."""
    found = [f"table {name}" for name in sorted(wanted.tables ^ live.tables)]
    for what, ours, theirs in (("chain", wanted.chains, live.chains), ("set", wanted.sets, live.sets)):
        places = sorted(ours.keys() | theirs.keys())
        found += [f"{what} {' '.join(place)}" for place in places if ours.get(place) != theirs.get(place)]
    if wanted.others != live.others:
        found.append("objects that are not mvm's")
    return found


def _daemons(path: Path | None) -> tuple[DaemonFacts, ...]:
    """The daemon that answers at `path`. It names its own pid, because its socket may be systemd's; what it may is read
    from the kernel all the same, and a process that is no daemon of ours would have to be as confined."""
    if path is None:
        return ()
    from mvm.linux.stream import UnixStream
    from mvm.wire.hostd_client import HostdClient

    try:
        node = HostdClient(lambda: UnixStream.dial(path)).ping()
    except (MvmError, OSError):
        return ()
    found = _daemon(node.pid, node.driver)
    return () if found is None else (found,)


def _daemon(pid: int, drivers: str) -> DaemonFacts | None:
    process = read_process(pid, (), "")
    sets: dict[str, set[str]] = {name: set() for name in CAPABILITY_SETS}
    if process is None:
        return None
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/status", encoding="ascii", errors="replace") as file:
                status = capabilities.parse_status(file.read())
            for name in CAPABILITY_SETS:
                sets[name] |= getattr(status, name)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return DaemonFacts(
        pid=pid,
        capabilities={name: tuple(sorted(names)) for name, names in sets.items()},
        no_new_privs=all(thread.no_new_privs for thread in process.threads),
        seccomp=all(thread.seccomp == 2 for thread in process.threads),
        network_sockets=process.network_sockets,
        drivers=tuple(drivers.split("+")),
    )


def _audits(store: Store) -> tuple[Checked, ...]:
    found = []
    for tenant in _tenants(store):
        try:
            audit.verify(store.tenant_dir(tenant) / audit.LOG_NAME, tenant)
            found.append(Checked(str(tenant), ""))
        except NotFound:
            if (store.tenant_dir(tenant) / "spec.json").exists():
                found.append(Checked(str(tenant), "it has no audit log"))
        except IntegrityError as error:
            found.append(Checked(str(tenant), error.brief))
    return tuple(found)


def _revisions(store: Store, used: set[RevisionId]) -> tuple[Checked, ...]:
    found = []
    for name in sorted(used):
        try:
            raw = read_bounded(store.revisions_dir / name / DOCUMENT, REVISION_BYTES)
            verify_artifacts(store, decode_revision(raw))
            found.append(Checked(name[:12], ""))
        except FileNotFoundError:
            found.append(Checked(name[:12], "it is not on this node"))
        except MvmError as error:
            found.append(Checked(name[:12], error.brief))
    return tuple(found)
