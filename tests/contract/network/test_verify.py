"""`net verify` on a node with records, real bridges, taps and rules: silent where all is well, and exact where not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.support.network_lab import Lab, Port, ip, network_lab, take_tap

from mvm.core.errors import GuestError
from mvm.core.ids import InstanceId, PoolId, RevisionId, TenantId
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan, plan_instance
from mvm.core.record import ProcessIdentity, VmmIdentity, new_record
from mvm.core.spec import EgressRule, PoolSpec, changed, new_tenant
from mvm.hostd import net_policy, net_verify
from mvm.hostd.net_verify import Instance, active
from mvm.hostd.resources import forwarding, network, nftables, private_tap
from mvm.hostd.store import Store
from mvm.linux import process

pytestmark = [pytest.mark.root, pytest.mark.req("N3")]
_PROCESS = ProcessIdentity(pid=1, start_ticks=1, boot_id="00000000-0000-0000-0000-000000000000")
_REVISION = RevisionId("0" * 64)


class Node:
    """Tenants with records that say `running`, and taps whose other ends are here."""

    def __init__(self, lab: Lab, root: Path) -> None:
        self.lab = lab
        self.store = Store(root)
        self.store.open()
        self.ports: dict[InstanceId, Port] = {}
        self.sent: list[InstanceId] = []
        self.driver = "qemu"

    def tenant(self, index: int, name: str, count: int = 1, **fields: object) -> list[InstancePlan]:
        pools = (PoolSpec(id=PoolId("default"), count=count),)
        spec = new_tenant(TenantId(name), "nix/embedded", pools=pools, **fields)
        self.store.save_spec(spec)
        plans = [plan_instance(spec, PoolId("default"), n, _REVISION, index, n) for n in range(count)]
        for plan in plans:
            record = new_record(plan.instance, plan.network, now_ns=1)
            vmm = VmmIdentity(driver=self.driver, version="1")
            record = msgspec.structs.replace(record, state=State.RUNNING, process=_PROCESS, vmm=vmm)
            self.store.save_record(record)
            self.start(plan)
        return plans

    def start(self, plan: InstancePlan) -> None:
        net = plan.network
        network.ensure_bridge(network.BridgeSpec(net.bridge, net.gateway, net.prefix))
        net_policy.ensure(self.store, plan)
        port = Port(net.index, net.slot, -1)
        port.mac = net.mac
        if self.driver == "firecracker":
            namespace = private_tap.open_private_tap(net.tap, 0, net.bridge)
            self.lab.own(namespace)
            port.fd = take_tap(namespace, net.tap)
        else:
            port.fd = network.open_tap(net.tap, 0, net.bridge)
        self.lab.own(port.fd)
        assert any(port.greet() for _ in range(12))
        self.ports[plan.instance] = port

    def send(self, instance: Instance, frames: list[bytes]) -> None:
        self.sent.append(instance.id)
        for frame in frames:
            self.ports[instance.id].send(frame)

    def findings(self) -> list[tuple[str, str]]:
        return [(d.where, d.what) for d in net_verify.verify(self.store)[1]]

    def probe(self) -> list[active.Result]:
        expected, _ = net_verify.verify(self.store)
        links = network.inspect().values()
        return active.run(expected, links, self.send, uplink=forwarding.has_default_route())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with network_lab() as lab:
        made = Node(lab, tmp_path / "root")
        made.tenant(1, "acme", 2)
        made.tenant(2, "globex", egress=(EgressRule.parse("203.0.113.0/24:443"),), metadata=True)
        yield made


def nft(*arguments: str) -> None:
    process.run(["nft", *arguments], timeout=10)


def test_nothing_to_say_where_all_is_well(node: Node) -> None:
    assert node.findings() == []


def _delete_rule(family: str, chain: str, text: str) -> None:
    listed = process.run(["nft", "-a", "list", "chain", family, "mvm", chain], timeout=10).stdout.decode()
    handle = next(line for line in listed.splitlines() if text in line).rpartition("handle ")[2]
    nft("delete", "rule", family, "mvm", chain, "handle", handle)


@pytest.mark.req("N2")
@pytest.mark.parametrize(
    ("family", "chain", "text", "named"),
    [
        ("inet", "from_guest", 'oifname "mvm-b*" drop', "a rule is missing: oifname mvm-b* drop"),
        ("bridge", "from_tap", "drop", "a rule is missing: drop"),
        ("inet", "forward", "@uplinks", "a rule is missing: iifname @uplinks drop"),
        ("inet", "input", "to_host", "a rule is missing: iifname mvm-b* goto to_host"),
    ],
)
def test_a_rule_deleted_by_hand_is_named(node: Node, family: str, chain: str, text: str, named: str) -> None:
    _delete_rule(family, chain, text)
    assert node.findings() == [(f"chain {family} mvm {chain}", named)]


@pytest.mark.req("N1", "N2")
@pytest.mark.parametrize(
    ("command", "where", "named"),
    [
        (
            "bridge link set dev mvm-t1s0 isolated off",
            "mvm-t1s0",
            "not isolated from the other instances of acme",
        ),
        ("ip link set mvm-t1s0 nomaster", "mvm-t1s0", "no port of any bridge, not of mvm-b1"),
        ("ip link set mvm-t1s0 master mvm-b2", "mvm-t1s0", "a port of mvm-b2, not of mvm-b1"),
        ("ip link set mvm-t1s1 down", "mvm-t1s1", "it is down"),
        ("ip address add 10.9.9.9/24 dev mvm-t1s1", "mvm-t1s1", "the host has the address 10.9.9.9/24"),
        ("ip address delete 10.240.1.1/24 dev mvm-b1", "mvm-b1", "gateway address 10.240.1.1/24 is missing"),
        ("ip address add 10.9.9.9/24 dev mvm-b2", "mvm-b2", "has the address 10.9.9.9/24"),
        (
            "ip link set mvm-b2 address 02:00:00:00:00:01",
            "mvm-b2",
            "sleeping guests know it as 0a:6d:0a:f0:02:01",
        ),
        ("ip link add mvm-b77 type bridge", "mvm-b77", "no running instance has it"),
        (
            "ip link set up0 master mvm-b1",
            "up0",
            "a port of mvm-b1, the bridge of acme, and no instance's tap",
        ),
        ("sysctl -qw net.ipv6.conf.mvm-b1.disable_ipv6=0", "mvm-b1", "IPv6 is on"),
        ("sysctl -qw net.ipv4.conf.mvm-b1.rp_filter=0", "net.ipv4.conf.mvm-b1.rp_filter", "it is 0, not 1"),
        ("sysctl -qw net.ipv4.conf.up0.forwarding=0", "net.ipv4.conf.up0.forwarding", "it is 0, not 1"),
        ("nft add rule inet mvm to_host accept", "chain inet mvm to_host", "mvm did not make: accept"),
        ("nft insert rule inet mvm forward accept", "chain inet mvm forward", "mvm did not make: accept"),
        ("nft add chain inet mvm extra", "chain inet mvm extra", "mvm makes no such chain"),
        ("nft delete table bridge mvm", "table bridge mvm", "missing, and with it every rule"),
        ("nft flush set bridge mvm sources", "set bridge mvm sources", "acme/default-0 may send as"),
        (
            "nft add element inet mvm open { mvm-b2 }",
            "set inet mvm open",
            "globex may reach anything outside",
        ),
        (
            "nft add element inet mvm allow_nets { mvm-b2 . 192.0.2.0/24 }",
            "set inet mvm allow_nets",
            "globex may reach",
        ),
        ("nft flush map inet mvm resolvers", "set inet mvm resolvers", "questions of acme for names go to"),
        ("nft add counter inet mvm c", "table mvm", "holds something mvm never makes"),
    ],
)
def test_a_change_by_hand_is_named(node: Node, command: str, where: str, named: str) -> None:
    process.run(command.split(), timeout=10)
    found = node.findings()
    assert any(at == where and named in what for at, what in found), found


def test_a_tap_that_is_gone_and_a_record_that_is_damaged_are_named(node: Node) -> None:
    gone, damaged = (InstanceId(TenantId("acme"), PoolId("default"), n) for n in (0, 1))
    os.close(node.lab.disown(node.ports[gone].fd))
    node.store.instance_paths(damaged).state.write_bytes(b"{")
    found = node.findings()
    assert ("mvm-t1s0", f"the tap of {gone} is missing, and its guest has no network") in found
    assert any(where == str(damaged) and "cannot be read" in what for where, what in found)


@pytest.mark.req("N2")
def test_the_next_start_or_wake_repairs_the_rules(node: Node) -> None:
    plan = plan_instance(node.store.load_spec(TenantId("globex")), PoolId("default"), 0, _REVISION, 2, 0)
    assert not net_policy.ensure(node.store, plan), "nothing to do"
    nft("add", "element", "inet", "mvm", "open", "{ mvm-b2 }")
    assert net_policy.ensure(node.store, plan)
    assert node.findings() == []
    assert not net_policy.ensure(node.store, plan)


@pytest.mark.req("N2")
def test_rules_follow_specification_and_records(node: Node) -> None:
    globex = TenantId("globex")
    spec = changed(node.store.load_spec(globex), egress=(), metadata=False)
    node.store.save_spec(spec)
    assert node.findings(), "the live rules are those of the old one"
    assert net_policy.ensure(node.store, plan_instance(spec, PoolId("default"), 0, _REVISION, 2, 0))
    assert node.findings() == []
    for instance, port in list(node.ports.items()):
        os.close(node.lab.disown(port.fd))
        assert network.remove_bridge_if_unused(f"mvm-b{port.index}") or port.tap == "mvm-t1s0"
        node.store.instance_paths(instance).state.unlink()
        assert net_policy.refresh(node.store)
        assert node.findings() == []
    assert nftables.read() == nftables.EMPTY
    assert forwarding.setting("up0", "forwarding") == "0", "what was switched on for guests is off again"
    assert not (node.store.root / net_policy.DOCUMENT).exists()


@pytest.mark.req("N2")
def test_rules_survive_in_memory_of_what_was_applied_only_as_a_shortcut(node: Node) -> None:
    plan = plan_instance(node.store.load_spec(TenantId("globex")), PoolId("default"), 0, _REVISION, 2, 0)
    (node.store.root / net_policy.DOCUMENT).write_bytes(b"damaged")
    assert net_policy.ensure(node.store, plan)
    assert node.findings() == []


@pytest.mark.req("N2")
def test_probes_all_pass_on_a_sound_node(node: Node) -> None:
    results = node.probe()
    assert [r for r in results if not r.ok] == []
    assert {r.instance for r in results} == {"acme/default-0", "acme/default-1", "globex/default-0"}
    assert {r.seen for r in results} == {"answered", "dropped", "left"}
    assert any("globex/default-0" in r.probe for r in results), "another tenant was tried"


@pytest.mark.req("N2")
@pytest.mark.parametrize(
    ("commands", "failing"),
    [
        (["nft flush chain bridge mvm prerouting"], "send as the gateway's address"),
        (["nft flush chain bridge mvm prerouting"], "send IPv6"),
        (["nft flush chain inet mvm forward"], "globex/default-0"),
        (["nft flush chain inet mvm forward"], "which its allow-list does not have"),
        (["nft flush chain inet mvm input"], "ping this host's address"),
        (
            # Where br_netfilter is on, bridged packets pass the inet rules as well: a third layer.
            ["nft flush chain inet mvm forward", "nft flush chain bridge mvm forward",
             "bridge link set dev mvm-t1s0 isolated off",
             "bridge link set dev mvm-t1s1 isolated off"],
            "by its MAC",
        ),
        (["nft insert rule inet mvm input drop"], "ping its gateway"),
        (["sysctl -qw net.ipv4.conf.mvm-b1.forwarding=0"], "outside"),
    ],
)  # fmt: skip
def test_a_hole_is_found_by_packets_alone(node: Node, commands: list[str], failing: str) -> None:
    for command in commands:
        process.run(command.split(), timeout=10)
    failed = [r for r in node.probe() if not r.ok]
    assert any(failing in r.probe for r in failed), failed


def test_a_host_without_a_route_lets_nothing_through_by_saying_so(node: Node) -> None:
    """Its kernel answers that a network is unreachable, and quotes the packet, before any rule is asked."""
    ip("route", "del", "default")
    results = node.probe()
    assert any("fleet" in r.probe for r in results)
    assert [r for r in results if not r.ok] == []


def test_a_quoted_packet_excuses_nothing_but_the_word_back_to_who_sent_it(node: Node) -> None:
    expected, _ = net_verify.verify(node.store)
    sender, other, *_ = (i for i in expected.instances if i.has_tap)
    (probe, *_) = [
        p
        for p in active.probes_of(expected, sender, [], host=None, uplink=False)
        if p.expect == active.BARRED
    ]
    sent = active.Sighting(probe.token, sender.network.tap, False)
    for tap, quoted, ok in (
        (sender.network.tap, True, True),
        (sender.network.tap, False, False),
        (other.network.tap, True, False),
        ("eth0", True, False),
    ):
        answer = active.Sighting(probe.token, tap, True, quoted)
        assert active.judge(sender, probe, [sent, answer]).ok is ok


def test_a_guest_that_does_not_send_is_no_proof(node: Node) -> None:
    def refuse(instance: Instance, frames: list[bytes]) -> None:
        raise GuestError("the guest does not answer")

    expected, _ = net_verify.verify(node.store)
    for send in (refuse, lambda instance, frames: None):
        results = active.run(expected, network.inspect().values(), send, uplink=False)
        assert results
        assert not any(r.ok for r in results)


def test_an_unknown_link_of_ours_is_reported(node: Node) -> None:
    ip("link", "add", "mvm-t9s9", "type", "veth", "peer", "name", "odd0")
    assert {where for where, _ in node.findings()} == {"mvm-t9s9"}


@pytest.mark.req("N1", "H4")
def test_the_kind_of_a_port_is_what_its_vmm_needs(node: Node) -> None:
    node.driver = "firecracker"
    (plan,) = node.tenant(3, "initech")
    assert node.findings() == []
    results = node.probe()
    assert [r for r in results if not r.ok] == []
    assert any(r.instance == str(plan.instance) and r.seen == "answered" for r in results)
    store = node.store
    for instance, driver, words in (
        (plan.instance, "qemu", "it is not a tap but veth"),
        (
            InstanceId(TenantId("acme"), PoolId("default"), 0),
            "firecracker",
            "a tap of the host's own namespace",
        ),
    ):
        before = store.load_record(instance)
        other = msgspec.structs.replace(before, vmm=VmmIdentity(driver=driver, version="1"))
        store.save_record(other)
        ((where, what),) = node.findings()
        assert where == before.network.tap
        assert words in what
        store.save_record(before)
    ip("link", "set", plan.network.tap, "nomaster")
    assert ("mvm-t3s0", "it is no port of any bridge, not of mvm-b3") in node.findings()
