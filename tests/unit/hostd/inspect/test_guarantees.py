"""The judges over scenes made up here: one in which all is well, and one thing wrong at a time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.unit.hostd.inspect.test_doctor import FIT, ROOT, facts

from mvm.core.ids import InstanceId, SnapshotId, TenantId
from mvm.core.posture import GUARANTEES, Status, assess
from mvm.hostd.confine import CAPABILITIES, DRIVERS
from mvm.hostd.inspect.doctor import diagnose
from mvm.hostd.inspect.guarantees import HOST_JUDGES, MAGIC, SCENE_JUDGES, SEGMENT_MAGIC, examine
from mvm.hostd.inspect.host import PathFacts
from mvm.hostd.inspect.process import OpenFile, ProcessFacts
from mvm.hostd.inspect.scene import (
    Checked,
    DaemonFacts,
    FirewallFacts,
    Scene,
    SecretsFacts,
    SnapshotFacts,
    SnapshotFile,
    VmmFacts,
    VolumeFacts,
    differences,
)
from mvm.hostd.inspect.text import Mapping, ThreadStatus
from mvm.hostd.resources.network import ObservedLink
from mvm.hostd.resources.nftables import EMPTY as NO_RULES
from mvm.hostd.resources.nftables import ObservedChain, Ruleset
from mvm.hostd.sealing import layout
from mvm.linux.process import clean_environment

BASE = f"{ROOT}/tenants/acme/instances/default-0"
UID = 2_000_256
THREAD = ThreadStatus((UID,) * 4, (UID,) * 4, (), True, 2, 0)
FILES = (
    OpenFile(2, f"{BASE}/runtime/logs/vmm.log", True, True, True),
    OpenFile(5, "/memory", True, False, True),
    OpenFile(20, "/nix/store/rootfs.ext4", True, True, False),
    OpenFile(21, f"{BASE}/volumes/data.img", True, True, True),
    OpenFile(22, "/memfd:mvm-secrets (deleted)", True, False, False),
    OpenFile(30, "anon_inode:kvm-vm", False, False, True),
)
PROCESS = ProcessFacts(
    pid=77, threads=(THREAD, THREAD), argv=("qemu-system-x86_64", "-name", "acme-default-0"),
    environ=tuple(f"{k}={v}" for k, v in clean_environment().items()), files=FILES, plain_maps=(), network_sockets=0,
    root="own", own_namespaces=("mnt", "net", "pid"), apart=False, cgroup="/mvm/acme-default-0",
    limits={"memory.max": "1000", "pids.max": "64", "cpu.max": "100000 100000"}, core_limit="0 0",
)  # fmt: skip
VMM = VmmFacts(
    "acme/default-0", UID, BASE, f"{BASE}/volumes/data.img", ("/nix/store/vmlinux",), "mvm-b1", "mvm-t1-0",
    PathFacts(f"{BASE}/runtime", "directory", 0, 0o700), PROCESS,
)  # fmt: skip
VOLUME = VolumeFacts("acme/default-0", f"{BASE}/volumes/data.img", True, True, (77,))
OPENED = msgspec.structs.replace(VOLUME, holders=(), device="/dev/dm-0", device_holders=(77,))


def sealed(name: str, head: bytes) -> SnapshotFile:
    return SnapshotFile(name, PathFacts(f"{BASE}/snapshots/latest/{name}", "file", 0, 0o600), head)


SNAPSHOT = SnapshotFacts(
    "acme/default-0", "latest", PathFacts(f"{BASE}/snapshots/latest", "directory", 0, 0o700),
    (*(sealed(name, head) for name, head in MAGIC.items()), sealed(f"segment-{'a' * 32}", SEGMENT_MAGIC)),
    ("acme/default-0", "b" * 32, "c" * 64), ("b" * 32, "c" * 64), False,
)  # fmt: skip
LINKS = {
    "mvm-b1": ObservedLink("mvm-b1", "bridge", "", True, 1500, addresses=("10.240.1.1/24",)),
    "mvm-t1-0": ObservedLink("mvm-t1-0", "tun", "", True, 1500, master="mvm-b1", isolated=True),
}
GIVEN = tuple(sorted(CAPABILITIES))
DAEMON = DaemonFacts(
    5,
    {**dict.fromkeys(("permitted", "effective", "bounding"), GIVEN), "inheritable": (), "ambient": ()},
    True,
    True,
    0,
)
WELL = Scene(
    vmms=(VMM,), volumes=(VOLUME,), hidden_processes=(), snapshots=(SNAPSHOT,),
    snapshot_parents=(PathFacts(f"{BASE}/snapshots", "directory", 0, 0o700),),
    secrets=(SecretsFacts(f"{ROOT}/tenants/acme/secrets.sealed", True),), provider="vault", provider_warning="",
    development_keys=0, links=LINKS, ipv6_off={"mvm-b1": True, "mvm-t1-0": True}, ipv6=True,
    audits=(Checked("acme", ""),), revisions=(Checked("abc", ""),), kvm_gid=106,
    firewall=FirewallFacts(()), daemons=(DAEMON,), unreadable=(),
)  # fmt: skip
EMPTY = msgspec.structs.replace(
    WELL, vmms=(), volumes=(), snapshots=(), snapshot_parents=(), secrets=(), links={}, ipv6_off={}, audits=(),
    revisions=(),
)  # fmt: skip


# The same on Firecracker: it names its files as its jail does, and its keeper holds its disk's device.
FIRECRACKER = msgspec.structs.replace(
    VMM, driver="firecracker", keeper=76, data_device="253:0", process=msgspec.structs.replace(
        PROCESS, argv=("/firecracker", "--id", "acme--default-0"), files=(
            OpenFile(5, "/memory", True, False, True),
            OpenFile(8, "/rootfs", True, True, False),
            OpenFile(9, "/data (deleted)", False, True, True, "253:0"),
            OpenFile(10, "/secrets", True, False, False),
            OpenFile(30, "anon_inode:kvm-vm", False, False, True),
        ),
    ),
)  # fmt: skip
ITS_DISK = msgspec.structs.replace(VOLUME, holders=(), device="/dev/dm-0", device_holders=(76, 77))
ITS_DAEMON = msgspec.structs.replace(
    DAEMON,
    capabilities={
        **DAEMON.capabilities,
        **dict.fromkeys(
            ("permitted", "effective", "bounding"),
            tuple(sorted({*CAPABILITIES, *DRIVERS["firecracker"]})),
        ),
    },
    drivers=("firecracker", "qemu"),
)


def link(name: str, **changes: Any) -> Scene:
    return msgspec.structs.replace(
        WELL, links={**LINKS, name: msgspec.structs.replace(LINKS[name], **changes)}
    )


def vmm(**changes: Any) -> Scene:
    return msgspec.structs.replace(WELL, vmms=(msgspec.structs.replace(VMM, **changes),))


def process(**changes: Any) -> Scene:
    return vmm(process=msgspec.structs.replace(PROCESS, **changes))


def thread(**changes: Any) -> Scene:
    """The second thread is another than the first."""
    return process(threads=(THREAD, msgspec.structs.replace(THREAD, **changes)))


def scene(**changes: Any) -> Scene:
    return msgspec.structs.replace(WELL, **changes)


def daemon(**changes: Any) -> Scene:
    return scene(daemons=(msgspec.structs.replace(DAEMON, **changes),))


def snapshot(**changes: Any) -> Scene:
    return scene(snapshots=(msgspec.structs.replace(SNAPSHOT, **changes),))


@pytest.mark.req("O6")
def test_every_guarantee_that_is_there_has_a_judge_and_no_judge_is_left_over() -> None:
    judged = SCENE_JUDGES.keys() | HOST_JUDGES.keys()
    assert {g.id for g in GUARANTEES if g.there} <= judged <= {g.id for g in GUARANTEES}
    assert not SCENE_JUDGES.keys() & HOST_JUDGES.keys()
    for guarantee in GUARANTEES:
        assert guarantee.check.startswith("Not looked at") == (guarantee.id not in judged), guarantee.id


@pytest.mark.req("O6")
@pytest.mark.parametrize("name", SCENE_JUDGES)
def test_all_is_well(name: str) -> None:
    verdict = SCENE_JUDGES[name](WELL)
    assert verdict.held is True, verdict.seen
    assert verdict.count


@pytest.mark.req("K1")
def test_a_disk_that_the_kernel_opened_for_its_vmm_is_in_order() -> None:
    device = OpenFile(21, "/dev/dm-0", False, True, True, "253:0")
    process = msgspec.structs.replace(PROCESS, files=(*(f for f in FILES if f.fd != 21), device))
    vmm = msgspec.structs.replace(VMM, process=process, data_device="253:0")
    opened = scene(vmms=(vmm,), volumes=(OPENED,))
    for name in ("memory-in-ram", "volume-locked"):
        assert (SCENE_JUDGES[name](opened).held, SCENE_JUDGES[name](opened).count) == (True, 1)


@pytest.mark.req("O6")
@pytest.mark.req("O6", "H3", "K1", "K3")
def test_all_holds_on_a_node_with_firecracker_too() -> None:
    found = scene(vmms=(FIRECRACKER,), volumes=(ITS_DISK,), daemons=(ITS_DAEMON,))
    for name, judge in SCENE_JUDGES.items():
        verdict = judge(found)
        assert verdict.held is True, (name, verdict)


@pytest.mark.req("O6", "H3", "K1", "K3")
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        # What is right for Firecracker is not for QEMU, and the other way round.
        ("bounded-capabilities", scene(daemons=(msgspec.structs.replace(ITS_DAEMON, drivers=("qemu",)),))),
        ("bounded-capabilities", daemon(drivers=("firecracker", "qemu"))),
        ("volume-locked", scene(volumes=(ITS_DISK,), vmms=(msgspec.structs.replace(VMM, keeper=76),))),
        (
            "volume-locked",
            scene(volumes=(ITS_DISK,), vmms=(msgspec.structs.replace(FIRECRACKER, keeper=75),)),
        ),
        ("secrets-sealed", vmm(driver="firecracker")),
        ("secrets-sealed", scene(vmms=(msgspec.structs.replace(FIRECRACKER, driver="qemu"),))),
    ],
)
def test_what_is_right_depends_on_the_driver(name: str, changed: Scene) -> None:
    assert SCENE_JUDGES[name](changed).held is False


@pytest.mark.parametrize(
    "name", [name for name in SCENE_JUDGES if name not in ("key-provider", "bounded-capabilities")]
)
def test_nothing_to_look_at_is_not_held(name: str) -> None:
    verdict = SCENE_JUDGES[name](EMPTY)
    assert (verdict.held, verdict.count) == (True, 0)


LEAK = OpenFile(9, "/var/tmp/memory.raw", True, True, True)
WRONG: list[tuple[str, Scene]] = [
    ("memory-sealed", snapshot(files=(sealed("memory.raw", b"MVMSEALM"),))),
    ("memory-sealed", snapshot(files=(sealed("manifest", b"\0" * 8),))),
    ("memory-sealed", snapshot(files=(sealed("segment-xyz", SEGMENT_MAGIC),))),
    ("memory-sealed", snapshot(name=".new-" + "a" * 32)),
    ("memory-sealed", snapshot(name="copy", pending=True)),
    ("memory-in-ram", process(files=(*FILES, LEAK))),
    ("memory-in-ram", process(files=(*FILES, OpenFile(21, "/dev/dm-0", False, True, True, "253:0")))),
    ("memory-in-ram", process(plain_maps=(Mapping("/srv/x", "8:1", 5, 4096, True),))),
    ("memory-in-ram", process(plain_maps=(Mapping("/srv/x", "8:1", 5, 256 << 20, False),))),
    ("memory-in-ram", process(core_limit="unlimited unlimited")),
    ("memory-in-ram", process(core_limit="")),
    ("snapshot-bound", snapshot(claims=("globex/default-0", "b" * 32, "c" * 64))),
    ("snapshot-bound", snapshot(claims=("acme/default-0", "d" * 32, "c" * 64))),
    ("snapshot-bound", snapshot(claims=("acme/default-0", "b" * 32, "d" * 64))),
    ("snapshot-bound", snapshot(claims=None, problem="it is truncated")),
    ("snapshot-bound", snapshot(recorded=None)),
    ("snapshot-private", snapshot(folder=PathFacts("x", "directory", 0, 0o755))),
    ("snapshot-private", scene(snapshot_parents=(PathFacts("x", "directory", 1, 0o700),))),
    ("snapshot-private", snapshot(files=(SnapshotFile("key", PathFacts("k", "file", 0, 0o640), b""),))),
    ("volume-encrypted", scene(volumes=(msgspec.structs.replace(VOLUME, luks=False),))),
    ("volume-locked", scene(volumes=(msgspec.structs.replace(VOLUME, holders=(77, 78)),))),
    ("volume-locked", scene(vmms=())),
    ("volume-locked", scene(volumes=(msgspec.structs.replace(OPENED, device_holders=(77, 78)),))),
    ("volume-locked", scene(volumes=(msgspec.structs.replace(OPENED, device_holders=()),), vmms=())),
    ("keys-wrapped", scene(volumes=(msgspec.structs.replace(VOLUME, key=False),))),
    ("keys-wrapped", snapshot(files=())),
    ("keys-wrapped", scene(secrets=(SecretsFacts("s", False),))),
    ("key-provider", scene(provider_warning="development key provider")),
    ("key-provider", scene(development_keys=1)),
    ("no-key-in-sight", process(environ=(*PROCESS.environ, "MVM_KEY=0123"))),
    ("no-key-in-sight", process(environ=("PATH=/tmp",))),
    ("no-key-in-sight", process(argv=("qemu", "secret,data=" + "0f" * 32))),
    ("no-key-in-sight", process(argv=())),
    ("secrets-sealed", scene(secrets=(SecretsFacts("s", False),))),
    ("secrets-sealed", process(files=FILES[:4])),
    ("hardware-virtualisation", process(files=FILES[:5])),
    ("vmm-uid", thread(uids=(UID, 0, UID, UID))),
    ("vmm-uid", thread(gids=(0,) * 4)),
    ("vmm-uid", thread(groups=(27,))),
    ("vmm-uid", scene(vmms=(VMM, VMM))),
    ("vmm-no-capabilities", thread(capabilities=1 << 21)),
    ("vmm-no-capabilities", process(threads=())),
    ("vmm-no-new-privs", thread(no_new_privs=False)),
    ("vmm-seccomp", thread(seccomp=0)),
    ("vmm-seccomp", thread(seccomp=1)),
    ("vmm-jail", process(own_namespaces=("net", "pid"), root="/")),
    ("vmm-jail", process(root="/")),
    ("vmm-jail", process(own_namespaces=("mnt", "net"))),
    ("vmm-jail", process(own_namespaces=("mnt", "pid"))),
    ("vmm-limits", process(limits={})),
    ("vmm-limits", process(limits={**PROCESS.limits, "memory.max": "max"})),
    ("vmm-limits", process(limits={**PROCESS.limits, "cpu.max": "max 100000"})),
    ("vmm-limits", process(cgroup="/")),
    ("artifacts-unchanged", scene(revisions=(Checked("abc", "the kernel is not what was built"),))),
    ("network-separate", scene(links={})),
    ("network-separate", link("mvm-t1-0", isolated=False)),
    ("network-separate", link("mvm-t1-0", master="br0")),
    ("network-separate", scene(vmms=(VMM, msgspec.structs.replace(VMM, instance="globex/default-0")))),
    ("ipv6-closed", scene(ipv6_off={"mvm-b1": True, "mvm-t1-0": False})),
    ("ipv6-closed", link("mvm-b1", addresses=("fe80::1/64",))),
    ("no-network-control", process(network_sockets=1)),
    ("no-network-control", vmm(runtime=PathFacts("r", "directory", 0, 0o755))),
    ("no-network-control", vmm(runtime=None)),
    ("firewall", scene(firewall=FirewallFacts(("chain inet forward",)))),
    ("bounded-capabilities", scene(daemons=())),
    ("bounded-capabilities", daemon(no_new_privs=False)),
    ("bounded-capabilities", daemon(seccomp=False)),
    ("bounded-capabilities", daemon(network_sockets=1)),
    ("bounded-capabilities", daemon(capabilities={**DAEMON.capabilities, "bounding": (*GIVEN, "SYS_MODULE")})),
    ("bounded-capabilities", daemon(capabilities={**DAEMON.capabilities, "ambient": GIVEN})),
    ("bounded-capabilities", daemon(capabilities={})),
    ("audit-chain", scene(audits=(Checked("acme", "line 3 was edited"),))),
]  # fmt: skip


@pytest.mark.req("O6")
@pytest.mark.parametrize(("name", "spoilt"), WRONG)
def test_what_is_wrong_is_noticed_and_said(name: str, spoilt: Scene) -> None:
    verdict = SCENE_JUDGES[name](spoilt)
    assert verdict.held is False
    assert verdict.seen


@pytest.mark.req("O6")
def test_every_judge_can_say_no() -> None:
    assert {name for name, _ in WRONG} == SCENE_JUDGES.keys()


@pytest.mark.req("O6", "K2")
def test_what_could_be_a_key_is_not_printed() -> None:
    for spoilt in (process(environ=("MVM_KEY=" + "0f" * 32,)), process(argv=("-x", "0f" * 32))):
        assert "0f0f" not in SCENE_JUDGES["no-key-in-sight"](spoilt).seen


UNSEEN: list[tuple[str, Scene]] = [
    ("vmm-seccomp", scene(unreadable=("acme/default-0: damaged",))),
    ("volume-locked", scene(hidden_processes=(1,))),
    ("network-separate", process(apart=True)),
    ("ipv6-closed", process(apart=True)),
    ("firewall", process(apart=True)),
    ("firewall", scene(firewall=FirewallFacts((), "nft is not installed"))),
]


@pytest.mark.req("O6")
@pytest.mark.parametrize(("name", "dark"), UNSEEN)
def test_what_cannot_be_seen_is_unknown(name: str, dark: Scene) -> None:
    assert SCENE_JUDGES[name](dark).held is None


@pytest.mark.req("O6")
def test_a_sleep_under_way_is_not_a_fault() -> None:
    under_way = snapshot(name=".new-" + "a" * 32, pending=True, files=(), claims=None)
    for name in ("memory-sealed", "snapshot-bound", "keys-wrapped"):
        assert SCENE_JUDGES[name](under_way).held is True


@pytest.mark.req("O6")
def test_the_first_bytes_are_those_that_are_written() -> None:
    identity = layout.SnapshotIdentity(
        InstanceId(TenantId("acme"), "default", 0), SnapshotId("a" * 32), b"x=y\n"
    )
    assert layout.render_manifest_header(identity, 1)[:8] == MAGIC["manifest"]
    assert layout.render_key_file(b"k")[:8] == MAGIC["key"]
    assert layout.render_segment_header(identity.instance, identity.snapshot)[:8] == SEGMENT_MAGIC
    assert (MAGIC["state"], MAGIC["working-set"]) == (layout.STATE_MAGIC, layout.WORKING_SET_MAGIC)
    assert layout.segment_name(identity.snapshot).startswith("segment-")


@pytest.mark.req("O6")
def test_without_root_nothing_of_the_node_is_claimed() -> None:
    for finding in examine(ROOT, FIT, diagnose(facts()), None):
        if finding.guarantee.id in SCENE_JUDGES and finding.guarantee.there:
            assert finding.status is Status.UNKNOWN


@pytest.mark.req("O6")
def test_on_a_perfect_host_only_what_is_not_there_is_missing() -> None:
    findings = examine(ROOT, FIT, diagnose(facts()), WELL)
    assert [f.guarantee.id for f in findings] == [g.id for g in GUARANTEES]
    for finding in findings:
        assert finding.status is (Status.HELD if finding.guarantee.there else Status.NOT_THERE)
    reached = assess(findings)
    assert (
        set(reached.missing) == {g.id for g in GUARANTEES if not g.there and g.mode == "baseline"}
        or not reached.missing
    )


@pytest.mark.req("O6")
@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        ("no-plain-swap", {"swaps": None}, Status.UNKNOWN),
        ("host-side-channels", {"smt": "on"}, Status.NOT_HELD),
        ("host-side-channels", {"smt": None}, Status.UNKNOWN),
        ("state-private", {"state": (PathFacts(ROOT, "directory", 0, 0o755),)}, Status.NOT_HELD),
        ("state-private", {"state": ()}, Status.NOTHING),
        ("state-private", {"state": (), "root": False}, Status.UNKNOWN),
    ],
)
def test_guarantees_of_the_host(name: str, changes: dict[str, Any], status: Status) -> None:
    host = msgspec.structs.replace(FIT, **changes)
    findings = {f.guarantee.id: f.status for f in examine(ROOT, host, diagnose(facts(host)), WELL)}
    assert findings[name] is status


@pytest.mark.req("O6", "N3")
def test_each_part_of_the_rules_that_differs_is_named() -> None:
    chain = ObservedChain("filter forward 0 drop", ("a rule",))
    wanted = Ruleset(frozenset({"inet"}), {("inet", "forward"): chain}, {})
    assert differences(wanted, wanted) == []
    assert differences(wanted, NO_RULES) == ["table inet", "chain inet forward"]
    changed = Ruleset(frozenset({"inet"}), {("inet", "forward"): chain._replace(rules=())}, {}, ("{}",))
    assert differences(wanted, changed) == ["chain inet forward", "objects that are not mvm's"]
